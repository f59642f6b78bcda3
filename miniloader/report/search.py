"""Where the libraries that a library needs are looked for, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import TEXT, array, keys, nullable, record
from miniloader.report.text import Part, Piece, Table, heading

if TYPE_CHECKING:
    from miniloader.loader.search import Found

__all__ = ["SCHEMA", "lines", "to_json"]


def to_json(needed: Iterable[tuple[str, Found]]) -> list[dict[str, Any]]:
    """``[{needed, needed_by, path, steps[{rule, path, outcome}]}]``, in the order of ``needed``."""
    return [
        {
            "needed": found.name,
            "needed_by": needed_by,
            "path": found.path,
            "steps": [
                {"rule": step.rule, "path": step.path, "outcome": step.outcome} for step in found.steps
            ],
        }
        for needed_by, found in needed
    ]


SCHEMA: Final = array(
    record(
        keys(TEXT, "needed needed_by"),
        {"path": nullable(TEXT), "steps": array(record(keys(TEXT, "rule path outcome")))},
    )
)
"""What :func:`to_json` gives."""


def lines(needed: Iterable[tuple[str, Found]]) -> Iterator[Part]:
    """For each name: who needs it first, every place that was looked at, and what was there."""
    yield heading("Search", "where each library it needs is looked for, in the order of ld.so(8)")
    for needed_by, found in needed:
        outcome: Piece = (printable(found.path), "green") if found.path else ("not found", "bold red")
        yield ("  ", (printable(found.name), "bold"), "  ", outcome)
        yield (f"    needed by {printable(needed_by)}",)
        yield Table((), [(step.rule, step.outcome, printable(step.path)) for step in found.steps], 4)
