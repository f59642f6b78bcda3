"""Where text for people goes, and the small pieces that every command draws with.

Names come from files and from other processes: :func:`safe` makes them inert.  Colour only repeats what a
sign says already.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miniloader.errors import printable

__all__ = [
    "PROTECTION_STYLES",
    "console",
    "count",
    "drawing_width",
    "heading",
    "legend",
    "level",
    "pairs",
    "safe",
    "size",
    "table",
]

#: Wide enough that nothing is wrapped or cut in a pipe: what reads there wants one thing a line.
_PIPE_WIDTH: Final = 10_000
#: Drawings in a pipe are as wide as this, since a person may look at them.
_PIPE_DRAWING: Final = 100

#: What a page of each protection looks like in a drawing.
PROTECTION_STYLES: Final = {
    "r--": "cyan",
    "r-x": "green",
    "rw-": "yellow",
    "rwx": "red",
    "---": "bright_black",
}


def console(*, stderr: bool = False) -> Console:
    """Standard output (or error) for people.

    rich takes the width from the terminal and honours ``NO_COLOR``, ``TERM`` and ``COLUMNS``; a pipe gets
    plain text, and lines as long as they need to be unless ``COLUMNS`` says otherwise.  Strings are shown as
    they are: markup and emoji codes are off, since names such as ``[heap]`` come from outside.
    """
    out = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _PIPE_WIDTH
    return out


def drawing_width(out: Console, most: int = 160) -> int:
    """How many columns a drawing may take: the terminal's, up to ``most``; less in a pipe."""
    return min(out.width, _PIPE_DRAWING if out.width == _PIPE_WIDTH else most)


def safe(text: object, style: str = "") -> Text:
    """``text`` from outside, such as a file's or a symbol's name: no character of it acts on a terminal."""
    return Text(printable(text), style)


def count(number: int, singular: str, plural: str | None = None) -> str:
    """``1 page``, ``2 pages``, ``1,024 pages``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def size(number: int) -> str:
    """A number of bytes in the largest binary unit that keeps it at least one: ``4.5 MiB``."""
    value, units = float(number), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{number:,} {units[0]}" if units[0] == "bytes" else f"{value:.3g} {units[0]}"


def heading(title: str, about: str = "") -> Text:
    """The first line of a part: its title, and what it says in short."""
    return Text.assemble((title, "bold"), ("  " if about else "") + about)


def legend(signs: Iterable[tuple[str, str, str]], width: int, indent: int = 2) -> Text:
    """What each sign of a drawing means, ``(sign, style, meaning)``, in lines of at most ``width``."""
    lines = [Text(" " * indent)]
    for sign, style, meaning in signs:
        between = " " * (3 if len(lines[-1]) > indent else 0)
        if between and len(lines[-1]) + len(f"{between}{sign} {meaning}") > width:
            lines.append(Text(" " * indent))
            between = ""
        lines[-1].append(between).append(sign, style).append(f" {meaning}", "dim")
    return Text("\n").join(lines)


def level(part: float) -> str:
    """A block as high as ``part``, 0 to 1: ``·`` for nothing at all, else one of eight."""
    return "·" if part <= 0 else "▁▂▃▄▅▆▇█"[min(int(part * 8), 7)]


def table(*columns: str) -> Table:
    """A table without lines; a column whose name starts with ``>`` is aligned to the right.

    What does not fit into a cell goes on below: nothing is ever cut.
    """
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        made.add_column(name.removeprefix(">"), justify=side, overflow="fold")
    return made


def pairs(rows: Sequence[tuple[str, Text | str]], indent: int = 2) -> Table:
    """Names and their values, one pair a row."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(" " * indent + name, value)
    return grid
