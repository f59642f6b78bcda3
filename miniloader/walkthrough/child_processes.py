"""Processes for experiments: forked children that run a generator, and freshly started programs.

A child's generator runs up to its next ``yield`` when it is told to, and what it yields comes back together
with the calls it made.  No child outlives its ``with`` block, nor the thread that started it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Final, NoReturn, Self

from miniloader.errors import EvidenceError, WorkerError
from miniloader.lab.workers.child import die_with
from miniloader.walkthrough.traced_calls import Calls, TracedCall

__all__ = ["Body", "Child", "Program"]

Body = Callable[[Calls], Generator[Any, None, None]]
"""What a forked child does: each value it yields is picklable."""


# It imports exactly what we would: our sys.path as it is, without site's search for more.
_START: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; from miniloader.walkthrough.child_program import main; main()"
)


class _Ended:
    """A process that is ended with its ``with`` block."""

    pid: int
    name: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process, if it still runs, and reap it."""
        raise NotImplementedError


class Child(_Ended):
    """A forked child that runs ``body`` a ``yield`` at a time.  ``name`` is what to call it.

    To be made while no interrupt is heard, and until somebody is bound to end it.
    """

    def __init__(self, name: str, body: Body) -> None:
        reading, answers = os.pipe()
        turns, writing = os.pipe()
        self.name, self._answers, self._turns = name, reading, writing
        self._status: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os.close(writing)
            _be_the_child(body, turns, answers, parent)
        os.close(turns)
        os.close(answers)

    def next(self) -> tuple[Any, tuple[TracedCall, ...]]:
        """Let the child run to its next ``yield``: the value, and the calls that it made.

        Raises :class:`WorkerError` when it ends instead; :meth:`died` says how.
        """
        try:
            os.write(self._turns, b".")
            size = os.read(self._answers, 8)
        except BrokenPipeError:
            size = b""
        if len(size) < 8:
            raise WorkerError(f"{self.name} (pid {self.pid}): {self.died() or 'ended'}")
        message = b""
        while len(message) < int.from_bytes(size, "little"):
            message += os.read(self._answers, 1 << 16)
        value, calls = pickle.loads(message)
        if isinstance(value, Exception):
            raise value
        return value, tuple(calls)

    def died(self) -> str:
        """Wait for the child's end; the name of the signal that killed it, "" when none did."""
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
            os.close(self._answers)
            os.close(self._turns)
        return signal.Signals(-self._status).name if self._status < 0 else ""

    def end(self) -> None:
        """Kill the child, if it has not been waited for."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.died()


def _be_the_child(body: Body, turns: int, answers: int, parent: int) -> NoReturn:
    """Run ``body`` up to a ``yield`` for each byte from ``turns``, and end."""
    try:
        die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to deal with
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its crash is part of the lesson
        calls = Calls()
        steps = body(calls)
        while os.read(turns, 1):
            try:
                value = next(steps)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - handed to the parent, whatever it is
                value = error
            message = pickle.dumps((value, calls.taken()))
            os.write(answers, len(message).to_bytes(8, "little") + message)
    finally:
        os._exit(0)


class Program(_Ended):
    """A freshly started Python that carries out requests (:mod:`miniloader.walkthrough.child_program`)."""

    def __init__(self, name: str) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _START, *sys.path, _home()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
            )
        except OSError as error:
            raise EvidenceError(f"{sys.executable}: cannot be started: {error.strerror}") from error
        self.name, self.pid = name, self._process.pid

    def ask(self, request: str, **arguments: Any) -> tuple[Any, tuple[TracedCall, ...]]:
        """Have the program carry out ``request``: its answer, and the calls that it made."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the empty answer says so
            self._process.stdin.write(json.dumps({"request": request, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self.name} (pid {self.pid}): ended with status {status} at {request!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise OSError(*reply["error"])
        return reply["value"], tuple(TracedCall(*call) for call in reply["calls"])

    def end(self) -> None:
        """Kill the program and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a request that it did not read
                pipe.close()


def _home() -> str:
    """The directory that this package is in."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
