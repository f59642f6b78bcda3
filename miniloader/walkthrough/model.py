"""What a chapter is, and what comes of running one: values that the terminal, the page and JSON are made of.

A :class:`Chapter` is declared once, in a module of its own: claims, question, explanation, exercise, and a
``run`` that does the experiment.  ``run`` is a generator: it yields a :class:`Step` as each is done, and
returns what it has seen.  Each claim is judged by a pure function of that, so that a test can hand it other
observations and see it refuted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from miniloader.evidence.sharing import STATES, Sharing, analyse
from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import Claim, Verdict, combine
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.walkthrough.workbench import Bench

__all__ = [
    "Answer",
    "Call",
    "Chapter",
    "Choice",
    "Evidence",
    "Exercise",
    "Facts",
    "Finding",
    "Grid",
    "Line",
    "Listing",
    "PageBytes",
    "Part",
    "Question",
    "Result",
    "Row",
    "Statement",
    "Step",
    "Table",
    "Word",
]

Seen = TypeVar("Seen")


# ------------------------------------------------------------------------------- what is declared
class Finding(NamedTuple):
    """What became of one claim: the arguments of :func:`miniloader.evidence.verdict.judge`."""

    holds: bool | None
    expected: str
    observed: str
    reason: str = ""


@dataclass(frozen=True)
class Statement(Generic[Seen]):
    """A claim before it is judged: ``finding`` judges it by what the chapter has seen.

    ``level`` is the least evidence it needs: with less, it stays unknown.
    """

    id: str
    text: str
    finding: Callable[[Seen], Finding]
    level: LevelName = "none"


@dataclass(frozen=True)
class Choice:
    """One answer to a question, and why it is right or wrong."""

    text: str
    why: str


@dataclass(frozen=True)
class Question:
    """What to predict before the experiment; ``choices[answer]`` is right."""

    text: str
    choices: tuple[Choice, ...]
    answer: int


class Answer(NamedTuple):
    """Whether a learner's snippet does what the exercise asks for, and a sentence about it."""

    passed: bool
    message: str


@dataclass(frozen=True)
class Exercise:
    """A small change to a ``snippet`` of Python that runs as it is.

    ``check`` judges the names that the snippet leaves behind, while its mappings are still there; it runs in
    the snippet's own process.  ``solution`` is the snippet as it may look when done.
    """

    task: str
    snippet: str
    solution: str
    check: Callable[[dict[str, Any]], Answer]


# ----------------------------------------------------------------------------------- what is seen
@dataclass(frozen=True)
class Call:
    """One thing that a process did, as strace(1) would write it.

    ``text`` is the call with its arguments, ``result`` what came back ("" for nothing).  ``process`` names
    who did it ("" for this process).  ``access`` marks a plain load or store, which is no system call.
    """

    text: str
    result: str = ""
    process: str = ""
    access: bool = False

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"text": self.text, "result": self.result, "process": self.process, "access": self.access}


