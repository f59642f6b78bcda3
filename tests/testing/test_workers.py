"""A crew in a test: its processes are led, forked and looked at, and what cannot be is said."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fixtures import build
from miniloader.errors import LoadError, ProcessGone, SymbolError, UsageError, WorkerError
from miniloader.testing import (
    StartCrew,
    Workers,
    assert_shared,
    snapshot,
)

by_both = pytest.mark.parametrize("workers", ["miniloader", "dlopen"], indirect=True)


@by_both
def test_workers_call_write_and_are_looked_at(workers: Workers, demo: Path) -> None:
    assert len(workers) == len({os.getpid(), *workers.pids}) - 1 == 3
    assert workers.call("demo_add(2, 3)->long") == [5, 5, 5]
    assert workers[1].call("demo_next()->long") == [100]
    assert workers.call("demo_next()->long") == [100, 101, 100]
    assert workers.call("demo_message()->str")[0] == "hello from a library that was mapped by hand"
    workers[1:].write("demo_counters", 7)
    assert workers.call("demo_next()->long") == [101, 7, 7]
    workers.write("demo_counters", b"\1\2", offset=1)
    assert [number & 0xFFFF00 for number in workers.call("demo_next()->long")] == [0x20100] * 3
    looked = workers.snapshot("looked")
    assert looked.paths == (os.path.realpath(demo),)
    assert looked.pids == workers.pids
    assert looked.level in repr(looked)


def test_a_module_is_led_too_and_its_forks(server: Workers) -> None:
    assert server.call("handle", 1) == [101]
    children = server.fork(2)
    assert children.call("handle", 1) == [102, 102]  # as their parent left it, each for itself
    grandchildren = children.fork(2)
    assert len({*server.pids, *children.pids, *grandchildren.pids}) == 7
    assert grandchildren[0].call("handle", 0) == [102]
    assert (server + children + grandchildren).call("handle", 0) == [101, 102, 102, 103, 102, 102, 102]
    for pid in grandchildren.pids:  # none has its relatives' connections
        ends = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert len([end for end in ends if end.startswith("socket:")]) == 1
    assert grandchildren.call("os:getppid") == [pid for pid in children.pids for _ in range(2)]
    assert server.call("Shop.handle") == ["{1}"]  # no JSON: its repr
    children[0].write("demo_counters", 7, library="libdemo")
    assert (server + children).call("handle", 0) == [102, 7, 103]


def test_any_processes_can_be_looked_at(server: Workers) -> None:
    looked = snapshot([os.getpid(), *server.pids], library="libc.so.6")
    assert len(looked.library().look.processes) == 2
    assert_shared(looked, section=".text")
    everything = snapshot(server.pids)
    assert len(everything.paths) > 4
    with pytest.raises(UsageError, match="several libraries in this snapshot"):
        assert_shared(everything)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ({"library": "libz.so.1", "module": "json"}, UsageError, "give one of library= and module="),
        ({}, UsageError, "give one of library= and module="),
        ({"module": "json", "by": "magic"}, UsageError, "by='magic'"),
        ({"module": "no_such_module"}, WorkerError, "ModuleNotFoundError: No module named 'no_such_module'"),
        ({"library": "libnosuch.so.1"}, LoadError, "libnosuch.so.1: no library of that name"),
        ({"library": "pyproject.toml", "by": "dlopen"}, LoadError, "libnosuch|invalid ELF header"),
    ],
)
def test_it_cannot_start(
    crew: StartCrew,
    start: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(build.ROOT)
    with pytest.raises(error, match=message):
        crew(1, **start)


def test_what_a_crew_cannot_do(crew: StartCrew, workers: Workers) -> None:
    for what, message in (
        (lambda: workers.write("demo_none", 1), "no symbol demo_none"),
        (lambda: workers.write("demo_current", b"123456789"), "it has 8 bytes, none for 9 at 0"),
        (lambda: workers.write("demo_current", 1, offset=8), "it has 8 bytes"),
        (lambda: workers.snapshot(library="libnosuch"), "'libnosuch': none of these processes has one"),
        (lambda: crew(1, module="json").write("x", 1), "of which library"),
        (lambda: workers + crew(1, module="json"), "of two crews"),
    ):
        with pytest.raises(UsageError, match=message):
            what()
    with pytest.raises(SymbolError, match="no symbol demo_none"):
        workers.call("demo_none()->int")


def test_a_death_is_reported_and_nobody_is_left(crew: StartCrew, demo: Path) -> None:
    workers = crew(2, library=demo, by="dlopen")
    with pytest.raises(WorkerError, match=r"^step write demo_greeting: .* was killed by SIGSEGV"):
        workers.write("demo_greeting", 1)
    others = crew(2, library=demo, by="dlopen")
    os.kill(others.pids[1], signal.SIGKILL)
    os.waitid(os.P_PID, others.pids[1], os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerError, match=r"^step looked: worker 2 of 2 .* was killed by SIGKILL"):
        others.snapshot("looked")


def test_the_death_of_a_fork(server: Workers) -> None:
    children = server.fork(2)
    with pytest.raises(
        WorkerError,
        match=rf"process {children.pids[0]}, forked by {server.pids[0]}, ended with exit status 3$",
    ):
        children[0].call("sys:exit", 3)
    with pytest.raises(ProcessGone):
        children.snapshot(library="libdemo")


def test_forks_are_reaped_as_well(crew: StartCrew) -> None:
    """By their parents, at the end: nothing waits for whoever reaps orphans here."""
    adopt_orphans = 36  # PR_SET_CHILD_SUBREAPER
    libc = ctypes.CDLL(None)
    assert libc.prctl(adopt_orphans, 1, 0, 0, 0) == 0
    try:
        workers = crew(2, module="json")
        children = workers.fork(2)
        workers._crew.close()
        for pid in children.pids:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, 0)
    finally:
        libc.prctl(adopt_orphans, 0, 0, 0, 0)


def test_what_a_function_raises(server: Workers) -> None:
    """It is told of who raised it: the worker that was forked, not the server by way of which it is asked."""
    with pytest.raises(WorkerError, match=r"worker 1 of 1 .*: ValueError: no such item\nTraceback"):
        server.call("refuse")
    children = server.fork()
    (child,), (parent,) = children.pids, server.pids
    told = rf"^process {child}, forked by {parent}: ValueError: no such item\nTraceback"
    with pytest.raises(WorkerError, match=told):
        children.call("refuse")


def test_what_a_function_raises_comes_with_its_traceback(server: Workers) -> None:
    """From the test's own code on, with what it was caused by; nothing of how it was called and sent."""
    with pytest.raises(WorkerError) as raised:
        server.fork().call("fail_slowly", 3)
    (trace,) = raised.value.__notes__
    assert "KeyError: 3" in trace.splitlines()
    assert "The above exception was the direct cause" in trace
    assert trace.splitlines()[-1] == "ValueError: no item 3"
    assert '["items"][number]' in trace
    assert "served.py" in trace
    assert "/miniloader/" not in trace


def test_a_step_that_hangs(crew: StartCrew, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = crew(1, module="time", timeout=50)
    child = workers.fork()
    monkeypatch.setattr(workers._crew, "_timeout", 0.2)
    with pytest.raises(WorkerError, match=r"^step call sleep: .* has not answered within 0\.2 s"):
        child.call("sleep", 60)
