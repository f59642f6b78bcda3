"""System calls that are made and traced at once, as strace(1) would show them.

Light on purpose (no numpy): the programs that chapters start import it, too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap as _mmap
import os
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, TypeVar

from miniloader.kernel import syscalls

__all__ = ["Calls", "Mapping", "TracedCall", "flag_text"]

T = TypeVar("T")

_NOT_FRESH: Final = ("/dev", "/proc/self")  # whose files are shown by their whole path
_PROTECTIONS: Final = {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4}
_MAPS: Final = {
    "MAP_SHARED": syscalls.MAP_SHARED,
    "MAP_PRIVATE": syscalls.MAP_PRIVATE,
    "MAP_FIXED": syscalls.MAP_FIXED,
    "MAP_ANONYMOUS": syscalls.MAP_ANONYMOUS,
    "MAP_FIXED_NOREPLACE": syscalls.MAP_FIXED_NOREPLACE,
}
_ADVICE: Final = {name: getattr(_mmap, name) for name in ("MADV_NORMAL", "MADV_RANDOM", "MADV_DONTNEED")}
_OPENS: Final = {name: getattr(os, name) for name in ("O_CREAT", "O_TRUNC", "O_PATH", "O_DIRECTORY")}
_ACCESS: Final = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}


class TracedCall(NamedTuple):
    """One thing that a process did, as strace(1) would write it.

    ``text`` is the call with its arguments, ``result`` what came back ("" for nothing).  ``process`` names
    who did it ("" for this process).  ``access`` marks a plain load or store, which is no system call.
    """

    text: str
    result: str = ""
    process: str = ""
    access: bool = False


class Mapping(NamedTuple):
    """A mapping of this process: [``address``, ``address`` + ``length``)."""

    address: int
    length: int

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return -(-self.length // syscalls.PAGE_SIZE)

    def page(self, number: int) -> int:
        """The address of page ``number``."""
        return self.address + number * syscalls.PAGE_SIZE


def flag_text(value: int, names: dict[str, int], none: str) -> str:
    """``value`` as flags in C, by their ``names``; ``none`` where it has no bit set.

    >>> flag_text(0x13, {"MAP_PRIVATE": 2, "MAP_FIXED": 0x10}, "0")
    'MAP_PRIVATE|MAP_FIXED|0x1'
    """
    flags = [name for name, bit in names.items() if bit and value & bit == bit]
    unnamed = value & ~sum(names[name] for name in flags)
    return "|".join(flags + ([f"{unnamed:#x}"] if unnamed else [])) or none


def _quoted(data: bytes, most: int = 24) -> str:
    """Bytes as strace shows them: the first few, in C's notation."""
    shown = "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in data[:most])
    return f'"{shown}"' + ("..." if len(data) > most else "")


