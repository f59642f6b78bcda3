"""Mapping a load plan into this process, and reading and writing what is mapped.

The calls made are :meth:`miniloader.elf.LoadPlan.calls`, in that order.  The whole span is reserved by one
inaccessible private mapping of the file and kept; each segment goes over its part with ``MAP_FIXED``, so no
other thread's mapping can slip in between and the gaps stay inaccessible (and look in ``/proc/self/maps`` as
ld.so leaves them).  Where a page of the file is gone, a read
or a write is an error and no SIGBUS, which ends the process: see :func:`miniloader.native.copy`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, Literal

from miniloader.elf import LoadPlan, PlannedCall, Source
from miniloader.errors import NO_ROOM, ElfError, LoadError
from miniloader.kernel import syscalls as sys
from miniloader.native import Stopped, buffer_address, copy, gate

__all__ = ["Memory", "OnCall", "flag_bits", "map_plan", "protection_bits"]

_BITS: Final = {
    "r": sys.PROT_READ,
    "w": sys.PROT_WRITE,
    "x": sys.PROT_EXEC,
    "b": sys.PROT_BTI,
    "-": 0,
    "p": 0,
}
_FLAGS: Final = {
    "MAP_PRIVATE": sys.MAP_PRIVATE,
    "MAP_FIXED": sys.MAP_FIXED,
    "MAP_FIXED_NOREPLACE": sys.MAP_FIXED_NOREPLACE,
    "MAP_ANONYMOUS": sys.MAP_ANONYMOUS,
}

_NOEXEC: Final = "its file system is mounted noexec: copy it to another, or mount that with exec"
_BEYOND: Final = "that is beyond the addresses that a process has here"
_NEAR: Final = "give one such as 0x200000000, or none"
_UNMAPPED: Final = "allow munmap(2) in the filter of system calls (seccomp)"


def _without_memory(error: OSError) -> str | None:
    """What to look at where the kernel has no memory, or may not make one more mapping."""
    return NO_ROOM if error.errno == errno.ENOMEM else None


@lru_cache(maxsize=16)
def protection_bits(protection: str) -> int:
    """``r-x`` as mmap(2) wants it: the sum of PROT_READ and its like.

    >>> protection_bits("r-x")
    5
    """
    return sum(_BITS[sign] for sign in protection)


@lru_cache(maxsize=16)
def flag_bits(flags: tuple[str, ...]) -> int:
    """``MAP_PRIVATE`` and its like, by name, as mmap(2) wants them: their sum.

    >>> hex(flag_bits(("MAP_PRIVATE", "MAP_FIXED")))
    '0x12'
    """
    return sum(_FLAGS[name] for name in flags)


OnCall = Callable[["Memory", PlannedCall], None]
"""Called with a call of a plan once it is made, and the memory that it was made for."""


class Memory:
    """The pages of one library in this process: ``bias`` + vaddr is the address of its byte ``vaddr``."""

    def __init__(self, name: str, plan: LoadPlan, bias: int) -> None:
        self.name = name
        self.plan = plan
        self.bias = bias
        self.mapped = True

    @property
    def start(self) -> int:
        """The lowest address."""
        return self.bias + self.plan.start

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.bias + self.plan.end

    def read(self, vaddr: int, length: int) -> bytearray:
        """``length`` bytes at ``vaddr``, copied; :class:`ElfError` when the file's page is gone."""
        data = bytearray(length)
        self.read_into(vaddr, data)
        return data

    def read_into(self, vaddr: int, data: Any) -> None:
        """Fill the buffer ``data`` (contiguous) from ``vaddr`` on."""
        self._transfer(vaddr, data, reading=True)

    def write(self, vaddr: int, data: Any) -> None:
        """Store the buffer ``data`` (contiguous, writable) at ``vaddr``; each page touched is copied.

        :class:`ElfError` where that is outside the library, or a page cannot be written.
        """
        self._transfer(vaddr, data, reading=False)

    def put(self, vaddrs: Iterable[int], values: Iterable[int], size: int) -> None:
        """Store the low ``size`` bytes of each value at its vaddr, which need not be aligned."""
        for vaddr, value in zip(vaddrs, values, strict=True):
            self.write(vaddr, bytearray(value.to_bytes(8, "little")[:size]))

    def perform(
        self, calls: Iterable[PlannedCall], on_call: OnCall | None = None, source: Source | None = None
    ) -> None:
        """Make calls of the plan; ``source`` is the file, for those that map it.

        ``on_call`` is told each call once it is made.  :class:`LoadError` names the call that was refused.
        """
        for call in calls:
            if call.call == "mmap":
                self._map(call, source)
            elif call.call == "mprotect":
                self.protect(call.start, call.end, call.protection)
            else:
                self.write(call.start, bytearray(call.length))
            if on_call is not None:
                on_call(self, call)

    def perform_step(self, step: Literal["guard", "zero", "protect"], on_call: OnCall | None = None) -> None:
        """Make the calls of one of the plan's steps that come after the mapping."""
        self.perform(self.plan.calls_of(step), on_call)

    def protect(self, start: int, end: int, protection: str) -> None:
        """mprotect(2) the whole pages from vaddr ``start`` to ``end``."""
        try:
            sys.mprotect(self.bias + start, end - start, protection_bits(protection))
        except OSError as error:
            what = f"mprotect of vaddrs {start:#x} to {end:#x} to {protection}"
            raise LoadError(f"{self.name}: {what}: {error.strerror}", hint=_without_memory(error)) from None

    def unmap(self) -> None:
        """Unmap everything; a second call does nothing."""
        if self.mapped:
            try:
                sys.munmap(self.start, self.plan.length)
            except OSError as error:
                raise LoadError(f"{self.name}: {error.strerror}", hint=_UNMAPPED) from None
            self.mapped = False

    def _map(self, call: PlannedCall, source: Source | None) -> None:
        try:
            _mmap(call, self.bias + call.start, source)
        except OSError as error:
            refused = source is not None and error.errno == errno.EPERM and gate.is_noexec(source.fd)
            hint = _NOEXEC if refused else _without_memory(error)
            what = f"{self.name}: {call.text(self.bias)}: {error.strerror}"
            raise LoadError(what, hint=hint, ld_so=_refused(self.name)) from None

    def _transfer(self, vaddr: int, data: Any, *, reading: bool) -> None:
        length = memoryview(data).nbytes
        if not self.plan.start <= vaddr <= vaddr + length <= self.plan.end:  # somebody else's memory
            found, expected = f"{vaddr:#x} to {vaddr + length:#x}", "inside the PT_LOADs"
            raise ElfError(self.name, "vaddrs", found, expected)
        mapped, buffer = (self.bias + vaddr) % (1 << 64), buffer_address(data)
        to, from_ = (buffer, mapped) if reading else (mapped, buffer)
        try:
            copy(to, from_, length)
        except Stopped as stopped:
            raise self.gone(stopped.where - self.bias) from None

    def gone(self, vaddr: int) -> ElfError:
        """What to raise where the page at ``vaddr`` could not be read or written."""
        return ElfError(
            self.name,
            f"page at vaddr {vaddr & -self.plan.page_size:#x}",
            "one that cannot be read or written",
            "a page of the file",
            hint="the file was changed while it was being loaded",
        )


