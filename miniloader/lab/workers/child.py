"""What holds for every child that is forked: it is known before an interrupt is heard, and ends with us."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from miniloader.kernel import syscalls

__all__ = ["INTERRUPTS", "die_with", "kill", "uninterrupted"]

INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
