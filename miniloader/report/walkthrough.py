"""How the walkthrough is told in the terminal: each part of a chapter as something to print.

Everything fits the width it is given; nothing is told by colour alone.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from miniloader.evidence.verdict import Claim, Verdict
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.report.grid import explained, matrix, matrix_legend
from miniloader.report.numbers import size
from miniloader.report.output import console, count, drawing_width, heading, pairs, safe, table
from miniloader.report.walkthrough_page import dump, moves
from miniloader.walkthrough.chapter import Answer, Chapter, Quiz, Statement
from miniloader.walkthrough.run_chapter import ChapterResult
from miniloader.walkthrough.step import BeforeAfter, ChapterStep, CodeListing, Figures, Grid, PageBytes
from miniloader.walkthrough.traced_calls import TracedCall
from miniloader.walkthrough.workbench import Environment

__all__ = [
    "checked",
    "closing",
    "contents",
    "correction",
    "opening",
    "page",
    "question",
    "snippet",
    "step_view",
    "summary",
    "told_by",
]

_SIGNS: Final[dict[Verdict, tuple[str, str]]] = {
    "proven": ("✔", "bold green"),
    "refuted": ("✘", "bold red"),
    "unknown": ("?", "bold yellow"),
}
_WIDEST: Final = 110  # columns; longer lines are hard to read
_ROOM_FOR_16: Final = 76  # columns that a row of sixteen bytes needs


def page() -> Console:
    """Standard output, no wider than what reads well."""
    out = console()
    out.width = min(drawing_width(out), _WIDEST)
    return out


# ------------------------------------------------------------------------------------------- the contents
def contents(chapters: Sequence[Chapter[Any]], level: LevelName) -> Group:
    """The chapters with their claims, and what can be shown of each at ``level``."""
    parts: list[RenderableType] = [
        heading("How mmap and shared libraries work", f"{count(len(chapters), 'chapter')}, each run here"),
        pairs([*_evidence(level)], indent=0),
    ]
    for one in chapters:
        can = [_can(claim, level) for claim in one.claims]
        shown = f"all {len(can)} claims can be judged here"
        if not all(can):
            shown = f"{sum(can)} of {len(can)} claims can be judged here"
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(no_wrap=True)
        rows.add_column(overflow="fold")
        for claim, judged in zip(one.claims, can, strict=True):
            needs = "" if judged else f"  (needs evidence by {claim.level})"
            rows.add_row(Text("  · " if judged else "  ? ", "dim"), Text(claim.text + needs))
        parts += [
            Text(""),
            Text.assemble(
                f"{one.number:>2} ", (one.id, "bold cyan"), "  ", (one.title, "bold"), (f"  {shown}", "dim")
            ),
            Padding(Text(one.claim), (0, 0, 0, 3)),
            rows,
        ]
    first = chapters[0].id if chapters else "CHAPTER"
    parts += [
        Text(""),
        pairs(
            [
                ("one", _command(f"miniloader walkthrough {first}")),
                ("all", _command("miniloader walkthrough --all --no-pause")),
                ("as a page", _command("miniloader walkthrough --html walkthrough.html")),
            ],
            indent=0,
        ),
    ]
    return Group(*parts)


def _can(claim: Statement[Any], level: LevelName) -> bool:
    names = [known.name for known in LEVELS]
    return names.index(level) <= names.index(claim.level)


def _evidence(level: LevelName) -> Iterator[tuple[str, Text | str]]:
    position = next(index for index, known in enumerate(LEVELS) if known.name == level)
    yield "evidence", Text.assemble((level, "bold"), f": {LEVELS[position].shows}")
    if position:
        above = LEVELS[position - 1]
        yield "for more", Text.assemble((above.name, "bold"), f" {above.shows}: {above.get}")


def _part(title: str) -> Text:
    """The heading of a part of a chapter."""
    return Text(f"── {title}", "bold")


def _command(text: str) -> Text:
    return safe(text, "bold")


# --------------------------------------------------------------------------------------- before it runs
def opening(chapter: Chapter[Any], of: int, facts: Environment) -> Group:
    """Title, claim, and where it runs."""
    title = f"Chapter {chapter.number} of {of}: {chapter.title}"
    where = f"{facts.kernel}, {facts.machine}, pages of {size(facts.page_size)}, {facts.privilege}"
    return Group(
        Text(title, "bold"),
        Text("═" * len(title), "dim"),
        Text(chapter.claim, "bold"),
        Text(""),
        pairs([("here", safe(where)), *_evidence(facts.level)], indent=0),
    )


def question(asked: Quiz) -> Group:
    """The question and its choices."""
    choices = Table.grid(padding=(0, 2, 0, 0))
    choices.add_column(no_wrap=True)
    choices.add_column(overflow="fold")
    for number, choice in enumerate(asked.choices, 1):
        choices.add_row(Text(f"  {number}", "bold"), choice.text)
    return Group(_part("What do you expect?"), Text(asked.text), choices)


def correction(asked: Quiz, chosen: int | None) -> Group:
    """The answer; and, where another was ``chosen`` (None: none was), what is wrong with that."""
    right = asked.choices[asked.answer]
    answer = Text.assemble("The answer is ", (f"{asked.answer + 1}: {right.text}", "bold"), ". ", right.why)
    if chosen is None:
        return Group(answer)
    if chosen == asked.answer:
        return Group(Text("✔ right", "bold green"), answer)
    wrong = asked.choices[chosen]
    said = Text.assemble((f"{chosen + 1}: {wrong.text}", "bold"), ". ", wrong.why)
    return Group(Text("✘ not so", "bold red"), said, answer)


# ---------------------------------------------------------------------------------------- the experiment
def step_view(number: int, step: ChapterStep, width: int, told: Collection[int] = ()) -> Group:
    """Everything of one step; the signs that are ``told`` are not explained again."""
    parts: list[RenderableType] = [_part(f"Step {number}: {step.name}"), Text(step.did)]
    if step.calls:
        parts += [Text(""), _calls(step.calls)]
    for sentence in step.saw:
        parts += [Text(""), safe(sentence)]
    for evidence in step.evidence:
        parts += [Text(""), _before_and_after(evidence)]
    for figures in step.tables:
        parts += [Text(""), _figures(figures)]
    for octets in step.bytes:
        parts += [Text(""), _octets(octets, width)]
    if step.listing is not None:
        parts += [Text(""), _listing(step.listing)]
    if step.grid is not None and len(step.grid.sharing.vaddrs):
        parts += [Text(""), _grid(step.grid, width, told)]
    return Group(*parts)


def _calls(calls: Sequence[TracedCall]) -> Table:
    """Who did what: what the kernel returned behind ``=``, what a plain access gave behind ``→``."""
    rows = Table.grid(padding=(0, 1, 0, 0))
    rows.add_column(no_wrap=True, style="dim")
    rows.add_column(overflow="fold")
    before = "" if not any(call.process for call in calls) else None
    for call in calls:
        who = "" if call.process == before else call.process or "this process"
        before = call.process
        sign = " → " if call.access else " = "
        result = ((sign, "dim"), (_one_line(call.result), "bold")) if call.result else ()
        text = Text.assemble((_one_line(call.text), "" if call.access else "cyan"), *result)
        rows.add_row(f"  {_one_line(who)}", text)
    return rows


def _one_line(text: str) -> str:
    return safe(text).plain


def _before_and_after(evidence: BeforeAfter) -> Group:
    rows = table("", "", "before", "after")
    for row in evidence.rows:
        style = "bold" if row.changed else ""
        cells = (safe(text, style) for text in (row.name, row.before, row.after))
        rows.add_row(Text("  ≠" if row.changed else "   ", style), *cells)
    about = Text(f"   {evidence.source}; ≠ marks what changed", "dim")
    return Group(safe(f"   {evidence.title}", "bold"), about, rows)


def _figures(figures: Figures) -> Group:
    rows = table(*figures.columns)
    for row in figures.rows:
        rows.add_row(*map(safe, row))
    return Group(safe(figures.title, "bold"), Padding(rows, (0, 0, 0, 2)))


def _octets(octets: PageBytes, width: int) -> Group:
    """Rows of bytes before, below them after, and marks below those that changed."""
    lines = [safe(f"   {octets.title}", "bold")]
    for row in dump(octets, 16 if width >= _ROOM_FOR_16 else 8):
        start = f"   {row.start:#x}  "
        blank = " " * len(start)
        marks = " ".join(("^" if marked else " ") * len(text) for text, marked in row.after)
        before, after = (" ".join(text for text, _ in runs) for runs in (row.before, row.after))
        lines += [
            Text.assemble(start, ("before  ", "dim"), before),
            Text.assemble(blank, ("after   ", "dim"), after),
            Text(f"{blank}        {marks}".rstrip(), "bold"),
        ]
        if row.names:
            lines.append(safe(f"{blank}        {row.names}", "dim"))
    return Group(*lines)


def _listing(listing: CodeListing) -> Group:
    """Code, and below the instruction that uses it first, each slot with what it holds."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True, style="dim")
    rows.add_column(overflow="fold")
    for move in moves(listing):
        line = move.line
        arrow = f"  → slot {line.slot:#x}" if line.slot is not None else ""
        rows.add_row(f"   {line.vaddr:x}", Text.assemble(_one_line(line.text), (arrow, "bold")))
        if move.slot is not None and not move.again:
            _, name, before, after = move.slot
            rows.add_row("", Text.assemble("  ↳ ", (_one_line(name), "bold")))
            rows.add_row("", safe(f"    before: {before}"))
            rows.add_row("", safe(f"    after:  {after}"))
    return Group(safe(f"   {listing.title}", "bold"), rows)


