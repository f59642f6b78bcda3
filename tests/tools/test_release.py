"""tools/release in a small repository: what it writes, commits and tags, and what it refuses."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fixtures.build import ROOT

CHANGELOG = "# Changelog\n\n## Unreleased\n\n- A thing is new.\n\n## 0.1.0\n\n- The first.\n"


def git(repository: Path, *words: str) -> str:
    identity = {f"GIT_{who}_{what}": "x@y.z" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity}
    command = ["git", *words]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("this machine lacks git")
    for name, text in (
        ("miniloader/__init__.py", '__version__ = "0.1.0"\n'),
        ("docs/changelog.md", CHANGELOG),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "release", tmp_path / "tools")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.email", "x@y.z")
    git(tmp_path, "config", "user.name", "x")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "begin")
    return tmp_path


def release(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [repository / "tools" / "release", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_release_is_one_command(repository: Path) -> None:
    done = release(repository, "0.2.0", "--no-tests", "--no-build")
    assert (done.returncode, done.stderr) == (0, "")
    assert "twine upload" in done.stdout
    assert (repository / "miniloader/__init__.py").read_text() == '__version__ = "0.2.0"\n'
    today = datetime.date.today()
    heading = f"## Unreleased\n\n## 0.2.0, {today:%Y-%m-%d}\n\n- A thing is new.\n"
    assert heading in (repository / "docs/changelog.md").read_text()
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "tag", "--points-at", "HEAD").strip() == "v0.2.0"
    assert "nothing under Unreleased" in release(repository, "0.3.0", "--no-tests", "--no-build").stderr


@pytest.mark.parametrize(("words", "told"), [(("1.0",), "three numbers"), (("0.2.0",), "has changes")])
def test_what_is_no_release_is_refused(repository: Path, words: tuple[str, ...], told: str) -> None:
    (repository / "miniloader/__init__.py").write_text('__version__ = "0.1.1"\n')
    done = release(repository, *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert told in done.stderr


def test_a_release_whose_tests_fail_changes_nothing(repository: Path) -> None:
    (repository / "tools" / "test").write_text("#!/bin/sh\nexit 3\n")
    (repository / "tools" / "test").chmod(0o755)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "tests")
    done = release(repository, "0.2.0")
    assert done.returncode == 1
    assert "tools/test: exit status 3" in done.stderr
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "tag").strip() == ""
