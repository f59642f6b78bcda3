"""How the walkthrough is told in the terminal: each part of a chapter as lines and tables.

Everything fits the width it is given; nothing is told by colour alone.
"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from miniloader.errors import printable
from miniloader.evidence.verdict import Claim
from miniloader.forking import importing
from miniloader.kernel.features import LevelName
from miniloader.report.grid import explained, matrix, matrix_legend
from miniloader.report.levels import evidence
from miniloader.report.numbers import count, size
from miniloader.report.text import VERDICT_SIGNS, Cell, Line, Part, Piece, Table, heading, indented, pairs
from miniloader.report.walkthrough_page import dump, moves
from miniloader.walkthrough.chapter import Answer, Chapter, Quiz
from miniloader.walkthrough.run_chapter import ChapterResult
from miniloader.walkthrough.step import BeforeAfter, ChapterStep, CodeListing, Figures, Grid, PageBytes
from miniloader.walkthrough.traced_calls import TracedCall, is_indexed, shortened
from miniloader.walkthrough.workbench import Environment

__all__ = [
    "WIDEST",
    "checked",
    "closing",
    "contents",
    "correction",
    "farewell",
    "hints",
    "opening",
    "question",
    "snippet",
    "solution",
    "step_opening",
    "step_view",
    "summary",
    "told_by",
    "word_list",
]

WIDEST: Final = 110
"""Columns; longer lines are hard to read."""
_ROOM_FOR_16: Final = 76  # columns that a row of sixteen bytes needs
_NOTATION: Final = -2  # stands among the states that are told: how accesses are written


# ------------------------------------------------------------------------------------------- the contents
def contents(chapters: Sequence[Chapter[Any]], level: LevelName) -> Iterator[Part]:
    """The chapters with their claims, and what can be shown of each at ``level``."""
    yield heading("How mmap and shared libraries work", f"{count(len(chapters), 'chapter')}, each run here")
    yield pairs(evidence(level))
    for chapter in chapters:
        can = [claim.told_at(level) for claim in chapter.claims]
        shown = f"{sum(can)} of {len(can)}" if not all(can) else f"all {len(can)}"
        yield ()
        yield (
            f"{chapter.number:>2} ",
            (chapter.id, "bold cyan"),
            "  ",
            (chapter.title, "bold"),
            (f"  {shown} claims can be judged here", "dim"),
        )
        yield Table((), [(chapter.claim,)], 3)
        yield Table((), [*_statements(chapter, can)], 2, gap=3)
    first = chapters[0].id if chapters else "CHAPTER"
    yield ()
    yield pairs(
        [
            ("one", _command(f"miniloader walkthrough {first}")),
            ("all", _command("miniloader walkthrough --all --no-pause")),
            ("as a page", _command("miniloader walkthrough --html walkthrough.html")),
            ("a word", _command("miniloader walkthrough --word frame")),
            ("build one", _command("miniloader walkthrough build --exercise > mine.py")),
        ]
    )


def _statements(chapter: Chapter[Any], can: Sequence[bool]) -> Iterator[tuple[Cell, Cell]]:
    for claim, judged in zip(chapter.claims, can, strict=True):
        needs = "" if judged else f"  (needs evidence by {claim.level})"
        yield ("·" if judged else "?", "dim"), claim.text + needs


def _part(title: str) -> Line:
    """The heading of a part of a chapter."""
    return ((f"── {title}", "bold"),)


def _command(text: str) -> Cell:
    return printable(text), "bold"


# --------------------------------------------------------------------------------------- before it runs
def opening(chapter: Chapter[Any], of: int, environment: Environment) -> Iterator[Part]:
    """Title, claim, and where it runs."""
    title = f"Chapter {chapter.number} of {of}: {chapter.title}"
    pages = f"pages of {size(environment.page_size)}"
    where = f"{environment.kernel}, {environment.machine}, {pages}, {environment.privilege}"
    yield ((title, "bold"),)
    yield (("═" * len(title), "dim"),)
    yield ((chapter.claim, "bold"),)
    yield ()
    yield pairs([("here", printable(where)), *evidence(environment.level)])


def question(asked: Quiz) -> Iterator[Part]:
    """The question and its choices."""
    yield _part("What do you expect?") if not asked.step else (("What do you expect? ", "bold"), asked.text)
    if not asked.step:
        yield (asked.text,)
    choices = enumerate(asked.choices, 1)
    yield Table((), [((str(number), "bold"), choice.text) for number, choice in choices], 2)


def correction(asked: Quiz, chosen: int | None) -> Iterator[Part]:
    """The answer; and, where another was ``chosen`` (None: none was), what is wrong with that."""
    right = asked.choices[asked.answer]
    if chosen is not None:
        sign, style = VERDICT_SIGNS["proven" if chosen == asked.answer else "refuted"]
        yield ((f"{sign} {'right' if chosen == asked.answer else 'not so'}", style),)
    if chosen not in (None, asked.answer):
        wrong = asked.choices[chosen]
        yield (f"{chosen + 1}: {wrong.text}", "bold"), ". ", wrong.why
    yield "The answer is ", (f"{asked.answer + 1}: {right.text}", "bold"), ". ", right.why


# ---------------------------------------------------------------------------------------- the experiment
def step_opening(number: int, step: ChapterStep) -> Iterator[Part]:
    """The name of one step, and what is done in it."""
    yield _part(f"Step {number}: {step.name}")
    yield (step.did,)


def step_view(step: ChapterStep, width: int, told: Collection[int] = ()) -> Iterator[Part]:
    """What was done and seen in one step; the signs that are ``told`` are not explained again."""
    for block in _blocks(step, width, told):
        yield ()
        yield from block


def _blocks(step: ChapterStep, width: int, told: Collection[int]) -> Iterator[Iterable[Part]]:
    """What was done and what was seen, each to be set apart."""
    if step.calls:
        yield [_calls(step.calls)]
    if _NOTATION in _notation(step) - {*told}:
        yield [Table((), [(("p[0] = x: a store; p[0] → x: a load, and what it gave", "dim"),)], 3)]
    for sentence in step.saw:
        yield [(printable(sentence),)]
    yield from map(_before_and_after, step.evidence)
    yield from map(_figures, step.tables)
    for octets in step.bytes:
        yield _octets(octets, width)
    if step.listing is not None:
        yield _listing(step.listing)
    if step.grid is not None and len(step.grid.sharing.vaddrs):
        yield indented(_grid(step.grid, width - 3, told), 3)


def _calls(calls: Sequence[TracedCall]) -> Table:
    """Who did what: what the kernel returned behind ``=``, what a plain access gave behind ``→``."""
    rows: list[tuple[Cell, Cell]] = []
    before = "" if not any(call.process for call in calls) else None
    for call in shortened(calls):
        process = "" if call.process == before else call.process or "this process"
        before = call.process
        text: list[Piece] = [(printable(call.text), "" if call.access else "cyan")]
        if call.result:
            text += [(" → " if call.access else " = ", "dim"), (printable(call.result), "bold")]
        rows.append(((printable(process), "dim"), text))
    return Table((), rows, 2, gap=1)


def _before_and_after(compared: BeforeAfter) -> Iterator[Part]:
    yield ((f"   {printable(compared.title)}", "bold"),)
    yield ((f"   {compared.source}; ≠ marks what changed", "dim"),)
    rows: list[tuple[Cell, ...]] = []
    for row in compared.rows:
        style = "bold" if row.changed else ""
        cells = ((printable(text), style) for text in (row.name, row.before, row.after))
        rows.append((("≠" if row.changed else " ", style), *cells))
    yield Table(("", "", "before", "after"), rows, 2)


def _figures(figures: Figures) -> Iterator[Part]:
    yield ((printable(figures.title), "bold"),)
    yield Table(figures.columns, [tuple(map(printable, row)) for row in figures.rows], 2)


def _octets(octets: PageBytes, width: int) -> Iterator[Part]:
    """Rows of bytes before, below them after, and marks below those that changed."""
    yield ((f"   {printable(octets.title)}", "bold"),)
    for row in dump(octets, 16 if width >= _ROOM_FOR_16 else 8):
        start = f"   {row.start:#x}  "
        blank = " " * len(start)
        marks = " ".join(("^" if marked else " ") * len(text) for text, marked in row.after)
        before, after = (" ".join(text for text, _ in runs) for runs in (row.before, row.after))
        yield start, ("before  ", "dim"), before
        yield blank, ("after   ", "dim"), after
        yield ((f"{blank}        {marks}".rstrip(), "bold"),)
        if row.names:
            yield ((f"{blank}        {printable(row.names)}", "dim"),)


def _listing(listing: CodeListing) -> Iterator[Part]:
    """Code, and below the instruction that uses it first, each slot with what it holds."""
    yield ((f"   {printable(listing.title)}", "bold"),)
    rows: list[tuple[Cell, Cell]] = []
    for move in moves(listing):
        line = move.line
        arrow = f"  → slot {line.slot:#x}" if line.slot is not None else ""
        rows.append(((f"{line.vaddr:x}", "dim"), [printable(line.text), (arrow, "bold")]))
        if move.slot is not None and not move.repeated:
            _, name, before, after = move.slot
            rows.append(("", ["  ↳ ", (printable(name), "bold")]))
            rows.append(("", f"    before: {printable(before)}"))
            rows.append(("", f"    after:  {printable(after)}"))
    yield Table((), rows, 3)


def told_by(step: ChapterStep) -> frozenset[int]:
    """What the legends of ``step`` have explained: of its accesses, and of its grid."""
    told = _notation(step)
    return told if step.grid is None else told | explained(step.grid.snapshot, _parts(step.grid))


def _notation(step: ChapterStep) -> frozenset[int]:
    return frozenset({_NOTATION} if any(map(is_indexed, step.calls)) else ())


def _parts(grid: Grid) -> list[tuple[int, str]]:
    return [(part.vaddr, part.name) for part in grid.parts]


def _grid(grid: Grid, width: int, told: Collection[int]) -> Iterator[Part]:
    parts = _parts(grid)
    if grid.title:
        yield ((printable(grid.title), "bold"),)
    yield from matrix(grid.snapshot, grid.rows, parts, width)
    yield matrix_legend(grid.snapshot, parts, told)


# ------------------------------------------------------------------------------------- when it has run
def closing(result: ChapterResult, following: str | None = None) -> Iterator[Part]:
    """The claims and their verdicts, why it is so, what to try, and which chapter is ``following``."""
    chapter, environment = result.chapter, result.environment
    yield _part("What was claimed, and what was seen")
    yield from _claims(result.claims)
    if environment.file_systems:
        yield ((f"Its files were on {printable(', '.join(environment.file_systems))}.", "dim"),)
    yield ()
    yield _part("Why")
    for paragraph in chapter.explanation:
        yield (paragraph,)
        yield ()
    yield ("The surprise: ", "bold"), chapter.surprise
    yield pairs([("sources", printable("; ".join(chapter.sources)))])
    yield ()
    yield _part("Try it")
    yield (chapter.exercise.task,)
    yield pairs(
        [
            ("get it", _command(f"miniloader walkthrough {chapter.id} --exercise > try.py")),
            ("check it", _command(f"miniloader walkthrough {chapter.id} --check try.py")),
            ("a hint", _command(f"miniloader walkthrough {chapter.id} --hints")),
            ("ours", _command(f"miniloader walkthrough {chapter.id} --check try.py --solution")),
            *([("next", _command(f"miniloader walkthrough {following}"))] if following else []),
        ],
        indent=2,
    )


def _claims(claims: Iterable[Claim]) -> Iterator[Part]:
    """Each claim and what was seen; why some could not be told, once for all that follow each other."""
    for (reason, verdict), alike in groupby(claims, lambda claim: (claim.reason, claim.verdict)):
        for claim in alike:
            yield VERDICT_SIGNS[claim.verdict], f" {claim.statement}"
            seen = [("seen", printable(claim.observed))]
            if claim.verdict == "refuted":
                seen.insert(0, ("refuted: expected", printable(claim.expected)))
            if not reason:
                yield pairs(seen, indent=2)
        if reason:
            yield pairs([(verdict, printable(reason))], indent=2)


def summary(results: Sequence[ChapterResult]) -> Iterator[Part]:
    """A line for each chapter; what was refuted or could not be told, and why."""
    rows: list[tuple[Cell, ...]] = []
    for result in results:
        tally = Counter(claim.verdict for claim in result.claims)
        said = ", ".join(f"{tally[verdict]} {verdict}" for verdict in VERDICT_SIGNS if tally[verdict])
        sign = VERDICT_SIGNS[result.verdict]
        rows.append((sign, str(result.chapter.number), result.chapter.title, said))
    yield Table(("", ">", "chapter", "claims"), rows)
    for result in results:
        amiss = [claim for claim in result.claims if claim.verdict != "proven"]
        if amiss:
            yield ()
            yield ((result.chapter.title, "bold"),)
            yield from _claims(amiss)
    if results:
        yield ()
        yield pairs(evidence(results[0].environment.level))


def farewell() -> Iterator[Part]:
    """What all of it comes to, and what to do with it."""
    yield _part("What you have seen")
    for sentence in _IN_SHORT:
        yield Table((), [(("·", "dim"), sentence)], 1, gap=1)
    yield ()
    yield _part("What next")
    yield pairs([(name, [(command, "bold"), f"  {why}"]) for name, command, why in _NEXT], indent=2)


_IN_SHORT: Final = (
    "A process has addresses. Page tables lead them to frames, and are filled in when a page is touched.",
    "A file's page is in memory once, in the page cache. mmap lets a process in; read gives it a copy.",
    "Who writes to a private page is given a copy: after fork, in a private mapping, in a library's data.",
    "A library is mapped by its program headers. Its code is one copy for all; what is relocated is not.",
    "So a further process costs what it writes. That can be measured, in each process, page by page.",
)
_NEXT: Final = (
    ("build it", "miniloader walkthrough build", "write a loader of your own, in seven steps"),
    ("prove it", "miniloader prove libz.so.1 -n 4", "the same of a library of this system"),
    ("use it", "miniloader audit PID", "the memory of processes that run here, and why it is not shared"),
)


# ------------------------------------------------------------------------------------------- the words
def word_list(words: dict[str, str]) -> Iterator[Part]:
    """Each word and what it means."""
    yield Table((), [((word, "bold"), text) for word, text in words.items()])


# --------------------------------------------------------------------------------------- the exercise
def hints(chapter: Chapter[Any]) -> Iterator[Part]:
    """What leads to a solution of the exercise."""
    yield (chapter.exercise.task,)
    for number, hint in enumerate(chapter.exercise.hints, 1):
        yield Table((), [((f"{number}", "bold"), hint)], 2)


def solution(chapter: Chapter[Any], tried: str) -> Iterator[Part]:
    """How a learner's text becomes ours, as diff(1) shows it; the text as printed is no attempt."""
    with importing:
        from difflib import unified_diff

    if _code_of(tried) == _code_of(chapter.exercise.snippet):
        yield ("This is the snippet as it was printed: the solution is shown beside an attempt.",)
        yield from hints(chapter)
        return
    yield _part("Your file, and the lines by which ours differs")
    ours = _attempted(chapter.exercise.solution, tried).splitlines()
    for line in [*unified_diff(_code_of(tried), ours, n=2, lineterm="")][2:]:
        style = {"+": "green", "-": "red"}.get(line[:1], "dim")
        yield ((f"  {printable(line)}", style),)


