"""Calls that may never come back, made by a thread, or a process, that is given up when one does not.

Whoever reads what a process has mapped waits for those who fill its pages: a userfaultfd(2), the server of a
file system (FUSE, NFS) that one of its files is on.  Nobody can be made to answer.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import weakref
from _queue import Empty, SimpleQueue  # what queue has of its own is not wanted
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from miniloader.forking import importing
from miniloader.lab.workers.child import ForkedProcess

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Blocked", "PatientCalls", "PatientProcess"]

_SECONDS: Final = 5.0
_LATER: Final = 2.0  # seconds, once somebody has been waited for so long
_LOOK_EVERY: Final = 0.1  # seconds
_FOR_PROCESS: Final = 2.0  # seconds
_FOR_OTHERS: Final = 0.5  # seconds, once a process has been waited for in vain
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
        self._caller: _Caller | None = None  # one that waits for the next call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._caller is not None:  # until it has ended it has the error it raised, and what that holds
            self._caller.end()

    def call_each(
        self, functions: Sequence[Callable[[], _Answer]], on_answer: Callable[[], None]
    ) -> list[_Answer | Blocked]:
        """What each of ``functions`` returns, in order; :class:`Blocked` in the place of who does not.

        The thread goes on from one to the next without waiting for this one, which costs more than many a
        call does.  ``on_answer`` is called here, once for each, and maybe for several at once.  Raises what
        one raises.
        """
        answers = list[_Answer | Blocked]()
        while len(answers) < len(functions):
            batch = _Batch(functions[len(answers) :], on_answer)
            try:
                self.call(batch.run, batch.tell)
            except Blocked as blocked:
                batch.end(blocked)
            except BaseException:
                batch.end()
                raise
            batch.tell()
            answers += batch.answers
        return answers

    def call(self, function: Callable[[], _Answer], meanwhile: Callable[[], None] = lambda: None) -> _Answer:
        """What ``function`` returns or raises; :class:`Blocked` when it does neither.

        ``meanwhile`` is called here now and then until it has.
        """
        try:
            caller, self._caller = self._caller or _Caller(), None
        except RuntimeError:  # no more threads, or no memory for one: as without patience
            return function()
        caller.calls.put(function)
        try:
            answer, error = self._answer(caller, meanwhile)
        except BaseException:  # Blocked, or an interrupt: nobody waits for it any more
            caller.give_up()
            raise
        self._caller = caller
        try:
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]  # that of the function
        finally:
            del error  # its traceback has this frame: what the call has opened would stay until a collection

    def _answer(self, caller: _Caller, meanwhile: Callable[[], None]) -> tuple[Any, BaseException | None]:
        asleep: bytes | None = None
        since = time.monotonic()
        while True:
            try:
                answer, error = caller.answers.get(timeout=_LOOK_EVERY)
                return answer, error
            except Empty:
                meanwhile()
            before, asleep = asleep, caller.asleep()
            seconds = time.monotonic() - since
            if asleep is None or asleep != before:
                since = time.monotonic()
            elif seconds > self._patience:
                self._patience = min(self._patience, _LATER)
                raise Blocked(f"nobody has answered for {seconds:.1f} s")


class _Batch(Generic[_Answer]):
    """Calls that follow one another until it ends, and what they have come to."""

    def __init__(self, functions: Sequence[Callable[[], _Answer]], on_answer: Callable[[], None]) -> None:
        self._functions, self._on_answer, self._told, self._has_ended = functions, on_answer, 0, False
        self.answers = list[_Answer | Blocked]()

    def run(self) -> None:
        """Make the calls: in the thread."""
        answers = self.answers
        for function in self._functions:
            answers.append(function())
            if self._has_ended:
                return

    def end(self, *answer: Blocked) -> None:
        """Make no more calls; what the one that goes on comes to is nothing to anybody."""
        self._has_ended, self.answers = True, [*self.answers, *answer]

    def tell(self) -> None:
        """Tell of each answer that has come since the last time."""
        while self._told < len(self.answers):
            self._told += 1
            self._on_answer()


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
        try:
            asleep = _ASLEEP.search(os.pread(self._status, 1 << 14, 0))
        except OSError:
            return None
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


class PatientProcess:
    """Makes calls one after the other, in a forked process of its own; a context manager, which ends that.

    Who waits for a server that has its question cannot even be killed, and this process could not end while a
    thread of it did so.  A process that does not answer for two seconds is left, to end when it can, and the
    next call is made by another; that has half a second.  It has no open files but what its calls open.

    >>> with PatientProcess() as process:
    ...     process.call(divmod, 17, 5)
    (3, 2)
    """

    def __init__(self) -> None:
        self._patience = _FOR_PROCESS
        self._peer: _Peer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process; the next call is made by another."""
        if self._peer is not None:
            self._peer.end()
        self._peer = None

    def call(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        """What ``function``, one that its module has by name, returns; raises its OSError, and Blocked."""
        for _ in range(2):
            # A helper has its parent's; and it ends with the thread that has forked it.
            if self._peer is None or not self._peer.is_ours:
                self._peer = _Peer()
            try:
                answer, error = self._peer.ask(function, arguments, self._patience)
            except TimeoutError:
                seconds, self._patience = self._patience, min(self._patience, _FOR_OTHERS)
                self.end()
                raise Blocked(f"nobody has answered for {seconds:.1f} s") from None
            except (EOFError, ConnectionError):
                self.end()
                continue
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]  # that of the function
        raise OSError(errno.EIO, "the process that reads for this one has ended")


class _Peer:
    """A forked process that does what it is asked."""

    def __init__(self) -> None:
        with importing:
            from multiprocessing.connection import Pipe
        self._owner = os.getpid()
        self._ours, theirs = Pipe()
        try:
            self._child = ForkedProcess(lambda: _answer_calls(theirs))
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end_peer, self._owner, self._ours, self._child)

    @property
    def is_ours(self) -> bool:
        """Whether it is this process that has forked it."""
        return self._owner == os.getpid()

    def ask(self, function: Callable[..., Any], arguments: Sequence[object], seconds: float) -> Any:
        """What the function returned, and the OSError that it raised; TimeoutError; EOFError of the dead."""
        self._ours.send((function, arguments))
        if not self._ours.poll(seconds):
            raise TimeoutError
        return self._ours.recv()

    def end(self) -> None:
        """End it, waiting a moment only."""
        self._end()


def _end_peer(owner: int, connection: Connection, child: ForkedProcess) -> None:
    connection.close()
    if owner == os.getpid():
        child.abandon()


def _answer_calls(connection: Connection) -> int:
    """In the child: make the calls that are asked for, until nobody can ask any more."""
    for name in os.listdir("/proc/self/fd"):  # whoever waits for the end of our output has it
        if int(name) != connection.fileno():
            with suppress(OSError):
                os.close(int(name))
    with suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            try:
                reply: tuple[Any, OSError | None] = function(*arguments), None
            except OSError as error:
                reply = None, error
            connection.send(reply)
    return 0
