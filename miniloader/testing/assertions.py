"""What a test claims of snapshots.  A failure says what is wrong, why, and shows the page grid."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, UsageError, printable
from miniloader.evidence.sharing import (
    CHANGED,
    COPIED,
    COPIED_SHARED,
    SHARED,
    SOLE,
    STATES,
    SWAPPED,
    UNKNOWN,
    ZERO,
)
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.report.grid import Mark, grid_legend, page_grid
from miniloader.report.numbers import count
from miniloader.report.text import laid_out, plain
from miniloader.testing.snapshots import LibraryMemory, MemorySnapshot
from miniloader.values import dataclass

__all__ = ["assert_copied_only", "assert_private", "assert_private_pages", "assert_shared"]

Snapshots = MemorySnapshot | Sequence[MemorySnapshot]
"""One snapshot, or several, in the order in which they were taken."""

_RANKS: Final = [level.name for level in LEVELS]
_IN_MEMORY: Final = (SHARED, SOLE, COPIED, COPIED_SHARED, ZERO)
_UNTOLD: Final = (UNKNOWN, CHANGED, SWAPPED)
_MOST: Final = 8  # pages, words or symbols that a message lists
_WIDTH: Final = range(60, 121)  # columns of a message


@dataclass(frozen=True)
class _Finding:
    """Something that is not as it should be: at which vaddr, and what."""

    vaddr: int
    text: str


# ------------------------------------------------------------------------------------------- assertions
def assert_shared(
    snapshots: Snapshots,
    *,
    section: str | None = None,
    symbols: Collection[str] = (),
    library: str | None = None,
    level: LevelName | None = None,
) -> None:
    """Every page of the section or the symbols (else: of the library) is one copy for all who have it.

    Such as the file's own page, or one that was inherited by fork and not written since.  A page that a
    process has never touched is no copy; yet at least one must be in memory in two processes.  ``library``
    can be left out where the snapshot has only one.

    Raises AssertionError when a page is not shared, EvidenceError where that cannot be told (see ``level``
    in :mod:`miniloader.testing`), UsageError when there is no such section, symbol or library, or only one
    process.
    """
    __tracebackhide__ = True
    for one in _each(snapshots):
        _check_level(one, level)
        memory = one.library(library)
        if len(memory.look.processes) < 2:
            raise UsageError(f"{memory.path}: only one process has it, which shares with nobody")
        chosen = memory.pages(section, symbols)
        what = _what(memory, section, symbols)
        states, groups = memory.sharing.states, memory.sharing.frame_group
        there = np.isin(states, _IN_MEMORY)
        known = there & (groups > 0)
        lowest = np.where(known, groups, np.iinfo(np.int32).max).min(axis=0)
        differs = known.any(axis=0) & (groups.max(axis=0) != lowest)
        hidden = (states == COPIED_SHARED) & (groups == 0)
        if level == "flags":
            hidden[:] = False
        wrong = chosen & (differs | (states == COPIED).any(axis=0))
        untold = chosen & (np.isin(states, _UNTOLD) | hidden)
        if wrong.any():
            _fail(one, memory, f"{what} is not shared: {_of_pages(wrong, chosen)}", _pages(memory, wrong))
        _refuse_untold(one, memory, what, untold)
        if not (chosen & (there.sum(axis=0) >= 2)).any():
            raise EvidenceError(
                f"{_at(one)}{what}: no page of it is in memory in two processes",
                hint="have the workers use it first",
            )


def assert_private(
    snapshots: Snapshots,
    *,
    section: str | None = None,
    symbols: Collection[str] = (),
    library: str | None = None,
    level: LevelName | None = None,
) -> None:
    """Every page of the section or the symbols (else: of the library) that is in memory is a copy of its own.

    Nobody else has it, nor is it the file's.  Pages never touched are left out; yet one must be there.
    Parameters and errors as of :func:`assert_shared`.
    """
    __tracebackhide__ = True
    for one in _each(snapshots):
        _check_level(one, level)
        memory = one.library(library)
        chosen = memory.pages(section, symbols)
        what = _what(memory, section, symbols)
        states = memory.sharing.states
        not_own = np.isin(states, (SHARED, SOLE, COPIED_SHARED, ZERO)) | memory.elsewhere
        wrong = chosen & not_own.any(axis=0)
        if wrong.any():
            _fail(one, memory, f"{what} is not private: {_of_pages(wrong, chosen)}", _pages(memory, wrong))
        _refuse_untold(one, memory, what, chosen & np.isin(states, _UNTOLD))
        if not (chosen & (states == COPIED).any(axis=0)).any():
            raise EvidenceError(
                f"{_at(one)}{what}: no page of it is in memory", hint="have the workers use it first"
            )


def assert_copied_only(
    snapshots: Snapshots,
    *,
    symbols: Collection[str] = (),
    library: str | None = None,
    level: LevelName | None = None,
) -> None:
    """Of the library's file pages the program has written to nothing but ``symbols``.

    With one snapshot: since the library was loaded.  With several: from the first to the last, which must
    have the same processes.  What the loader writes (relocations, its own bookkeeping) does not count, nor
    do neighbours on the page, which are copied along.  A page that was copied and is as in the file, or as
    it was before relatives had it in common no more (level ``frames``), must hold one of the symbols.  bss
    beyond the file's pages is anonymous from the start: nothing is copied.

    Raises AssertionError naming what else was written, EvidenceError where the cause of a copy is unknown
    (one that is swapped out, too), UsageError when there is no such symbol or library.
    """
    __tracebackhide__ = True
    every = _each(snapshots)
    for one in every:
        _check_level(one, level)
    first, last = every[0].library(library), every[-1].library(library)
    before = first if len(every) > 1 else None
    if before is not None and _processes(before) != _processes(last):
        raise UsageError(f"{last.path}: the first and the last snapshot have different processes")
    allowed = [span for name in symbols for span in last.symbol(name)]
    named = ", ".join(symbols) or "nothing"
    what = f"{last.name}: more than {named} was written"
    found = [*_written_elsewhere(last, before, allowed), *_identical(last, before, allowed)]
    if before is not None:
        told = {finding.vaddr & -PAGE_SIZE for finding in found}
        found += (one for one in _moved(last, before, allowed) if one.vaddr not in told)
    if found:
        _fail(every[-1], last, what, found)
    untold = {vaddr: reason for copies in last.copies for vaddr, reason in copies.reasons.items()}
    if untold:
        vaddr, reason = min(untold.items())
        more = f", and {len(untold) - 1} more" if len(untold) > 1 else ""
        raise EvidenceError(
            f"{_at(every[-1])}{what}? The cause is unknown at vaddr {vaddr:#x} ({reason}){more}"
        )
    swapped = (last.sharing.states == SWAPPED) & last.of_file
    _refuse_untold(every[-1], last, f"{last.name}: whether more than {named} was written", swapped)


def assert_private_pages(
    snapshots: Snapshots, *, at_most: int, library: str | None = None, level: LevelName | None = None
) -> None:
    """No process has more than ``at_most`` copies of the library's file pages to itself.

    A copy that relatives by fork still have in common is not counted, nor is bss beyond the file's pages.
    Pages that may be copies (swapped out, changed while we looked) count as both, so that neither a pass nor
    a failure is a guess.  With ``level="totals"``, where no better evidence is to be had, the sums of
    ``smaps`` are compared; they include copies that relatives have in common.

    Raises AssertionError when one has more, EvidenceError where that cannot be told, UsageError when there
    is no such library.
    """
    __tracebackhide__ = True
    for one in _each(snapshots):
        if level == "totals" and one.level == "totals":
            _check_sums(one, one.path(library), at_most)
            continue
        _check_level(one, level)
        memory = one.library(library)
        states, of_file = memory.sharing.states, memory.of_file
        own = (states == COPIED) & of_file & ~memory.elsewhere
        maybe = np.isin(states, _UNTOLD) & of_file
        numbers = own.sum(axis=1)
        if numbers.max() > at_most:
            heavy = own[numbers > at_most].any(axis=0)
            who = _who(memory, numbers > at_most)
            found = f"{count(int(numbers.max()), 'private page')} in {who}"
            summary = f"{memory.name}: {found}, at most {at_most} allowed"
            _fail(one, memory, summary, _pages(memory, heavy))
        if (numbers + maybe.sum(axis=1)).max() > at_most:
            _refuse_untold(one, memory, f"{memory.name}: at most {at_most} private pages", maybe)


# ----------------------------------------------------------------------------------------------- levels
def _each(snapshots: Snapshots) -> tuple[MemorySnapshot, ...]:
    every = (snapshots,) if isinstance(snapshots, MemorySnapshot) else tuple(snapshots)
    if not every:
        raise UsageError("no snapshot to judge")
    return every


def _check_level(one: MemorySnapshot, level: LevelName | None) -> None:
    """Raise EvidenceError unless the snapshot knows of pages, and has what the test insists on."""
    __tracebackhide__ = True
    needed: LevelName = "frames" if level == "frames" else "flags"
    if _RANKS.index(one.level) > _RANKS.index(needed):
        how = next(known.get for known in LEVELS if known.name == needed)
        raise EvidenceError(
            f"{_at(one)}evidence level {needed} is needed, this snapshot has {one.level}", hint=how
        )


def _refuse_untold(one: MemorySnapshot, memory: LibraryMemory, what: str, untold: NDArray[np.bool_]) -> None:
    """Raise EvidenceError when pages (shape as ``states``) are not known: passing would be a guess."""
    __tracebackhide__ = True
    if not untold.any():
        return
    codes = np.unique(memory.sharing.states[untold]).tolist()
    columns = np.flatnonzero(untold.any(axis=0))
    hint = None
    if COPIED_SHARED in codes:
        frames = LEVELS[_RANKS.index("frames")]
        hint = f"level frames {frames.shows}: {frames.get}; or be content with level='flags'"
    raise EvidenceError(
        f"{_at(one)}{what}: cannot be told of {count(len(columns), 'page')} at level {one.level}"
        f" ({'; '.join(STATES[code].help for code in codes)}),"
        f" the first at vaddr {int(memory.sharing.vaddrs[columns[0]]):#x}",
        hint=hint,
    )


def _check_sums(one: MemorySnapshot, path: str, at_most: int) -> None:
    __tracebackhide__ = True
    over = {pid: size // PAGE_SIZE for pid, size in one.sums[path].items() if size > at_most * PAGE_SIZE}
    if over:
        listed = ", ".join(f"{pages:,} in pid {pid}" for pid, pages in over.items())
        raise AssertionError(
            f"{_at(one)}{path}: at most {at_most} private pages allowed, by the sums of smaps {listed}\n"
            f"evidence: totals: {LEVELS[_RANKS.index('totals')].shows}"
        )


# ---------------------------------------------------------------------------------------- what was written
def _processes(memory: LibraryMemory) -> tuple[tuple[int, int], ...]:
    return tuple((process.pid, process.base) for process in memory.look.processes)


def _written_elsewhere(
    last: LibraryMemory, before: LibraryMemory | None, allowed: Collection[tuple[int, int]]
) -> Iterator[_Finding]:
    """The bytes outside ``allowed`` that hold something else than before (or than the file), by symbol."""
    found: dict[str, tuple[int, list[int]]] = {}
    for row, copies in enumerate(last.copies):
        old = before.copies[row].words if before is not None else copies.words[:0]
        for vaddr in _changed(old, copies.words):
            if not any(start <= vaddr < end for start, end in allowed):
                first, pids = found.setdefault(_symbol(last, vaddr), (vaddr, []))
                found[_symbol(last, vaddr)] = min(first, vaddr), pids
                if copies.pid not in pids:
                    pids.append(copies.pid)
    for symbol, (vaddr, pids) in sorted(found.items(), key=lambda item: item[1][0]):
        yield _Finding(vaddr, f"{symbol} was written by {_pids(pids, len(last.copies))}")


def _changed(old: NDArray[np.void], new: NDArray[np.void]) -> Iterable[int]:
    """The vaddrs of the bytes that were written between two tables of words (WORD_DTYPE)."""
    was = {int(word["vaddr"]): word for word in old}
    now = {int(word["vaddr"]): word for word in new}
    for vaddr in sorted({*was, *now}):
        word = now.get(vaddr, was.get(vaddr))
        if word is None or (vaddr in was and vaddr in now and was[vaddr]["live"] == now[vaddr]["live"]):
            continue
        first, second = (
            int(words[vaddr]["live"]) if vaddr in words else int(word["file"]) for words in (was, now)
        )
        differing = (first ^ second).to_bytes(8, sys.byteorder)
        yield from (vaddr + index for index, byte in enumerate(differing) if byte)


def _identical(
    last: LibraryMemory, before: LibraryMemory | None, allowed: Collection[tuple[int, int]]
) -> Iterator[_Finding]:
    """The pages that were copied and are as in the file: somebody wrote there, nobody can tell to what."""
    found: dict[int, list[int]] = {}
    for row, copies in enumerate(last.copies):
        known = before.copies[row].causes if before is not None else {}
        for vaddr, causes in copies.causes.items():
            held = any(start < vaddr + PAGE_SIZE and vaddr < end for start, end in allowed)
            if causes == ("identical",) and vaddr not in known and not held:
                found.setdefault(vaddr, []).append(copies.pid)
    for vaddr, pids in sorted(found.items()):
        who = _pids(pids, len(last.copies))
        yield _Finding(vaddr, f"{' '.join(_sections(last, vaddr))}: copied by {who}, yet as in the file")


def _moved(
    last: LibraryMemory, before: LibraryMemory, allowed: Collection[tuple[int, int]]
) -> Iterator[_Finding]:
    """The pages that were a family's and have gone to frames of their own: somebody wrote what was there."""
    found: dict[int, list[int]] = {}
    copied = np.isin(last.sharing.states, (COPIED, COPIED_SHARED)) & last.of_file
    for row, (was, now) in enumerate(zip(before.look.processes, last.look.processes, strict=True)):
        if len(was.pages) != len(now.pages):
            continue
        first, then = was.pages["frame"], now.pages["frame"]
        moved = copied[row] & ~was.pages["exclusive"] & now.pages["exclusive"] & ~was.pages["file"]
        moved &= (first != 0) & (then != 0) & (first != then)
        for vaddr in last.sharing.vaddrs[np.flatnonzero(moved)].tolist():
            if not any(start < vaddr + PAGE_SIZE and vaddr < end for start, end in allowed):
                found.setdefault(vaddr, []).append(now.pid)
    for vaddr, pids in sorted(found.items()):
        who = _pids(pids, len(last.copies))
        text = f"{' '.join(_sections(last, vaddr))}: no more shared with relatives by {who}, yet as it was"
        yield _Finding(vaddr, text)


