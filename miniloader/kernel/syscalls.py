"""The system calls miniloader makes, each declared once.

Every function here either succeeds or raises :class:`OSError` with the errno the kernel gave, so no
caller ever looks at a return code.  They go through one table, :data:`_LIBC`, which is the seam where
tests inject failures (see :func:`injected`).  Addresses and lengths are bytes; sources are the man
pages of section 2.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = [
    "MADV_DONTNEED",
    "MADV_RANDOM",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MS_SYNC",
    "PAGE_SIZE",
    "PROT_BTI",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "PR_GET_PDEATHSIG",
    "PR_SET_DUMPABLE",
    "PR_SET_PDEATHSIG",
    "compare_memory",
    "injected",
    "ioctl",
    "madvise",
    "mincore",
    "mmap",
    "mprotect",
    "msync",
    "munmap",
    "open_events",
    "open_process",
    "prctl",
    "take_descriptor",
    "userfaultfd",
]

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_BTI: Final = 0x10  # aarch64 only

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_FIXED_NOREPLACE: Final = 0x100000

MADV_RANDOM: Final = 1
MADV_DONTNEED: Final = 4

MS_SYNC: Final = 4

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_SET_DUMPABLE: Final = 4

_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_int, _long, _ulong = ctypes.c_int, ctypes.c_long, ctypes.c_ulong
_size, _address = ctypes.c_size_t, ctypes.c_void_p

_libc = ctypes.CDLL(None, use_errno=True)

_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "mmap": (_address, (_address, _size, _int, _int, _int, ctypes.c_int64)),
    "munmap": (_int, (_address, _size)),
    "mprotect": (_int, (_address, _size, _int)),
    "madvise": (_int, (_address, _size, _int)),
    "mincore": (_int, (_address, _size, _address)),
    "msync": (_int, (_address, _size, _int)),
    "prctl": (_int, (_int, _ulong, _ulong, _ulong, _ulong)),
    "ioctl": (_int, (_int, _ulong, _address)),
    "syscall": (_long, (_long, _long)),
}


def _declare(name: str) -> Callable[..., Any]:
    restype, argtypes = _SIGNATURES[name]
    function = getattr(_libc, name)
    function.restype, function.argtypes = restype, argtypes
    return function  # type: ignore[no-any-return]  # ctypes has no type for a declared function


# glibc has no wrapper for it; numbers from arch/*/…/syscall*.tbl, by the machine name of uname(2).
_USERFAULTFD: Final = {
    "x86_64": 323,
    "aarch64": 282,
    "riscv64": 282,
    "loongarch64": 282,
    "ppc64le": 364,
    "ppc64": 364,
    "s390x": 355,
}

_PERF_EVENT_OPEN: Final = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "ppc64le": 319,
    "ppc64": 319,
    "s390x": 331,
}

_PIDFD_OPEN: Final = 434  # on every machine
_PIDFD_GETFD: Final = 438

# Likewise, and by the same tables.
_KCMP: Final = {
    "x86_64": 312,
    "aarch64": 272,
    "riscv64": 272,
    "loongarch64": 272,
    "ppc64le": 354,
    "ppc64": 354,
    "s390x": 343,
}
_KCMP_VM: Final = 1
_CLOSED_ON_EXEC: Final = 8  # PERF_FLAG_FD_CLOEXEC

_LIBC: Final[dict[str, Callable[..., Any]]] = {name: _declare(name) for name in _SIGNATURES}


@contextmanager
def injected(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace system call ``name`` by ``function`` while the block runs (for tests only).

    ``function`` has the C signature; to fail it calls ``ctypes.set_errno`` and returns -1 (mmap: -1 too).
    """
    original = _LIBC[name]
    _LIBC[name] = function
    try:
        yield
    finally:
        _LIBC[name] = original


