"""Text for people as plain values: lines of styled pieces, columns made of such lines, and tables.

A terminal gets them through rich.  A pipe needs no more than their text, and does without importing rich,
which costs as much as reading a library.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Final

from miniloader.values import dataclass

__all__ = ["Line", "Part", "Piece", "Table", "columns", "heading", "legend", "plain", "room", "show"]

Piece = str | tuple[str, str]
"""A text, or a text and its style."""
Line = tuple[Piece, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells below the names of their columns; one whose name starts with ``>`` is flush right."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Piece]]

    @cached_property
    def texts(self) -> list[list[str]]:
        """Every row as text, that of the names first."""
        names = [name.removeprefix(">") for name in self.columns]
        return [names, *([plain((cell,)) for cell in row] for row in self.rows)]

    @property
    def widths(self) -> list[int]:
        """How wide each column would like to be."""
        return [max(map(len, column)) for column in zip(*self.texts, strict=True)]

    def aligned(self) -> Iterator[str]:
        """Its lines, each as long as it needs to be."""
        sides = [str.rjust if name.startswith(">") else str.ljust for name in self.columns]
        layout = tuple(zip(sides, self.widths, strict=True))
        for row in self.texts:
            cells = (side(text, width) for text, (side, width) in zip(row, layout, strict=True))
            yield "  ".join(cells).rstrip()


Part = Line | Table

#: What makes rich write anything but plain text, in lines of any length, into a pipe.
_ASKS_FOR_RICH: Final = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
#: Drawings in a pipe are as wide as this, since a person may look at them.
_PIPE_DRAWING: Final = 100
_MOST: Final = 160


def plain(line: Line) -> str:
    """The text of a line."""
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in line)


def heading(title: str, about: str = "") -> Line:
    """The first line of a part: its title, and what it says in short."""
    return ((title, "bold"), f"  {about}") if about else ((title, "bold"),)


def legend(signs: Iterable[tuple[str, str, str]], width: int) -> Iterator[Line]:
    """What each sign of a drawing means, ``(sign, style, meaning)``, in lines of at most ``width``."""
    line: Line = (" ",)
    for sign, style, meaning in signs:
        more: Line = (" " if len(line) == 1 else "   ", (sign, style), (f" {meaning}", "dim"))
        if len(line) > 1 and len(plain(line + more)) > width:
            yield line
            line, more = (" ",), (" ", *more[1:])
        line += more
    yield line


def columns(
    rows: Sequence[Sequence[Piece]], width: int | None, *, right: Sequence[int] = ()
) -> Iterator[Line]:
    """Rows of cells below each other, those of the columns ``right`` flush right.

    The last cell of a row goes on below itself where it is too long for ``width``; ``None`` is any width.
    """
    texts = [[plain((cell,)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*(row[:-1] for row in texts), fillvalue="")]
    for row, cells in zip(rows, texts, strict=True):
        line: list[Piece] = []
        for place, (cell, text) in enumerate(zip(row[:-1], cells, strict=False)):
            padded = text.rjust(widths[place]) if place in right else text.ljust(widths[place])
            line += [_like(cell, padded), "  "]
        indent = sum(widths[: len(row) - 1]) + 2 * (len(row) - 1)
        lines = [cells[-1]] if width is None else _wrapped(cells[-1], width - indent)
        yield (*line, _like(row[-1], lines[0]))
        for text in lines[1:]:
            yield (" " * indent, _like(row[-1], text))


def _like(cell: Piece, text: str) -> Piece:
    return text if isinstance(cell, str) else (text, cell[1])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 16), break_on_hyphens=False) or [""]


def room() -> tuple[int, int | None]:
    """Columns for a drawing on standard output, and for text (``None``: no limit, as in a pipe)."""
    if _is_plain():
        return _PIPE_DRAWING, None
    from miniloader.report.output import console

    width = console().width
    return min(width, _MOST), width


def show(parts: Iterable[Part]) -> None:
    """Print lines and tables on standard output."""
    if _is_plain():
        for part in parts:
            for line in part.aligned() if isinstance(part, Table) else (plain(part).rstrip(),):
                print(line)
        return
    from miniloader.report.output import console, rendered

    out = console()
    out.print(*(rendered(part, out.width) for part in parts), sep="\n")


def _is_plain() -> bool:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return not terminal and not any(os.environ.get(name) for name in _ASKS_FOR_RICH)