def _refused(name: str) -> str:
    """What ld.so says where the kernel refuses a mapping of a file."""
    return f"{name}: failed to map segment from shared object"


def map_plan(
    plan: LoadPlan, source: Source, *, address: int | None = None, on_call: OnCall | None = None
) -> Memory:
    """Map ``plan`` with the bytes of ``source``: at ``address`` (of its first page), or where there is room.

    Raises :class:`LoadError` when the kernel refuses; nothing stays mapped then.
    """
    if source.start % plan.page_size:
        raise LoadError(
            f"{source.name}: begins at byte {source.start} of its file, no multiple of the page size",
            hint="load a copy of its bytes: Source.from_bytes",
        )
    first, *following = plan.calls(placed=address is not None)
    if address is not None and not 0 <= address <= (1 << 64) - first.length:
        raise LoadError(
            f"{source.name}: reserving {plan.length:#x} bytes at {address:#x}: {_BEYOND}", hint=_NEAR
        )
    try:
        start = _mmap(first, address or 0, source)
        if first.length > plan.length:
            start = _keep_aligned(plan, start, first.length)
    except OSError as error:
        reason, hint = error.strerror, _without_memory(error)
        if address is not None and hint is None:
            hint = f"is {address:#x} free, and a multiple of the page size?"
        elif address is not None and _is_room_elsewhere(plan):
            reason, hint = _BEYOND, _NEAR
        where = "" if address is None else f" at {address:#x}"
        what = f"{source.name}: reserving {plan.length:#x} bytes{where}: {reason}"
        raise LoadError(what, hint=hint, ld_so=_refused(source.name)) from None
    memory = Memory(source.name, plan, start - plan.start)
    try:
        if on_call is not None:
            on_call(memory, first)
        memory.perform((call for call in following if call.step in ("reserve", "map")), on_call, source)
        _refuse_cut(source)
    except BaseException:  # whatever on_call raises, too
        memory.unmap()
        raise
    return memory


def _refuse_cut(source: Source) -> None:
    """Raise :class:`ElfError` if the file is shorter than it was when it was opened."""
    try:
        size = os.fstat(source.fd).st_size - source.start
    except OSError as error:
        raise LoadError(f"{source.name}: {error.strerror}") from None
    if size < source.size:
        expected, hint = f"{source.size:#x} bytes", "it was cut short while it was being mapped"
        raise ElfError(source.name, "file", f"{size:#x} bytes", expected, hint=hint)


def _mmap(call: PlannedCall, address: int, source: Source | None) -> int:
    """mmap(2) as ``call`` says, at ``address``; where the mapping begins."""
    fd, offset = -1, 0
    if call.file_offset is not None:
        assert source is not None
        fd, offset = source.fd, source.start + call.file_offset
    protection, flags = protection_bits(call.protection), flag_bits(call.flags)
    return sys.mmap(address, call.length, protection, flags, fd, offset)


def _is_room_elsewhere(plan: LoadPlan) -> bool:
    """Whether what is refused at an address is granted at another: ENOMEM is also what lies too high."""
    try:
        start = sys.mmap(0, plan.length, sys.PROT_NONE, sys.MAP_PRIVATE | sys.MAP_ANONYMOUS, -1, 0)
    except OSError:
        return False
    sys.munmap(start, plan.length)
    return True


def _keep_aligned(plan: LoadPlan, room: int, length: int) -> int:
    """Unmap what ``plan`` does not need of the ``length`` bytes at ``room``; where the part kept begins.

    With the plan's first page there, the bias is a multiple of the plan's alignment.
    """
    start = -(-(room - plan.start) // plan.alignment) * plan.alignment + plan.start
    if start > room:
        sys.munmap(room, start - room)
    if start + plan.length < room + length:
        sys.munmap(start + plan.length, room + length - start - plan.length)
    return start
