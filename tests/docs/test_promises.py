"""What docs/security.md promises is held by tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[tuple[str, str]]:
    """Each promise of the table, and what is said to hold it."""
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("| promise | held by |")[2]
    cells = [line.strip().strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [(promise.strip(), holders.strip()) for promise, holders in cells]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_what_holds_a_promise_is_there(row: tuple[str, str]) -> None:
    """Files by their paths; tests by their names, or by how these begin where "…" ends them."""
    _, holders = row
    files = re.findall(r"`(tests/[\w/.]+\.py)`", holders)
    tests = re.findall(r"`(test_\w+)(…?)`", holders)
    assert files or tests
    for file in files:
        assert (ROOT / file).is_file(), file
    searched = [ROOT / file for file in files] or list((ROOT / "tests").rglob("test_*.py"))
    source = "\n".join(path.read_text() for path in searched)
    everywhere = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name, shortened in tests:
        pattern = rf"def {name}\w*\(" if shortened else rf"def {name}\("
        assert re.search(pattern, source) or re.search(pattern, everywhere), name


def test_the_table_is_read() -> None:
    assert len(rows()) > 8
