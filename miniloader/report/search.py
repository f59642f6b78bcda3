"""Where the libraries that a library needs are looked for, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from miniloader.elf import ElfImage
from miniloader.errors import printable
from miniloader.loader.search import find_needed
from miniloader.report.text import Line, Piece, columns, heading

__all__ = ["lines", "to_json"]


def to_json(image: ElfImage) -> list[dict[str, Any]]:
    """``[{needed, needed_by, path, steps[{rule, path, outcome}]}]``, breadth first."""
    return [
        {
            "needed": found.name,
            "needed_by": needed_by,
            "path": found.path,
            "steps": [asdict(step) for step in found.steps],
        }
        for needed_by, found in find_needed(image)
    ]


def lines(image: ElfImage, width: int | None) -> Iterator[Line]:
    """For each name: who needs it first, every place that was looked at, and what was there."""
    yield heading("Search", "where each library it needs is looked for, in the order of ld.so(8)")
    for needed_by, found in find_needed(image):
        outcome: Piece = (printable(found.path), "green") if found.path else ("not found", "bold red")
        yield ("  ", (printable(found.name), "bold"), "  ", outcome)
        yield (f"    needed by {printable(needed_by)}",)
        rows: list[tuple[Piece, ...]] = [
            (f"    {step.rule}", step.outcome, printable(step.path)) for step in found.steps
        ]
        yield from columns(rows, width)
