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
from miniloader.testing.levels import RANKS, Snapshots, at, check_level, each
from miniloader.testing.snapshots import LibraryMemory, MemorySnapshot
from miniloader.values import dataclass

__all__ = ["assert_copied_only", "assert_private", "assert_private_pages", "assert_shared"]

_IN_MEMORY: Final = (SHARED, SOLE, COPIED, COPIED_SHARED, ZERO)
_UNTOLD: Final = (UNKNOWN, CHANGED, SWAPPED)
_MOST: Final = 8  # pages, words or symbols that a message lists
_WIDTH: Final = range(60, 121)  # columns of a message


@dataclass(frozen=True)
class _Violation:
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
    for snapshot in each(snapshots):
        check_level(snapshot, level)
        memory = snapshot.library(library)
        if len(memory.pids) < 2:
            raise UsageError(f"{memory.path}: only one process has it, which shares with nobody")
        chosen = memory.pages(section, symbols)
        subject = _what(memory, section, symbols)
        states, groups = memory.sharing.states, memory.sharing.frame_group
        in_memory = np.isin(states, _IN_MEMORY)
        grouped = in_memory & (groups > 0)
        lowest = np.where(grouped, groups, np.iinfo(np.int32).max).min(axis=0)
        differs = grouped.any(axis=0) & (groups.max(axis=0) != lowest)
        hidden = (states == COPIED_SHARED) & (groups == 0)
        if level == "flags":
            hidden[:] = False
        wrong = chosen & (differs | (states == COPIED).any(axis=0))
        untold = chosen & (np.isin(states, _UNTOLD) | hidden)
        if wrong.any():
            _fail(
                snapshot,
                memory,
                f"{subject} is not shared: {_of_pages(wrong, chosen)}",
                _pages(memory, wrong),
            )
        _refuse_untold(snapshot, memory, subject, untold)
        if not (chosen & (in_memory.sum(axis=0) >= 2)).any():
            raise EvidenceError(
                f"{at(snapshot)}{subject}: no page of it is in memory in two processes",
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
    for snapshot in each(snapshots):
        check_level(snapshot, level)
        memory = snapshot.library(library)
        chosen = memory.pages(section, symbols)
        subject = _what(memory, section, symbols)
        states = memory.sharing.states
        not_own = np.isin(states, (SHARED, SOLE, COPIED_SHARED, ZERO)) | memory.elsewhere
        wrong = chosen & not_own.any(axis=0)
        if wrong.any():
            _fail(
                snapshot,
                memory,
                f"{subject} is not private: {_of_pages(wrong, chosen)}",
                _pages(memory, wrong),
            )
        _refuse_untold(snapshot, memory, subject, chosen & np.isin(states, _UNTOLD))
        if not (chosen & (states == COPIED).any(axis=0)).any():
            raise EvidenceError(
                f"{at(snapshot)}{subject}: no page of it is in memory", hint="have the workers use it first"
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
    series = each(snapshots)
    for snapshot in series:
        check_level(snapshot, level)
    first, last = series[0].library(library), series[-1].library(library)
    before = first if len(series) > 1 else None
    if before is not None and _processes(before) != _processes(last):
        raise UsageError(f"{last.path}: the first and the last snapshot have different processes")
    allowed = [span for name in symbols for span in last.symbol(name)]
    named = ", ".join(symbols) or "nothing"
    subject = f"{last.name}: more than {named} was written"
    violations = [*_written_elsewhere(last, before, allowed), *_identical(last, before, allowed)]
    if before is not None:
        told = {violation.vaddr & -PAGE_SIZE for violation in violations}
        violations += (page for page in _moved(last, before, allowed) if page.vaddr not in told)
    if violations:
        _fail(series[-1], last, subject, violations)
    untold = {vaddr: reason for copies in last.copies for vaddr, reason in copies.reasons.items()}
    if untold:
        vaddr, reason = min(untold.items())
        more = f", and {len(untold) - 1} more" if len(untold) > 1 else ""
        raise EvidenceError(
            f"{at(series[-1])}{subject}? The cause is unknown at vaddr {vaddr:#x} ({reason}){more}"
        )
    swapped = (last.sharing.states == SWAPPED) & last.of_file
    _refuse_untold(series[-1], last, f"{last.name}: whether more than {named} was written", swapped)


def assert_private_pages(
    snapshots: Snapshots, *, at_most: int, library: str | None = None, level: LevelName | None = None
) -> None:
    """No process has more than ``at_most`` copies of the library's file pages to itself.

    Where a process has the library mapped several times, by two loaders, the copies of all mappings count.
    A copy that relatives by fork still have in common is not counted, nor is bss beyond the file's pages.
    Pages that may be copies (swapped out, changed while we looked) count as both, so that neither a pass nor
    a failure is a guess.  With ``level="totals"``, where no better evidence is to be had, the sums of
    ``smaps`` are compared; they include copies that relatives have in common.

    Raises AssertionError when one has more, EvidenceError where that cannot be told, UsageError when there
    is no such library.
    """
    __tracebackhide__ = True
    for snapshot in each(snapshots):
        if level == "totals" and snapshot.level == "totals":
            _check_sums(snapshot, snapshot.path(library), at_most)
            continue
        check_level(snapshot, level)
        memory = snapshot.library(library)
        states, of_file = memory.sharing.states, memory.of_file
        private = (states == COPIED) & of_file & ~memory.elsewhere
        maybe = np.isin(states, _UNTOLD) & of_file
        numbers = _by_process(memory, private.sum(axis=1))
        if numbers.max() > at_most:
            heavy = private[numbers > at_most].any(axis=0)
            holders = _who(memory, numbers > at_most)
            several = ", all mappings of it together" * (len(memory.pids) < len(memory.look.processes))
            excess = f"{count(int(numbers.max()), 'private page')} in {holders}{several}"
            summary = f"{memory.name}: {excess}, at most {at_most} allowed"
            _fail(snapshot, memory, summary, _pages(memory, heavy))
        if (numbers + _by_process(memory, maybe.sum(axis=1))).max() > at_most:
            _refuse_untold(snapshot, memory, f"{memory.name}: at most {at_most} private pages", maybe)


def _by_process(memory: LibraryMemory, numbers: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each mapping of the library the sum over all of the same process."""
    pids = np.array([process.pid for process in memory.look.processes])
    sums: NDArray[np.intp] = (pids[:, None] == pids) @ numbers
    return sums


# ----------------------------------------------------------------------------------------------- levels
def _refuse_untold(
    snapshot: MemorySnapshot, memory: LibraryMemory, subject: str, untold: NDArray[np.bool_]
) -> None:
    """Raise EvidenceError when pages (shape as ``states``) are not known: passing would be a guess."""
    __tracebackhide__ = True
    if not untold.any():
        return
    codes = np.unique(memory.sharing.states[untold]).tolist()
    columns = np.flatnonzero(untold.any(axis=0))
    hint = None
    if COPIED_SHARED in codes:
        frames = LEVELS[RANKS.index("frames")]
        hint = f"level frames {frames.shows}: {frames.get}; or be content with level='flags'"
    raise EvidenceError(
        f"{at(snapshot)}{subject}: cannot be told of {count(len(columns), 'page')} at level {snapshot.level}"
        f" ({'; '.join(STATES[code].help for code in codes)}),"
        f" the first at vaddr {int(memory.sharing.vaddrs[columns[0]]):#x}",
        hint=hint,
    )


def _check_sums(snapshot: MemorySnapshot, path: str, at_most: int) -> None:
    __tracebackhide__ = True
    over = {pid: size // PAGE_SIZE for pid, size in snapshot.sums[path].items() if size > at_most * PAGE_SIZE}
    if over:
        listed = ", ".join(f"{pages:,} in pid {pid}" for pid, pages in over.items())
        raise AssertionError(
            f"{at(snapshot)}{path}: at most {at_most} private pages allowed, by the sums of smaps {listed}\n"
            f"evidence: totals: {LEVELS[RANKS.index('totals')].shows}"
        )


# ---------------------------------------------------------------------------------------- what was written
def _processes(memory: LibraryMemory) -> tuple[tuple[int, int], ...]:
    return tuple((process.pid, process.base) for process in memory.look.processes)


def _written_elsewhere(
    last: LibraryMemory, before: LibraryMemory | None, allowed: Collection[tuple[int, int]]
) -> Iterator[_Violation]:
    """The bytes outside ``allowed`` that hold something else than before (or than the file), by symbol."""
    written: dict[str, tuple[int, list[int]]] = {}
    for row, copies in enumerate(last.copies):
        old = before.copies[row].words if before is not None else copies.words[:0]
        for vaddr in _changed(old, copies.words):
            if not any(start <= vaddr < end for start, end in allowed):
                first, pids = written.setdefault(_symbol(last, vaddr), (vaddr, []))
                written[_symbol(last, vaddr)] = min(first, vaddr), pids
                if copies.pid not in pids:
                    pids.append(copies.pid)
    for symbol, (vaddr, pids) in sorted(written.items(), key=lambda item: item[1][0]):
        yield _Violation(vaddr, f"{symbol} was written by {_pids(pids, len(last.pids))}")


def _changed(old: NDArray[np.void], new: NDArray[np.void]) -> Iterable[int]:
    """The vaddrs of the bytes that were written between two tables of words (WORD_DTYPE)."""
    old_words = {int(word["vaddr"]): word for word in old}
    new_words = {int(word["vaddr"]): word for word in new}
    for vaddr in sorted({*old_words, *new_words}):
        word = new_words.get(vaddr, old_words.get(vaddr))
        if word is None or (
            vaddr in old_words and vaddr in new_words and old_words[vaddr]["live"] == new_words[vaddr]["live"]
        ):
            continue
        first, second = (
            int(words[vaddr]["live"]) if vaddr in words else int(word["file"])
            for words in (old_words, new_words)
        )
        differing = (first ^ second).to_bytes(8, sys.byteorder)
        yield from (vaddr + index for index, byte in enumerate(differing) if byte)


def _identical(
    last: LibraryMemory, before: LibraryMemory | None, allowed: Collection[tuple[int, int]]
) -> Iterator[_Violation]:
    """The pages that were copied and are as in the file: somebody wrote there, nobody can tell to what."""
    copied: dict[int, list[int]] = {}
    for row, copies in enumerate(last.copies):
        earlier_causes = before.copies[row].causes if before is not None else {}
        for vaddr, causes in copies.causes.items():
            held = any(start < vaddr + PAGE_SIZE and vaddr < end for start, end in allowed)
            if causes == ("identical",) and vaddr not in earlier_causes and not held:
                copied.setdefault(vaddr, []).append(copies.pid)
    for vaddr, pids in sorted(copied.items()):
        writers = _pids(pids, len(last.pids))
        yield _Violation(
            vaddr, f"{' '.join(_sections(last, vaddr))}: copied by {writers}, yet as in the file"
        )


def _moved(
    last: LibraryMemory, before: LibraryMemory, allowed: Collection[tuple[int, int]]
) -> Iterator[_Violation]:
    """The pages that were a family's and have gone to frames of their own: somebody wrote what was there."""
    pages: dict[int, list[int]] = {}
    copied = np.isin(last.sharing.states, (COPIED, COPIED_SHARED)) & last.of_file
    for row, (earlier, later) in enumerate(zip(before.look.processes, last.look.processes, strict=True)):
        if len(earlier.pages) != len(later.pages):
            continue
        first, then = earlier.pages["frame"], later.pages["frame"]
        moved = copied[row] & ~earlier.pages["exclusive"] & later.pages["exclusive"] & ~earlier.pages["file"]
        moved &= (first != 0) & (then != 0) & (first != then)
        for vaddr in last.sharing.vaddrs[np.flatnonzero(moved)].tolist():
            if not any(start < vaddr + PAGE_SIZE and vaddr < end for start, end in allowed):
                pages.setdefault(vaddr, []).append(later.pid)
    for vaddr, pids in sorted(pages.items()):
        writers = _pids(pids, len(last.pids))
        text = (
            f"{' '.join(_sections(last, vaddr))}: no more shared with relatives by {writers}, yet as it was"
        )
        yield _Violation(vaddr, text)


def _symbol(memory: LibraryMemory, vaddr: int) -> str:
    number = int(memory.facts.symbols_at(np.array([vaddr], np.uint64))[0])
    return memory.facts.symbol_name(number) if number >= 0 else "what has no symbol"


# ---------------------------------------------------------------------------------------------- messages
def _fail(
    snapshot: MemorySnapshot, memory: LibraryMemory, summary: str, violations: Sequence[_Violation]
) -> NoReturn:
    """Raise AssertionError with what was found and the grid of all processes."""
    __tracebackhide__ = True
    shown = [f"  {violation.vaddr:#x}  {violation.text}" for violation in violations[:_MOST]]
    if len(violations) > _MOST:
        shown.append(f"  … and {len(violations) - _MOST} more")
    level = LEVELS[RANKS.index(snapshot.level)]
    lines = [
        f"{at(snapshot)}{summary}",
        *map(printable, shown),
        "",
        _picture(memory, violations[0].vaddr),
        f"evidence: {level.name}: {level.shows}",
    ]
    raise AssertionError("\n".join(lines))


def _picture(memory: LibraryMemory, vaddr: int) -> str:
    """The grid, pointing at ``vaddr``, and what its signs mean; plain text."""
    width = min(max(shutil.get_terminal_size((104, 24)).columns - 4, _WIDTH.start), _WIDTH.stop)
    mark = Mark(vaddr // PAGE_SIZE * PAGE_SIZE, f"vaddr {vaddr:#x}")
    grid = page_grid(memory.look, memory.plan, width, mark)
    return "\n".join(map(plain, laid_out([*grid, (), grid_legend([memory.look], memory.plan)], width)))


def _pages(memory: LibraryMemory, chosen: NDArray[np.bool_]) -> list[_Violation]:
    """A line for each of the pages: section, symbols, what it is in how many processes, and why."""
    return [_page(memory, index) for index in np.flatnonzero(chosen).tolist()]


def _page(memory: LibraryMemory, index: int) -> _Violation:
    vaddr, facts = int(memory.sharing.vaddrs[index]), memory.facts
    numbers = facts.symbols_between(vaddr, vaddr + PAGE_SIZE)
    names = [facts.symbol_name(number) for number in numbers[:3]] + ["…"] * (len(numbers) > 3)
    codes, elsewhere = memory.sharing.states[:, index].tolist(), memory.elsewhere[:, index].tolist()
    states = Counter(
        STATES[code].name + " and mapped by another process" * is_elsewhere
        for code, is_elsewhere in zip(codes, elsewhere, strict=True)
    )
    said = ", ".join(f"{name} in {number}" for name, number in states.items())
    causes = {name: None for copies in memory.copies for name in copies.causes.get(vaddr, ())}
    why = f" ({', '.join(causes)})" if causes else ""
    place = " ".join([*_sections(memory, vaddr), ", ".join(names)]).strip() or "no section"
    return _Violation(vaddr, f"{place}: {said}{why}")


def _sections(memory: LibraryMemory, vaddr: int) -> list[str]:
    """The names of the sections that have a byte on the page at ``vaddr``."""
    spans = memory.facts.section_spans
    return [name for start, end, name in spans if start < vaddr + PAGE_SIZE and vaddr < end]


def _what(memory: LibraryMemory, section: str | None, symbols: Collection[str]) -> str:
    named = ", ".join([*([section] if section is not None else []), *symbols])
    return f"{named} of {memory.name}" if named else memory.name


def _of_pages(pages: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> str:
    return f"{int(pages.sum()):,} of {count(int(chosen.sum()), 'page')}"


def _who(memory: LibraryMemory, rows: NDArray[np.bool_]) -> str:
    pids = [process.pid for process, row in zip(memory.look.processes, rows.tolist(), strict=True) if row]
    return _pids(pids, len(memory.pids))


def _pids(pids: Sequence[int], of: int) -> str:
    pids = [*dict.fromkeys(pids)]
    listed = ", ".join(map(str, pids[:_MOST])) + (", …" if len(pids) > _MOST else "")
    return f"{len(pids)} of {count(of, 'process', 'processes')} (pid {listed})"
