"""A crash in a library's code is told with the address, the function and the library."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import build
from miniloader.lab.workers.fault import FaultRecord

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="this machine lacks x86-64 code: nothing is loaded"
)

SOURCE = """
#include <signal.h>
#include <stdlib.h>
int reads(void) { return *(volatile int *)16; }
int writes(long address) { *(volatile int *)address = 1; return 0; }
static void (*nothing)(void);
int jumps(void) { nothing(); return 1; }
int lost(void) { __asm__ volatile("mov $64, %rsp; mov $8, %eax; jmp *%rax"); return 1; }
int traps(void) { __builtin_trap(); }
int deep(int n) { volatile char room[4096]; room[0] = n; return deep(n + 1) + room[0]; }
int outside(void) { return *(volatile int *)0x8000000000000000UL; }
int raises(void) { return raise(SIGSEGV); }
int aborts(void) { abort(); }
"""
SEGV = r"was killed by SIGSEGV \(Segmentation fault\)"
IN = r"\+0x[0-9a-f]+ of libfaults\.so \(vaddr 0x[0-9a-f]+\)"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "libfaults.so"
    command = ["gcc", "-shared", "-fPIC", "-w", "-xc", "-", "-o", str(library)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return library


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("reads()", rf"{SEGV} reading address 0x10, in reads{IN}"),
        ("writes(4096)", rf"{SEGV} writing address 0x1000, in writes{IN}"),
        ("jumps()", rf"{SEGV} jumping to address 0x0, called from jumps{IN}"),
        ("lost()", rf"{SEGV} jumping to address 0x8"),
        ("traps()", rf"was killed by SIGILL \(Illegal instruction\) in traps{IN}"),
        ("deep(0)", rf"{SEGV} writing address 0x7[0-9a-f]+, in deep{IN}"),
        ("outside()", rf"{SEGV} reading an address that no process has, in outside{IN}"),
        ("raises()", SEGV),
        ("aborts()", r"was killed by SIGABRT \(Aborted\)"),
    ],
)
def test_a_crash_in_a_call(faults: Path, call: str, told: str) -> None:
    command = [sys.executable, "-m", "miniloader", "load", str(faults), "--call", f"{call}->int"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
    assert done.returncode == 1
    assert re.fullmatch(rf"miniloader: .*{re.escape(call)}->int: the process {told}\n", done.stderr), (
        done.stderr
    )


def test_a_crash_in_a_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILOADER_MISBEHAVE", "crash")
    command = [sys.executable, "-m", "miniloader", "load", str(build.build("misbehaves"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
    assert re.search(rf"{SEGV} writing address 0x0, in misbehave\+0x\w+ of libmisbehaves\.so", done.stderr)


def test_nothing_noted_is_nothing_told() -> None:
    assert FaultRecord().told(-11, ()) == ""
