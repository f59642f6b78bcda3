"""What the page about chapters of the walkthrough shows: values for ``templates/walkthrough.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from miniloader.evidence.verdict import combine
from miniloader.report.matrix_data import Film, Group, Scene
from miniloader.values import dataclass
from miniloader.walkthrough.run_chapter import ChapterResult
from miniloader.walkthrough.step import ChapterStep, CodeLine, CodeListing, Grid, PageBytes
from miniloader.walkthrough.traced_calls import shortened

__all__ = ["view_of"]

_ROW: Final = 16  # bytes
_MOST_ROWS: Final = 24


@dataclass(frozen=True)
class DumpRow:
    """One row of bytes: each (text, whether it changed), before and after, and what the changed words are."""

    start: int
    before: tuple[tuple[str, bool], ...]
    after: tuple[tuple[str, bool], ...]
    names: str


@dataclass(frozen=True)
class Move:
    """An instruction, and the slot that it goes through, told at the first instruction that does."""

    line: CodeLine
    slot: tuple[int, str, str, str] | None
    repeated: bool


def view_of(results: Sequence[ChapterResult]) -> dict[str, Any]:
    """Everything that the template asks for."""
    return {
        "results": results,
        "chapters": [(result, dict(_films(result))) for result in results],
        "tally": Counter(result.verdict for result in results),
        "verdict": combine(claim for result in results for claim in result.claims),
        "dump": dump,
        "moves": moves,
        "shortened": shortened,
    }


# -------------------------------------------------------------------------------------------- films
def _films(result: ChapterResult) -> Iterator[tuple[int, Film]]:
    """By the step after which it is shown: steps with a grid of the same rows and pages are one film."""
    scenes: list[tuple[ChapterStep, Grid]] = []
    last = 0
    for number, step in enumerate(result.steps):
        if step.grid is None or not len(step.grid.sharing.vaddrs):
            continue
        if scenes and not _alike(scenes[-1][1], step.grid):
            yield last, _film(result, scenes)
            scenes = []
        scenes.append((step, step.grid))
        last = number
    if scenes:
        yield last, _film(result, scenes)


def _alike(first: Grid, second: Grid) -> bool:
    return first.rows == second.rows and np.array_equal(first.sharing.vaddrs, second.sharing.vaddrs)


def _film(result: ChapterResult, scenes: Sequence[tuple[ChapterStep, Grid]]) -> Film:
    names = [step.name for step, _ in scenes]
    return Film(
        title=f"{result.chapter.title}: the pages, {' → '.join(names)}",
        rows=scenes[0][1].rows,
        groups=tuple(_groups(scenes[-1][1])),
        scenes=tuple(Scene(step.name, step.did, grid.snapshot) for step, grid in scenes),
        start=len(scenes) - 1,
    )


def _groups(grid: Grid) -> Iterator[Group]:
    vaddrs = grid.sharing.vaddrs
    starts = [int(np.searchsorted(vaddrs, np.uint64(part.vaddr))) for part in grid.parts]
    names = [part.name for part in grid.parts]
    if not starts or starts[0] > 0:
        starts, names = [0, *starts], ["pages", *names]
    for start, stop, name in zip(starts, [*starts[1:], len(vaddrs)], names, strict=True):
        if start < stop:
            yield Group(start, stop, name)


# -------------------------------------------------------------------------------------------- bytes
def dump(page: PageBytes, row: int = _ROW) -> list[DumpRow]:
    """The rows, of so many bytes, that changed or are named: the first few."""
    named = {offset: word for word in page.words for offset in range(word.offset, word.offset + word.length)}
    length = max(len(page.before), len(page.after))
    rows = []
    for at in range(0, length, row):
        offsets = range(at, min(at + row, length))
        before, after = page.before[at : at + row], page.after[at : at + row]
        names = dict.fromkeys(named[offset].name for offset in offsets if offset in named)
        if before != after or names:
            marked = [
                offset in named or page.before[offset : offset + 1] != page.after[offset : offset + 1]
                for offset in offsets
            ]
            rows.append(
                DumpRow(page.start + at, _octets(before, marked), _octets(after, marked), "; ".join(names))
            )
    return rows[:_MOST_ROWS]


def _octets(octets: bytes, marked: Sequence[bool]) -> tuple[tuple[str, bool], ...]:
    """The bytes in hexadecimal, in runs of which each is marked or not."""
    runs: list[tuple[str, bool]] = []
    for octet, mark in zip(octets, marked, strict=False):
        if runs and runs[-1][1] == mark:
            runs[-1] = (f"{runs[-1][0]} {octet:02x}", mark)
        else:
            runs.append((f"{octet:02x}", mark))
    return tuple(runs)


def moves(listing: CodeListing) -> list[Move]:
    """Each instruction with its slot."""
    slots = {slot[0]: slot for slot in listing.slots}
    slot_of = [None if line.slot is None else slots.get(line.slot) for line in listing.lines]
    return [
        Move(line, slot, slot is not None and slot in slot_of[:number])
        for number, (line, slot) in enumerate(zip(listing.lines, slot_of, strict=True))
    ]
