"""``miniloader diff``: files that are no audits, and audits that do not differ."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures import build
from miniloader import cli


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


#: What no audit has anywhere, or not where it is put.
_ODD: list[Any] = [None, True, -1, 0.5, 10**400, float("inf"), "\ud800", [], {}, [[]], {"a": 1}, "x" * 9]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each list or object within ``value`` with a key of it; of long lists the first items."""
    for key in value if isinstance(value, dict) else range(min(len(value), 3)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def test_whatever_is_in_the_place_of_a_value_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not of the shape that `audit --json` has is refused, wherever it is."""
    saved, odd, chance = tmp_path / "audit.json", tmp_path / "odd.json", random.Random(22)
    miniloader.audit([os.getpid()], library="libc.so.6").save(saved)
    value = json.loads(saved.read_text())
    places, refused = [*_places(value)], 0
    for parent, key in chance.sample(places, min(120, len(places))):
        kept, parent[key] = parent[key], chance.choice(_ODD)
        odd.write_text(json.dumps(value))
        parent[key] = kept
        status = cli.main(["diff", *map(str, chance.sample((saved, odd), 2))])
        error = capsys.readouterr().err
        assert status in (0, 2), error
        assert "a fault of" not in error
        assert error.count("\n") == (status == 2)
        refused += status == 2
    assert refused > 60


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
