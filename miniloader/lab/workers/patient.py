"""Calls that may never come back, made by a thread, or a process, that is given up when one does not.

Whoever reads what a process has mapped waits for those who fill its pages: a userfaultfd(2), the server of a
file system (FUSE, NFS) that one of its files is on.  Nobody can be made to answer.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Self, TypeVar

from miniloader.lab.workers.child import ForkedProcess

__all__ = ["Blocked", "PatientCalls", "comes_to_an_end"]

_SECONDS: Final = 5.0
_LATER: Final = 2.0  # seconds, once somebody has been waited for so long
_LOOK_EVERY: Final = 0.1  # seconds
#: Asleep, and how often it has been since it began: while both stay, it has not run at all.
_ASLEEP: Final = re.compile(rb"^State:\s+[SD].*^voluntary_ctxt_switches:\s+(\d+)", re.DOTALL | re.MULTILINE)

_Answer = TypeVar("_Answer")


class Blocked(Exception):
    """A call has slept in the kernel for too long, and was given up."""


class PatientCalls:
    """Makes calls one after the other, in a thread of its own; a context manager, which ends that.

    A call that sleeps for five seconds without running in between is given up: a thread that is kept from
    running by others, or waits for a disk again and again, is not.  The next one that does so has two
    seconds.  The thread of a call that was given up stays until it comes back, or the process ends.
    """

    def __init__(self) -> None:
        self._patience = _SECONDS
        self._caller: _Caller | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._caller is not None and kind is None:
            self._caller.end()
        elif self._caller is not None:  # interrupted, say, while a call is waited for
            self._caller.give_up()

    def call(self, function: Callable[[], _Answer]) -> _Answer:
        """What ``function`` returns or raises; :class:`Blocked` when it does neither."""
        if self._caller is None:
            try:
                self._caller = _Caller()
            except RuntimeError:  # no more threads, or no memory for one: as without patience
                return function()
        caller = self._caller
        caller.calls.put(function)
        answer, error = self._answer(caller)
        try:
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]  # that of the function
        finally:
            del error  # its traceback has this frame: what the call has opened would stay until a collection

    def _answer(self, caller: _Caller) -> tuple[Any, BaseException | None]:
        asleep: bytes | None = None
        since = time.monotonic()
        while True:
            try:
                answer, error = caller.answers.get(timeout=_LOOK_EVERY)
                return answer, error
            except Empty:
                pass
            before, asleep = asleep, caller.asleep()
            seconds = time.monotonic() - since
            if asleep is None or asleep != before:
                since = time.monotonic()
            elif seconds > self._patience:
                self._patience, self._caller = min(self._patience, _LATER), None
                caller.give_up()
                raise Blocked(f"nobody has answered for {seconds:.1f} s")


class _Caller:
    """A thread, and what it is asked to call and has come to."""

    def __init__(self) -> None:
        self.calls, self.answers = SimpleQueue[Any](), SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._status: int | None = self.answers.get()

    def _run(self) -> None:
        status = None
        with suppress(OSError):  # its own file: a /proc of another pid namespace has other numbers
            status = os.open("/proc/thread-self/status", os.O_RDONLY | os.O_CLOEXEC)
        self.answers.put(status)
        while (function := self.calls.get()) is not None:
            try:
                self.answers.put((function(), None))
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                self.answers.put((None, error))
            del function

    def asleep(self) -> bytes | None:
        """How often it has gone to sleep, where it sleeps; None where it does not, or nobody tells."""
        if self._status is None:
            return None
        asleep = _ASLEEP.search(os.pread(self._status, 1 << 14, 0))
        return asleep[1] if asleep is not None else None

    def give_up(self) -> None:
        """Leave it where it is."""
        self.calls.put(None)
        if self._status is not None:
            os.close(self._status)

    def end(self) -> None:
        """Wait for its end, having nothing more to call."""
        self.give_up()
        self._thread.join()


def comes_to_an_end(function: Callable[[], object], seconds: float = 2.0) -> bool:
    """Whether ``function`` returns, in a forked child of its own, within so many ``seconds``.

    A child that waits for a server that has its question cannot even be killed, and this process could not
    end while a thread of it did so.  The child is left then, to end when it can.  It has no open files.

    >>> comes_to_an_end(lambda: None), comes_to_an_end(lambda: time.sleep(60), seconds=0.1)
    (True, False)
    """

    def body() -> int:
        for name in os.listdir("/proc/self/fd"):  # whoever waits for the end of our output has it
            with suppress(OSError):
                os.close(int(name))
        function()
        return 0

    child = ForkedProcess(body)
    try:
        return child.wait(seconds) == 0
    finally:
        child.abandon()
