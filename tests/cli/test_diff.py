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
    assert done.stdout == "no page went private, was rewritten, or returned\n"
    assert json.loads(run(saved, saved, "--json").stdout)["changes"] == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "another"}', "\xff", "null"])
def test_what_is_no_audit(tmp_path: Path, text: str) -> None:
    saved = tmp_path / "odd.json"
    saved.write_bytes(text.encode("latin-1"))
    done = run(saved, saved)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no audit" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_no_such_file(tmp_path: Path) -> None:
    done = run(tmp_path / "none", tmp_path / "none")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "none" in done.stderr
