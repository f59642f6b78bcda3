"""What works here?  Each feature is tried for real, on a page or two of our own; never by a version.

A kernel may be patched, a container may mask files, a security module may forbid calls: the only honest
test is to do the thing and to look whether the answer is right.  All of it takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from miniloader.errors import EvidenceError
from miniloader.kernel import scan, syscalls
from miniloader.kernel.features import FEATURES, LEVELS, EvidenceLevel, Feature, LevelName
from miniloader.kernel.frames import KPF, frame_flags, map_counts
from miniloader.kernel.page_faults import FaultLog
from miniloader.kernel.pagemap import PageMap, PageTable
from miniloader.kernel.query import query_vma
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.kernel.userfault import WriteWatch
from miniloader.values import dataclass

__all__ = ["Capabilities", "Trial", "best_level", "level_for", "probe"]


@dataclass(frozen=True)
class Trial:
    """Whether ``feature`` works here; ``why`` says why not, "" where it does."""

    feature: Feature
    works: bool
    why: str


@dataclass(frozen=True)
class Capabilities:
    """What works here, one trial for each of FEATURES, in their order."""

    trials: tuple[Trial, ...]

    def works(self, name: str) -> bool:
        """Whether the feature ``name`` works; KeyError where there is none of that name."""
        return {trial.feature.name: trial.works for trial in self.trials}[name]

    @property
    def level(self) -> EvidenceLevel:
        """The best level of evidence that works."""
        return next(level for level in LEVELS if level.feature is None or self.works(level.feature))

    @property
    def next_level(self) -> EvidenceLevel | None:
        """The level above, whose ``get`` says how to reach it; None at the top."""
        position = LEVELS.index(self.level)
        return LEVELS[position - 1] if position else None


@contextmanager
def _anonymous_page() -> Iterator[int]:
    """The address of a fresh writable page, not touched yet."""
    address = syscalls.mmap(
        0,
        PAGE_SIZE,
        syscalls.PROT_READ | syscalls.PROT_WRITE,
        syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS,
    )
    try:
        yield address
    finally:
        syscalls.munmap(address, PAGE_SIZE)


@contextmanager
def _file_page() -> Iterator[int]:
    """The address of a page of a file, mapped privately and writable, not touched yet."""
    fd = os.memfd_create("miniloader-probe")
    try:
        os.write(fd, b"x" * PAGE_SIZE)
        address = syscalls.mmap(
            0, PAGE_SIZE, syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_PRIVATE, fd
        )
    finally:
        os.close(fd)
    try:
        yield address
    finally:
        syscalls.munmap(address, PAGE_SIZE)


def _read(address: int) -> None:
    ctypes.string_at(address, 1)


def _write(address: int) -> None:
    ctypes.memset(address, 1, 1)


def _entry(address: int) -> PageTable:
    with PageMap() as pagemap:
        return pagemap.table(address, address + PAGE_SIZE)


def _expect(right: object, otherwise: str) -> None:
    if not right:
        raise EvidenceError(otherwise)


def _smaps() -> None:
    with _anonymous_page() as address:
        _write(address)
        sizes = next((sums.sizes for sums in read_smaps() if address in sums.vma), {})
        _expect(sizes.get("Anonymous", 0) >= PAGE_SIZE, "a page just written is not counted")


def _pagemap() -> None:
    with _file_page() as address:
        _read(address)
        _expect((before := _entry(address)).present.all(), "a page just read is not shown as present")
        _expect(before.file.all(), "a page of a file is not shown as one (bit 61)")
        _write(address)
        _expect((after := _entry(address)).present.all(), "a page just written is not shown as present")
        _expect(not after.file.any(), "a page copied on write is still shown as the file's (bit 61)")


def _frame(address: int) -> np.uint64:
    """The frame number of the page at ``address`` after writing it; 0 where it is hidden."""
    _write(address)
    number: np.uint64 = _entry(address).frame[0]
    return number


def _frames() -> None:
    with _anonymous_page() as address:
        _expect(_frame(address), "frame numbers read as 0: no CAP_SYS_ADMIN of the initial user namespace")


def _kpagecount() -> None:
    with _anonymous_page() as address:
        frame = _frame(address)
        count = map_counts(np.array([frame]))[0]  # says first whether the file may be read at all
        _expect(frame, "it opens, but there are no frame numbers to look up")
        _expect(count == 1, f"a page mapped once has count {count}")


def _kpageflags() -> None:
    with _anonymous_page() as address:
        frame = _frame(address)
        flags = frame_flags(np.array([frame]))[0]
        _expect(frame, "it opens, but there are no frame numbers to look up")
        _expect(flags & KPF["anonymous"].mask, f"an anonymous page has flags {flags:#x}")


def _pagemap_scan() -> None:
    with _anonymous_page() as address, PageMap() as pagemap:
        _read(address)
        wanted = scan.IS_PRESENT | scan.IS_ZERO
        runs = scan.scan(pagemap, address, address + PAGE_SIZE, required=wanted, returned=wanted)
        _expect(len(runs) == 1, "the page of zeros is not reported")


def _procmap_query() -> None:
    with _file_page() as address:
        reply = query_vma(None, address)
        _expect(reply and reply.vma.start == address, "our own mapping is not found")


def _userfaultfd() -> None:
    with _file_page() as address, WriteWatch(address, address + PAGE_SIZE) as watch:
        _read(address)
        _expect(not len(watch.written()), "a page only read is reported as written")
        _write(address)
        _expect(len(watch.written()), "a page just written is not reported")


def _page_faults() -> None:
    with _anonymous_page() as address, FaultLog(os.getpid()) as log:
        _write(address)
        touched = {fault.address // PAGE_SIZE * PAGE_SIZE for fault in log.read()}
        _expect(address in touched, "a page just written is not among them")


_CHECKS: Final[dict[str, Callable[[], None]]] = {
    "smaps": _smaps,
    "pagemap": _pagemap,
    "frames": _frames,
    "kpagecount": _kpagecount,
    "kpageflags": _kpageflags,
    "pagemap-scan": _pagemap_scan,
    "procmap-query": _procmap_query,
    "page-faults": _page_faults,
    "userfaultfd": _userfaultfd,
}


def _try(feature: Feature) -> Trial:
    try:
        _CHECKS[feature.name]()
    except EvidenceError as error:
        return Trial(feature, False, error.message)
    except OSError as error:
        return Trial(feature, False, error.strerror or str(error))
    return Trial(feature, True, "")


def probe() -> Capabilities:
    """Try every feature on pages of this process; raises nothing, and leaves nothing behind."""
    return Capabilities(tuple(_try(feature) for feature in FEATURES))


def level_for(wanted: LevelName | None, *, at_least: LevelName = "none") -> LevelName:
    """The level ``wanted`` (None: the best that works here).

    Raises EvidenceError where less works, or it is less than ``at_least``.
    """
    names, best = [level.name for level in LEVELS], best_level()
    chosen = best if wanted is None else wanted
    needed = min(chosen, at_least, key=names.index)
    if names.index(needed) < names.index(best):
        how = next(level.get for level in LEVELS if level.name == needed)
        raise EvidenceError(f"evidence level {needed}: only {best} works here", hint=how)
    if needed != chosen:
        raise EvidenceError(f"evidence level {needed} is needed: {chosen} says nothing about a page")
    return chosen


def best_level() -> LevelName:
    """The best level of evidence that works here, by trying only what decides it."""
    features = {feature.name: feature for feature in FEATURES}
    return next(
        level.name for level in LEVELS if level.feature is None or _try(features[level.feature]).works
    )
