"""A crew: freshly started worker processes that load a library and are led through it in step.

::

    with Crew(4) as crew:
        replies = crew.ask("map", path="/usr/lib/libz.so.1")
        …                                    # look at the workers' pages
        crew.ask("link")

Each worker is a Python of its own (:mod:`miniloader.lab.workers.worker`), started by exec and not forked from
here, so that it has its own address space layout and shares nothing with its parent but files.  Requests
and replies are lines of JSON over a socket pair; what the library prints goes elsewhere.

No worker outlives the crew, nor the thread that started it: closing kills and reaps them, and the
kernel does it (PR_SET_PDEATHSIG) when we have no chance to.  This module imports little, so that workers
start at once while the parent is still importing what it needs to look at them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final, Self

from miniloader import errors
from miniloader.errors import PROCESS_LIMITS, MiniloaderError, UsageError, WorkerError
from miniloader.lab.workers.child import death, kill, require_ending, uninterrupted

__all__ = ["Crew", "Reply", "Worker"]

Reply = Mapping[str, Any]
"""What a worker answers: see the commands in :mod:`miniloader.lab.workers.worker`."""

# The worker imports exactly what we would: our sys.path as it is, without site's search for more.
_START: Final = "import sys; sys.path[:] = sys.argv[3:]; from {} import main; main()"
_HOME: Final = os.path.abspath(f"{__file__}/../../../..")  # the directory that this package is in
_LOOK_EVERY: Final = 0.1  # seconds between looks whether a silent worker is still there
_LAST_BREATH: Final = 5.0  # seconds from the end of a worker's connection to its own
_LAST_OCTETS: Final = 8000  # of what a worker has printed
_MEMORY: Final = 16 << 20  # bytes that a worker needs for itself: 12 MiB were seen, loading nothing yet


class Worker:
    """One process of a crew: its ``pid``, and its number in the crew, from 1."""

    def __init__(self, number: int, of: int, program: str) -> None:
        require_ending()
        with ExitStack() as undo:
            try:
                self._socket, lowest = map(undo.enter_context, socket.socketpair())
                with lowest:  # which may be 2, where standard error is closed: that is for what it prints
                    higher = fcntl.fcntl(lowest, fcntl.F_DUPFD_CLOEXEC, 3)
                worker_end = undo.enter_context(socket.socket(fileno=higher))
                # What it prints, to be quoted when it dies; a file, so that it never waits for a reader.
                self._output = os.memfd_create("miniloader-worker-output", os.MFD_CLOEXEC)
                undo.callback(os.close, self._output)
                self._process = subprocess.Popen(
                    _command(program, worker_end.fileno()),
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # numpy's BLAS would start threads
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    pass_fds=[worker_end.fileno()],
                    process_group=0,  # Ctrl-C is for the parent to deal with
                )
            except OSError as error:
                limits = f" ({PROCESS_LIMITS})" if error.errno == errno.EAGAIN else ""
                raise WorkerError(
                    f"cannot start worker {number} of {of}: {error.strerror}{limits}"
                ) from error
            undo.pop_all()
        worker_end.close()
        self.number = number
        self.pid = self._process.pid
        self._name = f"worker {number} of {of} (pid {self.pid})"
        self._inbox = bytearray()

    def __repr__(self) -> str:
        return f"<{self._name}>"

    def fileno(self) -> int:
        """Its end of the socket pair, for a selector."""
        return self._socket.fileno()

    def check(self, step: str) -> None:
        """Raise WorkerError if it has died."""
        if self._ended() is not None:
            raise self.death(step)

    def send(self, command: str, arguments: Mapping[str, Any], step: str) -> None:
        """Tell it what to do; ``step`` is what to call it in errors."""
        line = json.dumps({"command": command, **arguments}) + "\n"
        try:
            self._socket.sendall(line.encode())
        except OSError:
            raise self.death(step) from None

    def receive(self, step: str) -> Reply | None:
        """Its reply, None when there is no whole one yet; called when its socket is readable.

        Raises the error it reports, or WorkerError when it has died.
        """
        try:
            part = self._socket.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            raise self.death(step)
        self._inbox += part
        if not self._inbox.endswith(b"\n"):
            return None
        reply: dict[str, Any] = json.loads(self._inbox)
        self._inbox.clear()
        if "error" in reply:
            raise _revived(reply["error"], {self.pid: self._name})
        return reply

    def death(self, step: str) -> WorkerError:
        """The error that says how the worker died, now that its connection is closed."""
        end = time.monotonic() + _LAST_BREATH
        while (status := self._ended()) is None:
            if time.monotonic() > end:
                return WorkerError(f"step {step}: {self._name} has closed its connection, and goes on")
            time.sleep(0.001)
        return death(self._name, status, f"step {step}", self._last_lines())

    def silence(self, step: str, seconds: float) -> WorkerError:
        """The error that says that the worker has not answered within ``seconds``."""
        return WorkerError(f"step {step}: {self._name} has not answered within {seconds:g} seconds")

    def kill(self) -> None:
        """End it, with what the library may have started that stayed in its process group."""
        if self._process.returncode is None:  # else its pid may be another's
            kill(self.pid)

    def reap(self) -> None:
        """Wait for its end, and close everything that belonged to it."""
        self._process.wait()
        self._socket.close()
        os.close(self._output)

    def _ended(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs.  Reaping it would free its pid."""
        try:
            result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except PermissionError:  # a filter of system calls (seccomp): then it is reaped now
            return self._process.poll()
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def _last_lines(self) -> list[str]:
        """The last lines that the worker printed, without those that are blank."""
        size = os.fstat(self._output).st_size
        octets = os.pread(self._output, _LAST_OCTETS, max(0, size - _LAST_OCTETS))
        return [line.strip() for line in octets.decode(errors="replace").split("\n") if line.strip()]


