"""``miniloader diff``: files that are no audits, and audits that do not differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import miniloader
from fixtures import build


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniloader", "diff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)


def test_the_same_twice(tmp_path: Path) -> None:
    saved = tmp_path / "audit.json"
    miniloader.audit([os.getpid()]).save(saved)
    done = run(saved, saved)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("USS ")
    assert "+" not in lines[0]
    assert lines[1:] == ["  1 process stayed", "", "no page went private, was rewritten, or returned"]
    value = json.loads(run(saved, saved, "--json").stdout)
    assert value["changes"] == []
    assert value["processes"][0]["state"] == "stayed"
    assert all(row["own"]["before"] == row["own"]["after"] for row in value["mappings"])


def test_what_an_older_version_saved(tmp_path: Path) -> None:
    """Without rows of mappings: the rest is compared, and it is said what is not."""
    saved, older = tmp_path / "audit.json", tmp_path / "older.json"
    miniloader.audit([os.getpid()]).save(saved)
    value = json.loads(saved.read_text())
    del value["mappings"]
    for process in value["processes"]:
        del process["memory_of"]
    for library in value["libraries"]:
        for process in library["processes"]:
            del process["pss"]
    older.write_text(json.dumps(value))
    done = run(older, saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not compared: an older version saved one" in done.stdout
    assert json.loads(run(older, saved, "--json").stdout)["mappings"] == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "another"}', "\xff", "null", "[" * 100_000])
def test_what_is_no_audit(tmp_path: Path, text: str) -> None:
    saved = tmp_path / "odd.json"
    saved.write_bytes(text.encode("latin-1"))
    done = run(saved, saved)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no audit" in done.stderr
    assert not any(word in done.stderr for word in ("codec", "column", "recursion"))
    assert len(done.stderr.splitlines()) <= 2


def test_a_hole_in_a_saved_audit_is_not_read_whole(tmp_path: Path) -> None:
    """Four GiB that take no disk, where a process may have less than that."""
    saved = tmp_path / "hole.json"
    saved.write_text('{"format": "')
    os.truncate(saved, 4 << 30)
    code = f"""
import resource
from miniloader.cli import main
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
main(["diff", {str(saved)!r}, {str(saved)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "no audit" in done.stderr


def test_no_such_file(tmp_path: Path) -> None:
    done = run(tmp_path / "none", tmp_path / "none")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "none" in done.stderr
