"""Who installs with a compiler gets the C part made of its source, with options of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import build
from miniloader.native import gate
from miniloader.native.compiling import compile_here


def compiler(directory: Path, *, status: int = 0) -> str:
    """A program that notes how it is called, and is gcc; or fails, as gcc without headers does."""
    program = directory / "a compiler"
    rest = 'exec gcc "$@"' if status == 0 else f"echo error: no header >&2; exit {status}"
    program.write_text(f'#!/bin/sh\necho "$@" >>"{directory}/calls"\n{rest}\n')
    program.chmod(0o755)
    return f"'{program}'"


def test_the_flags_of_whoever_installs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"CC": compiler(tmp_path), "CFLAGS": "-O1 -DTHEIRS='a b'", "LDFLAGS": "-Wl,-z,now"}
    made, why = compile_here(tmp_path, os.environ | given)
    assert why == ""
    assert [path.name for path in made] == [Path(gate.own_code()).name, gate.CHECKSUMS]
    first = (tmp_path / "calls").read_text().splitlines()[0]
    assert first.index("-O2") < first.index("-O1 -DTHEIRS=a b -Wl,-z,now ")
    subprocess.run(["sha256sum", "--check", made[1]], cwd=tmp_path, check=True)
    monkeypatch.setattr(gate, "own_code", lambda: str(made[0]))
    said = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert gate.compiled_code()[2] == f"compiled when it was installed, by {said.splitlines()[0]}"


def test_what_was_compiled_here_is_what_loads(tmp_path: Path) -> None:
    (library, _), _ = compile_here(tmp_path, os.environ)
    code = (
        "import sys; from ctypes import c_long; import miniloader; from miniloader.native import gate\n"
        "gate.own_code = lambda: sys.argv[1]\n"
        "print(miniloader.load(sys.argv[2]).function('demo_add', c_long, [c_long, c_long])(2, 3))"
    )
    command = [sys.executable, "-c", code, library, build.build("demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT)
    assert done.stdout == "5\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"PATH": "/nowhere", "CC": ""}, "no compiler"),
        ({"CC": "/nowhere/cc"}, "/nowhere/cc failed: "),
        ({"MINILOADER_NATIVE": "shipped"}, "MINILOADER_NATIVE=shipped"),
        ({"CFLAGS": "-c"}, " failed: "),
        ({"CC": "false"}, "false failed: "),
    ],
)
def test_without_a_compiler_the_copies_that_ship_are_taken(
    given: dict[str, str], told: str, tmp_path: Path
) -> None:
    made, why = compile_here(tmp_path, os.environ | given)
    assert ([path.name for path in made], told in why) == ([gate.CHECKSUMS], True), why
    subprocess.run(
        ["sha256sum", "--check", "--strict", made[0]], cwd=build.LOOPS["x86_64"].parent, check=True
    )


def test_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    made, why = compile_here(tmp_path, os.environ | {"CC": compiler(tmp_path, status=1)})
    assert (len(made), why.endswith("failed: error: no header")) == (1, True)


def test_a_compiler_for_another_machine_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CC set for a cross build: what it makes would not run here."""
    monkeypatch.setattr(gate, "damage", lambda path: f"{path} is riscv64 code, and this process x86_64")
    made, why = compile_here(tmp_path, os.environ)
    assert (len(made), "made something else" in why) == (1, True)