def told_by(step: ChapterStep) -> frozenset[int]:
    """What the legend of the grid of ``step`` has explained."""
    return frozenset() if step.grid is None else explained(step.grid.snapshot, _parts(step.grid))


def _parts(grid: Grid) -> list[tuple[int, str]]:
    return [(part.vaddr, part.name) for part in grid.parts]


def _grid(grid: Grid, width: int, told: Collection[int]) -> Group:
    parts = _parts(grid)
    title = [safe(f"   {grid.title}", "bold")] if grid.title else []
    drawn = matrix(grid.snapshot, grid.rows, parts, width - 3)
    legend = matrix_legend(grid.snapshot, parts, told)
    more = [Padding(legend, (0, 0, 0, 3))] if legend.row_count else []
    return Group(*title, Padding(drawn, (0, 0, 0, 3)), *more)


# ------------------------------------------------------------------------------------- when it has run
def closing(result: ChapterResult) -> Group:
    """The claims and their verdicts, why it is so, and what to try."""
    chapter, facts = result.chapter, result.environment
    parts: list[RenderableType] = [_part("What was claimed, and what was seen")]
    parts += _claims(result.claims)
    if facts.file_systems:
        parts.append(Text(f"Its files were on {_one_line(', '.join(facts.file_systems))}.", "dim"))
    parts += [Text(""), _part("Why")]
    for paragraph in chapter.explanation:
        parts += [Text(paragraph), Text("")]
    parts += [
        Text.assemble(("The surprise: ", "bold"), chapter.surprise),
        pairs([("sources", safe("; ".join(chapter.sources)))], indent=0),
        Text(""),
        _part("Try it"),
        Text(chapter.exercise.task),
        pairs(
            [
                ("get it", _command(f"miniloader walkthrough {chapter.id} --exercise > try.py")),
                ("check it", _command(f"miniloader walkthrough {chapter.id} --check try.py")),
            ]
        ),
    ]
    return Group(*parts)


