"""docs/surroundings.md says what is so: a column of it is made anew, where its surroundings can be made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fixtures.build import ROOT
from fixtures.surroundings import COMMANDS, SURROUNDINGS, column


def columns() -> dict[str, list[str]]:
    """The table of the page, by the heads of its columns."""
    lines = (ROOT / "docs" / "surroundings.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {head: [row[place] for row in rows[2:]] for place, head in enumerate(rows[0]) if head}


def test_every_command_and_all_surroundings_are_in_the_table() -> None:
    assert list(columns()) == list(SURROUNDINGS)
    assert all(len(cells) == len(COMMANDS) for cells in columns().values())


def test_a_column_is_as_it_is_told(tmp_path: Path) -> None:
    name = "an ordinary user" if os.geteuid() else "a container, as Docker makes it"
    assert column(name, str(tmp_path)) == columns()[name]


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_whatever_does_not_work_says_why(name: str) -> None:
    for cell in columns()[name]:
        assert cell.startswith("works") or len(cell) > len("3: nothing is said")