@dataclass(frozen=True)
class Table:
    """Rows of text under ``columns``; a column whose name starts with ``>`` is aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The column names without their marks."""
        columns = [name.removeprefix(">") for name in self.columns]
        return {"title": self.title, "columns": columns, "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True)
class Row:
    """What the kernel said of ``name`` before and after a step; it ``changed`` when the two differ."""

    name: str
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether the two differ."""
        return self.before != self.after


@dataclass(frozen=True)
class Evidence:
    """The kernel's answers before and after, to be shown side by side; ``source`` says where from."""

    title: str
    source: str
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        rows = [
            {"name": r.name, "before": r.before, "after": r.after, "changed": r.changed} for r in self.rows
        ]
        return {"title": self.title, "source": self.source, "rows": rows}


@dataclass(frozen=True)
class Part:
    """A named part of a grid: it begins at ``vaddr``."""

    vaddr: int
    name: str


@dataclass(frozen=True, eq=False)
class Grid:
    """A process × page matrix: ``rows`` name the processes (or mappings) of ``snapshot``, in order."""

    title: str
    rows: tuple[str, ...]
    snapshot: Snapshot
    parts: tuple[Part, ...] = ()

    @cached_property
    def sharing(self) -> Sharing:
        """State and frame of each page in each row."""
        return analyse(self.snapshot)

    def to_json(self) -> dict[str, Any]:
        """Runs of pages that look the same; ``frames`` are groups: equal numbers are equal frames.

        In a run of several pages ``frames`` are those of its first page; the others go on in step.
        """
        sharing = self.sharing
        runs = [
            {
                "vaddr": run.vaddr,
                "pages": run.pages,
                "states": [STATES[code].name for code in run.states],
                "frames": sharing.frame_group[:, run.start].tolist(),
            }
            for run in sharing.runs([part.vaddr for part in self.parts])
        ]
        return {
            "title": self.title,
            "rows": list(self.rows),
            "page_size": PAGE_SIZE,
            "parts": [{"vaddr": part.vaddr, "name": part.name} for part in self.parts],
            "runs": runs,
        }


@dataclass(frozen=True)
class Word:
    """``length`` bytes of a page, from byte ``offset`` on, that changed, what they are and why."""

    offset: int
    length: int
    name: str


@dataclass(frozen=True)
class PageBytes:
    """Some bytes of memory before and after; ``start`` is the address (or vaddr) of the first."""

    title: str
    start: int
    before: bytes
    after: bytes
    words: tuple[Word, ...]

    def to_json(self) -> dict[str, Any]:
        """The bytes in hexadecimal."""
        words = [{"offset": w.offset, "length": w.length, "name": w.name} for w in self.words]
        return {
            "title": self.title,
            "start": self.start,
            "before": self.before.hex(),
            "after": self.after.hex(),
            "words": words,
        }


@dataclass(frozen=True)
class Line:
    """One instruction; ``slot`` is the vaddr of the GOT slot that it reads (None: it reads none)."""

    vaddr: int
    code: bytes
    text: str
    slot: int | None = None


@dataclass(frozen=True)
class Listing:
    """Code, and the slots it goes through: ``slots`` are (vaddr, name, value before, value after)."""

    title: str
    lines: tuple[Line, ...]
    slots: tuple[tuple[int, str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, code in hexadecimal."""
        return {
            "title": self.title,
            "lines": [
                {"vaddr": one.vaddr, "code": one.code.hex(), "text": one.text, "slot": one.slot}
                for one in self.lines
            ],
            "slots": [
                {"vaddr": vaddr, "name": name, "before": before, "after": after}
                for vaddr, name, before, after in self.slots
            ],
        }


@dataclass(frozen=True)
class Step:
    """One step of an experiment: what was done, and what was seen.

    ``did`` is a sentence; ``calls`` are the very calls it made; ``saw`` are sentences with figures, which
    are observations and nothing that is claimed.
    """

    name: str
    did: str
    calls: tuple[Call, ...] = ()
    saw: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    tables: tuple[Table, ...] = ()
    grid: Grid | None = None
    bytes: tuple[PageBytes, ...] = ()
    listing: Listing | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "name": self.name,
            "did": self.did,
            "calls": [call.to_json() for call in self.calls],
            "saw": list(self.saw),
            "evidence": [one.to_json() for one in self.evidence],
            "tables": [table.to_json() for table in self.tables],
            "grid": None if self.grid is None else self.grid.to_json(),
            "bytes": [one.to_json() for one in self.bytes],
            "listing": None if self.listing is None else self.listing.to_json(),
        }


@dataclass(frozen=True)
class Facts:
    """Where a chapter ran: its header.  ``file_systems`` read like ``ext4 (/var/tmp)``."""

    kernel: str
    machine: str
    page_size: int
    file_systems: tuple[str, ...]
    privilege: str
    level: LevelName
    shows: str

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "kernel": self.kernel,
            "machine": self.machine,
            "page_size": self.page_size,
            "file_systems": list(self.file_systems),
            "privilege": self.privilege,
            "shows": self.shows,
        }


# --------------------------------------------------------------------------------------- a chapter
@dataclass(frozen=True)
class Chapter(Generic[Seen]):
    """One chapter.  ``claim`` is its one sentence, ``claims`` the statements that are judged.

    ``surprise`` is what the experiment shows that few expect.  ``explanation`` are paragraphs; ``sources``
    say where that is written down.
    """

    id: str
    number: int
    title: str
    claim: str
    surprise: str
    claims: tuple[Statement[Seen], ...]
    question: Question
    explanation: tuple[str, ...]
    sources: tuple[str, ...]
    exercise: Exercise
    run: Callable[[Bench], Generator[Step, None, Seen]] = field(repr=False)

    @property
    def code(self) -> str:
        """The source of the experiment."""
        return inspect.getsource(self.run)


@dataclass(frozen=True)
class Result:
    """What came of running ``chapter``: the steps, and the claims judged by what was seen."""

    chapter: Chapter[Any]
    facts: Facts
    steps: tuple[Step, ...]
    claims: tuple[Claim, ...]

    @property
    def verdict(self) -> Verdict:
        """Of all claims together."""
        return combine(self.claims)

    def to_json(self) -> dict[str, Any]:
        """One element of ``chapters`` of ``walkthrough --json``."""
        chapter = self.chapter
        return {
            "id": chapter.id,
            "number": chapter.number,
            "title": chapter.title,
            "claim": chapter.claim,
            "surprise": chapter.surprise,
            "verdict": self.verdict,
            "evidence": self.facts.level,
            "facts": self.facts.to_json(),
            "claims": [claim.to_json() for claim in self.claims],
            "question": {
                "text": chapter.question.text,
                "choices": [{"text": c.text, "why": c.why} for c in chapter.question.choices],
                "answer": chapter.question.answer,
            },
            "steps": [step.to_json() for step in self.steps],
            "explanation": list(chapter.explanation),
            "sources": list(chapter.sources),
            "exercise": {"task": chapter.exercise.task, "snippet": chapter.exercise.snippet},
        }
