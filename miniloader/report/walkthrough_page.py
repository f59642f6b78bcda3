"""What the page about chapters of the walkthrough shows: values for ``templates/walkthrough.html``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from miniloader.evidence.verdict import combine
from miniloader.report.matrix_data import Film, Group, Scene
from miniloader.values import dataclass
from miniloader.walkthrough.c_sources import c_source
from miniloader.walkthrough.chapter import Quiz
from miniloader.walkthrough.run_chapter import ChapterResult
from miniloader.walkthrough.step import ChapterStep, CodeLine, CodeListing, Grid, PageBytes
from miniloader.walkthrough.traced_calls import is_indexed, shortened
from miniloader.walkthrough.words import WORDS, words_in

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


@dataclass(frozen=True, eq=False)
class StepView:
    """A step, the questions that are asked before it is shown, and its matrix: before it, and after."""

    step: ChapterStep
    questions: tuple[Quiz, ...]
    film: Film | None


@dataclass(frozen=True, eq=False)
class ChapterView:
    """A chapter that was run; ``films`` are its matrices through all steps, where there are three or more."""

    result: ChapterResult
    steps: tuple[StepView, ...]
    films: tuple[Film, ...]
    c_source: str

    @property
    def has_accesses(self) -> bool:
        """Whether a load or a store of memory is among what was done."""
        return any(is_indexed(call) for step in self.result.steps for call in step.calls)

    @property
    def listing(self) -> str:
        """The calls of all steps."""
        lines = []
        for number, step in enumerate(self.result.steps, 1):
            lines += [f"# {number}. {step.name}"] if step.calls else []
            for call in shortened(step.calls):
                who = f"[{call.process}] " if call.process else ""
                result = f" {'→' if call.access else '='} {call.result}" if call.result else ""
                lines.append(f"{who}{call.text}{result}")
        return "\n".join(lines)


def view_of(results: Sequence[ChapterResult]) -> dict[str, Any]:
    """Everything that the template asks for."""
    return {
        "results": results,
        "chapters": tuple(map(_chapter, results)),
        "verdict": combine(claim for result in results for claim in result.claims),
        "dump": dump,
        "moves": moves,
        "shortened": shortened,
        "words": WORDS,
        "words_in": words_in,
    }


def _chapter(result: ChapterResult) -> ChapterView:
    steps, seen, asked = list[StepView](), list[tuple[ChapterStep, Grid]](), set[str]()
    for number, step in enumerate(result.steps):
        quizzes = [
            *([result.chapter.question] if not number else []),
            *result.chapter.asked_before(step.name),
        ]
        new = tuple(quiz for quiz in quizzes if quiz.text not in asked)
        asked |= {quiz.text for quiz in new}
        steps.append(StepView(step, new, _film_of(step, seen)))
    films = tuple(film for film in _films(result) if len(film.scenes) > 2)
    return ChapterView(result, tuple(steps), films, c_source(result.chapter.id))


# -------------------------------------------------------------------------------------------- films
def _film_of(step: ChapterStep, seen: list[tuple[ChapterStep, Grid]]) -> Film | None:
    """The matrix of one step, beginning with that of the step before; which is added to ``seen``."""
    if step.grid is None or not len(step.grid.sharing.vaddrs):
        return None
    before = [seen[-1]] if seen and _alike(seen[-1][1], step.grid) else []
    seen.append((step, step.grid))
    return _film("The pages, before and after" if before else "The pages", [*before, seen[-1]], start=0)


def _films(result: ChapterResult) -> Iterator[Film]:
    """Steps with a grid of the same rows and pages, which follow each other, are one film."""
    scenes: list[tuple[ChapterStep, Grid]] = []
    for step in result.steps:
        if step.grid is None or not len(step.grid.sharing.vaddrs):
            continue
        if scenes and not _alike(scenes[-1][1], step.grid):
            yield _film(_title(result, scenes), scenes, start=0)
            scenes = []
        scenes.append((step, step.grid))
    if scenes:
        yield _film(_title(result, scenes), scenes, start=0)


def _title(result: ChapterResult, scenes: Sequence[tuple[ChapterStep, Grid]]) -> str:
    return f"{result.chapter.title}: the pages, {' → '.join(step.name for step, _ in scenes)}"


def _alike(first: Grid, second: Grid) -> bool:
    """Whether two grids show the same pages of the same mappings, and so a before and an after."""
    bases = [[process.base for process in grid.snapshot.processes] for grid in (first, second)]
    same_pages = np.array_equal(first.sharing.vaddrs, second.sharing.vaddrs)
    return first.rows == second.rows and bases[0] == bases[1] and same_pages


def _film(title: str, scenes: Sequence[tuple[ChapterStep, Grid]], start: int) -> Film:
    return Film(
        title=title,
        rows=scenes[0][1].rows,
        groups=tuple(_groups(scenes[-1][1])),
        scenes=tuple(Scene(step.name, step.did, grid.snapshot) for step, grid in scenes),
        start=start,
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
