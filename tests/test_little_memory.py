"""Processes that the kernel ends for lack of memory, at each step: they are reported, and nobody is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import miniloader
from fixtures.build import ROOT, build
from miniloader.errors import WorkerError
from miniloader.files import UNFINISHED
from miniloader.lab.workers.crew import Crew
from miniloader.loader.events import Event
from miniloader.loader.prepare import prepare
from miniloader.loader.prepared import store
from tests.lab.conftest import lives

pytestmark = pytest.mark.needs_root("making a cgroup needs to write to /sys/fs/cgroup")

_DEMO = str(build("demo"))
#: What is run, and with so many megabytes, of which it gets to different steps.
COMMANDS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("load", _DEMO): (8, 24),
    ("prove", _DEMO, "-n", "2"): (24, 60),
    ("prepare", _DEMO): (24, 40),
    ("run", "--no-bill", "-c", f"import ctypes; ctypes.CDLL({_DEMO!r})"): (16, 28),
    ("audit", "--tree", str(os.getpid())): (32, 52),
}


class Group:
    """A cgroup, without swap."""

    def __init__(self, path: Path, limits: list[str]) -> None:
        self.path, self._limits = path, limits

    def limit(self, octets: int) -> None:
        """Have its processes together use no more than that from now on, swap included."""
        memory, swap = self._limits
        both = (self.path / swap).exists()
        if both and swap == "memory.swap.max":
            (self.path / swap).write_text("0")
        elif both:
            with suppress(OSError):  # it may not be less than what is in memory, which may not be more
                (self.path / swap).write_text(str(octets))
        (self.path / memory).write_text(str(octets))
        if both and swap != "memory.swap.max":
            (self.path / swap).write_text(str(octets))

    def take(self, pid: int) -> None:
        """Move a process there; what it has already is not counted."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def is_empty(self) -> bool:
        """Whether nobody is there, within ten seconds."""
        end = time.monotonic() + 10
        while (self.path / "cgroup.procs").read_text().strip():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture
def group() -> Iterator[Group]:
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    path = root / ("" if unified else "memory") / f"miniloader-test-{os.getpid()}"
    limits = ["memory.max", "memory.swap.max"]
    if not unified:
        limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"this machine lacks a cgroup that can be written: {error.strerror}")
    made = Group(path, limits)
    try:
        made.limit(1 << 20)
    except OSError as error:
        path.rmdir()
        pytest.skip(f"this machine lacks a memory controller in its cgroup: {error.strerror}")
    yield made
    assert made.is_empty()
    path.rmdir()


def test_a_worker_that_the_kernel_ends_for_its_memory_is_reported(group: Group) -> None:
    with Crew(2) as crew:
        pids = [worker.pid for worker in crew.workers]
        crew.ask("load", path=_DEMO)
        group.take(pids[0])
        with pytest.raises(WorkerError, match=r"^step touch: worker 1 of 2 .* was killed by SIGKILL"):
            crew.ask("touch", ranges=[[0, 0]] * 200_000)  # more to remember than it may
    assert not any(map(lives, pids))


def test_a_proof_is_told_of_a_worker_that_is_ended_at_any_step(group: Group) -> None:
    """It may have no more pages than one from then on, and may do without any at the last."""
    steps: list[str] = []
    miniloader.prove(_DEMO, 2, on_step=lambda step, _: steps.append(step))
    group.limit(4096)
    killed = 0
    for step in steps:
        pids: set[int] = set()

        def take(name: str, now: object, step: str = step, pids: set[int] = pids) -> None:
            pids.update(now)  # type: ignore[call-overload]  # the pids
            if name == step:
                group.take(min(pids))

        said = ""
        try:
            miniloader.prove(_DEMO, 2, on_step=take)
        except WorkerError as error:
            said = str(error)
        killed += "was killed by SIGKILL" in said
        assert not said or re.match(r"step .*: worker 1 of 2 .* was killed by SIGKILL[^\n]*$", said)
        assert not any(map(lives, pids))
    assert killed >= len(steps) // 2


def test_who_is_ended_while_it_prepares_leaves_nothing_that_is_used(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any event: a file is whole, or removed by the next one who prepares.  The secret is one of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    events: list[Event] = []
    entry = prepare(_DEMO, on_event=events.append)
    store.clear()
    group.limit(4096)
    codes = []
    for number in range(len(events)):
        came: list[Event] = []

        def take(event: Event, number: int = number, came: list[Event] = came) -> None:
            came.append(event)
            if len(came) > number:
                group.take(os.getpid())

        child = os.fork()
        if child == 0:
            try:
                prepare(_DEMO, on_event=take)
            finally:
                os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        whole = {name for name in os.listdir(store.directory()) if not name.startswith(UNFINISHED)}
        assert whole <= {entry.name, "secret"}
    assert -signal.SIGKILL in codes
    prepare(_DEMO)
    assert {*os.listdir(store.directory())} == {entry.name, "secret"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_that_gets_too_little_memory(group: Group, command: tuple[str, ...]) -> None:
    """It is ended by the kernel, or says in one line what was; nobody outlives it."""
    for megabytes in COMMANDS[command]:
        group.limit(megabytes << 20)
        done = run(command, lambda: group.take(os.getpid()))
        assert done.returncode in (0, 1, 3, -signal.SIGKILL), done.stderr
        assert done.stderr.count("\n") <= 1, done.stderr
        assert "fault of" not in done.stderr
        assert group.is_empty()


def run(command: tuple[str, ...], first: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "miniloader", *command]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # what is cut short is kept by nobody
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, preexec_fn=first
    )
