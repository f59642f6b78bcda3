"""All pages of one process, as its page table has them: flat arrays over all its mappings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.forking import cached_property
from miniloader.kernel.frames import KPF, frame_flags, map_counts
from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import EXCLUSIVE, FILE, FRAME, GUARD, PRESENT, SWAPPED, PageMap
from miniloader.kernel.scan import IS_HUGE, IS_PRESENT, IS_SWAPPED, IS_ZERO, scan
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.kernel.zeros import doubtful, zeros_by_sums
from miniloader.lab.audit.equal_arrays import EqualArrays
from miniloader.lab.audit.outline import Outline, Outlines
from miniloader.values import dataclass

__all__ = ["Narrow", "PageColumns", "Pages", "Rows", "count_rows", "count_set", "rows_of"]

#: Which rows of an array: most often one after another.
Rows = slice | NDArray[np.intp]

#: Numbers that are not larger than they must be.
Narrow = NDArray[np.unsignedinteger[Any]]

#: For each page whether it is the page of zeros; for each mapping how many pages are huge, and zeros besides.
_Zeros = tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]

_SETTLED: Final = PRESENT | SWAPPED | GUARD | FILE | FRAME
_SHIFT: Final = np.uint64(PAGE_SIZE.bit_length() - 1)  # from an address to the number of its page
_BITS: Final = np.uint64(56)  # all that is asked of most entries is above: in a byte it takes an eighth
_EXCLUSIVE, _GUARD, _FILE, _SWAPPED, _PRESENT = (
    np.uint8(bit >> _BITS) for bit in (EXCLUSIVE, GUARD, FILE, SWAPPED, PRESENT)
)
_HUGE: Final = 2 << 20  # bytes; the pages of hugetlbfs are no smaller
_LARGE: Final = 4 << 20  # bytes; of a larger mapping only what is populated is read
_GAP: Final = 1 << 20  # bytes without pages that are read all the same
_STEP: Final = 64 << 20  # bytes; so much at once is looked at without PAGEMAP_SCAN
_MOST: Final = 1 << 44  # bytes; to find what is populated takes a second a TiB without PAGEMAP_SCAN


class Pages:
    """Every page of a process that is in memory or swapped out: flat arrays over all mappings.

    ``copied`` and ``own`` (pages of files, and of shared memory) are the two kinds that are counted; of them
    ``copies`` and ``originals`` keep what an audit asks for; mappings ``writable`` are private, of
    files, and may be written to.  ``anonymous`` are the addresses of the copied pages that lie in no
    file's mapping, ``swapped_in`` how many of each mapping are swapped out.  ``zero`` are the page of zeros,
    which is not counted; where a kernel does not tell all of them from copies, ``zeros_among`` the counted
    ones of each mapping are so many more.  ``huge_in`` is how many pages of each mapping are mapped by huge
    entries; ``hugetlb_in`` how many are in memory of those of hugetlbfs, which are counted nowhere else.
    """

    def __init__(
        self,
        pagemap: PageMap,
        vmas: Sequence[Vma],
        *,
        frames: bool,
        arrays: EqualArrays | None = None,
        outline: Outline | None = None,
    ) -> None:
        """Read them; ``arrays`` has what is kept of other processes, and may be the same here."""
        self._pagemap, self._arrays = pagemap, arrays or EqualArrays()
        self.outline = outline or Outlines().of(vmas)
        begins = self.outline.starts
        index, start, end = _ranges(pagemap, vmas, self.outline)
        self._runs = _runs(start, end)
        entries = self._read()
        # What is neither in memory nor swapped out has no more to tell: most of what is mapped.
        self._places = (entries >= SWAPPED).nonzero()[0]
        self.entries = entries[self._places]
        last = end >> _SHIFT
        ends = (last - (start >> _SHIFT)).cumsum().view(np.int64)
        populated = self._places.searchsorted(ends)
        populated[1:] -= populated[:-1].copy()
        self.vma = index.repeat(populated)
        # Of each range the page of a place 0, were it that long: one sum gives the pages of all places.
        pages = self._places.view(np.uint64) + (last - ends.view(np.uint64)).repeat(populated)
        self.addresses = pages << _SHIFT
        zeros = self._scanned(vmas, frames=frames) or self._without_scan(vmas, frames=frames)
        self.zero, self.huge_in, self.zeros_among = zeros
        bits = (self.entries >> _BITS).astype(np.uint8)
        present, bounds = bits >= _PRESENT, np.searchsorted(self.vma, np.arange(len(vmas) + 1))
        self.counted = present & ~self.zero
        reserved = self._huge_files(vmas, index[(start | end) % np.uint64(_HUGE) == 0])
        self.hugetlb_in = np.zeros(len(vmas), np.int64)
        for left_out in (*self.outline.outside, *reserved):
            rows = slice(bounds[left_out], bounds[left_out + 1])
            self.hugetlb_in[left_out] = count_set(present[rows]) if left_out in reserved else 0
            self.counted[rows] = False
        self.huge_in[reserved] = 0
        self.own = self.counted & (bits & _FILE).astype(np.bool_)
        self.copied = self.counted ^ self.own
        # A page of a file that is being moved to another frame is marked like one that is swapped out.
        self.swapped = (bits & (_SWAPPED | _GUARD | _FILE)) == _SWAPPED
        self.swapped_in = np.bincount(self.vma[self.swapped], minlength=len(vmas))
        offsets = self._arrays.first(self.outline.offsets)
        places = _narrow(pages - (begins >> _SHIFT).repeat(bounds[1:] - bounds[:-1]))
        numbers = _narrow(self.entries & (FRAME if frames else np.uint64(0)))
        copied, own = self.copied.nonzero()[0], self.own.nonzero()[0]
        once, exclusive = self._arrays.first, (bits & _EXCLUSIVE).astype(np.bool_)
        self.copies, self.originals = (
            PageColumns(
                places=once(places[rows]),
                numbers=once(numbers[rows]),
                exclusive=once(exclusive[rows]),
                starts=once(rows.searchsorted(bounds)),
                begins=begins,
                offsets=offsets,
            )
            for rows in (copied, own)
        )
        self.writable = self.outline.writable
        nameless = self.outline.nameless.repeat(self.copies.number)
        self.anonymous = self.addresses[copied[nameless]]

    def _read(self) -> NDArray[np.uint64]:
        """The entries of all ranges; those that touch are read at once."""
        entries = np.empty(sum([pages for _, pages in self._runs]), np.uint64)
        place = 0
        for start, pages in self._runs:
            self._pagemap.read_into(entries[place : place + pages], start)
            place += pages
        return entries

    def changed(self) -> NDArray[np.bool_]:
        """Which page table entries are not what they were when the pages were read."""
        return ((self.entries ^ self._read()[self._places]) & _SETTLED).astype(np.bool_)

    def _huge_files(self, vmas: Sequence[Vma], aligned: NDArray[np.uint64]) -> list[int]:
        """The mappings of hugetlbfs, which the kernel counts apart (Private_Hugetlb), and in no RSS."""
        asked = [index for index in dict.fromkeys(aligned.tolist()) if vmas[index].inode]
        if not asked:
            return []
        huge = {sums.vma for sums in read_smaps(self._pagemap.pid) if "ht" in sums.flags}
        return [index for index in asked if vmas[index] in huge]

    def _scanned(self, vmas: Sequence[Vma], *, frames: bool) -> _Zeros | None:
        """Which are the page of zeros, how many are in huge pages; None before PAGEMAP_SCAN (6.7)."""
        zero, huge = np.zeros((2, len(self.addresses)), np.bool_)
        try:
            kinds = IS_ZERO | IS_HUGE
            regions = scan(self._pagemap, vmas[0].start, vmas[-1].end, any_of=kinds, returned=kinds)
        except EvidenceError:
            return None
        first = self.addresses.searchsorted(regions["start"]).tolist()
        last = self.addresses.searchsorted(regions["end"]).tolist()
        categories = regions["categories"]
        for low, high, kind in zip(first, last, categories.tolist(), strict=True):
            zero[low:high] |= bool(kind & IS_ZERO)
            huge[low:high] |= bool(kind & IS_HUGE)
        none = np.zeros(len(vmas), np.int64)
        if not (categories & np.uint64(IS_HUGE)).any():
            return zero, none, none
        huge &= ~zero
        if frames:
            self._correct_exclusive(huge.nonzero()[0])
        return zero, np.bincount(self.vma[huge], minlength=len(vmas)), none

    def _correct_exclusive(self, rows: NDArray[np.intp]) -> None:
        """Have bit 56 of each of these pages in huge pages say of itself whether it is mapped once.

        The kernel (6.18) tests the first page of a huge one for all of them.  A relative that has written to
        some has these no more, which parts the huge page there, not here.  Where all are mapped equally often
        the bit is right, also where the count is a folio's average.
        """
        if not len(rows):
            return
        with suppress(EvidenceError):  # kpagecount is for root alone
            counts = map_counts(self.entries[rows] & FRAME)
            number = self.addresses[rows] // np.uint64(_HUGE)
            first = np.flatnonzero(np.append(True, np.diff(number) != 0))
            mixed = np.minimum.reduceat(counts, first) != np.maximum.reduceat(counts, first)
            mixed = np.repeat(mixed, np.diff(np.append(first, len(rows))))
            once = counts[mixed] == 1
            self.entries[rows[mixed]] &= ~EXCLUSIVE
            self.entries[rows[mixed][once]] |= EXCLUSIVE

    def _without_scan(self, vmas: Sequence[Vma], *, frames: bool) -> _Zeros:
        """Which are the page of zeros, how many are in huge pages, how many zeros are among the other pages.

        Told by the flags of the frames, or by sums, for kernels without PAGEMAP_SCAN.
        """
        sums, maybe = zeros_by_sums(self._pagemap, vmas), doubtful(self.entries)
        if frames:
            with suppress(EvidenceError):  # kpageflags is for root alone
                flags = frame_flags(self.entries[maybe] & FRAME)
                maybe[maybe] = (flags & KPF["zero_page"].mask).astype(np.bool_)
                return maybe, sums.huge, np.zeros(len(vmas), np.int64)
        mixed = (sums.all_or_none < 0) & (sums.zeros > 0)
        among = np.where(mixed, sums.zeros, 0)
        return maybe & (sums.all_or_none[self.vma] == 1), sums.huge, among


@dataclass(frozen=True, eq=False)
class PageColumns:
    """Pages of one kind of one process, a column for each question; those of mapping ``i`` begin at row
    ``starts[i]``.

    Every page of every process of an audit has a row, so it is kept in few bytes, and what processes of one
    program have alike is one array: ``places`` counts pages from the first one of the mapping, which
    ``begins`` at an address, and at ``offsets`` in its file; ``numbers`` are frames (0: hidden).  What is to
    be reckoned with is made of that when it is asked for.
    """

    places: Narrow
    numbers: Narrow
    exclusive: NDArray[np.bool_]
    starts: NDArray[np.int64]
    begins: NDArray[np.uint64]
    offsets: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The address of each page, ascending."""
        return self.begins.repeat(self.number) + self._distances(slice(None))

    @property
    def frames(self) -> NDArray[np.uint64]:
        """The frame of each page; 0 where it is hidden."""
        return self.frames_at(slice(None))

    def frames_at(self, rows: Rows) -> NDArray[np.uint64]:
        """The frames of these rows."""
        return self.numbers[rows].astype(np.uint64)

    def addresses_in(self, indices: Sequence[int]) -> NDArray[np.uint64]:
        """The addresses of the pages in the mappings ``indices``, which ascend."""
        return self._counted_from(self.begins, indices)

    def file_offsets_in(self, indices: Sequence[int]) -> NDArray[np.uint64]:
        """The places of these pages in the file that is mapped there."""
        return self._counted_from(self.offsets, indices)

    def _counted_from(self, firsts: NDArray[np.uint64], indices: Sequence[int]) -> NDArray[np.uint64]:
        chosen = np.array(indices, np.intp)
        numbers = self.starts[chosen + 1] - self.starts[chosen]
        return np.repeat(firsts[chosen], numbers) + self._distances(self.rows(indices))

    def _distances(self, rows: Rows) -> NDArray[np.uint64]:
        return self.places[rows].astype(np.uint64) * np.uint64(PAGE_SIZE)

    def rows(self, indices: Sequence[int]) -> Rows:
        """The rows of the mappings ``indices``, which ascend and most often follow one another."""
        return rows_of(indices, self.starts)

    @property
    def number(self) -> NDArray[np.int64]:
        """How many pages of each mapping they are."""
        return self.starts[1:] - self.starts[:-1]

    @cached_property
    def number_alone(self) -> NDArray[np.int64]:
        """How many pages of each mapping are mapped nowhere else."""
        if not self.any_several:
            return self.number
        before = self.exclusive.nonzero()[0].searchsorted(self.starts)
        return before[1:] - before[:-1]

    @cached_property
    def any_several(self) -> bool:
        """Whether any of the pages is mapped more than once."""
        return not bool(self.exclusive.all())

    def several(self, rows: Rows = slice(None)) -> Narrow:
        """The frames of those of the pages in these rows that are mapped more than once."""
        if not self.any_several:
            return self.numbers[:0]
        return self.numbers[rows][~self.exclusive[rows]]


