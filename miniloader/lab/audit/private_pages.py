"""The private pages of a library one by one: which processes have each, what is on it, why it was copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.evidence.cause_names import bit, cause_names
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.slots import LOADER
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.file_in_process import SWAPPED_OUT
from miniloader.lab.audit.occurrences import Occurrence
from miniloader.lab.audit.result import PrivatePage
from miniloader.values import NamedTuple, dataclass

__all__ = ["bss_pages", "private_pages", "swapped_pages"]

_BSS: Final = bit("bss")
_RELOCATION: Final = bit("relocation")
_OVERWRITTEN: Final = bit("overwritten")
_UNKNOWN: Final = bit("unknown")
_NONE: Final[tuple[int, ...]] = ()
_WRITTEN: Final = bit("write") | bit("overwritten") | bit("bss")


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


def private_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
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


def bss_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
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


def swapped_pages(occurrences: Sequence[Occurrence]) -> tuple[PrivatePage, ...]:
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
    covering, firsts, ends = facts.symbols_over(facts.slot_vaddrs[slots])
    on_first, on_last = page[np.array(firsts, np.intp)], page[np.array(ends, np.intp) - 1]
    rows = zip(covering, firsts, ends, on_first.tolist(), on_last.tolist(), strict=True)
    for symbol, first, end, low_page, high_page in rows:
        for on in range(low_page, high_page + 1):
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
    relocated = on_page.relocated if key.causes & _RELOCATION else _NONE
    names = _names(facts, {*key.changed, *key.kept, *relocated})
    return _Told(
        vaddr=key.vaddr,
        section=on_page.section,
        symbols=tuple(names.values()),
        written=tuple([names[number] for number in sorted(key.changed) if number in names]),
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


def _names(facts: FileFacts | None, numbers: Iterable[int]) -> dict[int, str]:
    """The symbols' names by their numbers, which ascend as their vaddrs do."""
    return {} if facts is None else {number: facts.symbol_name(number) for number in sorted(numbers)}


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
