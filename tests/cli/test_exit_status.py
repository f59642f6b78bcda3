"""What every command ends with: for what is not there, for Ctrl-C, for a reader who goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fixtures import build
from miniloader import cli
from miniloader.loader.from_inside.for_host import in_force
from tests.lab.conftest import children_of

COMMAND = [sys.executable, "-m", "miniloader"]
DEMO, HANGS, SAVED, MISSING = "{demo}", "{misbehaves}", "{saved}", "/nonexistent/x"
GONE = "4194304"  # one more than the highest PID there can be

#: For each command that is given a file or a process: one that is not there.
NOT_THERE: dict[str, tuple[tuple[str, ...], ...]] = {
    "inspect": ((MISSING,), ("libnonexistent.so.1",), (MISSING, "--symbols")),
    "load": ((MISSING,), ("libnonexistent.so.1",), (MISSING, "--prepared")),
    "run": ((MISSING,), ("-m", "nonexistent.module")),
    "disasm": ((MISSING, "f"), (MISSING, "f", "--loaded"), ("libnonexistent.so.1", "f")),
    "prove": ((MISSING,), ("libnonexistent.so.1",), (MISSING, "--prepared")),
    "prepare": ((MISSING,), (DEMO, MISSING)),
    "audit": ((GONE,), ("--tree", GONE), (GONE, "--csv"), (GONE, "--library", "libc", "--page", "0x0")),
    "diff": ((MISSING, MISSING), (SAVED, MISSING)),
    "walkthrough": (("cow", "--check", MISSING),),
    "tree": ((MISSING,), ("libnonexistent.so.1",)),
    "check": ((MISSING,), ("libnonexistent.so.1",)),
}
#: Commands that take neither.
ALWAYS_THERE = {"cache", "doctor"}


def words(command: Sequence[str], saved: Path) -> list[str]:
    meant = {DEMO: str(build.build("demo")), HANGS: str(build.build("misbehaves")), SAVED: str(saved)}
    return [meant.get(word, word) for word in command]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "saved.json"
    assert cli.main(["audit", str(os.getpid()), "--no-causes", "--save", str(path)]) == 0
    return path


def test_the_table_has_every_command() -> None:
    assert NOT_THERE.keys() | ALWAYS_THERE == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "command",
    [(name, *arguments) for name, several in NOT_THERE.items() for arguments in several],
    ids=" ".join,
)
def test_a_file_or_a_process_that_is_not_there(
    command: tuple[str, ...], saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(command, saved)) == 1
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    missing = next(word for word in command if word in (MISSING, GONE) or "nonexistent" in word)
    assert missing in shown.err + shown.out
    assert not in_force  # of a program that has not begun nothing is left, either


def test_one_process_of_two_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(os.getpid()), GONE, "--no-causes"]) == 0
    assert f"{GONE}: " in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--name", "no such name"), ("--user", "4294967")], ids=" ".join)
def test_no_process_fits(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *words]) == 1
    assert capsys.readouterr().err == "miniloader: no process fits\n"


# ------------------------------------------------------------------------------------- a reader who goes
#: A command for each that prints more than one line.
LONG: dict[str, tuple[str, ...]] = {
    "inspect": ("libc.so.6", "--symbols"),
    "load": (DEMO, "--trace"),
    "disasm": ("libcrypto.so.3", "SHA256"),
    "prove": (DEMO, "-n", "2", "--steps"),
    "audit": ("--tree", str(os.getpid()), "--no-causes"),
    "diff": (SAVED, SAVED),
    "walkthrough": (),
    "prepare": (DEMO,),
    "cache": ("--verify",),
    "doctor": (),
    "tree": ("libcrypto.so.3",),
    "check": ("libcrypto.so.3",),
}


@pytest.mark.parametrize("name", LONG)
def test_a_closed_pipe_is_141(name: str, saved: Path) -> None:
    """Nobody reads a word: nothing is said of it, and no status means anything else."""
    if name == "cache":
        assert cli.main(["prepare", str(build.build("demo"))]) == 0
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as pipe:
        command = [*COMMAND, name, *words(LONG[name], saved)]
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, cwd=build.ROOT
        )
    assert (done.returncode, done.stderr) == (cli.CLOSED_PIPE, "")


# ------------------------------------------------------------------------------------------------ Ctrl-C
#: Commands that last long enough to be interrupted; constructors that sleep in machine code among them.
LASTING: tuple[tuple[str, ...], ...] = (
    ("load", HANGS),
    ("disasm", HANGS, "misbehave", "--loaded"),
    ("prove", HANGS),
    ("prove", "libcrypto.so.3", "-n", "64"),
    ("walkthrough", "--all", "--json"),
)


@pytest.mark.parametrize("command", LASTING, ids=" ".join)
def test_ctrl_c_is_130(command: tuple[str, ...], saved: Path) -> None:
    """As a terminal sends it: to the whole group."""
    with subprocess.Popen(
        [*COMMAND, *words(command, saved)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=build.ROOT,
        env=os.environ | {"MINILOADER_MISBEHAVE": "hang"},
        start_new_session=True,
    ) as process:
        while not children_of(process.pid) and process.poll() is None:  # Python has to start first
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (cli.INTERRUPTED, "miniloader: interrupted\n")
    assert "proven" not in out


#: Every way in which a command is given a file to read.
READING: tuple[tuple[str, ...], ...] = (
    ("inspect", "{}"),
    ("tree", "{}"),
    ("check", "{}"),
    ("check", "--in", "{}", "libz.so.1"),
    ("load", "{}"),
    ("disasm", "{}", "main"),
    ("prove", "{}"),
    ("prepare", "{}"),
    ("diff", "{}", "{}"),
    ("walkthrough", "cow", "--check", "{}"),
)


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_what_is_no_regular_file_is_refused_at_once(
    command: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must not be long
    os.mkfifo("pipe")
    os.mkdir("directory")
    kinds = {"./pipe": "a pipe", "./directory": "irectory", "./socket": "", "/dev/zero": "a character"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for path, kind in kinds.items():
            filled = [word.format(path) for word in command]
            assert cli.main(filled) == 1
            out, err = capfd.readouterr()
            assert kind in out + err
            assert "found found" not in out + err
            assert path.removeprefix(".") in out + err