def _claims(claims: Iterable[Claim]) -> Iterator[RenderableType]:
    """Each claim and what was seen; why some could not be told, once for all that follow each other."""
    for reason, alike in groupby(claims, lambda claim: claim.reason):
        for claim in alike:
            sign, style = _SIGNS[claim.verdict]
            yield Text.assemble((sign, style), f" {claim.statement}")
            seen = [("seen", safe(claim.observed))]
            if claim.verdict == "refuted":
                seen.insert(0, ("refuted: expected", safe(claim.expected)))
            if not reason:
                yield pairs(seen)
        if reason:
            yield pairs([("unknown", safe(reason))])


def summary(results: Sequence[ChapterResult]) -> Group:
    """A line for each chapter; what was refuted or could not be told, and why."""
    rows = table("", ">", "chapter", "claims")
    for result in results:
        sign, style = _SIGNS[result.verdict]
        tally = Counter(claim.verdict for claim in result.claims)
        said = ", ".join(f"{tally[verdict]} {verdict}" for verdict in _SIGNS if tally[verdict])
        rows.add_row(Text(sign, style), str(result.chapter.number), result.chapter.title, said)
    parts: list[RenderableType] = [rows]
    for result in results:
        amiss = [claim for claim in result.claims if claim.verdict != "proven"]
        if amiss:
            parts += [Text(""), Text(result.chapter.title, "bold"), *_claims(amiss)]
    if results:
        parts += [Text(""), pairs([*_evidence(results[0].environment.level)], indent=0)]
    return Group(*parts)


# --------------------------------------------------------------------------------------- the exercise
def snippet(chapter: Chapter[Any]) -> str:
    """The exercise as a file: the task as a comment above the code."""
    task = textwrap.wrap(chapter.exercise.task, 78, initial_indent="# ", subsequent_indent="# ")
    check = f"# When done: miniloader walkthrough {chapter.id} --check THIS_FILE"
    return "\n".join([*task, check, "", chapter.exercise.snippet])


def checked(answer: Answer, printed: str) -> Group:
    """What became of a learner's file, and what it printed."""
    sign, style = _SIGNS["proven" if answer.passed else "refuted"]
    lines = [safe(f"  {line}", "dim") for line in printed.splitlines()]
    said = [Text("It printed:", "dim"), *lines, Text("")] if lines else []
    word = "done" if answer.passed else "not yet"
    return Group(*said, Text.assemble((f"{sign} {word}  ", style), safe(answer.message)))
