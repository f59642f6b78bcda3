"""One worker process of a :class:`~miniloader.lab.workers.crew.Crew`: a request and an answer a line.

A request is ``{"command": NAME, …arguments}``; each is answered by one object, the command's own or
``{"error": {"kind", "message", "fields"}}``, with a ``trace`` where it is no error of ours.  The commands are
the ``do_`` methods of a :class:`Commands`.
A library is loaded step by step, ``map``, ``link`` and ``initialise``, or at once by ``load``.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from miniloader.errors import LoadError, MiniloaderError, WorkerError
from miniloader.kernel import syscalls
from miniloader.lab.workers.child import die_with
from miniloader.startup import travel_light

if TYPE_CHECKING:
    from miniloader.loader import Loading
    from miniloader.loader.memory import Memory

__all__ = ["Commands", "main", "settle"]

_OURS: Final = "miniloader."  # how the names of our modules begin
_TOUCHED_AT_ONCE: Final = 1 << 20  # bytes


def main() -> NoReturn:
    """``argv``: the descriptor of the connection, and the pid of the parent."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    settle(parent)
    travel_light()
    import miniloader.loader.loading  # noqa: F401 - now, while the parent is importing as well

    _Commands(descriptor).serve()


def settle(parent: int) -> None:
    """Die when ``parent`` does, and show our ``/proc/PID`` to who may see it."""
    die_with(parent)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # an interpreter with privileges would hide its /proc/PID


class Commands:
    """Answers requests by its ``do_`` methods, each of which returns its reply."""

    def __init__(self, connection: int) -> None:
        self._connection = connection  # a descriptor: importing socket takes 2 ms
        self._requests = open(connection, "rb", closefd=False)  # noqa: SIM115 - as long as the process

    def serve(self) -> NoReturn:
        """Carry out commands; end the process when the parent has gone."""
        for line in self._requests:
            request = json.loads(line)
            self._reply(self._carry_out(request.pop("command"), request))
        os._exit(0)  # without the library's finalisers: nobody would see what they do

    def _carry_out(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = getattr(self, f"do_{command}")(**arguments)
        except MiniloaderError as error:
            return {"error": {"kind": type(error).__name__, "message": str(error), "fields": vars(error)}}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the parent that reports it
            return {"error": _unexpected(error)}
        return reply

    def _reply(self, reply: dict[str, Any]) -> None:
        line = json.dumps(reply).encode() + b"\n"
        while line:
            line = line[os.write(self._connection, line) :]


def _unexpected(error: Exception) -> dict[str, Any]:
    """What is told of an error that is not ours: it, and where it was raised, below the call of ours."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(_OURS):
        frames = frames.tb_next
    trace = traceback.format_exception(type(error), error, frames or error.__traceback__)
    print("".join(trace), file=sys.stderr)
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "fields": {},
        "trace": "".join(trace).rstrip("\n"),
        "pid": os.getpid(),
        "parent": os.getppid(),
    }


class _Commands(Commands):
    """The steps of a proof."""

    def __init__(self, connection: int) -> None:
        super().__init__(connection)
        self._steps: Loading | None = None

    def do_map(self, path: str, **options: Any) -> dict[str, Any]:
        """Map the library ``path``, with the options of :func:`miniloader.load`; its base."""
        from miniloader.loader import Loading

        self._steps = Loading(path, **options)
        self._steps.map()
        self._refuse_plain()
        return {"base": self._mapped.bias}

    def do_link(self) -> dict[str, Any]:
        """Link what is mapped: everything is relocated, and no constructor has run."""
        from miniloader.lab.workers.fault_teller import tell_faults

        tell_faults()  # from now on code of the library may run
        self._started.link()
        self._refuse_plain()
        return {}

    def do_initialise(self) -> dict[str, Any]:
        """Run the constructors."""
        self._started.initialise()
        return {}

    def do_load(self, path: str, **options: Any) -> dict[str, Any]:
        """Load the library ``path``: all three steps; its base."""
        reply = self.do_map(path, **options)
        self.do_link()
        self.do_initialise()
        return reply

    def do_touch(self, ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Read the pages of the vaddr ranges [start, end)."""
        memory, buffer = self._mapped, memoryview(bytearray(_TOUCHED_AT_ONCE))
        for start, end in ranges:
            for vaddr in range(start, end, len(buffer)):
                memory.read_into(vaddr, buffer[: end - vaddr])
        return {}

    def do_store(self, vaddr: int, value: int) -> dict[str, Any]:
        """Write the 8 bytes at ``vaddr`` by an ordinary store; what was there before."""
        word = self._word(vaddr)
        before, word.value = word.value, value
        return {"before": before}

    def do_fetch(self, vaddr: int) -> dict[str, Any]:
        """The 8 bytes at ``vaddr``."""
        return {"value": self._word(vaddr).value}

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _started(self) -> Loading:
        if self._steps is None:
            raise WorkerError("no library is mapped yet")
        return self._steps

    @property
    def _mapped(self) -> Memory:
        return self._started.mapped[0].mapped

    def _refuse_plain(self) -> None:
        """Raise LoadError when the library was to take its pages from the cache, and does not."""
        library = self._started.mapped[0]
        if library.not_prepared is not None:
            raise LoadError(f"{library.name}: {library.not_prepared}")

    def _word(self, vaddr: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self._mapped.bias + vaddr)
