"""What a step of a chapter shows: values that the terminal, the page and JSON are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from miniloader.evidence.sharing import STATES, Sharing, analyse
from miniloader.evidence.snapshot import Snapshot
from miniloader.forking import cached_property
from miniloader.json_schema import BOOL, COUNT, HEX, INT, TEXT, array, keys, nullable, record
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass
from miniloader.walkthrough.traced_calls import TracedCall

__all__ = [
    "NOTHING_OF_PAGES",
    "STEP_SCHEMA",
    "BeforeAfter",
    "ChangedWord",
    "ChapterStep",
    "CodeLine",
    "CodeListing",
    "Figures",
    "Grid",
    "OfPages",
    "PageBytes",
    "Part",
    "Row",
]


@dataclass(frozen=True)
class Figures:
    """A table: rows of text under ``columns``; one whose name starts with ``>`` is aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """An element of ``tables``, the column names without their marks.

        >>> Figures("pages", ("process", ">pages"), (("parent", "8"),)).to_json()["columns"]
        ['process', 'pages']
        """
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
        """Whether the kernel said something else after the step."""
        return self.before != self.after


@dataclass(frozen=True)
class BeforeAfter:
    """The kernel's answers before and after, to be shown side by side; ``source`` says where from."""

    title: str
    source: str
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """An element of ``evidence``."""
        rows = [
            {"name": row.name, "before": row.before, "after": row.after, "changed": row.changed}
            for row in self.rows
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

        In a run of several pages ``frames`` are those of its first page; the next pages go on in step.
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
class ChangedWord:
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
    words: tuple[ChangedWord, ...]

    def to_json(self) -> dict[str, Any]:
        """An element of ``bytes``, in hexadecimal."""
        words = [{"offset": word.offset, "length": word.length, "name": word.name} for word in self.words]
        return {
            "title": self.title,
            "start": self.start,
            "before": self.before.hex(),
            "after": self.after.hex(),
            "words": words,
        }


@dataclass(frozen=True)
class CodeLine:
    """One instruction; ``slot`` is the vaddr of the GOT slot that it reads (None: it reads none)."""

    vaddr: int
    code: bytes
    text: str
    slot: int | None = None

    def to_json(self) -> dict[str, Any]:
        """An element of a listing's ``lines``, its code in hexadecimal."""
        return {"vaddr": self.vaddr, "code": self.code.hex(), "text": self.text, "slot": self.slot}


@dataclass(frozen=True)
class CodeListing:
    """Code, and the slots it goes through: ``slots`` are (vaddr, name, value before, value after)."""

    title: str
    lines: tuple[CodeLine, ...]
    slots: tuple[tuple[int, str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """The key ``listing`` of a step."""
        slots = [dict(zip(("vaddr", "name", "before", "after"), slot, strict=True)) for slot in self.slots]
        return {"title": self.title, "lines": [line.to_json() for line in self.lines], "slots": slots}


class OfPages(str):
    """A sentence that rests on what the kernel tells of single pages: false where it tells nothing."""

    __slots__ = ()


NOTHING_OF_PAGES: Final = "Of single pages the kernel says nothing here."


@dataclass(frozen=True)
class ChapterStep:
    """One step of an experiment: what was done, and what was seen.

    ``did`` is a sentence; ``calls`` are the very calls it made; ``saw`` are sentences with figures, which
    are observations and nothing that is claimed.
    """

    name: str
    did: str
    calls: tuple[TracedCall, ...] = ()
    saw: tuple[str, ...] = ()
    evidence: tuple[BeforeAfter, ...] = ()
    tables: tuple[Figures, ...] = ()
    grid: Grid | None = None
    bytes: tuple[PageBytes, ...] = ()
    listing: CodeListing | None = None

    def told_at(self, level: LevelName) -> ChapterStep:
        """The step as it may be told with evidence of ``level``: at totals without what rests on pages."""
        if level in ("frames", "flags"):
            return self
        saw = (NOTHING_OF_PAGES if isinstance(sentence, OfPages) else sentence for sentence in self.saw)
        return replace(self, saw=tuple(dict.fromkeys(saw)))

    def to_json(self) -> dict[str, Any]:
        """An element of ``steps`` of a chapter."""
        return {
            "name": self.name,
            "did": self.did,
            "calls": [call._asdict() for call in self.calls],
            "saw": list(self.saw),
            "evidence": [comparison.to_json() for comparison in self.evidence],
            "tables": [figures.to_json() for figures in self.tables],
            "grid": None if self.grid is None else self.grid.to_json(),
            "bytes": [octets.to_json() for octets in self.bytes],
            "listing": None if self.listing is None else self.listing.to_json(),
        }


_GRID: Final = record(
    {"title": TEXT, "rows": array(TEXT), "page_size": COUNT},
    {"parts": array(record({"vaddr": COUNT, "name": TEXT}))},
    {"runs": array(record(keys(COUNT, "vaddr pages"), {"states": array(TEXT), "frames": array(INT)}))},
)
_BYTES: Final = record(
    {"title": TEXT, "start": COUNT, "before": HEX, "after": HEX},
    {"words": array(record(keys(COUNT, "offset length"), {"name": TEXT}))},
)
_LISTING: Final = record(
    {"title": TEXT},
    {"lines": array(record({"vaddr": COUNT, "code": HEX, "text": TEXT, "slot": nullable(COUNT)}))},
    {"slots": array(record({"vaddr": COUNT}, keys(TEXT, "name before after")))},
)

STEP_SCHEMA: Final = record(
    {"name": TEXT, "did": TEXT, "saw": array(TEXT)},
    {"calls": array(record(keys(TEXT, "text result process"), {"access": BOOL}))},
    {"evidence": array(record(
        keys(TEXT, "title source"),
        {"rows": array(record(keys(TEXT, "name before after"), {"changed": BOOL}))},
    ))},
    {"tables": array(record({"title": TEXT, "columns": array(TEXT), "rows": array(array(TEXT))}))},
    {"grid": nullable(_GRID), "bytes": array(_BYTES), "listing": nullable(_LISTING)},
)  # fmt: skip
"""What :meth:`ChapterStep.to_json` gives."""
