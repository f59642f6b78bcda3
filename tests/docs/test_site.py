"""The site of tools/docs: it builds without a warning, has every page, and asks no network for anything."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fixtures.build import ROOT
from miniloader.cli import COMMANDS

SCRIPT = ROOT / "tools" / "docs"


def test_each_page_has_its_place() -> None:
    """A page of docs/ that no part names would not be found."""
    names = runpy.run_path(str(SCRIPT))
    placed = {page for pages in names["PARTS"].values() for page in pages}
    written = {str(path.relative_to(ROOT / "docs"))[:-3] for path in (ROOT / "docs").rglob("*.md")}
    made = {f"reference/{name}" for name in names["REFERENCE"]}
    assert placed == written - {"index"} | made


def test_the_reference_is_made_from_what_it_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = {name: make() for name, make in runpy.run_path(str(SCRIPT))["REFERENCE"].items()}
    for command in COMMANDS:
        assert f"## miniloader {command}\n" in made["commands"]
        assert f"## {command}\n" in made["json"]
    assert ".. autofunction:: miniloader.load" in made["python"]
    assert "| 3 | the kernel" in made["exit-statuses"]
    assert "error" in made["rules"]
    assert "**page cache**\n: " in made["words"]


@pytest.mark.skipif(find_spec("sphinx") is None, reason="this machine lacks Sphinx")
def test_the_site_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert {"index.html", "tutorial.html", "reference/python.html", "search.html"} <= pages
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//'
    )
    for page in pages:
        assert not loaded.search((tmp_path / page).read_text()), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text(errors="replace")), style