def _attempted(solution: str, tried: str) -> str:
    """The ``solution`` without the functions that a learner has not begun: those are as in the snippet."""
    lines, begun = solution.splitlines(), _functions(tried)
    for name, (first, last, _) in sorted(_functions(solution).items(), key=lambda item: -item[1][0]):
        if begun.get(name, (0, 0, False))[2]:
            lines[first:last] = ["    raise NotImplementedError"]
    return "\n".join(lines)


def _functions(text: str) -> dict[str, tuple[int, int, bool]]:
    """Each function of ``text``: the lines below its docstring, and whether it is still to be written."""
    try:
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError):  # ValueError: a byte that no source may have
        return {}
    found = {}
    for node in nodes:
        told = ast.get_docstring(node) is not None and len(node.body) > 1
        body = node.body[1:] if told else node.body
        unwritten = len(body) == 1 and ast.unparse(body[0]) == "raise NotImplementedError"
        found[node.name] = (body[0].lineno - 1, node.end_lineno or 0, unwritten)
    return found


def _code_of(text: str) -> list[str]:
    """The lines of a snippet without those that only tell of it."""
    lines = text.splitlines()
    while lines and (not lines[0] or lines[0].startswith("#")):
        del lines[0]
    return lines


def snippet(chapter: Chapter[Any]) -> str:
    """The exercise as a file: the task as a comment above the code."""
    task = textwrap.wrap(chapter.exercise.task, 78, initial_indent="# ", subsequent_indent="# ")
    check = f"# When done: miniloader walkthrough {chapter.id} --check THIS_FILE"
    return "\n".join([*task, check, "", chapter.exercise.snippet])


def checked(answer: Answer, printed: str, hint: str | None = None) -> Iterator[Part]:
    """What became of a learner's file, what it printed, and a ``hint`` where it does not do yet."""
    if printed:
        yield (("It printed:", "dim"),)
        for line in printed.splitlines():
            yield ((f"  {printable(line)}", "dim"),)
        yield ()
    sign, style = VERDICT_SIGNS["proven" if answer.passed else "refuted"]
    yield (f"{sign} {'done' if answer.passed else 'not yet'}  ", style), printable(answer.message)
    if hint and not answer.passed:
        yield ("a hint: ", "dim"), hint
