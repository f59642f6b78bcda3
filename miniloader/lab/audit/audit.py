"""``audit``: which pages of running processes are one copy, which are private, and why."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.evidence.cause import bit, cause_names
from miniloader.evidence.slots import LOADER, Facts
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import KPF, distinct, frame_flags, has_merged, map_counts, marks_merged
from miniloader.kernel.probe import level_for
from miniloader.kernel.procfs import read_process_file, require_proc
from miniloader.kernel.smaps import read_rollup
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.mapped_files import Identity, MappedFile, MappedFiles
from miniloader.lab.audit.result import (
    Audit,
    AuditedLibrary,
    AuditedProcess,
    LibraryProcess,
    PrivatePage,
    Unreadable,
)
from miniloader.lab.audit.survey import SWAPPED_OUT, FileInProcess, Survey, survey
from miniloader.lab.workers.fork_map import share_out
from miniloader.values import dataclass

__all__ = ["audit", "jobs_for", "matches"]

_BSS: Final = bit("bss")
_RELOCATION: Final = bit("relocation")
_UNKNOWN: Final = bit("unknown")
_WORTH_A_JOB: Final = 12  # processes; to look at fewer takes no longer than to ask for help
_WRITTEN: Final = bit("write") | bit("overwritten") | bit("bss")


def audit(
    pids: Iterable[int],
    *,
    library: str | None = None,
    causes: bool = True,
    level: LevelName | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> Audit:
    """Look at the processes ``pids`` and say of every file they have privately mapped what is shared.

    ``library`` chooses files by a shell pattern, or a part of the path.  ``causes=False`` only counts.
    ``level`` asks for less evidence than the best that works here.  ``on_progress`` is told how many
    processes are done, about, and of how many.  At most so many ``jobs`` look at once (see :func:`jobs_for`):
    more than one forks, which is not for a program with threads (fork(2)).  Nothing is stopped, nothing
    written, nothing mapped into the processes.

    A process that ends meanwhile or may not be read is listed as unreadable.  Raises EvidenceError where
    the kernel tells nothing about pages (below level ``flags``), or less than ``level``.
    """
    require_proc()
    chosen = level_for(level, at_least="flags")
    files, every, when = MappedFiles(), list(dict.fromkeys(pids)), time.time()
    look = partial(survey, files=files, causes=causes, frames=chosen == "frames", wanted=_wanted(library))
    shares = max(1, min(jobs, jobs_for(every)))
    done, this = 0, os.getpid()

    def tell(more: int) -> None:
        nonlocal done
        done = min(done + more, len(every))
        if on_progress is not None and os.getpid() == this:  # and not in a helper
            on_progress(done, len(every))

    def look_at(part: Sequence[int]) -> list[Survey | Unreadable]:
        seen = list[Survey | Unreadable]()
        for pid in part:
            seen.append(_look(pid, look))
            tell(shares)
        return seen

    tell(0)
    # The first is looked at before anybody helps: most of the files are known then.
    seen = [_look(pid, look) for pid in every[:1]]
    tell(len(seen))
    seen += (one for answer in share_out(look_at, every[1:], shares) for one in answer)
    surveys = [one for one in seen if isinstance(one, Survey)]
    _settle(surveys, files)
    mine, merged = _by_process(surveys), _merged(surveys, chosen)
    return Audit(
        level=chosen,
        when=when,
        page_size=PAGE_SIZE,
        explained=causes,
        processes=_costs(surveys, mine, chosen, merged),
        libraries=tuple(
            sorted(
                (_library(group, chosen, causes, merged) for group in _grouped(mine)),
                key=lambda one: (-one.private, -one.present, one.path),
            )
        ),
        unreadable=tuple(one for one in seen if isinstance(one, Unreadable)),
    )


def jobs_for(pids: Collection[int]) -> int:
    """How many jobs are worth their while; 1 where this process is among them, whose memory helpers share."""
    return 1 if os.getpid() in pids else max(1, len(pids) // _WORTH_A_JOB)


def _settle(surveys: Sequence[Survey], files: MappedFiles) -> None:
    """Have all of them refer to the same ``files``: a helper's are its own.

    What a helper could read may be gone by now, with the process: then the causes stay, without names.
    """
    for one in surveys:
        for here in one.files:
            here.file = files.same(here.file)
            if here.file.facts is None:
                here.reasons = dict.fromkeys(range(len(here.causes)), here.file.trouble) | here.reasons


def _look(pid: int, look: Callable[[int], Survey]) -> Survey | Unreadable:
    try:
        return look(pid)
    except ProcessGone as error:
        return Unreadable(pid, error.message, "")
    except EvidenceError as error:
        return Unreadable(pid, error.message, error.hint or "")


def matches(pattern: str, *texts: str) -> bool:
    """Whether a shell pattern fits one of ``texts``; one without wildcards fits what it is a part of."""
    if any(mark in pattern for mark in "*?["):
        return any(fnmatch(text, pattern) for text in texts)
    return any(pattern in text for text in texts)


def _wanted(library: str | None) -> Callable[[Identity], bool]:
    if library is None:
        return lambda _: True
    return lambda one: matches(library, one.path, one.path.rpartition("/")[2])


# -------------------------------------------------------------------------------------------- processes
def _costs(
    surveys: Sequence[Survey],
    files: Sequence[Sequence[_InProcess]],
    level: LevelName,
    merged: NDArray[np.uint64] | None,
) -> tuple[AuditedProcess, ...]:
    """What each process costs, with its ``files``."""
    pss: list[int | None] = [None] * len(surveys)
    if level == "frames" and surveys:
        with suppress(EvidenceError):  # kpagecount is for root alone: PSS stays unknown
            pss = [*_proportional(surveys, files)]
    return tuple(
        AuditedProcess(
            pid=one.pid,
            name=one.name,
            parent=one.parent,
            started=one.started,
            rss=one.rss * PAGE_SIZE,
            pss=pss[index],
            uss=one.exclusive * PAGE_SIZE,
            anonymous=one.anonymous,
            anonymous_shared=one.anonymous_shared,
            ksm=_number_merged(one, merged),
            zero=one.zero,
            huge=one.huge,
            swapped=one.swapped,
        )
        for index, one in enumerate(surveys)
    )


def _proportional(surveys: Sequence[Survey], files: Sequence[Sequence[_InProcess]]) -> list[int]:
    """The PSS of each process in bytes.

    The kernel is asked at once about the frames of all, and each array of them is looked up only once.
    """
    others = [one.frames_outside_files for one in surveys]
    arrays = {id(one.own): one.own for mine in files for one in mine} | {id(one): one for one in others}
    frames = _distinct(arrays.values())
    # A page that has been given up since counts as its own, not as infinitely shared.
    shares = PAGE_SIZE / np.maximum(map_counts(frames), np.uint64(1)).astype(np.float64)
    part = {key: float(shares[np.searchsorted(frames, array)].sum()) for key, array in arrays.items()}
    return [
        round(survey.alone * PAGE_SIZE + part[id(other)] + sum([part[id(one.own)] for one in mine]))
        for survey, other, mine in zip(surveys, others, files, strict=True)
    ]


def _merged(surveys: Sequence[Survey], level: LevelName) -> NDArray[np.uint64] | None:
    """The frames that KSM has merged pages into; None where the kernel does not tell which they are."""
    if not has_merged():
        return np.empty(0, np.uint64)
    try:
        if level != "frames" or not marks_merged():
            return None
        anonymous = _distinct([one.copies.frames for one in surveys])
        return anonymous[(frame_flags(anonymous) & KPF["ksm"].mask).astype(np.bool_)]
    except EvidenceError:  # kpageflags is for root alone
        return None


def _number_merged(one: Survey, merged: NDArray[np.uint64] | None) -> int | None:
    """How many pages of a process KSM has merged: by their frames, else by the kernel's sums (6.6; 5.19)."""
    if merged is not None:
        return int(np.isin(one.copies.frames, merged).sum()) if len(merged) else 0
    try:
        sizes = read_rollup(one.pid)
        if "KSM" in sizes:
            return sizes["KSM"] // PAGE_SIZE
        return int(read_process_file(one.pid, "ksm_merging_pages"))
    except EvidenceError:
        return None


