"""Progress is for a person who waits: nobody else sees it, and it goes again."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from miniloader.report import progress as module
from miniloader.report.progress import progress


class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self) -> bool:
        return True


def test_who_does_not_wait_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for forks in (False, True):
        with progress(forks=forks) as say:
            say("at once")
    assert terminal.getvalue() == ""


def test_who_waits_sees_what_is_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with progress(forks=True) as say:
        say("one")
        say("two")
    assert terminal.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"


def test_where_the_block_forks_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    threads = {*threading.enumerate()}
    with progress(forks=True) as say:
        say("one")
        assert {*threading.enumerate()} <= threads
    with progress():
        assert {*threading.enumerate()} - threads


def test_what_is_no_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with progress(forks=True) as say:
        say("one")
    assert pipe.getvalue() == ""
