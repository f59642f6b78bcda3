"""Where text for people goes, and the small pieces that every command draws with.

Names come from files and from other processes: :func:`safe` makes them inert.  Colour only repeats what a
sign says already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from miniloader.errors import printable
from miniloader.report import text
from miniloader.report.numbers import PROTECTION_STYLES, count, size
from miniloader.report.text import Part

__all__ = [
    "PROTECTION_STYLES",
    "console",
    "count",
    "drawing_width",
    "heading",
    "pairs",
    "rendered",
    "safe",
    "size",
    "table",
]

#: Wide enough that nothing is wrapped or cut in a pipe: what reads there wants one thing a line.
_PIPE_WIDTH: Final = 10_000
#: Drawings in a pipe are as wide as this, since a person may look at them.
_PIPE_DRAWING: Final = 100


class _Console(Console):
    """When nobody reads any more it says so as everything else does; rich's own would leave by SystemExit."""

    def on_broken_pipe(self) -> None:
        """Called while the BrokenPipeError is being handled: let it through."""
        raise


def console(*, stderr: bool = False) -> Console:
    """Standard output (or error) for people.

    rich takes the width from the terminal and honours ``NO_COLOR``, ``TERM`` and ``COLUMNS``; a pipe gets
    plain text, and lines as long as they need to be unless ``COLUMNS`` says otherwise.  Strings are shown as
    they are: markup and emoji codes are off, since names such as ``[heap]`` come from outside.
    """
    out = _Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _PIPE_WIDTH
    return out


def drawing_width(out: Console, most: int = 160) -> int:
    """How many columns a drawing may take: the terminal's, up to ``most``; less in a pipe."""
    return min(out.width, _PIPE_DRAWING if out.width == _PIPE_WIDTH else most)


def safe(text: object, style: str = "") -> Text:
    """``text`` from outside, such as a file's or a symbol's name: no character of it acts on a terminal."""
    return Text(printable(text), style)


def heading(title: str, about: str = "") -> Text:
    """The first line of a part: its title, and what it says in short."""
    return Text.assemble((title, "bold"), ("  " if about else "") + about)


def table(*columns: str) -> Table:
    """A table without lines; a column whose name starts with ``>`` is aligned to the right.

    What does not fit into a cell goes on below: nothing is ever cut.
    """
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        made.add_column(name.removeprefix(">"), justify=side, overflow="fold")
    return made


def rendered(part: Part, width: int) -> RenderableType:
    """A line or a table for rich; a table that needs all of ``width`` has its columns closer together."""
    if not isinstance(part, text.Table):
        return Text.assemble(*part)
    made = table(*part.columns)
    if sum(part.widths) + 2 * len(part.columns) - 2 > width:
        made.padding = (0, 1, 0, 0)
    for row in part.rows:
        made.add_row(*(cell if isinstance(cell, str) else Text(*cell) for cell in row))
    return made


def pairs(rows: Sequence[tuple[str, Text | str]], indent: int = 2) -> Table:
    """Names and their values, one pair a row."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(" " * indent + name, value)
    return grid
