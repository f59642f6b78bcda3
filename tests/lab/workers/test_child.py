"""One way to fork: a child does one function, ends with its parent, and its end is told in one sentence."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time

import pytest

from miniloader.errors import WorkerError
from miniloader.lab.workers.child import ForkedProcess, death, ending, signal_name, uninterrupted
from miniloader.lab.workers.crew import Crew
from tests.lab.conftest import lives, wait_until_gone


def _sleep() -> int:
    time.sleep(1000)
    return 0


def test_the_status_that_the_body_returns_is_the_exit_code() -> None:
    with ForkedProcess(lambda: 7) as process:
        assert process.wait() == 7
        assert process.wait() == 7, "it is remembered"
    assert not lives(process.pid)


def test_a_body_that_raises_runs_nothing_of_its_parent_s() -> None:
    here, ends = os.getpid(), os.pipe()
    try:
        with ForkedProcess(lambda: 1 // 0) as process:
            assert process.wait() == 1
    finally:
        os.write(ends[1], b"parent" if os.getpid() == here else b"child!")
    os.close(ends[1])
    assert os.read(ends[0], 100) == b"parent"
    os.close(ends[0])


def test_it_is_killed_when_it_is_left() -> None:
    with pytest.raises(KeyError), ForkedProcess(_sleep) as process:
        raise KeyError
    assert not lives(process.pid)
    assert process.wait() == -signal.SIGKILL


def test_where_no_process_may_be_started_the_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    said = r"Resource temporarily unavailable \(ulimit -u, pids.max of a control group\)$"
    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OSError, match=f"cannot start a process: {said}"):
        ForkedProcess(lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(WorkerError, match=f"^cannot start worker 1 of 2: {said}"):
        Crew(2)


def test_what_a_leader_has_started_ends_with_it() -> None:
    reading, writing = os.pipe()

    def start_another() -> int:
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        os.write(writing, str(child).encode())
        return 0

    with ForkedProcess(start_another, leader=True) as process:
        assert process.wait() == 0
        assert os.getsid(0) != process.pid
    grandchild = int(os.read(reading, 100))
    wait_until_gone([grandchild])
    for end in (reading, writing):
        os.close(end)


def test_an_interrupt_while_it_is_forked_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here, fork, pids = os.getpid(), os.fork, list[int]()

    def interrupted() -> int:
        pids.append(fork())
        if os.getpid() == here:
            signal.raise_signal(signal.SIGINT)
        return pids[-1]

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ForkedProcess(_sleep)
    assert len(pids) == 1
    assert not lives(pids[0])


def test_an_interrupt_waits_while_nothing_may_be_half_done() -> None:
    done = False

    def work() -> None:
        nonlocal done
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            done = True

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done


def test_where_sigchld_is_ignored_nobody_is_told() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with ForkedProcess(lambda: 7) as process:
            assert process.wait() is None
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("code", "words", "name"),
    [
        (0, "ended with exit status 0", ""),
        (3, "ended with exit status 3", ""),
        (-signal.SIGSEGV, "was killed by SIGSEGV (Segmentation fault)", "SIGSEGV"),
        (-(signal.SIGRTMIN + 3), f"was killed by signal {signal.SIGRTMIN + 3} (Real-time signal 3)", None),
        (None, "ended", ""),
    ],
)
def test_how_a_process_ended_in_words(code: int | None, words: str, name: str | None) -> None:
    assert ending(code) == words
    assert str(death("the process", code, "libx.so: crash()")) == f"libx.so: crash(): the process {words}"
    if name is not None:
        assert signal_name(code or 0) == name


def test_an_interrupt_that_wakes_nobody_is_heard() -> None:
    """One that comes just before the system call that waits; here another thread is given it."""
    ended = threading.Event()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait()

    def wait(process: ForkedProcess) -> None:
        other.start()  # it may come before the wait, on a busy machine
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.wait()

    previous = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with ForkedProcess(_sleep) as process:
        other = threading.Timer(0.1, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                wait(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            ended.set()
            other.join()
    assert not lives(process.pid)


def test_a_child_is_awaited_where_waitid_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a filter of system calls; a leader's group must not be ended before its time."""

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def body() -> int:
        time.sleep(0.2)
        return 3

    monkeypatch.setattr(os, "waitid", forbidden)
    with ForkedProcess(body, leader=True) as child:
        assert child.wait() == 3
