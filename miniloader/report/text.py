"""Text for people as plain values: lines of styled pieces, and tables of cells, which become lines.

Every report is made of these; :mod:`miniloader.report.output` alone draws them.  Colour only repeats what a
sign or a word says already.  Names come from files and from other processes: whoever puts one into a line
makes it inert with :func:`miniloader.errors.printable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from operator import le
from typing import TYPE_CHECKING, Final

from miniloader.forking import cached_property, importing
from miniloader.values import dataclass

if TYPE_CHECKING:
    from textwrap import TextWrapper

    from miniloader.evidence.verdict import Verdict

__all__ = [
    "VERDICT_SIGNS",
    "Cell",
    "Line",
    "Part",
    "Piece",
    "Table",
    "heading",
    "indented",
    "laid_out",
    "legend",
    "listed",
    "more",
    "pairs",
    "plain",
    "stripped",
    "wrapped",
]

Piece = str | tuple[str, str]
"""A text, or a text and its style."""
Line = tuple[Piece, ...]
Cell = Piece | list[Piece]
"""What stands in one column of one row: a piece, or a list of several."""

#: The sign of each verdict and of a right or wrong answer, and its style: in terminals and pages alike.
VERDICT_SIGNS: Final[dict[Verdict, tuple[str, str]]] = {
    "proven": ("✔", "bold green"),
    "refuted": ("✘", "bold red"),
    "unknown": ("?", "bold yellow"),
    "nothing to judge": ("–", "dim"),
}

_NARROWEST: Final = 16  # columns that the last cell of a row keeps where others have all they want
_LONGEST_WORD: Final = 16  # columns that every cell keeps for a word, so that only long ones are broken
_NUMBER: Final = r"0x[0-9a-fA-F]+|(?<![0-9A-Za-z])[0-9a-f]{6,}(?![0-9A-Za-z])|[0-9]+(?:[.,][0-9]+)*"
_SEPARATORS: Final = "/:,;=+-_@.()"  # after which a long word is best broken


@lru_cache(maxsize=1)
def _number() -> re.Pattern[str]:
    return re.compile(_NUMBER)  # when a table needs it: a few lines of text do not


def plain(line: Line) -> str:
    """The text of ``line`` without its styles.

    >>> plain(("libz.so.1", ("  2 pages", "dim")))
    'libz.so.1  2 pages'
    """
    return "".join([piece if isinstance(piece, str) else piece[0] for piece in line])


def stripped(line: Sequence[Piece]) -> Line:
    """``line`` without the spaces at its end."""
    pieces = list(line)
    while pieces:
        last = pieces.pop()
        text = last if isinstance(last, str) else last[0]
        if kept := text.rstrip():
            pieces.append(kept if isinstance(last, str) else (kept, last[1]))
            break
    return tuple(pieces)


def heading(title: str, about: str = "") -> Line:
    """The first line of a part: its title, and what it says in short."""
    return ((title, "bold"), f"  {about}") if about else ((title, "bold"),)


def more(number: int, what: str = "") -> str:
    """How many items of a list are not shown, as its last item; "" for none.

    >>> more(1200, "runs of pages")
    'and 1,200 more runs of pages'
    """
    return f"and {number:,} more{' ' * bool(what)}{what}" if number > 0 else ""


def listed(names: Sequence[str], most: int, of: int | None = None) -> str:
    """The first ``most`` of ``names``, and the number of the others; where there are more, ``of`` how many.

    >>> listed(["read", "write", "close"], 2)
    'read, write and 1 more'
    """
    number = len(names) if of is None else of
    return " ".join(filter(None, (", ".join(names[:most]), more(number - min(most, len(names))))))


def legend(signs: Iterable[tuple[str, str, str]], width: int) -> Iterator[Line]:
    """What each sign of a drawing means, ``(sign, style, meaning)``, in lines of at most ``width``."""
    line: Line = (" ",)
    for sign, style, meaning in signs:
        entry: Line = (" " if len(line) == 1 else "   ", (sign, style), (f" {meaning}", "dim"))
        if len(line) > 1 and len(plain(line + entry)) > width:
            yield line
            line, entry = (" ",), (" ", *entry[1:])
        line += entry
    yield line


# -------------------------------------------------------------------------------------------- wrapping
def wrapped(line: Line, width: int | None, indent: int = 0) -> Iterator[Line]:
    """``line`` in lines of at most ``width`` columns (None: any), those after the first set in by ``indent``.

    It is broken at spaces; a word that is too long for a line is broken behind a sign, and a number only
    where it is longer than a line in itself.

    >>> [plain(part) for part in wrapped(("where it is ", ("looked for", "bold")), 16, indent=2)]
    ['where it is', '  looked for']
    """
    text = plain(line)
    if width is None or len(text) <= width:
        yield line
        return
    margin, at = " " * indent, 0
    lines = _wrapper()(
        max(width, indent + 4), subsequent_indent=margin, break_on_hyphens=False, expand_tabs=False
    ).wrap(text)
    for number, broken in enumerate(lines or [""]):
        words = broken[indent:] if number else broken
        at = text.index(words, at)
        yield (margin, *_cut(line, at, len(words))) if number and indent else _cut(line, at, len(words))
        at += len(words)


@lru_cache(maxsize=1)
def _wrapper() -> type[TextWrapper]:
    """What breaks lines; and a word that is longer than a line where :func:`_break_of` says.

    Made when something does not fit: to import this takes longer than most tables.
    """
    with importing:
        from textwrap import TextWrapper

    class Wrapper(TextWrapper):
        def _handle_long_word(
            self, reversed_chunks: list[str], cur_line: list[str], cur_len: int, width: int
        ) -> None:
            word, room = reversed_chunks[-1], max(width - cur_len, 1)
            at = _break_of(word, room)
            if at == 0 and cur_line:
                return  # nothing of it fits behind what there is: it begins the next line
            cur_line.append(word[: at or room])
            reversed_chunks[-1] = word[at or room :]

    return Wrapper


def _break_of(word: str, room: int) -> int:
    """How many characters of ``word``, at most ``room``, are a good beginning of it; 0 for none.

    >>> _break_of("/usr/lib/libcrypto.so.3", 12), _break_of("at_0x7f52fe9a1000", 8), _break_of("0x7f52fe", 4)
    (9, 3, 0)
    """
    numbers = [match.span() for match in _number().finditer(word)]
    whole = [at for at in range(1, room + 1) if not any(start < at < end for start, end in numbers)]
    behind_signs = [at for at in whole if word[at - 1] in _SEPARATORS]
    return max(behind_signs or whole, default=0)


def _cut(line: Line, start: int, length: int) -> Line:
    """``length`` characters of ``line`` from ``start`` on, in their styles."""
    pieces: list[Piece] = []
    for piece in line:
        text = piece if isinstance(piece, str) else piece[0]
        part = text[max(start, 0) : max(start + length, 0)]
        if part:
            pieces.append(part if isinstance(piece, str) else (part, piece[1]))
        start -= len(text)
    return tuple(pieces)


# ---------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    """Rows of cells below the names of their columns (none: the rows alone), set in by ``indent``.

    Columns are ``gap`` apart; one whose name starts with ``>`` is flush right.  No number and no address is
    ever broken: where a table is wider than its place, columns move together, then texts go on below
    themselves, and a column that has no room even so stands below each row, behind its name.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    indent: int = 0
    gap: int = 2

    def lines(self, width: int | None = None) -> Iterator[Line]:
        """The table in lines of at most ``width`` columns (None: any).

        >>> for line in Table(("library", ">pages"), [("libz.so.1", "31"), ("libc.so.6", "1,407")]).lines():
        ...     print(plain(line))
        library    pages
        libz.so.1     31
        libc.so.6  1,407
        """
        names = [name.removeprefix(">") for name in self.columns]
        header: list[list[Cell]] = [[(name, "bold") for name in names]] if any(names) else []
        rows = [[_as_line(cell) for cell in row] for row in [*header, *self.rows]]
        texts = [[plain(cell) for cell in row] for row in rows]
        columns = [
            _Column(name, name.startswith(">"), cells)
            for name, cells in zip_longest(self.columns, zip_longest(*texts, fillvalue=""), fillvalue="")
        ]
        layout = _fitted(columns, None if width is None else width - self.indent, self.gap)
        margin = (" " * self.indent,) if self.indent else ()
        for number, (row, texts_of_row) in enumerate(zip(rows, texts, strict=True)):
            for line in _beside_each_other(row, texts_of_row, layout):
                yield margin + line if line else line
            beside = len(layout.widths)
            if number or not header:
                below = zip([*names, *[""] * len(row)][beside:], row[beside:], strict=False)
                yield from (margin + line for line in _below(below, layout.room))


