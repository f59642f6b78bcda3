"""Processes for experiments: forked children that run a generator, and freshly started programs.

A child's generator runs up to its next ``yield`` when it is told to, and what it yields comes back together
with the calls it made.  No child outlives its ``with`` block, nor the thread that started it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from typing import Any, Final, Self

from miniloader.lab.workers.child import ForkedProcess, crash_quietly, death, signal_name
from miniloader.lab.workers.crew import Crew
from miniloader.lab.workers.shared_value import SharedValue
from miniloader.walkthrough.traced_calls import Calls, TracedCall

__all__ = ["Body", "Child", "Program"]

Body = Callable[[Calls], Generator[Any, None, None]]
"""What a forked child does: each value it yields is picklable."""

_TURN: Final = b"."  # down: go on; up: a value has been left


class Child:
    """A forked child that runs ``body`` a ``yield`` at a time.  ``name`` is what to call it.

    To be made while no interrupt is heard, and until somebody is bound to end it.
    """

    def __init__(self, name: str, body: Body) -> None:
        self.name = name
        self._value = SharedValue()
        turns, self._turns = os.pipe()
        self._answers, answers = os.pipe()
        ends = self._turns, self._answers
        self._process = ForkedProcess(lambda: _take_turns(body, turns, answers, self._value, ends))
        self.pid = self._process.pid
        os.close(turns)
        os.close(answers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def next(self) -> tuple[Any, tuple[TracedCall, ...]]:
        """Let the child run to its next ``yield``: the value, and the calls that it made.

        Raises :class:`WorkerError` when it ends instead; :meth:`died` says how.
        """
        try:
            os.write(self._turns, _TURN)
            answered = os.read(self._answers, 1) == _TURN
        except BrokenPipeError:
            answered = False
        if not answered:
            raise death(f"{self.name} (pid {self.pid})", self._process.wait(), "its next step")
        value, calls = self._value.read()
        if isinstance(value, Exception):
            raise value
        return value, calls

    def died(self) -> str:
        """Wait for the child's end; the name of the signal that killed it, "" when none did."""
        return signal_name(self._process.wait() or 0)

    def end(self) -> None:
        """Kill the child, if it still runs, and close what led to it."""
        self._process.kill()
        for descriptor in (self._turns, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._turns = self._answers = -1


def _take_turns(body: Body, turns: int, answers: int, shared: SharedValue, parents: tuple[int, int]) -> int:
    """In the child: run ``body`` a ``yield`` for each turn; an exit status."""
    for descriptor in parents:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to deal with
    crash_quietly()  # its crash is part of the lesson
    calls = Calls()
    steps = body(calls)
    while os.read(turns, 1):
        try:
            value = next(steps)
        except StopIteration:
            break
        except Exception as error:  # noqa: BLE001 - handed to the parent, whatever it is
            value = error
        shared.leave((value, tuple(calls.taken())))
        os.write(answers, _TURN)
    return 0


class Program:
    """A freshly started Python that carries out requests (:mod:`miniloader.walkthrough.child_program`).

    To be made while no interrupt is heard, and until somebody is bound to end it.
    """

    def __init__(self, name: str) -> None:
        self._crew = Crew(1, program="miniloader.walkthrough.child_program")
        self.name, self.pid = name, self._crew.workers[0].pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: str, **arguments: Any) -> tuple[Any, tuple[TracedCall, ...]]:
        """Have the program carry out ``request``: its answer, and the calls that it made."""
        reply = self._crew.ask(request, **arguments)[0]
        return reply["value"], tuple(TracedCall(*call) for call in reply["calls"])

    def end(self) -> None:
        """Kill the program and reap it."""
        self._crew.close()
