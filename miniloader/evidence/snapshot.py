"""One look at every page of an image in several processes, as the kernel records it.

The page table entries are read before and after everything else is asked about them; a page whose entry
differs is marked ``changed``, so that nothing is concluded from two halves that do not belong together.
A process that ends meanwhile is recorded as gone, not raised: the others are still worth a look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, ProcessGone, UsageError
from miniloader.evidence.open_process import OpenProcess, ProcessRange, open_process, places_had_by_any
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import KPF, distinct, frame_flags, map_counts
from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import FILE, FRAME, GUARD, PRESENT, SWAPPED, PageTable
from miniloader.kernel.probe import level_for
from miniloader.kernel.query import query_vma
from miniloader.kernel.scan import IS_ZERO, lie_in, scan
from miniloader.kernel.smaps import read_smaps, sum_sizes
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.kernel.zeros import doubtful, zeros_by_sums
from miniloader.values import dataclass

__all__ = ["PAGE_DTYPE", "Backing", "ProcessPages", "ProcessRange", "Snapshot", "on_same_pages", "take"]

PAGE_DTYPE: Final = np.dtype(
    [
        ("vaddr", np.uint64),  # as linked; the address is the process's base + vaddr
        ("mapping", np.int32),  # index into ProcessPages.mappings; -1: nothing is mapped there
        ("file_offset", np.uint64),  # of the page in its mapping's file; 0 for anonymous memory
        ("frame", np.uint64),  # page frame number; 0: not present, or not known
        ("map_count", np.int64),  # over all processes; -1: not known
        ("flags", np.uint64),  # KPF flags of the frame; 0: not known
        ("present", np.bool_),
        ("swapped", np.bool_),  # bit 62 without bit 58: a swap or migration entry, or a marker
        ("file", np.bool_),  # bit 61: the page cache's own page, or shared memory
        ("exclusive", np.bool_),  # bit 56: mapped once over all processes
        ("guard", np.bool_),
        ("zero", np.bool_),  # the kernel's page of zeros
        ("zero_known", np.bool_),  # whether that is known
        ("changed", np.bool_),  # its entry, or its mapping, changed while we looked
    ]
)
"""One page of one process; see the comments at each field."""

_SETTLED: Final = PRESENT | SWAPPED | GUARD | FILE | FRAME
"""What must not change between the two readings; bits 55 to 57 may (others map and unmap the page)."""


@dataclass(frozen=True)
class Backing:
    """A mapping that the image touches, and the build-id of its file (None: it has none, or not known)."""

    vma: Vma
    build_id: bytes | None


@dataclass(frozen=True, eq=False)
class ProcessPages:
    """The pages of the image in one process.

    ``pages`` has a PAGE_DTYPE record for each page of the range, read-only.  ``reason`` is "" where it
    holds what the kernel said; else it says why not (``gone``: the process has ended), and every
    record but its vaddr is blank.  ``totals`` are the ``smaps`` sums of its own mappings in bytes, at level
    ``totals`` only.
    """

    pid: int
    base: int
    mappings: tuple[Backing, ...]
    pages: NDArray[np.void]
    totals: Mapping[str, int] | None = None
    gone: bool = False
    reason: str = ""

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The address of each page in the process."""
        return np.uint64(self.base) + self.pages["vaddr"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What the kernel said at one moment: ``when`` in seconds since the epoch, ``step`` a name for it."""

    step: str
    level: LevelName
    processes: tuple[ProcessPages, ...]
    when: float


@dataclass(frozen=True, eq=False)
class _Reading:
    """What was read of one process before its frames were asked about."""

    process: OpenProcess
    table: PageTable
    zero: NDArray[np.bool_] | None  # None: the kernel could not be asked


def take(
    targets: Sequence[ProcessRange],
    *,
    step: str = "",
    level: LevelName | None = None,
    most_empty: int | None = None,
) -> Snapshot:
    """Look at every page of ``targets`` once, at the best level of evidence that works, or at ``level``.

    A lower level than the best asks the kernel for no more than that level does.  A process that has
    ended or may not be read is recorded with its reason.  Raises EvidenceError for a level that does not
    work here, UsageError for a base that is not page-aligned.

    Pages of no file that none of the processes has are left out where more than ``most_empty`` follow one
    another, if all targets have one range: see :func:`on_same_pages`.
    """
    chosen = level_for(level)
    targets = tuple(map(_whole_pages, targets))
    when = time.time()
    match chosen:
        case "frames" | "flags":
            processes = _look(targets, with_frames=chosen == "frames", most_empty=most_empty)
        case "totals":
            processes = tuple(_recorded(target, partial(_totals, target)) for target in targets)
        case "none":
            processes = tuple(_blank(target, reason="the kernel tells nothing here") for target in targets)
    return Snapshot(step, chosen, processes, when)


def _whole_pages(target: ProcessRange) -> ProcessRange:
    if target.base % PAGE_SIZE:
        raise UsageError(f"load bias {target.base:#x}: expected a multiple of the page size {PAGE_SIZE}")
    return replace(
        target,
        vaddr_start=target.vaddr_start // PAGE_SIZE * PAGE_SIZE,
        vaddr_end=-(-target.vaddr_end // PAGE_SIZE) * PAGE_SIZE,
    )


_Found = TypeVar("_Found")


def _recorded(
    target: ProcessRange, look: Callable[[], _Found], places: NDArray[np.int64] | None = None
) -> _Found | ProcessPages:
    """What ``look`` finds, or the record of why it could not, of the pages at ``places``."""
    try:
        return look()
    except ProcessGone as error:
        return _only(_blank(target, reason=str(error), gone=True), places)
    except EvidenceError as error:
        return _only(_blank(target, reason=str(error)), places)


def _blank_pages(vaddrs: NDArray[np.uint64]) -> NDArray[np.void]:
    """A record for each page that knows nothing but its vaddr."""
    pages = np.zeros(len(vaddrs), dtype=PAGE_DTYPE)
    pages["vaddr"] = vaddrs
    pages["mapping"] = -1
    pages["map_count"] = -1
    return pages


def _blank(target: ProcessRange, *, reason: str, gone: bool = False) -> ProcessPages:
    pages = _blank_pages(np.arange(target.vaddr_start, target.vaddr_end, PAGE_SIZE, dtype=np.uint64))
    pages.flags.writeable = False
    return ProcessPages(target.pid, target.base, (), pages, gone=gone, reason=reason)


def _totals(target: ProcessRange) -> ProcessPages:
    """The sums of the image's mappings, for level ``totals``.

    The kernel may have merged its bss with somebody else's memory behind it: that mapping says nothing of it.
    """
    start, end = target.base + target.vaddr_start, target.base + target.vaddr_end
    inside = [sums for sums in read_smaps(target.pid) if start <= sums.vma.start and sums.vma.end <= end]
    return replace(
        _blank(target, reason="sums of mappings say nothing about a page"),
        mappings=tuple(Backing(sums.vma, None) for sums in inside),
        totals=MappingProxyType(sum_sizes(inside)),
    )


def _look(
    targets: Sequence[ProcessRange], *, with_frames: bool, most_empty: int | None
) -> tuple[ProcessPages, ...]:
    """Read every process's entries, then ask about all frames at once, then read the entries again."""
    with ExitStack() as files:
        opened = [_recorded(target, partial(open_process, target, files)) for target in targets]
        places = None
        if (
            most_empty is not None
            and len({(target.vaddr_start, target.vaddr_end) for target in targets}) == 1
        ):
            there = [process for process in opened if isinstance(process, OpenProcess)]
            places = places_had_by_any(there, most_empty)
        found = [
            _only(process, places)
            if isinstance(process, ProcessPages)
            else _recorded(process.target, partial(_first, process, places), places)
            for process in opened
        ]
        readings = [answer for answer in found if isinstance(answer, _Reading)]
        facts = iter(_frame_facts(readings, with_frames=with_frames))
        return tuple(
            answer
            if isinstance(answer, ProcessPages)
            else _recorded(
                answer.process.target,
                partial(_second, answer, next(facts), with_frames=with_frames),
                places,
            )
            for answer in found
        )


def _first(process: OpenProcess, places: NDArray[np.int64] | None) -> _Reading:
    """The entries at ``places``, and which of them are the page of zeros."""
    table = process.read(places)
    try:
        regions = scan(process.pagemap, *process.span, required=IS_ZERO, returned=IS_ZERO)
    except EvidenceError:  # PAGEMAP_SCAN is from 6.7 on; flags of the frames, or sums, may still tell
        return _Reading(process, table, None)
    return _Reading(process, table, lie_in(regions, table.addresses))


def _only(process: ProcessPages, places: NDArray[np.int64] | None) -> ProcessPages:
    """What is known of the pages at ``places``; ``None``: of all."""
    return process if places is None else replace(process, pages=process.pages[places])


def on_same_pages(snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """``snapshots`` that were taken one after the other, each with all the pages that any of them has.

    What one has left out nobody had then: it is added as absent.
    """
    every = [process.pages["vaddr"] for snapshot in snapshots for process in snapshot.processes]
    vaddrs = distinct(np.concatenate(every)) if every else np.empty(0, np.uint64)
    return tuple(
        replace(snapshot, processes=tuple(_with_absent(process, vaddrs) for process in snapshot.processes))
        for snapshot in snapshots
    )


def _with_absent(process: ProcessPages, vaddrs: NDArray[np.uint64]) -> ProcessPages:
    if len(process.pages) == len(vaddrs):
        return process
    pages, vmas = _blank_pages(vaddrs), [backing.vma for backing in process.mappings]
    if not process.reason:
        addresses = np.uint64(process.base) + vaddrs
        pages["mapping"] = mapping = _mapping_of(addresses, vmas)
        pages["file_offset"] = _file_offsets(addresses, mapping, vmas)
        pages["zero_known"] = True
    pages[np.searchsorted(vaddrs, process.pages["vaddr"])] = process.pages
    pages.flags.writeable = False
    return replace(process, pages=pages)


@dataclass(frozen=True, eq=False)
class _FrameFacts:
    """What the kernel says of the frames of one process's pages; None: nothing."""

    map_count: NDArray[np.uint64] | None
    flags: NDArray[np.uint64] | None


def _frame_facts(readings: Sequence[_Reading], *, with_frames: bool) -> list[_FrameFacts]:
    """The facts for each reading; one question for all of them, since they mostly share their frames."""
    if not with_frames or not readings:
        return [_FrameFacts(None, None)] * len(readings)
    frames = [reading.table.frame for reading in readings]
    ends = np.cumsum([len(array) for array in frames])[:-1]

    def split(ask: Callable[[NDArray[np.uint64]], NDArray[np.uint64]]) -> list[NDArray[np.uint64] | None]:
        try:
            return list(np.split(ask(np.concatenate(frames)), ends))
        except EvidenceError:  # counts and flags corroborate; without them the frames still prove
            return [None] * len(frames)

    return [_FrameFacts(*both) for both in zip(split(map_counts), split(frame_flags), strict=True)]


def _second(reading: _Reading, facts: _FrameFacts, *, with_frames: bool) -> ProcessPages:
    """Read the entries again and put everything together."""
    before, process = reading.table, reading.process
    target, vmas = process.target, process.vmas
    addresses, after = before.addresses, process.read(before.places)
    pages = _blank_pages(addresses - np.uint64(target.base))
    pages["mapping"] = mapping = _mapping_of(addresses, vmas)
    pages["file_offset"] = _file_offsets(addresses, mapping, vmas)
    pages["changed"] = ((before.entries ^ after.entries) & _SETTLED).astype(np.bool_)
    pages["changed"] |= _remapped(addresses, vmas, process.touched())
    for name in ("present", "swapped", "file", "exclusive", "guard"):
        pages[name] = getattr(after, name)
    if with_frames:
        pages["frame"] = after.frame
    if facts.map_count is not None:
        pages["map_count"] = np.where(after.frame != 0, facts.map_count.astype(np.int64), -1)
    if facts.flags is not None:
        pages["flags"] = facts.flags
        pages["zero"] = (facts.flags & KPF["zero_page"].mask).astype(np.bool_)
    if reading.zero is not None:
        pages["zero"] |= reading.zero
    pages["zero_known"] = True
    if reading.zero is None and facts.flags is None:
        maybe, answers = doubtful(after.entries), zeros_by_sums(process.pagemap, vmas).all_or_none
        answer = np.append(answers, np.int8(0))[mapping]
        pages["zero"] = maybe & (answer == 1)
        pages["zero_known"] = ~maybe | (answer >= 0)
    pages.flags.writeable = False
    return ProcessPages(target.pid, target.base, _backings(target.pid, vmas), pages)


def _remapped(
    addresses: NDArray[np.uint64], before: Sequence[Vma], after: Sequence[Vma]
) -> NDArray[np.bool_]:
    """Which pages are not mapped as they were."""
    # Their extents do not matter: the kernel merges and splits neighbouring mappings as it likes.
    old, new = ([*map(_meaning, vmas), None] for vmas in (before, after))
    same = np.array([[first == second for second in new] for first in old])
    return ~same[_mapping_of(addresses, before), _mapping_of(addresses, after)]


def _mapping_of(addresses: NDArray[np.uint64], vmas: Sequence[Vma]) -> NDArray[np.int64]:
    """The index of the mapping that each address lies in, -1 for none; ``vmas`` by address."""
    if not vmas:
        return np.full(len(addresses), -1)
    starts = np.array([vma.start for vma in vmas], dtype=np.uint64)
    ends = np.array([vma.end for vma in vmas], dtype=np.uint64)
    index = np.searchsorted(starts, addresses, side="right") - 1
    return np.where(addresses < ends[index], index, -1)


def _shift(vma: Vma) -> int | None:
    """What to add (modulo 2**64) to an address in ``vma`` for its file offset; None: no file."""
    return (vma.file_offset - vma.start) % 2**64 if vma.is_file else None


def _meaning(vma: Vma) -> tuple[object, ...]:
    """What a mapping says of each of its pages."""
    return _shift(vma), vma.device, vma.inode, vma.protection, vma.shared


def _file_offsets(
    addresses: NDArray[np.uint64], mapping: NDArray[np.int64], vmas: Sequence[Vma]
) -> NDArray[np.uint64]:
    """The offset of each page in its mapping's file; 0 where there is none."""
    shifts = [_shift(vma) for vma in vmas] + [None]
    shift = np.array([shift or 0 for shift in shifts], dtype=np.uint64)[mapping]
    of_file = np.array([shift is not None for shift in shifts])[mapping]
    return np.where(of_file, addresses + shift, np.uint64(0))


def _backings(pid: int, vmas: Sequence[Vma]) -> tuple[Backing, ...]:
    """The mappings with the build-id of their file, which is asked for once a file."""
    build_ids: dict[tuple[tuple[int, int], int], bytes | None] = {}
    for vma in vmas:
        key = (vma.device, vma.inode)
        if vma.is_file and key not in build_ids:
            build_ids[key] = _build_id(pid, vma)
    return tuple(Backing(vma, build_ids.get((vma.device, vma.inode))) for vma in vmas)


def _build_id(pid: int, vma: Vma) -> bytes | None:
    try:
        answer = query_vma(pid, vma.start)
    except EvidenceError:  # PROCMAP_QUERY is from 6.11 on; device, inode and path still name the file
        return None
    same = answer is not None and (answer.vma.device, answer.vma.inode) == (vma.device, vma.inode)
    return answer.build_id if answer is not None and same else None