Part = Line | Table


def pairs(rows: Iterable[tuple[str, Cell]], indent: int = 0) -> Table:
    """Names and their values, a pair a row."""
    return Table((), [((name, "dim"), value) for name, value in rows], indent)


def indented(parts: Iterable[Part], indent: int) -> Iterator[Part]:
    """``parts`` set in by ``indent`` columns."""
    for part in parts:
        if isinstance(part, Table):
            yield Table(part.columns, part.rows, part.indent + indent, part.gap)
        else:
            yield (" " * indent, *part) if part else part


def laid_out(parts: Iterable[Part], width: int | None) -> Iterator[Line]:
    """All of ``parts`` in lines of at most ``width`` columns (None: any)."""
    for part in parts:
        yield from part.lines(width) if isinstance(part, Table) else wrapped(part, width)


@dataclass(frozen=True)
class _Column:
    """The texts of one column, that of its heading first."""

    name: str
    right: bool
    texts: Sequence[str]

    @cached_property
    def width(self) -> int:
        """What it would like to have."""
        return max(map(len, self.texts), default=0)

    @cached_property
    def least(self) -> int:
        """What it needs, so that no number, no address and no word of its heading is broken."""
        if self.right:
            return self.width
        words = [word for text in self.texts for word in text.split()]
        numbers = [number for text in self.texts for number in _number().findall(text)]
        return max([*(min(len(word), _LONGEST_WORD) for word in words), *map(len, numbers)], default=0)


