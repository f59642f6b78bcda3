"""Each script of docs/examples does what it says, as short as one would start from, and without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import build

EXAMPLES = build.ROOT / "docs" / "examples"

#: For each script its arguments, and what it must print.
PRINTED = {
    "audit_pool.py": (
        [],
        r"private pages of libc\.so\.6: .*relocation(.|\n)*: 3 processes, unreadable: 0\n$",
    ),
    "inspect_library.py": (
        ["libz.so.1"],
        r"needs libc\.so\.6\n(.|\n)*PROT_READ\|PROT_EXEC(.|\n)*'DT_RELA': \d+",
    ),
    "load_and_call.py": ([], r"/libz\.so\.1(\.\S+)? at 0x(.|\n)* says 0x3610a686\n"),
    "load_step_by_step.py": (
        ["libz.so.1"],
        r"^mapped: +0 of \d+ pages copied\nlinked: +[1-9]\d*, [1-9]\d* symbols bound\ninitialised: +[1-9]",
    ),
}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES)


def test_every_example_is_tested() -> None:
    tested = {*PRINTED, "test_workers_share.py", "write_check.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short(script: str) -> None:
    """At most thirty lines, counted as a reader does: without the blank ones."""
    lines = (EXAMPLES / script).read_text().splitlines()
    assert 10 <= sum(bool(line.strip()) for line in lines) <= 30


@pytest.mark.parametrize("script", PRINTED)
def test_an_example_prints(script: str) -> None:
    arguments, expected = PRINTED[script]
    done = run(script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(expected, done.stdout), done.stdout


def test_the_test_of_a_pool_passes() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_workers_share.py")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_test_of_a_pool_fails_when_something_else_is_written(tmp_path: Path) -> None:
    text = (EXAMPLES / "test_workers_share.py").read_text()
    call = 'workers.call("demo_next()->int")'
    assert call in text
    changed = tmp_path / "test_changed.py"
    changed.write_text(text.replace(call, f'{call}\n    workers.write("demo_current", 0)'))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", changed)
    assert done.returncode == 1
    assert "demo_current" in done.stdout


def test_the_check_finds_a_strange_search_path(tmp_path: Path) -> None:
    good = build.build("demo")
    strange = tmp_path / "libstrange.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-Wl,-rpath,/opt/lib:$ORIGIN/lib",
        "-o",
        strange,
        "-xc",
        "/dev/null",
    ]
    subprocess.run(command, check=True)
    assert run("write_check.py", good).returncode == 0
    done = run("write_check.py", good, strange)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{strange}: DT_RUNPATH has /opt/lib; expected $ORIGIN/..."]
