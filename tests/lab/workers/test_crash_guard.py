"""Code that may crash runs in a child, and somebody is left to say what it was doing."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal

import pytest

from miniloader.errors import WorkerError
from miniloader.lab.workers import crash_guard
from miniloader.lab.workers.child import crash_quietly
from miniloader.lab.workers.crash_guard import Doing, in_child
from miniloader.lab.workers.fault import FaultRecord


def test_the_status_of_the_body_is_returned() -> None:
    assert in_child(lambda doing: 5) == 5


def test_a_crash_is_told_with_what_was_being_done() -> None:
    def crash(doing: Doing) -> int:
        crash_quietly()
        doing("libx.so: mapping it")
        doing("libx.so: crash()")
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    told = re.escape("libx.so: crash(): the process was killed by SIGSEGV (Segmentation fault)")
    with pytest.raises(WorkerError, match=f"^{told}$"):
        in_child(crash)


def test_an_exit_from_below_is_told() -> None:
    def leave(doing: Doing) -> int:
        doing("libx.so: leave()")
        ctypes.CDLL(None)._exit(0)
        return 0

    with pytest.raises(WorkerError, match=r"^libx.so: leave\(\): the process ended with exit status 0$"):
        in_child(leave)


def test_a_note_has_an_end() -> None:
    def crash(doing: Doing) -> int:
        crash_quietly()
        doing("x" * 10_000_000)
        os.abort()

    with pytest.raises(
        WorkerError, match=r"^x+\[[\d,]+ characters\]x+: the process was killed by SIGABRT \(Aborted\)$"
    ) as raised:
        in_child(crash)
    assert len(str(raised.value)) < 10_000


def test_a_crash_that_cannot_be_noted_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no memory for a stack of signals: what can be done without is done."""

    def fail(self: FaultRecord) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(FaultRecord, "be_noted", fail)
    assert in_child(lambda doing: 5) == 5


def test_a_status_is_told_before_anything_else_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no memory to write out what C has in its buffers: what was told is not told again."""

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(crash_guard, "flush_c_output", fail)
    assert in_child(lambda doing: 5) == 5


def test_an_exception_is_printed_as_an_interpreter_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(lambda doing: 1 // 0) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err
