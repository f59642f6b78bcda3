"""Work that is shared out among processes: all of it is done, whatever becomes of the helpers."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fixtures import build
from miniloader.kernel import syscalls
from miniloader.lab.workers.fork_map import share_out

HERE = os.getpid()
Work = Callable[[Sequence[int]], list[int]]


def _children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def _squares(items: Sequence[int]) -> list[int]:
    return [item * item for item in items]


def _dies(items: Sequence[int]) -> list[int]:
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return _squares(items)


def _fails(items: Sequence[int]) -> list[int]:
    if os.getpid() != HERE:
        raise ValueError("only here")
    return _squares(items)


def _answers_what_cannot_be_pickled(items: Sequence[int]) -> object:
    return _squares(items) if os.getpid() == HERE else lambda: items


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 12, 23, 100, 5000])
def test_every_piece_is_answered_in_order(processes: int, count: int) -> None:
    answers = share_out(_squares, range(count), processes)
    assert [item for answer in answers for item in answer] == _squares(range(count))
    assert len(answers) <= 6 * processes


def test_the_parts_are_done_by_different_processes() -> None:
    pids = share_out(lambda items: os.getpid(), range(9), 3)
    assert pids[0] == os.getpid()
    assert len(set(pids)) == 3
    assert not _children()


def test_arrays_come_back_as_they_are() -> None:
    def arrays(items: Sequence[int]) -> list[np.ndarray]:
        return [np.arange(3, dtype=np.uint8), np.arange(1000, dtype=np.uint64) * np.uint64(items[0])]

    _, (small, large) = share_out(arrays, range(1, 3), 2)
    assert np.array_equal(small, [0, 1, 2])
    assert np.array_equal(large, np.arange(1000) * 2)
    assert large.flags.aligned


@pytest.mark.parametrize("work", [_dies, _fails, _answers_what_cannot_be_pickled])
def test_what_a_helper_does_not_do_is_done_here(work: Work) -> None:
    assert share_out(work, range(4), 2) == [[0, 1], [4, 9]]
    assert not _children()


@pytest.mark.parametrize("slow", [0, 1], ids=["here", "helper"])
def test_who_is_done_first_does_what_is_left(slow: int) -> None:
    """One of the two has an item that takes until all others are done."""
    done = mmap.mmap(-1, 60)  # which both have

    def work(items: Sequence[int]) -> list[int]:
        for item in items:
            if item == 20 * slow:
                until = time.monotonic() + 20
                while sum(done[20 - 20 * slow + 1 : 40 - 20 * slow]) + sum(done[40:]) < 39:
                    assert time.monotonic() < until
                    time.sleep(0.001)
            done[item] = 1
        return [os.getpid()] * len(items)

    pids = [pid for answer in share_out(work, range(60), 2) for pid in answer]
    assert (pids[0], pids[-1]) == ((HERE, pids[20]) if slow == 0 else (HERE, HERE))
    assert pids[20] != HERE
    assert set(pids[40:]) == {pids[20] if slow == 0 else HERE}


def test_what_a_helper_has_taken_and_not_done_is_done_here() -> None:
    """It dies at the first item that it was not bound to do: with it goes what it had done before."""

    def work(items: Sequence[int]) -> list[int]:
        if os.getpid() == HERE:
            time.sleep(0.01)  # until the helper has begun
        elif items[0] >= 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return _squares(items)

    answers = share_out(work, range(60), 2)
    assert [item for answer in answers for item in answer] == _squares(range(60))
    assert not _children()


@pytest.mark.parametrize("call", ["fork", "memfd_create", "pipe"])
def test_without_a_helper_all_is_done_here(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, refused)
    answers = share_out(_squares, range(60), 2)
    assert [item for answer in answers for item in answer] == _squares(range(60))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_error_here_leaves_no_helper() -> None:
    def work(items: Sequence[int]) -> None:
        if os.getpid() != HERE:
            signal.pause()
        raise KeyboardInterrupt

    before = sorted(os.listdir("/proc/self/fd"))
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(KeyboardInterrupt):
        share_out(work, range(4), 2)
    assert not _children()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == heard


@pytest.mark.parametrize(
    ("module", "call"),
    [(os, "pipe"), (os, "memfd_create"), (os, "fork"), (syscalls, "open_process"), (os, "waitpid")],
    ids=["pipe", "memfd_create", "fork", "open_process", "waitpid"],
)
def test_an_interrupt_at_any_moment_leaves_no_helper(
    module: ModuleType, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is being started, as it is there, as it begins to be waited for, and as that is over."""
    original = getattr(module, call)

    def interrupted(*arguments: object) -> object:
        answer = original(*arguments)
        if os.getpid() == HERE and call != "fork":
            os.kill(HERE, signal.SIGINT)
        elif os.getpid() != HERE and call == "fork":
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does in a terminal: all hear it
            os.kill(HERE, signal.SIGINT)
        return answer

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(module, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        share_out(_squares, range(60), 2)
    monkeypatch.undo()
    assert not _children()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_where_nobody_is_told_of_a_child_s_end_all_is_done_here() -> None:
    """SIGCHLD ignored, as a library does not change."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert share_out(_squares, range(4), 2) == [[0, 1], [4, 9]]
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not _children()


# ------------------------------------------------------------------------------- whose parent has ended
_ORPHAN = """
import os, signal, sys, time
from miniloader.kernel import syscalls
ask, here = syscalls.prctl, os.getpid()
def late(*arguments):
    if os.getpid() == here: return ask(*arguments)
    print(os.getpid(), flush=True)
    while os.getppid() == here: time.sleep(0.01)
    ask(*arguments)
syscalls.prctl = late
def work(*_):
    if os.getpid() == here: os.kill(here, signal.SIGKILL) if sys.stdin.readline() else None
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "start",
    [
        "from miniloader.lab.workers.fork_map import share_out; share_out(work, range(4), 2)",
        "import threading; threading.Thread(target=work, daemon=True).start()\n"
        "from miniloader.lab.workers.crash_guard import in_child; in_child(work)",
    ],
    ids=["helper", "guard"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_ends_when_its_parent_was_killed_before_it_could_ask_to(start: str) -> None:
    program = f"import warnings; warnings.simplefilter('ignore')\n{_ORPHAN}\n{start}"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=build.ROOT
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.stdin.write(b"end\n")
        parent.stdin.flush()
        assert parent.wait() == -signal.SIGKILL
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
