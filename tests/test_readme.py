"""The README is true: what it shows was printed by the very commands it names, and its Python runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from miniloader.cli import COMMANDS
from miniloader.kernel.syscalls import PAGE_SIZE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def masked(text: str) -> list[str]:
    """Lines without what differs from run to run: process numbers (and how wide their column is), addresses,
    where the checkout lies.
    """
    text = re.sub(r"^ *\d+ [0-9a-f]{6,} ", "PID BASE ", text.replace(f"{ROOT}/", ""), flags=re.MULTILINE)
    return [line.strip() for line in text.splitlines()]


def run(command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "miniloader"
    words = [sys.executable, "-m", "miniloader", *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.needs_root("the transcript was made with the best evidence there is")
@pytest.mark.skipif(os.uname().machine != "x86_64" or PAGE_SIZE != 4096, reason="made on another machine")
def test_the_transcript_is_what_the_command_prints() -> None:
    (transcript,) = blocks("console")
    command, shown = transcript.removeprefix("$ ").split("\n", 1)
    done = run(command)
    assert (done.returncode, done.stderr) == (0, "")
    expected = masked(shown)
    assert len(expected) > 20
    assert masked(done.stdout)[: len(expected)] == expected


def test_what_it_says_to_try_works() -> None:
    """Each command of the ``sh`` blocks that is miniloader itself; tools/demo is tested with the tools."""
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("miniloader ")]
    assert len(commands) > 2
    assert {command: run(command).returncode for command in commands} == dict.fromkeys(commands, 0)


def test_the_python_runs() -> None:
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "907060870" in done.stdout  # crc32 of hello


def test_every_command_is_named() -> None:
    named = re.findall(r"^\| `miniloader (\w+)", README, re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)


def test_every_dependency_has_its_reason() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~\[; ]", line)[0] for line in wanted}
    section = README.split("\n## Dependencies\n")[1].split("\n## ")[0]
    assert names | {"package"} == set(re.findall(r"^\| ([\w-]+) \| \w", section, re.MULTILINE))