def _narrow(values: NDArray[np.uint64]) -> Narrow:
    """The values in four bytes each, where all fit: places below 16 TiB, and frames."""
    fits = not len(values) or int(values.max()) >> 32 == 0
    return values.astype(np.uint32) if fits else values


def rows_of(indices: Sequence[int], starts: NDArray[np.int64] | Sequence[int]) -> Rows:
    """The rows of the mappings ``indices``, ascending; those of mapping ``i`` begin at ``starts[i]``.

    >>> rows_of([1, 2], np.array([0, 3, 4, 9]))
    slice(3, 9, None)
    """
    if not indices:
        return slice(0, 0)
    first, last = indices[0], indices[-1]
    if last - first == len(indices) - 1:
        return slice(int(starts[first]), int(starts[last + 1]))
    return np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])


def count_rows(rows: Rows) -> int:
    """How many rows they are.

    >>> count_rows(slice(3, 7)), count_rows(np.array([1, 5]))
    (4, 2)
    """
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def count_set(mask: NDArray[np.bool_]) -> int:
    """How many elements of ``mask`` are set.

    >>> count_set(np.array([True, False, True]))
    2
    """
    return int(np.count_nonzero(mask))


def _ranges(
    pagemap: PageMap, vmas: Sequence[Vma], outline: Outline
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Which addresses to read: mapping, start and end of each; of a very large mapping what is populated."""
    index, start, end = np.arange(len(vmas)), outline.starts, outline.starts + outline.sizes
    large = (outline.sizes > _LARGE).nonzero()[0].tolist()
    if not large:
        return index, start, end
    parts = {
        which: np.array([*_populated(pagemap, vmas[which])], np.uint64).reshape(-1, 2) for which in large
    }
    number = np.ones(len(vmas), np.int64)
    number[large] = [len(part) for part in parts.values()]
    index = index.repeat(number)
    start, end = start[index], end[index]
    for which, part in parts.items():
        start[index == which], end[index == which] = part.T
    return index, start, end


def _runs(starts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Where ranges begin that touch no other before them, and pages to the end of what they touch."""
    apart = starts[1:] != ends[:-1]
    first, last = np.append(True, apart)[: len(starts)], np.append(apart, True)[: len(starts)]
    pages = (ends[last] - starts[first]) >> _SHIFT
    return list(zip(starts[first].tolist(), pages.tolist(), strict=True))


def _populated(pagemap: PageMap, vma: Vma) -> Iterable[tuple[int, int]]:
    """The parts of a mapping that have pages."""
    try:
        regions = scan(pagemap, vma.start, vma.end, any_of=IS_PRESENT | IS_SWAPPED, returned=0)
    except EvidenceError:  # before 6.7
        if vma.size > _MOST:
            found = f"a mapping of {vma.size >> 30:,} GiB, which this kernel only shows page by page"
            raise EvidenceError(f"process {pagemap.pid}: {found}", hint="Linux 6.7") from None
        for start in range(vma.start, vma.end, _STEP):
            end = min(start + _STEP, vma.end)
            if vma.size <= _STEP or pagemap.read(start, end).any():
                yield start, end
    else:
        # To read over a small gap costs less than another read.
        wide = regions["start"][1:] - regions["end"][:-1] > np.uint64(_GAP)
        starts = regions["start"][np.append(True, wide)[: len(regions)]]
        ends = regions["end"][np.append(wide, True)[: len(regions)]]
        yield from zip(starts.tolist(), ends.tolist(), strict=True)
