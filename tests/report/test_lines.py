"""Lines and tables: the same text in a pipe and in a terminal, as far as there is room."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from miniloader.report.output import rendered
from miniloader.report.text import Table

_TABLE = Table(
    ("library", ">pages", "note"),
    [("libc.so.6", "1,407", ""), (("libLLVM-14.so.1", "yellow"), "9", "two separate files")],
)


def in_terminal(table: Table, width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    out.print(rendered(table, width))
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def test_a_table_in_a_pipe_is_as_wide_as_it_needs_to_be() -> None:
    assert list(_TABLE.aligned()) == [
        "library          pages  note",
        "libc.so.6        1,407",
        "libLLVM-14.so.1      9  two separate files",
    ]


def test_a_terminal_with_room_shows_the_same() -> None:
    assert in_terminal(_TABLE, 80) == list(_TABLE.aligned())


@pytest.mark.parametrize("missing", [1, 2])
def test_columns_move_together_before_a_name_is_broken(missing: int) -> None:
    width = max(map(len, _TABLE.aligned()))
    assert in_terminal(_TABLE, width - missing)[2] == "libLLVM-14.so.1     9 two separate files"


def test_what_does_not_fit_goes_on_below() -> None:
    lines = in_terminal(_TABLE, 30)
    assert len(lines) > 3
    for word in ("1,407", "two", "separate", "files"):
        assert any(word in line for line in lines)


def test_without_rows_there_are_the_names_of_the_columns() -> None:
    assert list(Table(("library", ">pages"), []).aligned()) == ["library  pages"]
