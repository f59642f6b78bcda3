"""All pages of one process, as its page table has them: flat arrays over all its mappings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import EXCLUSIVE, FILE, FRAME, GUARD, PRESENT, SWAPPED, PageMap
from miniloader.kernel.scan import IS_HUGE, IS_PRESENT, IS_SWAPPED, IS_ZERO, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["Pages", "Some", "number"]

_SETTLED: Final = PRESENT | SWAPPED | GUARD | FILE | FRAME
_LARGE: Final = 64 << 20  # bytes; of a larger mapping only what is populated is read
_NOT_PAGES: Final = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]"})  # counted by nobody


class Pages:
    """Every page of a process that is worth a word: flat arrays over all mappings."""

    def __init__(self, pagemap: PageMap, vmas: Sequence[Vma], *, frames: bool) -> None:
        self._pagemap = pagemap
        self._ranges = _ranges(pagemap, vmas)
        self.entries = self._read()
        index, start, end = np.array(self._ranges, np.uint64).reshape(-1, 3).T
        lengths = ((end - start) // np.uint64(PAGE_SIZE)).astype(np.int64)
        self.vma = np.repeat(index.astype(np.int64), lengths)
        # Of each range the address of a page 0, were it that long: one sum gives all addresses.
        before = (np.cumsum(lengths) - lengths).astype(np.uint64) * np.uint64(PAGE_SIZE)
        zeroth = start - before
        self.addresses = np.arange(len(self.vma), dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self.addresses += np.repeat(zeroth, lengths)
        self._mappings = len(vmas)
        self.present = (self.entries & PRESENT).astype(np.bool_)
        self.file = (self.entries & FILE).astype(np.bool_)
        self.zero, self.huge = self._scanned(vmas)
        unreal = np.array([vma.path in _NOT_PAGES for vma in vmas])
        self.counted = self.present & ~self.zero & ~unreal[self.vma]
        self.copied = self.counted & ~self.file
        self.own = self.counted & self.file
        nameless = self.copied & np.array([not vma.inode for vma in vmas])[self.vma]
        self.anonymous = self.addresses[nameless]
        self.exclusive = (self.entries & EXCLUSIVE).astype(np.bool_)
        self.swapped = (self.entries & (SWAPPED | GUARD)) == SWAPPED
        self.swapped_in = np.bincount(self.vma[self.swapped], minlength=len(vmas)).tolist()
        self.frames = self.entries & FRAME if frames else np.zeros(len(self.entries), np.uint64)
        # What is to be added to an address for its place in the file.
        shift = np.array([(vma.file_offset - vma.start) % 2**64 for vma in vmas], np.uint64)
        self.copies, self.originals = self._some(self.copied, shift), self._some(self.own, shift)

    def _some(self, mask: NDArray[np.bool_], shift: NDArray[np.uint64]) -> Some:
        rows = np.flatnonzero(mask)
        addresses, vma = self.addresses[rows], self.vma[rows]
        return Some(
            addresses,
            addresses + shift[vma],
            self.frames[rows],
            self.exclusive[rows],
            np.searchsorted(vma, np.arange(self._mappings + 1)).tolist(),
        )

    def _read(self) -> NDArray[np.uint64]:
        """The entries of all ranges; those that touch are read at once."""
        found, start, end = [], 0, 0
        for _, first, last in self._ranges:
            if first != end:
                found.append(self._pagemap.read(start, end))
                start = first
            end = last
        found.append(self._pagemap.read(start, end))
        return np.concatenate(found)

    def changed(self) -> NDArray[np.bool_]:
        """Which entries are not what they were."""
        return ((self.entries ^ self._read()) & _SETTLED).astype(np.bool_)

    def _scanned(self, vmas: Sequence[Vma]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which are the page of zeros, and which are part of a huge page; as PAGEMAP_SCAN (6.7) says."""
        zero, huge = np.zeros((2, len(self.addresses)), np.bool_)
        try:
            kinds = IS_ZERO | IS_HUGE
            regions = scan(self._pagemap, vmas[0].start, vmas[-1].end, any_of=kinds, returned=kinds)
        except EvidenceError:
            return zero, huge
        first = np.searchsorted(self.addresses, regions["start"]).tolist()
        last = np.searchsorted(self.addresses, regions["end"]).tolist()
        for low, high, kind in zip(first, last, regions["categories"].tolist(), strict=True):
            zero[low:high] |= bool(kind & IS_ZERO)
            huge[low:high] |= bool(kind & IS_HUGE)
        return zero, huge


@dataclass(frozen=True, eq=False)
class Some:
    """Some of the pages, a column for what is asked of each; those of mapping ``i`` begin at ``ends[i]``."""

    addresses: NDArray[np.uint64]
    file_offsets: NDArray[np.uint64]
    frames: NDArray[np.uint64]
    exclusive: NDArray[np.bool_]
    ends: Sequence[int] = ()

    def of(self, indices: Sequence[int]) -> Some:
        """Those of these mappings, which are in order and most often follow one another."""
        first, last, ends = indices[0], indices[-1], self.ends
        rows: slice | NDArray[np.intp] = slice(ends[first], ends[last + 1])
        if last - first != len(indices) - 1:
            rows = np.concatenate([np.arange(ends[index], ends[index + 1]) for index in indices])
        return Some(self.addresses[rows], self.file_offsets[rows], self.frames[rows], self.exclusive[rows])


def number(mask: NDArray[np.bool_]) -> int:
    """How many are set."""
    return int(np.count_nonzero(mask))


def _ranges(pagemap: PageMap, vmas: Sequence[Vma]) -> list[tuple[int, int, int]]:
    """Which addresses to read: (mapping, start, end); of a very large mapping what is populated."""
    ranges = []
    for index, vma in enumerate(vmas):
        if vma.end - vma.start <= _LARGE:
            ranges.append((index, vma.start, vma.end))
            continue
        try:
            regions = scan(pagemap, vma.start, vma.end, any_of=IS_PRESENT | IS_SWAPPED, returned=0)
        except EvidenceError:
            ranges.append((index, vma.start, vma.end))
            continue
        ranges += [(index, start, end) for start, end, _ in regions.tolist()]
    return ranges
