"""Code that may crash, run in a child of its own, so that somebody is left to say what happened."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from miniloader.errors import WorkerError
from miniloader.kernel.maps import Vma, read_maps
from miniloader.lab.workers.child import ForkedProcess, death
from miniloader.lab.workers.fault import FaultRecord
from miniloader.lab.workers.shared_value import SharedValue

__all__ = ["Doing", "flush_c_output", "in_child"]


class Doing(Protocol):
    """Notes what is being done, as the error shall name it when that is the end."""

    def __call__(self, doing: str, /, *, runs_code: bool = False) -> None:
        """``runs_code``: code of libraries comes next; a fault in it is told by how they are mapped now."""


_LONGEST: Final = 10_000  # characters of a note: a file's names may have any length


def flush_c_output() -> None:
    """Write out what C code has left in its own buffers, fflush(3)."""
    ctypes.CDLL(None).fflush(None)


def in_child(body: Callable[[Doing], int], library: str = "") -> int:
    """Run ``body`` in a forked child and return the status it returns; ``library`` is what it is about.

    It is given :data:`Doing` and has to report its errors itself.  Ends with the caller.  Raises
    :class:`WorkerError` naming what was being done when the child ends before ``body`` does: by a signal, or
    because the code it runs called exit(3).
    """
    note = SharedValue()  # what is being done and the mappings, and in the end the status
    fault = FaultRecord()

    def guarded() -> int:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C works within machine code, too
        with suppress(Exception):  # our own code, or memory, is missing: the body will meet it, and say so
            fault.be_noted()
        mappings: tuple[Vma, ...] = ()

        def note_it(doing: str, /, *, runs_code: bool = False) -> None:
            nonlocal mappings
            if runs_code:
                mappings = tuple(read_maps())
            note.leave((doing[:_LONGEST], mappings))

        status = 1
        try:
            status = body(note_it)
        except BaseException:  # noqa: BLE001 - this process ends here, as an interpreter does
            sys.excepthook(*sys.exc_info())
        note.leave(status)  # at once: where memory lacks, what comes now fails as well
        with suppress(Exception):
            status = _flush(status)
            note.leave(status)
        return status

    about = f"{library}: " if library else ""
    try:
        child = ForkedProcess(guarded)
    except WorkerError as error:
        raise WorkerError(about + error.message, hint=error.hint) from error
    with child:
        code = child.wait()
    told = note.read()
    if isinstance(told, int):
        return told
    doing, mappings = told or (f"{about}starting", ())
    raise death("the process", code, doing, where=fault.told(code, mappings))


def _flush(status: int) -> int:
    """Write out all output; the status, instead of 0 that of a closed pipe or of output that got lost."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as it is where it was closed from the start
                stream.flush()
        except BrokenPipeError:
            status = status or 128 + signal.SIGPIPE
        except (OSError, ValueError):
            status = status or 1
    flush_c_output()
    return status
