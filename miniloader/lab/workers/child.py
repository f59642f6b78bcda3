"""The one way to fork, to end a child, and to say how a process died.

A forked child does one function and nothing else of its parent's, ends with its parent, and is known to
somebody before an interrupt is heard.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, Self

from miniloader.errors import PROCESS_LIMITS, WorkerError
from miniloader.forking import importing
from miniloader.kernel import syscalls

__all__ = [
    "INTERRUPTS",
    "TOLD",
    "ForkedProcess",
    "crash_quietly",
    "death",
    "die_with",
    "ending",
    "kill",
    "require_ending",
    "signal_name",
    "uninterrupted",
]

INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LISTEN_EVERY: Final = 200  # milliseconds
_MOMENT: Final = 1.0  # seconds that a killed process has to be gone


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait: between a process's start and its being known, or half-way through ending it.

    What comes of these signals meanwhile comes at the end; a child that is forked meanwhile takes no notice.
    Python's handlers wait, not the signals: another thread, whose mask is another, may be given them.
    """
    came: list[int] = []
    heard: dict[int, Any] = {}
    with suppress(ValueError):  # in other threads than the first, which hear nothing
        for interrupt in INTERRUPTS:
            if callable(signal.getsignal(interrupt)):
                heard[interrupt] = signal.signal(interrupt, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _await_end(pid: int, seconds: float | None = None) -> bool:
    """Wait until a child has ended, and leave it to be reaped; False after so many ``seconds``.

    A signal that comes between Python's last look and the system call that waits is not heard before that
    returns: so it returns every so often.
    """
    descriptor = None
    try:
        with uninterrupted(), suppress(OSError):  # or, interrupted as it is opened, it would be nobody's
            descriptor = syscalls.open_process(pid)
        if descriptor is None:  # a filter of system calls (seccomp), too many open files, or it was reaped
            with suppress(PermissionError, ChildProcessError):  # who reaps it waits as well
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return True
        end = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(_LISTEN_EVERY):
            if end is not None and time.monotonic() > end:
                return False
        return True
    finally:
        if descriptor is not None:
            os.close(descriptor)


class ForkedProcess:
    """A forked child that exits with the status which ``body()`` returns, 1 when it raises.

    No ``finally`` of a caller, no interrupt's handler and no atexit function runs in the child, and it is
    killed when this process ends.  A ``leader`` begins a session: it takes no Ctrl-C from a terminal, and
    what it has started is killed with it.  A context manager that kills it.

    >>> with ForkedProcess(lambda: 3) as process:
    ...     ending(process.wait())
    'ended with exit status 3'
    """

    def __init__(self, body: Callable[[], int], *, leader: bool = False) -> None:
        """Fork; OSError where there are too many processes, WorkerError as :func:`require_ending`."""
        require_ending()
        self._leader, self._runs, self.pid = leader, False, 0
        self._code: int | None = None
        parent = os.getpid()
        try:
            with uninterrupted():
                self.pid = os.fork() or self._be_the_child(body, parent)
                self._runs = True
        except BlockingIOError as error:
            said = f"cannot start a process: {error.strerror} ({PROCESS_LIMITS})"
            raise OSError(error.errno, said) from error
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end; its exit code, see :func:`ending`; None after so many ``seconds``."""
        if self._runs and _await_end(self.pid, seconds):  # interrupted now, it is still ours
            self._reap()
        return self._code

    def abandon(self) -> None:
        """End it, waiting a moment only: it may be where nothing can be ended."""
        if self._runs:
            kill(self.pid)
            self.wait(_MOMENT)
            self._runs = False

    def kill(self) -> None:
        """End and reap it, if that is to be done."""
        if self._runs:
            kill(self.pid)
            self._reap()

    def _reap(self) -> None:
        with uninterrupted():
            if self._leader:
                with suppress(ProcessLookupError):  # its group has ended, or was not begun
                    os.killpg(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # SIGCHLD is ignored: nobody is told how it has ended
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._runs = False

    def _be_the_child(self, body: Callable[[], int], parent: int) -> NoReturn:
        status = 1
        try:
            if self._leader:
                os.setsid()
            die_with(parent)
            status = body()
        finally:
            os._exit(status)


def require_ending() -> None:
    """Raise WorkerError where the kernel is not to be asked that a child ends with its parent."""
    answer = ctypes.c_int()
    try:
        syscalls.prctl(syscalls.PR_GET_PDEATHSIG, ctypes.addressof(answer))
    except OSError as error:
        said = f"no process can be started that would end with this one: {error.strerror}"
        raise WorkerError(said, hint="allow prctl(2) in the filter of system calls (seccomp)") from error


def die_with(parent: int) -> None:
    """In a child: be killed when ``parent`` ends, however that ends (PR_SET_PDEATHSIG)."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask to end with it
        os._exit(1)


def crash_quietly() -> None:
    """In a child whose crash is expected: leave neither a core file nor a Python traceback of it."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def kill(pid: int) -> None:
    """Send SIGKILL to a child that is not reaped yet, and to the process group that it may lead."""
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            send(pid, signal.SIGKILL)


def ending(code: int | None) -> str:
    """How a process ended, by its exit code: negative for a signal, None where nobody was told.

    >>> ending(-11)
    'was killed by SIGSEGV (Segmentation fault)'
    """
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit status {code}"
    return f"was killed by {signal_name(code)} ({signal.strsignal(-code)})"


def signal_name(code: int) -> str:
    """The name of the signal that an exit code tells of, "" where it was none.

    >>> signal_name(-9), signal_name(-40), signal_name(1)
    ('SIGKILL', 'signal 40', '')
    """
    if code >= 0:
        return ""
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


TOLD: Final = "miniloader: the program was killed by "
"""How the line begins that :mod:`miniloader.lab.workers.fault_teller` prints of a crash."""


def death(
    process: str, code: int | None, doing: str, printed: Sequence[str] = (), where: str = ""
) -> WorkerError:
    """The error that tells of a process's end: what it was ``doing``, ``where``, what it ``printed`` last.

    ``where`` may be what was told of the crash itself, in the last of the lines.

    >>> print(death("worker 2 of 4 (pid 77)", -4, "step written"))
    step written: worker 2 of 4 (pid 77) was killed by SIGILL (Illegal instruction)
    >>> print(death("it", -11, "closing", ["bye", TOLD + "SIGSEGV, in f of libx.so"]))
    closing: it was killed by SIGSEGV (Segmentation fault), in f of libx.so; the last line it printed: bye
    """
    lines, crash = ["", *printed], TOLD + signal_name(code or 0)
    if code is not None and code < 0 and lines[-1].startswith(crash):
        where = lines.pop().removeprefix(crash)
    last = f"; the last line it printed: {lines[-1]}" if lines[-1] else ""
    return WorkerError(f"{doing}: {process} {ending(code)}{where}{last}", hint=_memory_hint(code))


def _memory_hint(code: int | None) -> str | None:
    """What may have killed a process by SIGKILL, where the kernel has killed for that before."""
    if code != -signal.SIGKILL:
        return None
    with importing:
        from miniloader.kernel.memory_kills import memory_kills

    kills = memory_kills()
    if not kills:
        return None
    return f"the kernel has ended processes of this control group for lack of memory (oom_kill {kills})"
