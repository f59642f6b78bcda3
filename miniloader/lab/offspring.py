"""What holds for every child that is forked: it is known before an interrupt is heard, and ends with us."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from miniloader.kernel import syscalls

__all__ = ["die_with", "kill", "uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait: between a process's start and its being known, or half-way through ending it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with(parent: int) -> None:
    """In a child: be killed when ``parent`` ends, however that ends (PR_SET_PDEATHSIG)."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask to end with it
        os._exit(1)


def kill(pid: int) -> None:
    """End a child and reap it; nothing happens where it has ended, or somebody else has reaped it."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
