"""``miniloader prove`` as it is used: what it prints, how it exits, what it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import build
from miniloader.kernel.probe import best_level
from tests.lab.conftest import children_of, lives, wait_until_gone

IDS = ["code-shared", "untouched-data-shared", "written-data-private", "writes-isolated", "file-unchanged"]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-m", "miniloader", "prove", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=build.ROOT, env=environment, **options
    )  # type: ignore[call-overload]


def grid(text: str) -> list[str]:
    """The drawing in each process's row: what stands behind the pid and the base."""
    return re.findall(r"^ *\d+ [0-9a-f]{6,} (.*)$", text, re.MULTILINE)


# --------------------------------------------------------------------------------------- what is printed
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_proof_fits_the_terminal(demo: Path, width: int) -> None:
    done = run(demo, "-n", 3, env={"COLUMNS": str(width)})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (
        "".join(lines[:2]).replace(" ", "").startswith(f"✔proven{demo}")
    )  # a long path has a line of its own
    assert max(map(len, lines)) <= width
    assert not any("\x1b" in line for line in lines)
    for id in IDS:
        assert any(line.startswith(f"✔ {id} ") for line in lines)
    memory = "memory 88 KiB used; 3 copies would use 144 KiB: sharing saves 56 KiB"
    assert memory in " ".join(done.stdout.split())
    assert re.search(rf"^evidence +{best_level()}: ", done.stdout, re.M)


def test_the_grid(demo: Path) -> None:
    done = run(demo, "-n", 3, env={"COLUMNS": "80"})
    blocks = [row.split() for row in grid(done.stdout)]
    # headers, code, constants, relro, data, bss
    assert blocks == [["█", "███", "█", own * 3, f"{own}██{own}", "000"] for own in "ABC"]
    # The same page as a pointer from below: the first of the data.
    lines = done.stdout.splitlines()
    row = next(index for index, line in enumerate(lines) if "CCC" in line)
    assert lines[row + 1].index("▲") == lines[row].index("C██C")
    assert "vaddr 0x8000, in .data" in lines[row + 1]


def test_a_large_library_fits_80_columns() -> None:
    done = run("libcrypto.so.3", env={"COLUMNS": "80"})
    if "no library of that name" in done.stderr:
        pytest.skip("this machine lacks libcrypto.so.3")
    assert done.returncode == 0
    assert len(grid(done.stdout)) == 4
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_every_step(demo: Path) -> None:
    done = run(demo, "-n", 2, "--steps", env={"COLUMNS": "80"})
    assert done.returncode == 0
    headings = re.findall(r"^Step (\d) of 5: (\w+)", done.stdout, re.M)
    assert headings == [*zip("12345", ("mapped", "touched", "relocated", "written", "exited"), strict=True)]
    rows = grid(done.stdout)
    assert len(rows) == 5 * 2
    assert set("".join(rows[0].split())) == {"·"}
    assert set("".join(rows[2].split())) == {"█", "0"}
    assert rows[-1].split() == rows[0].split()  # the one that has ended


def test_colour_only_repeats_what_the_signs_say(demo: Path) -> None:
    coloured = run(demo, "-n", 2, env={"FORCE_COLOR": "1", "COLUMNS": "80"}).stdout
    assert "\x1b[32m█" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [row.split() for row in grid(plain)] == [
        ["█", "███", "█", own * 3, f"{own}██{own}", "000"] for own in "AB"
    ]
    assert "\x1b" not in run(demo, "-n", 2, env={"NO_COLOR": "1"}).stdout


