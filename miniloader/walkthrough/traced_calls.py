"""System calls that are made and traced at once, as strace(1) would show them.

Light on purpose (no numpy): the programs that chapters start import it, too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap as _mmap
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from miniloader.kernel import syscalls
from miniloader.values import NamedTuple

__all__ = ["Calls", "Mapping", "TracedCall", "flag_text", "is_indexed", "page_slice", "quoted", "shortened"]

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
_ACCMODE: Final = 3  # os.O_ACCMODE has O_PATH in it where the C library is musl
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


def quoted(data: bytes, most: int = 32) -> str:
    """The first bytes as strace shows them, in C's notation: as many as fit ``most`` columns.

    >>> quoted(b"hello\\n")
    '"hello\\\\n"'
    >>> quoted(bytes(4096), 8)
    '"\\\\0\\\\0\\\\0\\\\0"...'
    """
    shown = ""
    for octet in data:
        sign = _ESCAPED.get(octet) or (chr(octet) if 32 <= octet < 127 else f"\\x{octet:02x}")
        if len(shown) + len(sign) > most:
            return f'"{shown}"...'
        shown += sign
    return f'"{shown}"'


def page_slice(number: int, length: int, name: str = "p") -> str:
    """The first ``length`` bytes of page ``number`` of a mapping, as the trace writes them.

    >>> page_slice(0, 5, "memory")
    'memory[0:5]'
    """
    start = number * syscalls.PAGE_SIZE
    return f"{name}[{start}:{start + length}]"


def is_indexed(call: TracedCall) -> bool:
    """Whether ``call`` is a load or a store that is written with an index.

    >>> is_indexed(TracedCall("p[0]", '"A"', access=True)), is_indexed(TracedCall("items = [1]", access=True))
    (True, False)
    """
    return call.access and _INDEXED.match(call.text) is not None


def shortened(calls: Iterable[TracedCall]) -> list[TracedCall]:
    """``calls`` with each run of like accesses, a step apart, as one.

    >>> loads = [TracedCall(f"p[{at}]", f'"{sign}"', access=True) for at, sign in zip((0, 8, 16), "ABC")]
    >>> shortened(loads)[0][:2]
    ('p[0], p[8], … p[16]', '"A" … "C"')
    """
    runs: list[list[TracedCall]] = []
    for call in calls:
        if runs and _goes_on(runs[-1], call):
            runs[-1].append(call)
        else:
            runs.append([call])
    return [call for run in runs for call in (run if len(run) < _FEWEST else [_as_one(run)])]


_ACCESS_AT: Final = re.compile(r"(?P<name>\w+)\[(?P<at>\d+)\](?P<stored>.*)", re.DOTALL)
_INDEXED: Final = re.compile(r"\w+\[")
_FEWEST: Final = 3  # accesses that become one


def _goes_on(run: Sequence[TracedCall], call: TracedCall) -> bool:
    """Whether ``call`` is the next access of ``run``: of the same memory, by the same, a step further."""
    last, match = _ACCESS_AT.fullmatch(run[-1].text), _ACCESS_AT.fullmatch(call.text)
    if last is None or match is None or run[-1].process != call.process or not call.access:
        return False
    step = int(match["at"]) - int(last["at"])
    first = _ACCESS_AT.fullmatch(run[-2].text) if len(run) > 1 else None
    return (
        (match["name"], match["stored"]) == (last["name"], last["stored"])
        and step > 0
        and (first is None or int(last["at"]) - int(first["at"]) == step)
    )


def _as_one(run: Sequence[TracedCall]) -> TracedCall:
    names = [call.text.partition(" = ")[0] for call in run]
    _, store, stored = run[0].text.partition(" = ")
    results = dict.fromkeys((run[0].result, run[-1].result))
    text = f"{names[0]}, {names[1]}, … {names[-1]}{store}{stored}"
    return run[0]._replace(text=text, result=" … ".join(filter(None, results)))


_ESCAPED: Final = {0: "\\0", 10: "\\n", 34: '\\"', 92: "\\\\"}


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
        text = _ACCESS[flags & _ACCMODE]
        more = flag_text(flags & ~_ACCMODE, _OPENS, "")
        name = path if os.path.dirname(path) in _NOT_FRESH else os.path.basename(path) or path
        shown = f'open("{name}", {text}{"|" + more if more else ""})'
        return self.do(shown, lambda: os.open(path, flags | os.O_CLOEXEC, mode))

    def close(self, fd: int) -> None:
        """close(2)."""
        self.do(f"close({fd})", lambda: os.close(fd), lambda _: "0")

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        data = os.pread(fd, length, offset)
        self.note(f"pread({fd}, {quoted(data)}, {length}, {offset})", str(len(data)))
        return data

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        """pwrite(2)."""
        self.do(f"pwrite({fd}, {quoted(data)}, {len(data)}, {offset})", lambda: os.pwrite(fd, data, offset))

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
        self.note(name or f"load {length} at {address:#x}", quoted(data), access=True)
        return data

    def store(self, address: int, data: bytes, name: str = "") -> None:
        """Write memory: no system call."""
        ctypes.memmove(address, data, len(data))
        self.note(f"{name or f'store at {address:#x}'} = {quoted(data)}", access=True)
