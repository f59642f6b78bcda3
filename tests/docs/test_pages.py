"""The pages of docs/ and the README lead where they say: links, files and headings that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fixtures import build

ROOT = build.ROOT
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

by_page = pytest.mark.parametrize("page", PAGES)


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text()


def anchors(text: str) -> set[str]:
    """The headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@by_page
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@by_page
def test_files_that_are_named_are_there(page: str) -> None:
    """A path in back ticks that begins with a folder of the repository; ``NAME`` stands for any name."""
    named = re.findall(r"`((?:miniloader|tests|tools|fixtures|docs|\.ci)/[\w./*-]*)[`:]", text_of(page))
    missing = [path for path in named if not any(ROOT.glob(re.sub("NAME|CHAPTER", "*", path.rstrip("/"))))]
    assert missing == []


@by_page
def test_pages_name_no_machine(page: str) -> None:
    assert re.findall(r"(?<!\w)/(?:root|home|work|tmp)/\S*", text_of(page)) == []


def test_the_design_names_every_room() -> None:
    """Each package of the tree is in the tables of docs/design.md, and none that is gone."""
    packages = {
        str(path.parent.relative_to(ROOT / "miniloader"))
        for path in (ROOT / "miniloader").rglob("*/__init__.py")
    }
    named = {
        path.rstrip("/")
        for path in re.findall(r"^\| `([\w/]+)/` \|", text_of("docs/design.md"), re.MULTILINE)
    }
    assert named == packages - {"."}
