"""glibc as the judge: what dlopen and ldd say of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

OpenEach = Callable[[Iterable[object]], dict[str, str]]


@pytest.fixture(scope="session")
def open_each(tmp_path_factory: pytest.TempPathFactory) -> OpenEach:
    """For each file "loads", dlopen's message, or "died"; in a program that has nothing but libc."""
    program = tmp_path_factory.mktemp("oracle") / "dlopen_each"
    subprocess.run(["gcc", "-O1", "-o", program, Path(__file__).with_name("dlopen_each.c"), "-w"], check=True)

    def ask(paths: Iterable[object]) -> dict[str, str]:
        lines = "".join(f"{path}\n" for path in paths)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)

    return ask


_IN_PYTHON = """
import ctypes, os, sys
for path in sys.stdin.read().splitlines():
    ends = os.pipe()
    child = os.fork()
    if not child:
        try:
            ctypes.CDLL(path)
            word = "loads"
        except OSError as error:
            word = str(error)
        os.write(ends[1], word.encode())
        os._exit(0)
    os.close(ends[1])
    word = os.read(ends[0], 4096).decode() or "died"
    os.close(ends[0])
    os.waitpid(child, 0)
    print(path, word, sep="\\t", flush=True)
"""


def open_each_in_python(paths: Iterable[object]) -> dict[str, str]:
    """What this interpreter's dlopen says of each file: "loads", its message, or "died"."""
    lines = "".join(f"{path}\n" for path in paths)
    command = [sys.executable, "-c", _IN_PYTHON]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


def ldd_complains(program: str) -> bool | None:
    """Whether ``ldd -r`` misses anything; None for what is no dynamic program."""
    environment = os.environ | {"LD_BIND_NOW": "1"}
    done = subprocess.run(["ldd", "-r", program], capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    if "not a dynamic executable" in said or "statically linked" in said:
        return None
    return any(words in said for words in ("not found", "undefined symbol", "not defined"))