def _symbol(memory: LibraryMemory, vaddr: int) -> str:
    number = int(memory.facts.symbols_at(np.array([vaddr], np.uint64))[0])
    return memory.facts.symbol_name(number) if number >= 0 else "what has no symbol"


# ---------------------------------------------------------------------------------------------- messages
def _fail(one: MemorySnapshot, memory: LibraryMemory, summary: str, findings: Sequence[_Finding]) -> NoReturn:
    """Raise AssertionError with what was found and the grid of all processes."""
    __tracebackhide__ = True
    shown = [f"  {finding.vaddr:#x}  {finding.text}" for finding in findings[:_MOST]]
    if len(findings) > _MOST:
        shown.append(f"  … and {len(findings) - _MOST} more")
    level = LEVELS[_RANKS.index(one.level)]
    lines = [
        f"{_at(one)}{summary}",
        *map(printable, shown),
        "",
        _picture(memory, findings[0].vaddr),
        f"evidence: {level.name}: {level.shows}",
    ]
    raise AssertionError("\n".join(lines))


def _picture(memory: LibraryMemory, vaddr: int) -> str:
    """The grid, pointing at ``vaddr``, and what its signs mean; plain text."""
    width = min(max(shutil.get_terminal_size((104, 24)).columns - 4, _WIDTH.start), _WIDTH.stop)
    mark = Mark(vaddr // PAGE_SIZE * PAGE_SIZE, f"vaddr {vaddr:#x}")
    grid = page_grid(memory.look, memory.plan, width, mark)
    return "\n".join(map(plain, laid_out([*grid, (), grid_legend([memory.look], memory.plan)], width)))


def _pages(memory: LibraryMemory, chosen: NDArray[np.bool_]) -> list[_Finding]:
    """A line for each of the pages: section, symbols, what it is in how many processes, and why."""
    return [_page(memory, index) for index in np.flatnonzero(chosen).tolist()]


def _page(memory: LibraryMemory, index: int) -> _Finding:
    vaddr, facts = int(memory.sharing.vaddrs[index]), memory.facts
    numbers = facts.symbols_between(vaddr, vaddr + PAGE_SIZE)
    names = [facts.symbol_name(number) for number in numbers[:3]] + ["…"] * (len(numbers) > 3)
    codes, elsewhere = memory.sharing.states[:, index].tolist(), memory.elsewhere[:, index].tolist()
    states = Counter(
        STATES[code].name + " and mapped by another process" * other
        for code, other in zip(codes, elsewhere, strict=True)
    )
    said = ", ".join(f"{name} in {number}" for name, number in states.items())
    causes = {name: None for copies in memory.copies for name in copies.causes.get(vaddr, ())}
    why = f" ({', '.join(causes)})" if causes else ""
    place = " ".join([*_sections(memory, vaddr), ", ".join(names)]).strip() or "no section"
    return _Finding(vaddr, f"{place}: {said}{why}")


def _sections(memory: LibraryMemory, vaddr: int) -> list[str]:
    """Those with a byte on the page."""
    spans = memory.facts.section_spans
    return [name for start, end, name in spans if start < vaddr + PAGE_SIZE and vaddr < end]


def _what(memory: LibraryMemory, section: str | None, symbols: Collection[str]) -> str:
    named = ", ".join([*([section] if section is not None else []), *symbols])
    return f"{named} of {memory.name}" if named else memory.name


def _of_pages(some: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> str:
    return f"{int(some.sum()):,} of {count(int(chosen.sum()), 'page')}"


def _who(memory: LibraryMemory, rows: NDArray[np.bool_]) -> str:
    pids = [process.pid for process, row in zip(memory.look.processes, rows.tolist(), strict=True) if row]
    return _pids(pids, len(memory.copies))


def _pids(pids: Sequence[int], of: int) -> str:
    listed = ", ".join(map(str, pids[:_MOST])) + (", …" if len(pids) > _MOST else "")
    return f"{len(pids)} of {count(of, 'process', 'processes')} (pid {listed})"


def _at(one: MemorySnapshot) -> str:
    return f"{one.step}: " if one.step else ""