def _failed(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")


def mmap(address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): the address of the new mapping."""
    result = _LIBC["mmap"](address, length, protection, flags, fd, offset)
    if result == _MAP_FAILED or result == -1:
        raise _failed("mmap")
    return int(result or 0)


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    if _LIBC["munmap"](address, length) != 0:
        raise _failed("munmap")


def mprotect(address: int, length: int, protection: int) -> None:
    """mprotect(2)."""
    if _LIBC["mprotect"](address, length, protection) != 0:
        raise _failed("mprotect")


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if _LIBC["madvise"](address, length, advice) != 0:
        raise _failed("madvise")


def mincore(address: int, length: int) -> bytes:
    """mincore(2): a byte for each page, 1 where it is in the page cache (of a file that one may write)."""
    vector = ctypes.create_string_buffer(-(-length // PAGE_SIZE))
    if _LIBC["mincore"](address, length, ctypes.addressof(vector)) != 0:
        raise _failed("mincore")
    return bytes(byte & 1 for byte in vector.raw)


def msync(address: int, length: int, flags: int) -> None:
    """msync(2)."""
    if _LIBC["msync"](address, length, flags) != 0:
        raise _failed("msync")


def prctl(option: int, value: int) -> int:
    """prctl(2) with one argument."""
    result = int(_LIBC["prctl"](option, value, 0, 0, 0))
    if result < 0:
        raise _failed("prctl")
    return result


def ioctl(fd: int, request: int, argument: int) -> int:
    """ioctl(2) with the address of its argument; the (never negative) result."""
    result = int(_LIBC["ioctl"](fd, request, argument))
    if result < 0:
        raise _failed("ioctl")
    return result


def userfaultfd(flags: int) -> int:
    """userfaultfd(2): the new descriptor; ENOSYS where this machine's call number is not known."""
    number = _USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd: no call number known for {os.uname().machine}")
    result = int(_LIBC["syscall"](number, flags))
    if result < 0:
        raise _failed("userfaultfd")
    return result


def open_events(attributes: bytes, thread: int, cpu: int) -> int:
    """perf_event_open(2): a descriptor of the events of a thread on a processor, closed on exec.

    ``attributes`` is a ``struct perf_event_attr``.  ENOSYS where this machine's call number is not known.
    """
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"perf_event_open: no call number known for {os.uname().machine}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(
        _LIBC["syscall"](
            number, ctypes.addressof(buffer), _long(thread), _long(cpu), _long(-1), _long(_CLOSED_ON_EXEC)
        )
    )
    if result < 0:
        raise _failed("perf_event_open")
    return result


def open_process(pid: int) -> int:
    """pidfd_open(2): a descriptor of a process, readable once that has ended.

    Python has it only where it was built with headers that do, which those of musl may not.

    >>> os.close(open_process(os.getpid()))
    """
    result = int(_LIBC["syscall"](_PIDFD_OPEN, pid, _long(0)))
    if result < 0:
        raise _failed("pidfd_open")
    return result


def take_descriptor(pid: int, descriptor: int) -> int:
    """pidfd_getfd(2): a descriptor of our own for what ``descriptor`` of process ``pid`` refers to."""
    process = open_process(pid)
    try:
        result = int(_LIBC["syscall"](_PIDFD_GETFD, process, _long(descriptor), _long(0)))
        if result < 0:
            raise _failed("pidfd_getfd")
    finally:
        os.close(process)
    return result


def compare_memory(pid: int, relative: int) -> int:
    """kcmp(2), KCMP_VM: 0 where two processes have one address space, else 1 or 2 by the kernel's order.

    Raises OSError: ENOSYS where this kernel or machine has no such call, EPERM where one may not look at
    both.

    >>> compare_memory(os.getpid(), os.getpid())
    0
    """
    number = _KCMP.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"kcmp: no call number known for {os.uname().machine}")
    zero = _long(0)
    result = int(_LIBC["syscall"](number, pid, _long(relative), _long(_KCMP_VM), zero, zero))
    if result < 0:
        raise _failed("kcmp")
    return result
