"""Ctrl-C, and what else ends a program, heard once: so that what was made is taken away in peace."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from miniloader.lab.workers.child import INTERRUPTS

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[None]:
    """The first of SIGINT, SIGTERM and SIGHUP is a KeyboardInterrupt; what comes later is ignored.

    Ctrl-C is often pressed twice, and the second must not stop the taking away, nor the telling of it: they
    stay ignored.  A signal that is ignored already (nohup(1)) stays so, too.  In other threads than the
    first, this does nothing.
    """

    interrupted = False

    def first(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        for interrupt in INTERRUPTS:
            signal.signal(interrupt, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in () if interrupted else before.items():
            signal.signal(number, handler)