def _distinct(arrays: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The different values in all arrays, sorted."""
    return distinct(np.concatenate([np.empty(0, np.uint64), *arrays]))


# -------------------------------------------------------------------------------------------- libraries
@dataclass(frozen=True, eq=False)
class _InProcess:
    """A file in a process, whose it is, and the frames of the pages that are its own.

    Processes that run the same program often have just the same: then it is one array.
    """

    pid: int
    here: FileInProcess
    own: NDArray[np.uint64]


def _by_process(surveys: Sequence[Survey]) -> list[list[_InProcess]]:
    """The files of each process."""
    known: dict[tuple[int, bytes], NDArray[np.uint64]] = {}
    found = []
    for one in surveys:
        found.append(list[_InProcess]())
        for here in one.files:
            frames = here.file_frames
            own = known.setdefault((here.file.number, frames.tobytes()), frames)
            found[-1].append(_InProcess(one.pid, here, own))
    return found


def _grouped(files: Sequence[Sequence[_InProcess]]) -> list[list[_InProcess]]:
    """What belongs to one library: files with one build-id, or with a frame in common."""
    every = [one for mine in files for one in mine]
    leader: dict[int, int] = {}

    def root(number: int) -> int:
        while leader.setdefault(number, number) != number:
            number = leader[number]
        return number

    by_build_id: dict[str, int] = {}
    for file in {one.here.file.number: one.here.file for one in every}.values():
        if file.build_id is not None:
            leader[root(file.number)] = root(by_build_id.setdefault(file.build_id, file.number))
    for first, second in _with_common_frames(every):
        leader[root(first)] = root(second)
    groups: dict[int, list[_InProcess]] = {}
    for one in every:
        groups.setdefault(root(one.here.file.number), []).append(one)
    return list(groups.values())


def _with_common_frames(every: Sequence[_InProcess]) -> Iterable[tuple[int, int]]:
    """Pairs of file numbers that have a frame of the page cache in common: one file under two names."""
    different = {id(one.own): one for one in every}.values()
    frames = np.concatenate([np.empty(0, np.uint64), *[one.own for one in different]])
    number = np.repeat(
        np.array([one.here.file.number for one in different], np.int64), [len(one.own) for one in different]
    )
    frames, number = frames[frames != 0], number[frames != 0]
    order = np.argsort(frames, kind="stable")
    frames, number = frames[order], number[order]
    common = (frames[1:] == frames[:-1]) & (number[1:] != number[:-1])
    pairs = distinct(number[:-1][common] << 32 | number[1:][common])
    return [(pair >> 32, pair & 0xFFFFFFFF) for pair in pairs.tolist()]


def _library(
    mine: Sequence[_InProcess], level: LevelName, causes: bool, merged: NDArray[np.uint64] | None
) -> AuditedLibrary:
    paths = Counter(one.here.file.identity.path for one in mine)
    file = next((one.here.file for one in mine if one.here.file.facts is not None), mine[0].here.file)
    return AuditedLibrary(
        path=max(paths, key=paths.__getitem__),
        build_id=next((one.here.file.build_id for one in mine if one.here.file.build_id), None),
        files=_separate_files(mine),
        frames=_frames(mine, level),
        processes=tuple(_in_process(one, merged) for one in mine),
        private_pages=_private_pages(mine, file) if causes else (),
        bss_pages=_bss_pages(mine, file) if causes else (),
        swapped_pages=_swapped_pages(mine, file) if causes else (),
    )


def _in_process(one: _InProcess, merged: NDArray[np.uint64] | None) -> LibraryProcess:
    here, several = one.here, one.here.several_frames
    by_ksm = int(np.isin(several, merged).sum()) if merged is not None and len(merged) else 0
    return LibraryProcess(
        pid=one.pid,
        base=here.base,
        mapped=here.mapped,
        present=here.shared + here.private,
        shared=here.shared,
        private=here.private,
        inherited=len(several) - by_ksm,
        merged=None if merged is None and len(several) else by_ksm,
        bss=len(here.bss_vaddrs),
        swapped=len(here.swapped_vaddrs),
        beforehand=here.beforehand,
    )


def _separate_files(mine: Sequence[_InProcess]) -> int:
    """How many files they are: those with a frame in common are one."""
    numbers = {one.here.file.number: one.here.file.number for one in mine}
    if len(numbers) == 1:
        return 1
    for first, second in _with_common_frames(mine):
        joined, other = numbers[first], numbers[second]
        numbers = {key: joined if value == other else value for key, value in numbers.items()}
    # The same device and inode under several names (containers, a deleted name) is one file, too.
    inodes = {one.here.file.number: one.here.file.identity[:2] for one in mine}
    return min(len(set(numbers.values())), len(set(inodes.values())))


def _frames(mine: Sequence[_InProcess], level: LevelName) -> int:
    """The pages of memory behind all present pages."""
    if level == "frames":
        # A copy that is mapped once is a frame of its own; the others may be anybody's.
        several = [one.here.several_frames for one in mine]
        alone = sum([one.here.private for one in mine]) - sum([len(frames) for frames in several])
        return alone + len(_distinct([*{id(one.own): one.own for one in mine}.values(), *several]))
    places: dict[int, list[NDArray[np.uint64]]] = {}
    for one in mine:
        places.setdefault(one.here.file.number, []).append(one.here.own_offsets)
    return sum(len(_distinct(offsets)) for offsets in places.values()) + sum(one.here.private for one in mine)


# ------------------------------------------------------------------------------------------------ pages
def _private_pages(mine: Sequence[_InProcess], file: MappedFile) -> tuple[PrivatePage, ...]:
    """The private pages, processes with the same page, causes and symbols together."""
    found: dict[tuple[int, int, str, tuple[int, ...], tuple[int, ...]], list[_Who]] = {}
    for one in mine:
        here = one.here
        written: dict[int, list[tuple[int, int]]] = {}
        for page, symbol, cause in here.written.tolist():
            written.setdefault(page, []).append((symbol, cause))
        columns = (here.vaddrs, here.causes, here.frames, here.is_common)
        rows = zip(*[column.tolist() for column in columns], strict=True)
        for page, (vaddr, causes, frame, common) in enumerate(rows):
            symbols = written.get(page, ())
            changed = tuple(sorted({symbol for symbol, cause in symbols if cause & _WRITTEN}))
            kept = tuple(sorted({symbol for symbol, cause in symbols if not cause & _WRITTEN}))
            key = (vaddr, causes, here.reasons.get(page, ""), changed, kept)
            found.setdefault(key, []).append(_Who(one.pid, frame, common))
    static: dict[int, _OnPage] = {}
    pages = []
    for (vaddr, causes, reason, changed, kept), who in sorted(found.items()):
        if vaddr not in static:
            static[vaddr] = _on_page(file.facts, vaddr)
        pages.append(_page(file.facts, static[vaddr], vaddr, causes, reason, changed, kept, who))
    return tuple(pages)


class _Who(NamedTuple):
    """A process that has a page: in which frame, and whether somebody else has that, too."""

    pid: int
    frame: int
    common: bool


@dataclass(frozen=True)
class _OnPage:
    """What the file says of one page: its section, the symbols that are relocated on it, the kinds."""

    section: str
    relocated: frozenset[int]
    kinds: dict[str, int]


def _on_page(facts: Facts | None, vaddr: int) -> _OnPage:
    if facts is None:
        return _OnPage("", frozenset(), {})
    ends = np.array([vaddr, vaddr + PAGE_SIZE], np.uint64)
    low, high = np.searchsorted(facts.slot_vaddrs, ends).tolist()
    slots = facts.slots[low:high]
    slots = slots[slots["what"] != LOADER]
    numbers = facts.symbols_at(slots["vaddr"])
    counts = sorted(Counter(slots["kind"].tolist()).items())
    named = {facts.kind_name(kind): count for kind, count in counts}
    return _OnPage(facts.section_on(vaddr), frozenset(numbers[numbers >= 0].tolist()), named)


def _page(
    facts: Facts | None,
    on_page: _OnPage,
    vaddr: int,
    causes: int,
    reason: str,
    changed: tuple[int, ...],
    kept: tuple[int, ...],
    who: Sequence[_Who],
) -> PrivatePage:
    symbols = {*changed, *kept}
    if causes & _RELOCATION:
        symbols |= on_page.relocated
    return PrivatePage(
        vaddr=vaddr,
        section=on_page.section,
        symbols=_names(facts, symbols),
        written=_names(facts, changed),
        causes=cause_names(causes),
        kinds=on_page.kinds if causes & _RELOCATION else {},
        pids=tuple(one.pid for one in who),
        groups=_groups(who),
        reason=reason,
        common=tuple(one.pid for one in who if one.common),
    )


def _names(facts: Facts | None, numbers: Iterable[int]) -> tuple[str, ...]:
    """The symbols' names, by vaddr."""
    return () if facts is None else tuple(facts.symbol_name(number) for number in sorted(numbers))


def _groups(who: Sequence[_Who]) -> tuple[tuple[int, ...], ...]:
    """The pids by frame; () where no two have the same, or frames are hidden."""
    by_frame: dict[int, list[int]] = {}
    for one in who:
        by_frame.setdefault(one.frame, []).append(one.pid)
    if 0 in by_frame or len(by_frame) == len(who):
        return ()
    return tuple(tuple(pids) for pids in by_frame.values())


def _bss_pages(mine: Sequence[_InProcess], file: MappedFile) -> tuple[PrivatePage, ...]:
    """The anonymous pages of bss; their symbols are all that lie on them."""
    nothing = _OnPage(".bss", frozenset(), {})
    return tuple(
        _page(file.facts, nothing, vaddr, _BSS, "", _bss_symbols(file.facts, vaddr), (), who)
        for vaddr, who in _holders((one.pid, one.here.bss_vaddrs) for one in mine)
    )


def _swapped_pages(mine: Sequence[_InProcess], file: MappedFile) -> tuple[PrivatePage, ...]:
    """The copies that are swapped out, whose cause cannot be known."""
    return tuple(
        _page(file.facts, _on_page(file.facts, vaddr), vaddr, _UNKNOWN, SWAPPED_OUT, (), (), who)
        for vaddr, who in _holders((one.pid, one.here.swapped_vaddrs) for one in mine)
    )


def _holders(
    vaddrs: Iterable[tuple[int, NDArray[np.uint64]]],
) -> list[tuple[int, list[_Who]]]:
    """By vaddr, ascending: who has that page; its frame is not told."""
    found: dict[int, list[_Who]] = {}
    for pid, here in vaddrs:
        for vaddr in here.tolist():
            found.setdefault(vaddr, []).append(_Who(pid, 0, False))
    return sorted(found.items())


def _bss_symbols(facts: Facts | None, vaddr: int) -> tuple[int, ...]:
    return () if facts is None else facts.symbols_between(vaddr, vaddr + PAGE_SIZE)
