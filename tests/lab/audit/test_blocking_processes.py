"""What nobody gives the contents of: who reads it waits for ever, and an audit of all does not."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import miniloader
from miniloader.lab.audit import survey
from miniloader.lab.workers import patient
from miniloader.lab.workers.patient import Blocked, PatientCalls, PatientProcess
from tests.lab.audit import unanswered_files


@contextmanager
def unanswered(directory: Path, library: Path, reads: int) -> Iterator[int]:
    command = [sys.executable, unanswered_files.__file__, str(directory), str(library), str(reads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if said == b"refused\n":
                pytest.skip("this kernel lacks FUSE")
            assert said == b"ready\n"
            yield process.pid
        finally:
            unmounted(directory)  # first: else the server waits for itself at its end
            process.kill()


def unmounted(directory: Path) -> None:
    """Have whoever waits go on, with an error."""
    subprocess.run(["umount", "-f", directory], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["umount", "-l", directory], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()


@pytest.mark.needs_root("mounting needs CAP_SYS_ADMIN")
@pytest.mark.parametrize("reads", [1, 2])
def test_a_file_that_nobody_serves_is_left_out(reads: int, demo: Path, tmp_path: Path, sleeper: int) -> None:
    """All of its process but the file is told, also where it was served at first; the command ends, too."""
    with unanswered(tmp_path, demo, reads) as pid:
        command = [sys.executable, "-m", "miniloader", "audit", str(pid), str(sleeper), "--json"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=100)
    answer = json.loads(done.stdout)
    assert answer["unreadable"] == []
    assert [process["pid"] for process in answer["processes"]] == [pid, sleeper]
    (file,) = (library for library in answer["libraries"] if library["path"].startswith(str(tmp_path)))
    assert (file["build_id"] is not None) == (reads >= 2)
    (page,) = file["private_pages"]
    assert ("unknown" in page["causes"]) == bool(page["reason"])
    assert reads == 2 or page["reason"] == "whoever serves the file does not answer"


def test_what_blocks_makes_one_process_unreadable(sleeper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that does not come back."""
    never, known_by = threading.Event(), survey.known_by

    def wait(pid: int, users: survey.Users) -> survey.KnownBy:
        if pid == 1:
            never.wait()
        return known_by(pid, users)

    monkeypatch.setattr(patient, "_SECONDS", 1.0)
    monkeypatch.setattr(survey, "known_by", wait)
    found = miniloader.audit([1, sleeper], causes=False)
    never.set()
    assert [process.pid for process in found.processes] == [sleeper]
    (unreadable,) = found.unreadable
    assert unreadable.pid == 1
    assert "nobody has answered for" in unreadable.reason
    assert "FUSE" in unreadable.needed


def test_calls_that_do_not_come_back_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "_SECONDS", 0.3)
    monkeypatch.setattr(patient, "_LATER", 0.2)
    never = threading.Event()
    with PatientCalls() as calls:
        assert calls.call(lambda: 1) == 1
        with pytest.raises(Blocked):
            calls.call(never.wait)
        with pytest.raises(ZeroDivisionError):
            calls.call(lambda: 1 // 0)
        with pytest.raises(Blocked):
            calls.call(never.wait)
        assert calls.call(lambda: 2) == 2
    never.set()


def test_calls_that_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not come back has no answer, and goes on with nothing once it does."""
    monkeypatch.setattr(patient, "_SECONDS", 0.3)
    never, made, told_of = threading.Event(), list[int](), list[None]()

    def make(number: int) -> int:
        made.append(number)
        return number

    with PatientCalls() as calls:
        functions = [*[partial(make, number) for number in range(3)], never.wait, partial(make, 4)]
        first, second, third, blocked, last = calls.call_each(functions, lambda: told_of.append(None))
        assert (first, second, third, last) == (0, 1, 2, 4)
        assert isinstance(blocked, Blocked)
        assert len(told_of) == len(functions)
        never.set()
        with pytest.raises(ZeroDivisionError):
            calls.call_each([lambda: 1 // 0, partial(make, 5)], lambda: None)
    assert made == [0, 1, 2, 4]


def test_an_error_leaves_no_thread_that_has_it() -> None:
    """What a call had opened when it failed is closed with the error: the thread has it for a while, too."""
    for _ in range(300):
        threads = {*threading.enumerate()}
        with pytest.raises(ZeroDivisionError), PatientCalls() as calls:
            calls.call(lambda: 1 // 0)
        assert {*threading.enumerate()} <= threads


def test_who_interrupts_does_not_wait_for_the_call() -> None:
    never, over = threading.Event(), threading.Event()

    def wait() -> None:
        _thread.interrupt_main()
        never.wait(60)
        over.set()

    with pytest.raises(KeyboardInterrupt), PatientCalls() as calls:
        calls.call(wait)
    assert not over.is_set()
    never.set()


def children() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


def test_a_process_that_does_not_answer_is_gone_and_another_takes_its_place() -> None:
    earlier = children()
    with PatientProcess() as process:
        assert process.call(divmod, 17, 5) == (3, 2)
        first = process.call(os.getpid)
        with pytest.raises(Blocked):
            process.call(time.sleep, 60)
        assert process.call(os.getpid) not in (first, os.getpid())
        with pytest.raises(FileNotFoundError):
            process.call(os.stat, "/none")
    assert children() == earlier


def test_a_process_that_was_ended_is_followed_by_another() -> None:
    """It ends with the thread that has made it, and may be killed for lack of memory."""
    with PatientProcess() as process:
        os.kill(process.call(os.getpid), 9)
        assert process.call(divmod, 17, 5) == (3, 2)
        child = os.fork()
        if child == 0:
            os._exit(process.call(os.getppid) != os.getpid())
        assert os.waitpid(child, 0)[1] == 0
        assert process.call(os.getppid) == os.getpid()


def test_who_forgets_a_process_leaves_none() -> None:
    earlier, process = children(), PatientProcess()
    process.call(os.getpid)
    del process
    assert children() == earlier


def test_calls_that_go_on_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes, and one that sleeps again and again, both longer than anybody is waited for."""
    monkeypatch.setattr(patient, "_SECONDS", 0.3)

    def compute() -> str:
        end = time.thread_time() + 0.5
        while time.thread_time() < end:
            pass
        return "computed"

    def sleep_often() -> str:
        for _ in range(50):
            time.sleep(0.01)
        return "slept"

    with PatientCalls() as calls:
        assert (calls.call(compute), calls.call(sleep_often)) == ("computed", "slept")
