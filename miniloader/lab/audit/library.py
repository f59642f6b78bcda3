"""One library of an audit: its files and processes, its private pages and what is on them.

Files are one library where they have the same build-id and segments, or a frame in common.  A
:class:`Occurrence` is one of its files in one process, of which there may be several.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.header import Segment
from miniloader.evidence.cause_names import bit, cause_names
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.slots import LOADER
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import distinct
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.equal_arrays import EqualArrays
from miniloader.lab.audit.file_in_process import SWAPPED_OUT, FileInProcess
from miniloader.lab.audit.mapped_files import MappedFile
from miniloader.lab.audit.process_pages import Narrow
from miniloader.lab.audit.result import AuditedLibrary, LibraryProcess, PrivatePage
from miniloader.lab.audit.survey import Survey
from miniloader.values import NamedTuple, dataclass

__all__ = ["Occurrence", "libraries_of", "occurrences_of"]

_BSS: Final = bit("bss")
_RELOCATION: Final = bit("relocation")
_OVERWRITTEN: Final = bit("overwritten")
_UNKNOWN: Final = bit("unknown")
_NONE: Final[tuple[int, ...]] = ()
_WRITTEN: Final = bit("write") | bit("overwritten") | bit("bss")


class Occurrence(NamedTuple):
    """A file in process ``pid``, and the frames of those of its pages there that are the file's own.

    Processes that run the same program often have just the same frames: then it is one array.  ``pss`` is
    what the file takes there in proportion, in bytes; None where that is not known.
    """

    pid: int
    placed: FileInProcess
    frames: Narrow
    pss: int | None

    @property
    def file(self) -> MappedFile:
        """The file."""
        return self.placed.file


def occurrences_of(
    surveys: Sequence[Survey], pss: Sequence[NDArray[np.float64] | None]
) -> list[list[Occurrence]]:
    """The files of each process; ``pss`` is, for each process, that of each of its mappings in bytes."""
    arrays, occurrences = defaultdict[int, EqualArrays](EqualArrays), []
    for process, pss_of in zip(surveys, pss, strict=True):
        of_process = list[Occurrence]()
        by_mapping = None if pss_of is None else pss_of.tolist()
        for placed in process.files:
            frames = arrays[placed.file.number].first(placed.file_frames)
            takes = (
                None if by_mapping is None else round(sum([by_mapping[index] for index in placed.mappings]))
            )
            of_process.append(Occurrence(process.pid, placed, frames, takes))
        occurrences.append(of_process)
    return occurrences


def libraries_of(
    files: Sequence[Sequence[Occurrence]],
    level: LevelName,
    merged: NDArray[np.uint64] | None,
    *,
    causes: bool,
) -> tuple[AuditedLibrary, ...]:
    """The libraries of all processes, whose ``files`` are given; those with the most own pages first.

    ``merged`` are the frames that KSM has merged pages into, None where that is not known.  Without
    ``causes`` no private page is told one by one.
    """
    libraries = [_library(group, level, causes, merged) for group in _grouped(files)]
    return tuple(sorted(libraries, key=_order))


def _order(library: AuditedLibrary) -> tuple[int, int, int, str]:
    return -library.own, -library.private, -library.present, library.path


def _distinct(arrays: Iterable[Narrow]) -> NDArray[np.uint64]:
    """The different values in all arrays, sorted."""
    return distinct(np.concatenate([np.empty(0, np.uint64), *arrays]))


def _grouped(files: Sequence[Sequence[Occurrence]]) -> list[list[Occurrence]]:
    """What belongs to one library: files with one build-id and the same segments, or with a frame in common.

    A build-id is what a file says of itself, and any file can say any.
    """
    occurrences = [occurrence for of_process in files for occurrence in of_process]
    leader: dict[int, int] = {}

    def root(number: int) -> int:
        while leader.setdefault(number, number) != number:
            number = leader[number]
        return number

    alike: dict[tuple[str, tuple[Segment, ...]], int] = {}
    for file in {occurrence.file.number: occurrence.file for occurrence in occurrences}.values():
        if file.build_id is not None:
            image = file.facts.image if file.facts is not None else None
            claim = file.build_id, image.loads if image is not None else ()
            leader[root(file.number)] = root(alike.setdefault(claim, file.number))
    for first, second in _with_common_frames(occurrences):
        leader[root(first)] = root(second)
    groups: dict[int, list[Occurrence]] = {}
    for occurrence in occurrences:
        groups.setdefault(root(occurrence.file.number), []).append(occurrence)
    return list(groups.values())


def _with_common_frames(occurrences: Sequence[Occurrence]) -> Iterable[tuple[int, int]]:
    """Pairs of file numbers that have a frame of the page cache in common: one file under two names."""
    different = {id(occurrence.frames): occurrence for occurrence in occurrences}.values()
    frames = np.concatenate([np.empty(0, np.uint64), *[occurrence.frames for occurrence in different]])
    numbers = np.array([occurrence.file.number for occurrence in different], np.int64)
    number = np.repeat(numbers, [len(occurrence.frames) for occurrence in different])
    frames, number = frames[frames != 0], number[frames != 0]
    order = np.argsort(frames, kind="stable")
    frames, number = frames[order], number[order]
    common = (frames[1:] == frames[:-1]) & (number[1:] != number[:-1])
    pairs = distinct(number[:-1][common] << 32 | number[1:][common])
    return [(pair >> 32, pair & 0xFFFFFFFF) for pair in pairs.tolist()]


def _library(
    occurrences: Sequence[Occurrence], level: LevelName, causes: bool, merged: NDArray[np.uint64] | None
) -> AuditedLibrary:
    files = [occurrence.placed.file for occurrence in occurrences]
    paths = Counter([file.identity.path for file in files])
    several = [occurrence.placed.several_frames for occurrence in occurrences]
    return AuditedLibrary(
        path=max(paths, key=paths.__getitem__),
        build_id=next((file.build_id for file in files if file.build_id), None),
        files=_separate_files(occurrences),
        frames=_frames(occurrences, several, level),
        processes=tuple(map(_in_process, occurrences, several, repeat(merged))),
        private_pages=_private_pages(occurrences) if causes else (),
        bss_pages=_bss_pages(occurrences) if causes else (),
        swapped_pages=_swapped_pages(occurrences) if causes else (),
    )


def _in_process(occurrence: Occurrence, several: Narrow, merged: NDArray[np.uint64] | None) -> LibraryProcess:
    """What a file costs in one process, where copies in the frames ``several`` are mapped elsewhere, too."""
    placed = occurrence.placed
    shared, private, bss, swapped = placed.shared, placed.private, placed.bss_vaddrs, placed.swapped_vaddrs
    by_ksm = int(np.isin(several, merged).sum()) if merged is not None and len(merged) else 0
    inherited, by_ksm_known = len(several) - by_ksm, merged is not None or not len(several)
    return LibraryProcess(  # in the order of its fields: by name they take twice as long
        occurrence.pid, placed.base % 2**64, placed.mapped, shared + private, shared, private, inherited,
        len(bss), len(swapped), placed.beforehand, by_ksm if by_ksm_known else None, occurrence.pss,
    )  # fmt: skip


def _separate_files(occurrences: Sequence[Occurrence]) -> int:
    """How many files a library is: those with a frame in common are one."""
    files = {occurrence.file.number: occurrence.file for occurrence in occurrences}
    if len(files) == 1:
        return 1
    joined = {number: number for number in files}
    for first, second in _with_common_frames(occurrences):
        old, new = joined[second], joined[first]
        joined = {number: new if leader == old else leader for number, leader in joined.items()}
    # The same device and inode under several names (containers, a deleted name) is one file, too.
    inodes = {file.identity[:2] for file in files.values()}
    return min(len(set(joined.values())), len(inodes))


def _frames(occurrences: Sequence[Occurrence], several: Sequence[Narrow], level: LevelName) -> int:
    """The pages of memory behind all present pages; ``several`` are frames of copies that others have."""
    private = sum([occurrence.placed.private for occurrence in occurrences])
    if level == "frames":
        # A copy that is mapped once is a frame of its own; the others may be anybody's.
        own = {id(occurrence.frames): occurrence.frames for occurrence in occurrences}.values()
        return private - sum([len(frames) for frames in several]) + len(_distinct([*own, *several]))
    places: dict[int, list[NDArray[np.uint64]]] = {}
    for occurrence in occurrences:
        places.setdefault(occurrence.file.number, []).append(occurrence.placed.own_offsets)
    return private + sum(len(_distinct(offsets)) for offsets in places.values())


# ------------------------------------------------------------------------------------------------ pages
class _Holder(NamedTuple):
    """A process that has a page: in which frame, and whether somebody else has that, too.

    0 is a frame that is not told; a number below is one that nobody else has, whichever it is.
    """

    pid: int
    frame: int = 0
    common: bool = False


@dataclass(frozen=True)
class _OnPage:
    """What the file says of one page: its section, the symbols that are relocated on it, the kinds."""

    section: str
    relocated: frozenset[int]
    kinds: tuple[tuple[str, int], ...]


class _Told(NamedTuple):
    """What is told of a private page, but for who has it.  Names, not numbers: each file has its own."""

    vaddr: int
    section: str
    symbols: tuple[str, ...]
    written: tuple[str, ...]
    causes: int
    kinds: tuple[tuple[str, int], ...]
    reason: str


class _Key(NamedTuple):
    """What processes have alike of a private page of one file.

    The symbols, by their numbers in that file, are those that were written after relocation, and those that
    only the loader wrote.
    """

    vaddr: int
    causes: int
    reason: str
    changed: tuple[int, ...]
    kept: tuple[int, ...]


def _private_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
    """The private pages, processes with the same page, causes and symbols together."""
    holders: dict[tuple[_Key, int], list[_Holder]] = {}
    for number, occurrence in enumerate(occurrences):
        for key, holder in _pages_of(occurrence, _Holder(occurrence.pid, -1 - number)):
            holders.setdefault((key, occurrence.file.number), []).append(holder)
    facts = {occurrence.file.number: occurrence.file.facts for occurrence in occurrences}
    on_pages = _on_all_pages({(key.vaddr, number) for key, number in holders}, facts)
    return _pages(
        (_told(facts[number], on_pages[key.vaddr, number], key), of_page)
        for (key, number), of_page in sorted(holders.items(), key=lambda item: item[0])
    )


def _pages_of(occurrence: Occurrence, alone: _Holder) -> Iterable[tuple[_Key, _Holder]]:
    """The private pages of a file in a process, and who has each: ``alone``, where nobody else does."""
    placed = occurrence.placed
    written: dict[int, list[tuple[int, int]]] = {}
    for page, symbol, cause in placed.written.tolist():
        written.setdefault(page, []).append((symbol, cause))
    columns = (placed.vaddrs, placed.causes, placed.frames, placed.is_common)
    rows = zip(*[column.tolist() for column in columns], strict=True)
    for page, (vaddr, causes, frame, common) in enumerate(rows):
        changed, kept = _NONE, _NONE
        if symbols := written.get(page):
            changed = tuple(sorted({symbol for symbol, cause in symbols if cause & _WRITTEN}))
            kept = tuple(sorted({symbol for symbol, cause in symbols if not cause & _WRITTEN}))
        key = _Key(vaddr, causes, placed.reasons.get(page, ""), changed, kept)
        yield key, alone if frame and not common else _Holder(occurrence.pid, frame, common)


def _bss_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
    """The anonymous pages of bss; their symbols are all that lie on them."""
    on_page = _OnPage(".bss", frozenset(), ())
    holders, facts = _holders((occurrence, occurrence.placed.bss_vaddrs) for occurrence in occurrences)
    return _pages(
        (
            _told(facts[number], on_page, _Key(vaddr, _BSS, "", _bss_symbols(facts[number], vaddr), ())),
            of_page,
        )
        for (vaddr, number), of_page in holders.items()
    )


def _swapped_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
    """The copies that are swapped out, whose cause cannot be known."""
    holders, facts = _holders((occurrence, occurrence.placed.swapped_vaddrs) for occurrence in occurrences)
    on_pages = _on_all_pages(holders, facts)
    return _pages(
        (
            _told(facts[number], on_pages[vaddr, number], _Key(vaddr, _UNKNOWN, SWAPPED_OUT, _NONE, _NONE)),
            of_page,
        )
        for (vaddr, number), of_page in holders.items()
    )


def _holders(
    pages: Iterable[tuple[Occurrence, NDArray[np.uint64]]],
) -> tuple[dict[tuple[int, int], list[_Holder]], dict[int, FileFacts | None]]:
    """Who has each page, by vaddr and the number of its file, in order, and what is in these files.

    ``pages`` are the vaddrs of occurrences.
    """
    holders: dict[tuple[int, int], list[_Holder]] = {}
    facts: dict[int, FileFacts | None] = {}
    for occurrence, vaddrs in pages:
        facts[occurrence.file.number] = occurrence.file.facts
        for vaddr in vaddrs.tolist():
            holders.setdefault((vaddr, occurrence.file.number), []).append(_Holder(occurrence.pid))
    return dict(sorted(holders.items())), facts


def _on_all_pages(
    places: Iterable[tuple[int, int]], facts: Mapping[int, FileFacts | None]
) -> dict[tuple[int, int], _OnPage]:
    """What the files say of pages, each by vaddr and the number of its file: of all of a file's together."""
    vaddrs: dict[int, list[int]] = {}
    for vaddr, number in places:
        vaddrs.setdefault(number, []).append(vaddr)
    return {
        (vaddr, number): on_page
        for number, of_file in vaddrs.items()
        for vaddr, on_page in _on_pages(facts[number], sorted(of_file)).items()
    }


