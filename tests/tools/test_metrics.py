"""tools/metrics counts what is there: each measure of a small package whose faults were put there by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fixtures import build

METRICS = build.ROOT / "tools" / "metrics"


def metrics(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, METRICS, *words], capture_output=True, text=True, check=False)


def figures(text: str) -> dict[str, str]:
    """The figures of the table, by measure."""
    return dict(re.findall(r"^(\S.*?) {2,}([\d.,]+)", text, re.MULTILINE))


def package(directory: Path, **modules: str) -> Path:
    root = directory / "small"
    root.mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (root / f"{name}.py").write_text(text)
    return root


FAULTY = '''\
"""A module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from small.second import Page


class Step:
    """The same as in the second module."""


def pages(one: "Page", size: int) -> "Page":
    """Give back a page.

    >>> pages(None, 1)
    """
    other = one  # a comment
    return other
'''
SECOND = '''\
def look() -> None:
    """Import within a function."""
    import small.first

    found = small.first


class Page:
    pass


class Step:
    pass
'''


def test_each_fault_is_counted(tmp_path: Path) -> None:
    done = metrics("--list", package(tmp_path, first=FAULTY, second=SECOND))
    assert done.returncode == 1
    assert figures(done.stdout) == {
        "class names that mean several things": "1",  # Step
        "variables that are pronouns": "75.00",  # one, other and found, of them and size
        "the same without words of the contracts": "50.00",
        "docstrings that lean on another": "1",
        "circles of imports, for types too": "1",
        "function docstrings": "2",
        "with an example": "1",
        "lines of code": "14",
        "modules": "3",
    }
    assert "    Step: small.first, small.second\n" in done.stdout
    assert "    small.first ⇄ small.second\n" in done.stdout
    assert "first.py:12 one\n" in done.stdout


def test_a_bar_that_is_not_met_is_named(tmp_path: Path) -> None:
    done = metrics(package(tmp_path, first="size = 1\n", second="import small.first\n"))
    assert (done.returncode, "NOT MET" in done.stdout) == (0, False)
    (tmp_path / "small" / "first.py").write_text("import small.second\n")
    done = metrics(tmp_path / "small")
    assert done.returncode == 1
    assert re.findall(r"^(.*?) {2,}.*NOT MET$", done.stdout, re.MULTILINE) == [
        "circles of imports, for types too"
    ]


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    done = metrics(tmp_path / "nothing")
    assert done.returncode == 2
    assert "is no directory" in done.stderr


def test_the_package_meets_the_bars() -> None:
    """One meaning a name, nouns for variables, docstrings that stand alone, no circle (docs/design.md)."""
    done = metrics("--list")
    assert done.returncode == 0, done.stdout
