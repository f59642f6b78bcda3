"""The tutorial and the how-to pages: each of their ``sh`` and ``python`` blocks runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fixtures.build import ROOT

PAGES = ["tutorial.md", *sorted(f"how-to/{path.name}" for path in (ROOT / "docs/how-to").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where ``miniloader`` is this one."""
    program = tmp_path / "bin" / "miniloader"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m miniloader "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type_works(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    shell = "\n".join(blocks(page, "sh"))
    assert shell or blocks(page, "python")
    done = subprocess.run(
        ["bash", "-e", "-c", shell],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    for code in blocks(page, "python"):
        named = re.match(r"# (test_\w+\.py)\n", code)
        path = tmp_path / (named[1] if named else "example.py")
        path.write_text(code)
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", path] if named else [path]
        done = subprocess.run(
            [sys.executable, "-W", "error", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