@dataclass(frozen=True)
class _Layout:
    """How wide the columns are, as many as have room, and how far apart, flush right or not."""

    widths: tuple[int, ...]
    gap: int
    right: tuple[bool, ...]
    room: int | None


def _fitted(columns: Sequence[_Column], room: int | None, gap: int) -> _Layout:
    """The first of these that fits: wide, close together, with a long last column broken, with any broken."""
    wide, right = [column.width for column in columns], tuple(column.right for column in columns)

    def excess(widths: Sequence[int], gap: int) -> int:
        return 0 if room is None else max(0, sum(widths) + gap * (len(widths) - 1) - room)

    if not excess(wide, gap):
        return _Layout(tuple(wide), gap, right, room)
    if not excess(wide, 1) and len(columns) > 2:
        return _Layout(tuple(wide), 1, right, room)
    last = max(wide[-1] - excess(wide, gap), columns[-1].least, min(wide[-1], _NARROWEST))
    if not excess([*wide[:-1], last], gap):
        return _Layout((*wide[:-1], last), gap, right, room)
    while excess(wide, 1):
        spare = [at for at, column in enumerate(columns) if wide[at] > column.least]
        if not spare and len(columns) > 1:
            return _fitted(columns[:-1], room, gap)
        if not spare:
            break
        wide[max(spare, key=wide.__getitem__)] -= 1
    return _Layout(tuple(wide), 1, right, room)


def _below(cells: Iterable[tuple[str, Line]], room: int | None) -> Iterator[Line]:
    """Cells that had no room beside the others, each behind the name of its column."""
    line: list[Piece] = []
    for name, cell in cells:
        if plain(cell):
            line += ["  " if line else "    ", f"{name}: " if name else "", *cell]
    return wrapped(tuple(line), room, 6) if line else iter(())


def _as_line(cell: Cell) -> Line:
    return tuple(cell) if isinstance(cell, list) else (cell,)


def _beside_each_other(cells: Sequence[Line], texts: Sequence[str], layout: _Layout) -> Iterator[Line]:
    """One row, in as many lines as its highest cell has; ``texts`` are those of the ``cells``."""
    lengths = [*map(len, texts)]
    if cells and all(map(le, lengths, layout.widths)):  # as in most rows
        yield _one_line(cells, lengths, layout)
        return
    columns = [list(wrapped(cell, width)) for cell, width in zip(cells, layout.widths, strict=False)]
    for parts in zip_longest(*columns, fillvalue=()):
        yield _one_line(parts, [len(plain(part)) for part in parts], layout)


def _one_line(parts: Iterable[Line], lengths: Iterable[int], layout: _Layout) -> Line:
    """Parts of so many letters beside each other."""
    line: list[Piece] = []
    for part, length, width, right in zip(parts, lengths, layout.widths, layout.right, strict=False):
        padding = " " * (width - length)
        line += [padding, *part] if right else [*part, padding]
        line.append(" " * layout.gap)
    return stripped(line)
