"""A process that exits, or becomes another program, at any call of an audit: it spoils that for nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import miniloader
from fixtures.build import build
from miniloader.kernel import syscalls
from miniloader.lab.audit.result import Audit
from tests.lab.audit.told_processes import wait_until_at_rest

#: Has a library, and becomes another program or ends, as it is told to.
CHANGES = """
import ctypes, os, sys
held = ctypes.CDLL(sys.argv[1])
print(flush=True)
if sys.stdin.readline() == "exec\\n":
    os.execv("/bin/sleep", ["sleep", "1000"])
"""
#: So many of the moments of each kind of call are tried.
TRIED = int(os.environ.get("MINILOADER_MOMENTS", "3"))


@contextmanager
def changing(library: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-S", "-E", "-c", CHANGES, str(library)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_until_at_rest(process.pid)
        yield process
        process.kill()


def change(process: subprocess.Popen[str], how: str) -> None:
    """Have it exit, or execute another program, and return when it has."""
    assert process.stdin is not None
    program = f"/proc/{process.pid}/exe"
    earlier = os.readlink(program)
    process.stdin.write(f"{how}\n")
    process.stdin.flush()
    if how == "exit":
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        while os.readlink(program) == earlier:
            os.sched_yield()


@contextmanager
def meanwhile(name: str, at: int, then: Callable[[], None]) -> Iterator[list[int]]:
    """Do ``then`` before the ``at``-th call of ``name``; how many calls there were."""
    declared, calls = name in syscalls._LIBC, [0]
    real: Callable[..., Any] = syscalls._LIBC[name] if declared else getattr(os, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            then()
        return real(*arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(
            syscalls.injected(name, counted) if declared else mock.patch.object(os, name, counted)
        )
        yield calls


@pytest.fixture(scope="module")
def quiet() -> Iterator[int]:
    with changing(build("relocations")) as process:
        yield process.pid


def pages_of(found: Audit, pid: int) -> dict[str, int]:
    """The private pages of each library in the process."""
    held = ((library.path, process) for library in found.libraries for process in library.processes)
    return {path: process.private for path, process in held if process.pid == pid}


@pytest.mark.parametrize("how", ["exit", "exec"])
@pytest.mark.parametrize("name", ["ioctl", "open", "preadv"])
def test_whichever_call_comes_too_late(name: str, how: str, demo: Path, quiet: int) -> None:
    """Mappings are asked for (``PROCMAP_QUERY``), files of /proc opened, memory read."""
    with changing(demo) as process:
        with meanwhile(name, 0, lambda: None) as calls:
            whole = miniloader.audit([process.pid, quiet])
        assert pages_of(whole, process.pid)
    if not calls[0]:
        pytest.skip(f"this kernel lacks what an audit calls {name} for")
    descriptors = len(os.listdir("/proc/self/fd"))
    for at in sorted({1 + step * (calls[0] - 1) // (TRIED - 1) for step in range(TRIED)}):
        with changing(demo) as process, meanwhile(name, at, lambda: change(process, how)):
            found = miniloader.audit([process.pid, quiet])
        told = [row.pid for row in (*found.processes, *found.unreadable)]
        assert sorted(told) == sorted([process.pid, quiet]), (at, found.unreadable)
        assert pages_of(found, quiet) == pages_of(whole, quiet), at
        assert "fault of" not in str([row.reason for row in found.unreadable]), at
    assert len(os.listdir("/proc/self/fd")) == descriptors
