"""Values as Python shows them: short texts, HTML for a notebook, objects and rows for programs."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import miniloader
from miniloader.errors import MiniloaderError, SymbolError


@pytest.fixture(scope="module")
def proof(demo: Path) -> miniloader.Proof:
    return miniloader.prove(demo, 2)


@pytest.fixture(scope="module")
def audit() -> miniloader.Audit:
    return miniloader.audit([os.getpid()], library="libc.so", causes=False)


class Tags(HTMLParser):
    """What is open and closed in turn, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_each_value_is_short_in_text_and_whole_in_a_notebook(
    demo: Path, proof: miniloader.Proof, audit: miniloader.Audit
) -> None:
    image = miniloader.inspect(demo)
    with miniloader.load(demo) as library:
        for value in (proof, audit, image, image.plan(), library):
            assert len(repr(value)) < 200, repr(value)
            assert repr(value).startswith(f"<{type(value).__name__}")
            lines = str(value).splitlines()
            assert 1 <= len(lines) <= 15, str(value)
            assert all(line == line.rstrip() for line in lines)
            page = value._repr_html_()
            tags = Tags(page)
            assert tags.open == []
            assert not {"script", "link", "img", "style"} & tags.seen
            assert len(page) < 100_000
            assert "object at 0x" not in page + str(value)


def test_a_proof_shows_its_grid_and_its_claims(proof: miniloader.Proof) -> None:
    assert str(proof).splitlines()[0].startswith("✔ proven")
    for claim in proof.claims:
        assert claim.id in str(proof)
    assert "█" not in str(proof)
    text = Tags(proof._repr_html_()).text
    assert re.search("A.*\n.*B", text)
    assert "█" in text


def test_names_from_outside_are_text(tmp_path: Path, demo: Path) -> None:
    hostile = tmp_path / "lib<script>alert(1)<\x1b[1m.so"
    hostile.write_bytes(demo.read_bytes())
    image = miniloader.inspect(hostile)
    assert "script" not in Tags(image._repr_html_()).seen
    assert "\x1b" not in image._repr_html_() + str(image) + repr(image)


def test_calls_are_read_as_written(demo: Path) -> None:
    calls = miniloader.inspect(demo).plan().calls()
    shown = [str(call) for call in calls]
    assert shown[0].startswith("base = mmap(NULL, ")
    assert all(line.endswith(f"  # {call.why}") for line, call in zip(shown, calls, strict=True))


def test_pages_are_those_of_the_command_line(
    proof: miniloader.Proof, audit: miniloader.Audit, tmp_path: Path
) -> None:
    proof.to_html(tmp_path / "proof.html")
    assert "Content-Security-Policy" in (tmp_path / "proof.html").read_text()
    audit.to_html(tmp_path / "audit.html")
    assert "libc.so" in (tmp_path / "audit.html").read_text()
    with pytest.raises(MiniloaderError, match="cannot write the page"):
        proof.to_html(tmp_path / "nowhere" / "proof.html")


def test_an_audit_of_who_has_ended_becomes_a_page(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        audit = miniloader.audit([sleeper.pid], causes=False)
        sleeper.kill()
    audit.to_html(tmp_path / "audit.html")
    assert f"{audit.processes[0].pid}" in (tmp_path / "audit.html").read_text()


def test_objects_are_those_of_the_command_line(demo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miniloader", "inspect", "--json", demo],
        capture_output=True, check=True,
    )  # fmt: skip
    image = miniloader.inspect(demo)
    assert image.to_json() == json.loads(done.stdout)
    plan = image.plan().to_json()
    assert json.loads(json.dumps(plan))["mappings"] == json.loads(done.stdout)["plan"]
    assert [call["start"] for call in plan["calls"]] == [call.start for call in image.plan().calls()]


class Frame(list[dict[str, object]]):
    """Stands for ``pandas.DataFrame``: the rows that it was made of."""


def test_rows_become_a_frame(
    demo: Path, proof: miniloader.Proof, audit: miniloader.Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = ModuleType("pandas")
    pandas.DataFrame = Frame  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    pages = proof.to_dataframe()
    assert len(pages) == sum(len(step["pages"]) * len(proof.processes) for step in proof.to_json()["steps"])
    assert {row["pid"] for row in pages} == {process.pid for process in proof.processes}
    (written,) = {row["vaddr"] for row in pages} & {proof.word.vaddr & -4096} if proof.word else {0}
    states = [row["state"] for row in pages if (row["vaddr"], row["step"]) == (written, "written")]
    assert states == ["copied"] * 2
    (library,) = audit.libraries
    assert [row["private"] for row in audit.to_dataframe()] == [library.processes[0].private]
    assert [row["rss"] for row in audit.to_dataframe("processes")] == [audit.processes[0].rss]
    assert len(audit.to_dataframe("mappings")) == sum(len(row.processes) for row in audit.mappings)
    image = miniloader.inspect(demo)
    assert "demo_add" in {row["name"] for row in image.to_dataframe()}
    assert len(image.plan().to_dataframe()) == len(image.plan().calls())


def test_a_frame_is_what_pandas_makes(audit: miniloader.Audit) -> None:
    pytest.importorskip("pandas", reason="this machine lacks pandas")
    frame = audit.to_dataframe()
    assert int(frame["private"].sum()) == audit.libraries[0].private


def test_without_pandas_one_line_says_so(audit: miniloader.Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MiniloaderError, match=r"needs pandas.*pip install pandas"):
        audit.to_dataframe()


# ---------------------------------------------------------------------------------------- functions
def test_functions_are_attributes_and_items() -> None:
    with miniloader.load("libz.so.1") as library:
        library.crc32.restype = ctypes.c_ulong
        assert library.crc32(0, b"hello", 5) == zlib.crc32(b"hello")
        assert library.crc32 is library.crc32
        assert library["crc32"] is not library["crc32"]
        assert library["crc32"](0, b"hello", 5) == ctypes.c_int(zlib.crc32(b"hello")).value
        assert not hasattr(library, "crc33")
        for look in (lambda: library.crc33, lambda: library["crc33"]):
            with pytest.raises(SymbolError, match=r"no symbol crc33; did you mean crc32"):
                look()
        with pytest.raises(LookupError):
            library["crc33"]
        assert "crc32" not in vars(miniloader.Library)
        assert not hasattr(library, "__len__")
        assert copy.copy(library).base == library.base
    with pytest.raises(miniloader.LoadError, match="is closed"):
        library["crc32"]
    assert "closed" in str(library)
