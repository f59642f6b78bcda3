"""A level of evidence in words."""

from __future__ import annotations

from collections.abc import Iterator

from miniloader.kernel.features import LEVELS, LevelName
from miniloader.report.text import Cell

__all__ = ["evidence"]


def evidence(level: LevelName, cannot: str = "") -> Iterator[tuple[str, Cell]]:
    """Pairs of a name and a text: what ``level`` shows, what it ``cannot``, how to reach the one above."""
    position = next(index for index, row in enumerate(LEVELS) if row.name == level)
    yield "evidence", [(level, "bold"), f": {LEVELS[position].shows}"]
    if cannot:
        yield "cannot", cannot
    if position:
        above = LEVELS[position - 1]
        yield "for more", [(above.name, "bold"), f" {above.shows}: {above.get}"]
