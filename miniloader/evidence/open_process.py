"""A process whose pages are looked at: its page table entries, and which pages any of several has at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.pagemap import GUARD, PRESENT, SWAPPED, PageMap, PageTable
from miniloader.kernel.scan import IS_PRESENT, IS_SWAPPED, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["OpenProcess", "ProcessRange", "open_process", "places_had_by_any"]


@dataclass(frozen=True)
class ProcessRange:
    """What to look at: the pages [``vaddr_start``, ``vaddr_end``) of an image in process ``pid``.

    ``base`` is the load bias, address - vaddr, a multiple of the page size; the range is widened to
    whole pages.
    """

    pid: int
    base: int
    vaddr_start: int
    vaddr_end: int


@dataclass(frozen=True, eq=False)
class OpenProcess:
    """A process with its ``pagemap`` open; ``vmas`` are the mappings that the image touches, by address."""

    target: ProcessRange
    pagemap: PageMap
    vmas: tuple[Vma, ...]

    @property
    def span(self) -> tuple[int, int]:
        """The addresses looked at: the first, and the one behind the last."""
        return _span(self.target)

    def touched(self) -> tuple[Vma, ...]:
        """The mappings that the image touches now."""
        start, end = self.span
        return read_maps(self.target.pid, start=start, end=end)

    def read(self, places: NDArray[np.int64] | None) -> PageTable:
        """The entries of the pages at ``places`` (ascending, from the first page on); ``None``: of all."""
        start, end = self.span
        if places is None:
            return self.pagemap.table(start, end)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
        entries = [
            self.pagemap.read(start + int(run[0]) * PAGE_SIZE, start + (int(run[-1]) + 1) * PAGE_SIZE)
            for run in runs
        ]
        return PageTable(start, np.concatenate([np.empty(0, np.uint64), *entries]), places)


def _span(target: ProcessRange) -> tuple[int, int]:
    return target.base + target.vaddr_start, target.base + target.vaddr_end


def open_process(target: ProcessRange, files: ExitStack) -> OpenProcess:
    """Open it until ``files`` are closed; raises ProcessGone or EvidenceError."""
    start, end = _span(target)
    return OpenProcess(
        target, files.enter_context(PageMap(target.pid)), read_maps(target.pid, start=start, end=end)
    )


def places_had_by_any(processes: Sequence[OpenProcess], most_empty: int) -> NDArray[np.int64] | None:
    """The places of the pages that any of ``processes``, all of one range, has, or that are of a file.

    With the pages between two of these where there are at most ``most_empty``.  ``None`` where that is all.
    What nobody has is not looked at page by page: it may be a gigabyte.
    """
    if not processes:
        return None
    start, end = processes[0].span
    length = (end - start) // PAGE_SIZE
    if length <= most_empty:
        return None
    runs = [(length, length)]
    for process in processes:
        try:
            runs += _runs_of(process)
        except EvidenceError:  # it has ended, as is recorded when its entries are read
            continue
    done, stays = 0, list[NDArray[np.int64]]()
    for first, last in sorted(runs):
        stays.append(np.arange(done if first - done <= most_empty else first, last))
        done = max(done, last)
    places = np.concatenate(stays)
    return None if len(places) == length else places


def _runs_of(process: OpenProcess) -> list[tuple[int, int]]:
    """Runs of pages that it has, or that are of a file: the places of the first, and behind the last."""
    start, end = process.span
    runs = [(max(vma.start, start), min(vma.end, end)) for vma in process.vmas if vma.is_file]
    try:
        had = scan(process.pagemap, start, end, any_of=IS_PRESENT | IS_SWAPPED, returned=0)
        runs += zip(had["start"].tolist(), had["end"].tolist(), strict=True)
    except EvidenceError:  # PAGEMAP_SCAN is from 6.7 on
        has = (process.pagemap.read(start, end) & (PRESENT | SWAPPED | GUARD)).astype(np.bool_)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], has, [False]])))
        runs += [
            (start + first * PAGE_SIZE, start + last * PAGE_SIZE)
            for first, last in edges.reshape(-1, 2).tolist()
        ]
    return [((first - start) // PAGE_SIZE, (last - start) // PAGE_SIZE) for first, last in runs]
