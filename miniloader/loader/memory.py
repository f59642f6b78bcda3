"""Mapping a load plan into this process, and reading and writing what is mapped.

The whole span is reserved by one inaccessible private mapping of the file and kept; each segment goes
over its part with ``MAP_FIXED``, so no other thread's mapping can slip in between and the gaps stay
inaccessible (and look in ``/proc/self/maps`` as ld.so leaves them).  Where a page of the file is gone, a read
or a write is an error and no SIGBUS, which ends the process: see :func:`miniloader.native.copy`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan, PlannedMapping, Source
from miniloader.errors import ElfError, LoadError
from miniloader.kernel import syscalls as sys
from miniloader.native import Stopped, copy

__all__ = ["Memory", "map_plan", "protection_bits", "put_words"]

_BITS: Final = {"r": sys.PROT_READ, "w": sys.PROT_WRITE, "x": sys.PROT_EXEC, "-": 0, "p": 0}


@lru_cache(maxsize=16)
def protection_bits(protection: str) -> int:
    """``r-x`` as mmap(2) wants it."""
    return sum(_BITS[sign] for sign in protection)


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

    def read(self, vaddr: int, length: int) -> NDArray[np.uint8]:
        """``length`` bytes at ``vaddr``, copied; :class:`ElfError` when the file's page is gone."""
        data = np.empty(length, np.uint8)
        self.read_into(vaddr, data)
        return data

    def read_into(self, vaddr: int, data: NDArray[Any]) -> None:
        """Fill ``data`` (contiguous) from ``vaddr`` on."""
        self._transfer(vaddr, data, reading=True)

    def write(self, vaddr: int, data: NDArray[Any]) -> None:
        """Store ``data`` (contiguous) at ``vaddr``: each page touched becomes a private copy."""
        self._transfer(vaddr, data, reading=False)

    def put(self, vaddrs: NDArray[np.uint64], values: NDArray[np.uint64], size: int) -> None:
        """Store the low ``size`` bytes of each value at its vaddr, which need not be aligned."""
        octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)[:, :size]
        for vaddr, word in zip(vaddrs.tolist(), octets, strict=True):
            self.write(vaddr, word)

    def protect(self, start: int, end: int, protection: str) -> None:
        """mprotect(2) the whole pages from vaddr ``start`` to ``end``."""
        try:
            sys.mprotect(self.bias + start, end - start, protection_bits(protection))
        except OSError as error:
            raise LoadError(f"{self.name}: vaddrs {start:#x} to {end:#x}: {error.strerror}") from None

    def unmap(self) -> None:
        """Unmap everything; a second call does nothing."""
        if self.mapped:
            sys.munmap(self.start, self.plan.length)
            self.mapped = False

    def _transfer(self, vaddr: int, data: NDArray[Any], *, reading: bool) -> None:
        if not self.plan.start <= vaddr <= vaddr + data.nbytes <= self.plan.end:  # somebody else's memory
            found, expected = f"{vaddr:#x} to {vaddr + data.nbytes:#x}", "inside the PT_LOADs"
            raise ElfError(self.name, "vaddrs", found, expected)
        there, here = (self.bias + vaddr) % (1 << 64), data.ctypes.data
        to, from_ = (here, there) if reading else (there, here)
        try:
            copy(to, from_, data.nbytes)
        except Stopped as stopped:
            raise self.gone(stopped.where - self.bias) from None

    def gone(self, vaddr: int) -> ElfError:
        """What to raise where the page at ``vaddr`` could not be read or written."""
        return ElfError(
            self.name,
            f"page at vaddr {vaddr & -self.plan.page_size:#x}",
            "one that is gone, or protected",
            "a page of the file",
            hint="the file was changed while it was being loaded",
        )


def put_words(
    buffer: NDArray[np.uint8],
    offsets: NDArray[np.int64] | NDArray[np.uint32],
    values: NDArray[np.uint64],
    size: int = 8,
) -> None:
    """Store the low ``size`` bytes of each value at its offset in ``buffer``, which need not be aligned."""
    if size == 8 and not (offsets & 7).any():
        buffer.view(np.uint64)[offsets >> 3] = values
    else:
        octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)[:, :size]
        buffer[offsets[:, None] + np.arange(size)] = octets


