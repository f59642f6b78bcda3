"""Code that may crash, run in a child of its own, so that somebody is left to say what happened."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable

from miniloader.errors import WorkerError
from miniloader.lab.workers.child import die_with, kill

__all__ = ["Doing", "flush_c_output", "in_child"]

Doing = Callable[[str], None]
"""Notes what is being done, as the error shall name it when that is the end."""

_SIZE = 1 << 16


def flush_c_output() -> None:
    """Write out what C code has left in its own buffers, fflush(3)."""
    ctypes.CDLL(None).fflush(None)


def in_child(body: Callable[[Doing], int]) -> int:
    """Run ``body`` in a forked child and return the status it returns.

    It is given :data:`Doing` and has to report its errors itself.  Ends with the caller.  Raises
    :class:`WorkerError` naming what was being done when the child ends before ``body`` does: by a signal, or
    because the code it runs called exit(3).
    """
    parent = os.getpid()
    with mmap.mmap(-1, _SIZE) as shared:
        child = os.fork()
        if child == 0:
            _be_the_child(body, shared, parent)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            kill(child)
            raise
        done, doing = shared[0], shared[1:].partition(b"\0")[0].decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    if done:
        return code
    if code < 0:
        how = f"died by {signal.Signals(-code).name} ({signal.strsignal(-code)})"
    else:
        how = f"was ended, with status {code}"
    raise WorkerError(f"{doing}: the process {how}")


def _be_the_child(body: Callable[[Doing], int], shared: mmap.mmap, parent: int) -> None:
    """Never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C works within machine code, too
        die_with(parent)

        def doing(what: str) -> None:
            text = what.encode("utf-8", "surrogateescape")[: _SIZE - 2].replace(b"\0", b"?") + b"\0"
            shared[1 : 1 + len(text)] = text

        try:
            status = body(doing)
        except BaseException:  # noqa: BLE001 - this process ends here, as an interpreter does
            sys.excepthook(*sys.exc_info())
        shared[0] = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:  # as it is where it was closed from the start
                    stream.flush()
            except (OSError, ValueError):
                status = status or 1  # nobody reads it any more
        flush_c_output()
        os._exit(status)