def _on_pages(facts: FileFacts | None, vaddrs: Sequence[int]) -> dict[int, _OnPage]:
    """What the file says of each of its pages at ``vaddrs``, which ascend: of all the slots there together.

    A large library has millions of them, so nothing is made for each.
    """
    if facts is None:
        return dict.fromkeys(vaddrs, _OnPage("", frozenset(), ()))
    starts = np.array(vaddrs, np.uint64)
    low = np.searchsorted(facts.slot_vaddrs, starts)
    high = np.searchsorted(facts.slot_vaddrs, starts + np.uint64(PAGE_SIZE - 1), side="right")
    number = np.maximum(high - low, 0)
    page = np.repeat(np.arange(len(vaddrs)), number)
    slots = np.arange(len(page)) + np.repeat(low + number - np.cumsum(number), number)
    told = facts.slots["what"][slots] != LOADER
    page, slots = page[told], slots[told]
    bounds = np.searchsorted(page, np.arange(len(vaddrs) + 1)).tolist()
    symbols = [set[int]() for _ in vaddrs]
    for symbol, first, end in zip(*facts.symbols_over(facts.slot_vaddrs[slots]), strict=True):
        for on in range(int(page[first]), int(page[end - 1]) + 1):
            if max(first, bounds[on]) < min(end, bounds[on + 1]):
                symbols[on].add(symbol)
    kind = facts.slots["kind"][slots]
    kinds = [Counter[int]() for _ in vaddrs]
    runs = np.flatnonzero((np.diff(kind, prepend=0) != 0) | (np.diff(page, prepend=-1) != 0))
    lengths = np.diff(runs, append=len(page)).tolist()
    for on, same, length in zip(page[runs].tolist(), kind[runs].tolist(), lengths, strict=True):
        kinds[on][same] += length
    return {
        vaddr: _OnPage(
            facts.section_on(vaddr),
            frozenset(symbols[on]),
            tuple((facts.kind_name(same), count) for same, count in sorted(kinds[on].items())),
        )
        for on, vaddr in enumerate(vaddrs)
    }