def map_plan(plan: LoadPlan, source: Source, *, address: int | None = None) -> Memory:
    """Map ``plan`` with the bytes of ``source``: at ``address`` (of its first page), or where there is room.

    Raises :class:`LoadError` when the kernel refuses; nothing stays mapped then.
    """
    if source.start % plan.page_size:
        raise LoadError(
            f"{source.name}: begins at byte {source.start} of its file, no multiple of the page size",
            hint="load a copy of its bytes: Source.from_bytes",
        )
    offset = source.start + plan.mappings[0].file_offset
    try:
        start = _reserve(plan, source, offset, address)
    except OSError as error:
        hint = f"is {address:#x} free, and a multiple of the page size?" if address is not None else None
        raise LoadError(
            f"{source.name}: reserving {plan.length:#x} bytes: {error.strerror}", hint=hint
        ) from None
    memory = Memory(source.name, plan, start - plan.start)
    try:
        for mapping in plan.mappings:
            if mapping.kind != "gap":
                _map(memory.bias, mapping, source)
        status = os.fstat(source.fd)
        if status.st_size - source.start < source.size:
            found = f"{status.st_size - source.start:#x} bytes"
            raise ElfError(source.name, "file", found, f"{source.size:#x}", hint="it was cut short meanwhile")
    except OSError as error:
        memory.unmap()
        raise LoadError(f"{source.name}: mapping: {error.strerror}") from None
    except ElfError:
        memory.unmap()
        raise
    return memory


def zero_tails(memory: Memory) -> int:
    """Zero what of file pages is bss; the number of bytes.  A read-only page is made writable meanwhile."""
    total = 0
    for span in memory.plan.zeroed:
        page = memory.plan.at(span.start)
        if page is None or page.kind != "file":
            continue  # a later segment took the page
        writable = "w" in page.protection
        pages = (span.start & -memory.plan.page_size, span.end)
        if not writable:
            memory.protect(*pages, "rw-")
        memory.write(span.start, np.zeros(span.end - span.start, np.uint8))
        if not writable:
            memory.protect(*pages, page.protection)
        total += span.end - span.start
    return total


def _reserve(plan: LoadPlan, source: Source, offset: int, address: int | None) -> int:
    flags = sys.MAP_PRIVATE
    if address is not None:
        return sys.mmap(
            address, plan.length, sys.PROT_NONE, flags | sys.MAP_FIXED_NOREPLACE, source.fd, offset
        )
    if plan.alignment <= sys.PAGE_SIZE:
        return sys.mmap(0, plan.length, sys.PROT_NONE, flags, source.fd, offset)
    # Reserve enough to find an aligned place in it, then give back what is before and after.
    length = plan.length + plan.alignment
    room = sys.mmap(0, length, sys.PROT_NONE, flags | sys.MAP_ANONYMOUS)
    start = -(-(room - plan.start) // plan.alignment) * plan.alignment + plan.start
    if start > room:
        sys.munmap(room, start - room)
    if start + plan.length < room + length:
        sys.munmap(start + plan.length, room + length - start - plan.length)
    try:
        return sys.mmap(start, plan.length, sys.PROT_NONE, flags | sys.MAP_FIXED, source.fd, offset)
    except OSError:
        sys.munmap(start, plan.length)
        raise


def _map(bias: int, mapping: PlannedMapping, source: Source) -> None:
    flags = sys.MAP_PRIVATE | sys.MAP_FIXED
    address, bits = bias + mapping.start, protection_bits(mapping.protection)
    if mapping.kind == "zero":
        sys.mmap(address, mapping.length, bits, flags | sys.MAP_ANONYMOUS)
    else:
        sys.mmap(address, mapping.length, bits, flags, source.fd, source.start + mapping.file_offset)