class Calls:
    """Makes system calls and traces them; :meth:`taken` hands the trace over and begins a new one.

    A call that fails is traced with its errno, and raises the OSError.
    """

    def __init__(self) -> None:
        self._trace: list[TracedCall] = []

    def taken(self) -> tuple[TracedCall, ...]:
        """What was done since the trace was last handed over."""
        trace, self._trace = tuple(self._trace), []
        return trace

    def note(self, text: str, result: str = "", *, access: bool = False) -> None:
        """Trace something done elsewhere."""
        self._trace.append(TracedCall(text, result, access=access))

    def add(self, calls: Iterable[TracedCall], process: str) -> None:
        """Trace what another ``process`` has done."""
        self._trace += (call._replace(process=process) for call in calls)

    def do(self, text: str, call: Callable[[], T], shown: Callable[[T], str] = str) -> T:
        """Make any ``call``, traced as ``text``; ``shown`` writes its result."""
        try:
            result = call()
        except OSError as error:
            number = error.errno or 0
            name = errno.errorcode.get(number, str(number))
            self.note(text, f"-1 {name} ({os.strerror(number)})")
            raise
        self.note(text, shown(result))
        return result

    # -- files
    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """open(2); a fresh file is shown by its last name, a device and what is in /proc by its path."""
        text = _ACCESS[flags & os.O_ACCMODE]
        more = flag_text(flags & ~os.O_ACCMODE, _OPENS, "")
        name = path if os.path.dirname(path) in _NOT_FRESH else os.path.basename(path) or path
        shown = f'open("{name}", {text}{"|" + more if more else ""})'
        return self.do(shown, lambda: os.open(path, flags | os.O_CLOEXEC, mode))

    def close(self, fd: int) -> None:
        """close(2)."""
        self.do(f"close({fd})", lambda: os.close(fd), lambda _: "0")

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        data = os.pread(fd, length, offset)
        self.note(f"pread({fd}, {_quoted(data)}, {length}, {offset})", str(len(data)))
        return data

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        """pwrite(2)."""
        self.do(f"pwrite({fd}, {_quoted(data)}, {len(data)}, {offset})", lambda: os.pwrite(fd, data, offset))

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        self.do(f"fsync({fd})", lambda: os.fsync(fd), lambda _: "0")

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate(2)."""
        self.do(f"ftruncate({fd}, {length})", lambda: os.ftruncate(fd, length), lambda _: "0")

    def drop_cache(self, fd: int) -> None:
        """posix_fadvise(2): let go of the file's clean pages in the page cache."""
        text = f"posix_fadvise({fd}, 0, 0, POSIX_FADV_DONTNEED)"
        self.do(text, lambda: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED), lambda _: "0")

    # -- memory
    def mmap(
        self, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0, *, address: int = 0
    ) -> Mapping:
        """mmap(2), where there is room, or at ``address`` with MAP_FIXED."""
        start = f"{address:#x}" if address else "NULL"
        text = (
            f"mmap({start}, {length}, {flag_text(protection, _PROTECTIONS, 'PROT_NONE')}, "
            f"{flag_text(flags, _MAPS, '0')}, {fd}, {offset})"
        )
        call: Callable[[], int] = lambda: syscalls.mmap(address, length, protection, flags, fd, offset)  # noqa: E731
        return Mapping(self.do(text, call, hex), length)

    def munmap(self, mapping: Mapping) -> None:
        """munmap(2)."""
        call: Callable[[], Any] = lambda: syscalls.munmap(*mapping)  # noqa: E731
        self.do(f"munmap({mapping.address:#x}, {mapping.length})", call, lambda _: "0")

    def mprotect(self, address: int, length: int, protection: int) -> None:
        """mprotect(2)."""
        text = f"mprotect({address:#x}, {length}, {flag_text(protection, _PROTECTIONS, 'PROT_NONE')})"
        self.do(text, lambda: syscalls.mprotect(address, length, protection), lambda _: "0")

    def madvise(self, mapping: Mapping, advice: str) -> None:
        """madvise(2); ``advice`` by its name."""
        text = f"madvise({mapping.address:#x}, {mapping.length}, {advice})"
        self.do(text, lambda: syscalls.madvise(*mapping, _ADVICE[advice]), lambda _: "0")

    def msync(self, mapping: Mapping) -> None:
        """msync(2), waiting until it is done."""
        text = f"msync({mapping.address:#x}, {mapping.length}, MS_SYNC)"
        self.do(text, lambda: syscalls.msync(*mapping, syscalls.MS_SYNC), lambda _: "0")

    def load(self, address: int, length: int = 1, name: str = "") -> bytes:
        """Read memory: no system call."""
        data = ctypes.string_at(address, length)
        self.note(name or f"load {length} at {address:#x}", _quoted(data), access=True)
        return data

    def store(self, address: int, data: bytes, name: str = "") -> None:
        """Write memory: no system call."""
        ctypes.memmove(address, data, len(data))
        self.note(f"{name or f'store at {address:#x}'} = {_quoted(data)}", access=True)
