"""Lines and tables: what does not fit goes on below, and no number is ever broken."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from miniloader.report.text import Line, Table, indented, laid_out, listed, more, plain, wrapped

_TABLE = Table(
    ("library", ">pages", "note"),
    [("libc.so.6", "1,407", ""), (("libLLVM-14.so.1", "yellow"), "9", "two separate files")],
)
_MAPPINGS = Table(
    ("from", "to", ">size", "what"),
    [
        ("7f52fe9a1000", "7f52fe9a4000", "1,212 KiB", "the file's pages"),
        ("7f52fe9a4000", "7f52fe9a5000", "4 KiB", ""),
    ],
)


def texts(table: Table, width: int | None = None) -> list[str]:
    return [plain(line) for line in table.lines(width)]


def test_a_table_is_as_wide_as_it_needs_to_be() -> None:
    assert texts(_TABLE) == [
        "library          pages  note",
        "libc.so.6        1,407",
        "libLLVM-14.so.1      9  two separate files",
    ]
    assert texts(_TABLE, 80) == texts(_TABLE)


@pytest.mark.parametrize("missing", [1, 2])
def test_columns_move_together_before_a_name_is_broken(missing: int) -> None:
    width = max(map(len, texts(_TABLE)))
    assert texts(_TABLE, width - missing)[2] == "libLLVM-14.so.1     9 two separate files"


def test_what_does_not_fit_goes_on_below() -> None:
    assert texts(_TABLE, 30) == [
        "library         pages note",
        "libc.so.6       1,407",
        "libLLVM-14.so.1     9 two",
        "                      separate",
        "                      files",
    ]


@pytest.mark.parametrize("width", range(20, 80))
def test_no_number_is_broken_and_no_line_too_long(width: int) -> None:
    shown = texts(_MAPPINGS, width)
    for cell in (cell for row in _MAPPINGS.rows for cell in row[:3]):
        number = str(cell).split()[0]
        assert any(re.search(rf"(?<!\S){number}(?!\S)", line) for line in shown)
    assert max(map(len, shown)) <= width


def test_a_column_without_room_stands_below_each_row() -> None:
    assert texts(_MAPPINGS, 34)[:3] == [
        "from          to",
        "7f52fe9a1000  7f52fe9a4000",
        "    size: 1,212 KiB  what: the",
    ]


def test_without_rows_there_are_the_names_of_the_columns() -> None:
    assert texts(Table(("library", ">pages"), [])) == ["library  pages"]
    assert texts(Table((), []), 10) == []


def test_wrapped_lines_keep_their_styles() -> None:
    line: Line = ("needed by ", ("libcrypto.so.3", "bold"), " and ", ("others", "dim"))
    found = list(wrapped(line, 18, 2))
    assert found == [
        ("needed by",),
        ("  ", ("libcrypto.so.3", "bold")),
        ("  ", "and ", ("others", "dim")),
    ]


@pytest.mark.parametrize("width", [14, 20, 33])
def test_lines_break_where_rich_breaks_them(width: int) -> None:
    """An outside opinion on wrapping: the terminal used to be drawn by rich alone."""
    text = "Reserve the whole span at once, inaccessible, so that nothing else can come between."
    out = Console(file=io.StringIO(), width=width, color_system=None)
    assert [plain(line) for line in wrapped((text,), width)] == [
        line.plain.rstrip() for line in Text(text).wrap(out, width)
    ]


def test_what_is_set_in_still_fits() -> None:
    lines = [plain(line) for line in laid_out(indented([("one",), (), _TABLE], 4), 34)]
    assert lines[:3] == ["    one", "", "    library         pages note"]
    assert max(map(len, lines)) <= 34


def test_the_first_of_many() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b"], 2, of=1002) == "a, b and 1,000 more"
    assert (more(0), more(3, "pages")) == ("", "and 3 more pages")