def _told(facts: FileFacts | None, on_page: _OnPage, key: _Key) -> _Told:
    """What is told of a page of the file that ``facts`` are of, which numbers the symbols of ``key``."""
    symbols = {*key.changed, *key.kept}
    relocated = key.causes & _RELOCATION
    if relocated:
        symbols |= on_page.relocated
    return _Told(
        vaddr=key.vaddr,
        section=on_page.section,
        symbols=_names(facts, symbols),
        written=_names(facts, key.changed),
        causes=key.causes,
        kinds=on_page.kinds if key.causes & (_RELOCATION | _OVERWRITTEN) else (),
        reason=key.reason,
    )


def _pages(pages: Iterable[tuple[_Told, Sequence[_Holder]]]) -> tuple[PrivatePage, ...]:
    """One page for all holders of whom the same is told, of whichever file they have it."""
    together: dict[_Told, list[_Holder]] = {}
    for told, holders in pages:
        together.setdefault(told, []).extend(holders)
    return tuple(
        PrivatePage(
            vaddr=told.vaddr,
            section=told.section,
            symbols=told.symbols,
            written=told.written,
            causes=cause_names(told.causes),
            kinds=dict(told.kinds),
            pids=tuple(holder.pid for holder in holders),
            groups=_groups(holders),
            reason=told.reason,
            common=tuple(holder.pid for holder in holders if holder.common),
        )
        for told, holders in together.items()
    )


def _names(facts: FileFacts | None, numbers: Iterable[int]) -> tuple[str, ...]:
    """The symbols' names, by vaddr."""
    return () if facts is None else tuple(facts.symbol_name(number) for number in sorted(numbers))


def _groups(holders: Sequence[_Holder]) -> tuple[tuple[int, ...], ...]:
    """The pids by frame; () where no two have the same, or frames are hidden.

    >>> _groups([_Holder(1, 70), _Holder(2, 70), _Holder(3, 71)])
    ((1, 2), (3,))
    """
    by_frame: dict[int, list[int]] = {}
    for holder in holders:
        by_frame.setdefault(holder.frame, []).append(holder.pid)
    if 0 in by_frame or len(by_frame) == len(holders):
        return ()
    return tuple(tuple(pids) for pids in by_frame.values())


def _bss_symbols(facts: FileFacts | None, vaddr: int) -> tuple[int, ...]:
    return () if facts is None else facts.symbols_between(vaddr, vaddr + PAGE_SIZE)
