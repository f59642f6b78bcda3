"""The one gate before machine code of ours: which processor this process is for, and beside which C library.

Loading takes code that was compiled for one processor, and lives beside glibc.  Whoever is about to run such
code asks here first; all else (``inspect``, ``tree``, ``disasm``, ``audit`` and more) asks nothing of it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from functools import lru_cache
from typing import Final

from miniloader.errors import UnsupportedError
from miniloader.forking import importing

__all__ = [
    "CHECKSUMS",
    "compiled_code",
    "damage",
    "glibc_version",
    "is_noexec",
    "lacks_for_loading",
    "lacks_own_code",
    "missing_of_glibc",
    "own_code",
    "processor",
    "require_loading",
]

#: The processors that libraries are loaded on, by the names of uname(2).
LOADS_ON: Final = ("x86_64", "aarch64")
_SHIPS_FOR: Final = ("x86_64", "aarch64")  # the compiled loops
#: What a process has where its C library is glibc, and loading makes use of.
_OF_GLIBC: Final = ("gnu_get_libc_version", "dlvsym", "dlinfo", "dl_iterate_phdr", "__tls_get_addr")
#: By the first 20 bytes of a program, its ELF header: class, byte order and machine.
_MACHINES: Final = {
    (2, 1, 62): "x86_64",
    (2, 1, 183): "aarch64",
    (2, 1, 243): "riscv64",
    (1, 1, 3): "i386",
    (1, 1, 40): "arm",
    (1, 1, 62): "x32",
}
CHECKSUMS: Final = "loops.sha256"
"""The file beside installed compiled code that says which is ours, in the format of sha256sum(1)."""
_EHDR: Final = struct.Struct("<40xQ10xHHxx")  # e_shoff, e_shentsize, e_shnum of 64 bits
_AGAIN: Final = "install miniloader again"
_STILL: Final = "what is not loaded can be looked at all the same: inspect, tree, check, disasm, audit"


@lru_cache(maxsize=1)
def processor() -> str:
    """What the code of this process is for, by its program's ELF header: ``x86_64``, ``aarch64``, …

    The kernel's own name for the machine would not do: an i386 Python runs on an x86-64 kernel as well.

    >>> processor() in os.uname().machine or processor() in ("i386", "arm", "x32")
    True
    """
    try:
        with open("/proc/self/exe", "rb") as file:
            head = file.read(20)
        order = "<" if head[5] == 1 else ">"
        key = head[4], head[5], *struct.unpack_from(f"{order}H", head, 18)
    except (OSError, IndexError, struct.error):  # no /proc
        return os.uname().machine if struct.calcsize("P") == 8 else f"32-bit {os.uname().machine}"
    return _MACHINES.get(key, os.uname().machine if head[4] == 2 else f"32-bit {os.uname().machine}")


@lru_cache(maxsize=1)
def missing_of_glibc() -> tuple[str, ...]:
    """What this process's C library lacks of what loading takes: nothing where it is glibc.

    >>> missing_of_glibc()
    ()
    """
    library = ctypes.CDLL(None)
    return tuple(name for name in _OF_GLIBC if not hasattr(library, name))


def glibc_version() -> tuple[int, ...]:
    """The version of this process's glibc, such as ``(2, 36)``; () for another C library.

    >>> glibc_version() > (2, 14)
    True
    """
    function = getattr(ctypes.CDLL(None), "gnu_get_libc_version", None)
    if function is None:
        return ()
    function.restype = ctypes.c_char_p
    return tuple(map(int, function().decode().split(".")[:2]))


def lacks_for_loading() -> str | None:
    """What is missing here for libraries to be loaded, as a phrase; None where nothing is."""
    if processor() not in LOADS_ON:
        return f"this process is {processor()} code, and libraries are loaded on {' and '.join(LOADS_ON)}"
    if missing := missing_of_glibc():
        return f"the C library of this process is not glibc: it has no {', '.join(missing)}"
    return _lacks_of_python()


def compiled_code() -> tuple[str, str | None, str]:
    """Where the compiled code for this process's processor is, its SHA-256, and whose it is, as a phrase.

    The SHA-256 is None where it is missing.

    >>> compiled_code()[1] is not None
    True
    """
    with importing:
        from hashlib import sha256  # which brings libcrypto into the process: for who asks

    path = own_code()
    try:
        with open(path, "rb") as file:
            checksum = sha256(file.read()).hexdigest()
    except OSError:
        return path, None, "missing"
    return path, checksum, _origin(path, checksum)


def _origin(path: str, checksum: str) -> str:
    """Whose the code at ``path`` is, by the list of checksums that was installed with it."""
    listed = os.path.join(os.path.dirname(path), CHECKSUMS)
    try:
        with open(listed, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return f"of a source tree: there is no list {listed}"
    if checksum not in [line.split(" ")[0] for line in lines]:
        return f"not ours: its SHA-256 is not the one in {listed}; {_AGAIN}"
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "as it ships")


def _lacks_of_python() -> str | None:
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    return "this Python runs without its global lock, which the loader's own code relies on"


def require_loading() -> None:
    """Raise :class:`UnsupportedError` where no library can be loaded: machine code of ours must not run."""
    lack = lacks_for_loading()
    if lack is not None:
        raise UnsupportedError(f"nothing can be loaded here: {lack}", hint=_hint())


def own_code() -> str:
    """The path of the compiled loops for this process's processor, whether they are there or not.

    >>> os.path.basename(own_code()) == f"loops-{processor()}.so"
    True
    """
    return os.path.join(os.path.dirname(__file__), f"loops-{processor()}.so")


def lacks_own_code() -> UnsupportedError | None:
    """Why the compiled loops cannot be used here; None where they can.

    >>> lacks_own_code()
    """
    path = own_code()
    lack, hint, state = _lacks_of_python(), _hint(), "are missing"
    if lack is None and not os.path.exists(path):
        lack = f"there is none for {processor()}: no file {path}"
        hint = _AGAIN if processor() in _SHIPS_FOR else _STILL
    if lack is None:
        lack, hint, state = damage(path), _AGAIN, "cannot be used"
    if lack is None and is_noexec(path):
        lack, hint = f"the file system of {path} is mounted noexec", f"{_AGAIN}, where code may be run"
    return None if lack is None else UnsupportedError(f"the loader's own loops {state}: {lack}", hint=hint)


def is_noexec(file: str | int) -> bool:
    """Whether no code may be mapped from the file system of a path, or of a descriptor's file.

    >>> is_noexec("/")
    False
    """
    try:
        return bool(os.statvfs(file).f_flag & os.ST_NOEXEC)
    except OSError:  # a filter of system calls: mmap(2) will tell
        return False


def damage(path: str) -> str | None:
    """Why the library at ``path`` cannot be mapped and run here, which its headers tell; None where it can.

    Of one that is cut short only ld.so would map what is there: to touch the rest is SIGBUS.
    """
    try:
        with open(path, "rb") as file:
            head, size = file.read(_EHDR.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if len(head) < _EHDR.size or head[:4] != b"\x7fELF":
        return f"{path} is no library"
    machine = _MACHINES.get((head[4], head[5], struct.unpack_from("<H", head, 18)[0]))
    if machine != processor():
        return f"{path} is {machine or 'another processor'} code, and this process {processor()}"
    start, length, number = _EHDR.unpack(head)
    if start + length * number > size:  # the section headers are its end
        return f"{path} is cut short: it has {size:,} bytes, of {start + length * number:,}"
    return None


def _hint() -> str:
    return _STILL if _lacks_of_python() is None else "start it with PYTHON_GIL=1 in the environment"
