"""Libraries to work with, and a look for processes that should be gone."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fixtures import build
from tests.conftest import RunAsNobody


@pytest.fixture
def misbehaves(
    fixture_library: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """``misbehaves("crash")``: a library whose constructor will do that, see fixtures/misbehaves.c."""

    def library(how: str) -> str:
        monkeypatch.setenv("MINILOADER_MISBEHAVE", how)
        return str(fixture_library("misbehaves"))

    return library


@pytest.fixture
def copied_demo(demo: Path, tmp_path: Path) -> Path:
    """The demonstration library as a file of the test's own, written to the disk."""
    copy = Path(shutil.copy(demo, tmp_path / "libcopy.so"))
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    return copy


def lives(pid: int) -> bool:
    """Whether there is such a process, be it only a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids: Iterable[int], seconds: float = 10) -> None:
    """Wait for processes that somebody else reaps."""
    end = time.monotonic() + seconds
    left = {*pids}
    while left := {pid for pid in left if lives(pid) and not _is_zombie(pid)}:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Ordinary:
    """``ordinary(["-m", "miniloader", …])``: Python with our package, run by an ordinary user."""

    def __init__(self, run: RunAsNobody, python: str) -> None:
        self.run, self.python = run, python
        # A path that another interpreter of this version can use; bytecode of ours is not for it to write.
        self.environment = {
            "PYTHONPATH": f"{build.ROOT}:{sysconfig.get_path('purelib')}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": "/usr/bin:/bin",
        }

    def __call__(self, arguments: Sequence[str], **options: Any) -> Any:
        return self.run([self.python, *arguments], env=self.environment, cwd="/", **options)


@pytest.fixture(scope="session")
def ordinary(run_as_nobody: RunAsNobody) -> Ordinary:
    """This interpreter where an ordinary user can read it, else the system's of the same version."""
    for python in (sys.executable, "/usr/bin/python3"):
        one = Ordinary(run_as_nobody, python)
        version = "import sys, numpy, elftools, miniloader; print(sys.version_info[:2])"
        try:
            done = one(["-c", version])
        except OSError:
            continue
        if done.stdout.strip() == str(sys.version_info[:2]):
            return one
    pytest.skip("this Python is not readable for other users")