def test_json(demo: Path) -> None:
    done = run(demo, "-n", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    proof = json.loads(done.stdout)
    assert proof["verdict"] == "proven"
    assert [claim["id"] for claim in proof["claims"]] == IDS
    assert [step["name"] for step in proof["steps"]] == [
        "mapped",
        "touched",
        "relocated",
        "written",
        "exited",
    ]


def test_a_lower_level_says_what_it_cannot(demo: Path) -> None:
    flags = run(demo, "-n", 2, "--level", "flags", env={"COLUMNS": "200"})
    assert flags.returncode == 0
    assert re.search(r"^evidence +flags: .*\ncannot +.*frame", flags.stdout, re.M)
    assert re.search(r"^for more +frames .*root", flags.stdout, re.M)
    totals = run(demo, "-n", 2, "--level", "totals")
    assert totals.returncode == 3
    assert totals.stdout.startswith("? unknown")
    assert totals.stdout.count("  unknown   ") == 3
    assert "Private_Dirty" in totals.stdout


# ------------------------------------------------------------------------------------------ how it exits
def test_a_refuted_claim_is_1(fixture_library: Callable[[str], Path]) -> None:
    done = run(fixture_library("textrel"), "-n", 2, "--allow-text-relocations")
    assert done.returncode == 1
    assert done.stdout.startswith("✘ refuted")
    assert "✘ code-shared" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["/nonesuch.so"], 1, "/nonesuch.so: file: found No such file or directory"),
        (["/etc"], 1, "/etc: file: found a directory, expected a regular file"),
        (["libc.so.6"], 1, "a process can have it only once"),
        (["libz.so.1", "-n", "1"], 2, "1 processes: expected at least 2"),
        (["libz.so.1", "-n", "many"], 2, "invalid int value"),
        (["libz.so.1", "--level", "guess"], 2, "--level: no 'guess'; there are frames, flags, totals"),
        ([], 2, "LIB"),
    ],
)
def test_errors_are_one_line(arguments: list[str], status: int, line: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("miniloader: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


def test_a_crash_is_one_line(fixture_library: Callable[[str], Path]) -> None:
    done = run(fixture_library("misbehaves"), "-n", 2, env={"MINILOADER_MISBEHAVE": "crash"})
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"miniloader: step relocated: worker [12] of 2 \(pid \d+\) was killed by SIGSEGV"
        r" \(Segmentation fault\) writing address 0x0, in misbehave\+0x\w+"
        r" of libmisbehaves.so \(vaddr 0x\w+\)\n",
        done.stderr,
    )


@pytest.mark.needs_root("mounting over /proc needs CAP_SYS_ADMIN")
def test_without_proc_it_is_3(demo: Path, own_mounts: list[str]) -> None:
    script = 'mount -t tmpfs none /proc && exec "$@"'
    command = [*own_mounts, script, "sh", sys.executable, "-m", "miniloader", "prove", demo]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "miniloader: /proc: not mounted here; mount it: mount -t proc proc /proc\n"


# ---------------------------------------------------------------------------------- what it leaves behind
def hanging(fixture_library: Callable[[str], Path], **options: object) -> subprocess.Popen[str]:
    """``prove`` of a library whose constructor never returns."""
    command = [sys.executable, "-m", "miniloader", "prove", str(fixture_library("misbehaves")), "-n", "3"]
    environment = os.environ | {"MINILOADER_MISBEHAVE": "hang"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=build.ROOT, env=environment
    )


def workers_of(parent: subprocess.Popen[str], number: int = 3, seconds: float = 20) -> list[int]:
    end = time.monotonic() + seconds
    while len(pids := children_of(parent.pid)) < number:
        assert time.monotonic() < end
        time.sleep(0.002)
    return pids


@pytest.mark.parametrize("wait", [0.0, 0.1, 1.0], ids=["at once", "early", "in the constructor"])
def test_ctrl_c_is_one_line_and_leaves_nobody(fixture_library: Callable[[str], Path], wait: float) -> None:
    with hanging(fixture_library) as parent:
        pids = workers_of(parent)
        time.sleep(wait)
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=20)
    assert (parent.returncode, out, err) == (130, "", "miniloader: interrupted\n")
    assert not any(map(lives, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(fixture_library: Callable[[str], Path], how: signal.Signals) -> None:
    with hanging(fixture_library) as parent:
        pids = workers_of(parent)
        time.sleep(1)
        parent.send_signal(how)
        parent.communicate(timeout=20)
    assert parent.returncode == -how
    wait_until_gone(pids)


def test_progress_is_shown_on_a_terminal_after_a_second(fixture_library: Callable[[str], Path]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "miniloader", "prove", str(fixture_library("misbehaves")), "-n", "2"]
    environment = os.environ | {"MINILOADER_MISBEHAVE": "hang"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, cwd=build.ROOT, env=environment
    ) as parent:
        os.close(theirs)
        shown = os.read(ours, 1000)  # comes when a second has passed, and not before
        parent.send_signal(signal.SIGINT)
        out, _ = parent.communicate(timeout=60)
    try:
        while part := os.read(ours, 1000):
            shown += part
    except OSError:  # EIO: the other side is closed
        os.close(ours)
    assert out == b""
    assert re.fullmatch(
        rb"(\r\x1b\[K(starting the processes|2 processes: \w+))+\r\x1b\[Kminiloader: interrupted\r\n", shown
    )