class Crew:
    """``processes`` workers, started at once; a context manager that ends them.

    ``timeout`` is how many seconds any answer may take.  When a method has raised, the crew can only be
    closed: its workers are no longer in step.  ``program`` is the module whose ``main`` they run.
    """

    def __init__(
        self, processes: int, *, timeout: float = 60.0, program: str = "miniloader.lab.workers.worker"
    ) -> None:
        """Start them.

        Raises UsageError for no process, or for more than the memory has room for; WorkerError when one
        cannot be started.
        """
        if processes < 1:
            raise UsageError(f"{processes} processes: expected at least 1")
        if processes > (most := _memory_available() // _MEMORY):
            raise UsageError(f"{processes} processes: expected at most {most}, which fit in memory now")
        self._timeout = timeout
        self._workers: list[Worker] = []
        try:
            for number in range(1, processes + 1):
                with uninterrupted():  # an interrupt comes between two of them
                    self._workers.append(Worker(number, processes, program))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that have not been dismissed."""
        return tuple(self._workers)

    def ask(self, command: str, *, step: str = "", **arguments: Any) -> list[Reply]:
        """Have all of them do ``command`` at the same time; their replies, in order.

        ``step`` is what to call it in errors.  Raises what a worker raises, or WorkerError for one that has
        died or does not answer.
        """
        return self.ask_each(command, [arguments] * len(self._workers), step=step)

    def ask_each(
        self,
        command: str,
        arguments: Sequence[Mapping[str, Any]],
        *,
        step: str = "",
        workers: Sequence[Worker] | None = None,
    ) -> list[Reply]:
        """Have ``workers``, by default all, do ``command``, each with its element of ``arguments``.

        Their replies, in order; ``step`` and errors are as for :meth:`ask`.
        """
        step, asked = step or command, self._workers if workers is None else workers
        for worker, request in zip(asked, arguments, strict=True):
            worker.send(command, request, step)
        return self._replies(asked, step)

    def dismiss(self, worker: Worker) -> None:
        """End one of them and reap it; the others stay."""
        with uninterrupted():
            self._workers.remove(worker)
            worker.kill()
            worker.reap()

    def check(self, step: str) -> None:
        """Raise WorkerError if one has died."""
        for worker in self._workers:
            worker.check(step)

    def close(self) -> None:
        """End all of them and reap them; a second call does nothing."""
        with uninterrupted():
            for worker in self._workers:
                worker.kill()
            while self._workers:
                self._workers.pop().reap()

    def _replies(self, workers: Sequence[Worker], step: str) -> list[Reply]:
        replies: dict[int, Reply] = {}
        end = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker, selectors.EVENT_READ, worker)
            while silent := [worker for worker in workers if worker.number not in replies]:
                ready = selector.select(min(_LOOK_EVERY, max(0.0, end - time.monotonic())))
                for worker in (key.data for key, _ in ready):
                    reply = worker.receive(step)
                    if reply is not None:
                        replies[worker.number] = reply
                        selector.unregister(worker)
                if not ready:
                    # What the library has left behind may hold the connection of a dead worker open.
                    for worker in silent:
                        worker.check(step)
                    if time.monotonic() >= end:
                        raise silent[0].silence(step, self._timeout)
        return [replies[worker.number] for worker in workers]


def _command(program: str, descriptor: int) -> list[str]:
    path = sys.path if _HOME in sys.path else [*sys.path, _HOME]
    flags = ["-S", *(["-I"] if sys.flags.isolated else [])]
    if not sys.executable:
        raise WorkerError("cannot start workers: this program is no Python interpreter (sys.executable)")
    start = _START.format(program)
    return [sys.executable, *flags, "-c", start, str(descriptor), str(os.getpid()), *path]


def _memory_available() -> int:
    """Bytes that can be taken without swapping: MemAvailable of proc_meminfo(5); endless if it is hidden."""
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for name, size, *_ in map(str.split, lines):
            if name == "MemAvailable:":
                return int(size) * 1024
    return sys.maxsize


def _revived(error: Mapping[str, Any], names: Mapping[int, str]) -> MiniloaderError:
    """The error that a worker reports, or one that it has forked, as what it was raised as there.

    ``names`` are what workers are called, by pid.
    """
    kind = getattr(errors, error["kind"], None)
    if not isinstance(kind, type) or not issubclass(kind, MiniloaderError):
        name = names.get(error["pid"], f"process {error['pid']}, forked by {error['parent']}")
        unexpected = WorkerError(f"{name}: {error['kind']}: {error['message']}")
        unexpected.add_note(error["trace"])  # what it was doing there, for whoever shows more than a line
        return unexpected
    revived: MiniloaderError = kind.__new__(kind, error["message"])
    vars(revived).update(error["fields"])
    return revived
