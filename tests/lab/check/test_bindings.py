"""Who binds to what, beside what ld.so says of the same start."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from miniloader.lab.check.bindings import bindings
from miniloader.lab.check.check import Checker

_LINE = re.compile(r"binding file (\S+) \[0\] to (\S+) \[0\]: \w+ symbol `([^']*)'(?: \[(.*)\])?")

_OF_LD_SO = ("malloc", "calloc", "realloc", "free", "_r_debug")

Binding = tuple[str, str, str | None, str]


def told_by_ld_so(program: str, directory: Path) -> set[Binding]:
    """(referrer, symbol, version, provider) of each look-up before the program runs, but for the vDSO's."""
    settings = {"LD_DEBUG": "bindings", "LD_BIND_NOW": "1", "LD_DEBUG_OUTPUT": str(directory / "bindings")}
    command = [program, "--version"]
    subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=30)
    (output,) = directory.glob("bindings.*")
    text = output.read_text(errors="replace").partition("initialize program")[0].partition("calling init")[0]
    found = {
        (match[1], match[3], match[4], match[2]) for match in _LINE.finditer(text) if "vdso" not in match[1]
    }
    return {(os.path.realpath(who), name, version, os.path.realpath(to)) for who, name, version, to in found}


@pytest.mark.parametrize("name", ["ls", "python3", "perl", "gcc"])
def test_bindings_are_those_that_ld_so_tells(name: str, tmp_path: Path) -> None:
    program = os.path.realpath(f"/usr/bin/{name}")
    if not os.path.exists(program):
        pytest.skip(f"this machine lacks {name}")
    ours = {
        (os.path.realpath(row.referrer), row.symbol, row.version, os.path.realpath(row.provider))
        for row in bindings(Checker().situation(program))
        if row.provider is not None
    }
    told = told_by_ld_so(program, tmp_path)
    # ld.so looks these up for its own use, on behalf of the program (elf/dl-minimal.c, elf/rtld.c).
    for_itself = {binding for binding in told - ours if binding[0] == program and binding[1] in _OF_LD_SO}
    assert told - ours == for_itself
    assert ours - told == set()
    assert len(told) > 50
