"""One worker process of a :class:`~miniloader.lab.workers.crew.Crew`: a request and an answer a line.

A request is ``{"command": NAME, …arguments}``; each is answered by one object, the command's own or
``{"error": {"kind", "message", "fields"}}``.  The commands are the ``do_`` methods of a :class:`Commands`.  A
load can be paused half-way: then the worker answers, and takes further commands right where it is, inside
the loader, until it is told to ``resume``.
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
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.workers.child import die_with
from miniloader.startup import travel_light

if TYPE_CHECKING:
    from miniloader.loader.events import Event
    from miniloader.loader.memory import Memory

__all__ = ["Commands", "main", "settle"]

_TOUCHED_AT_ONCE: Final = 1 << 20  # bytes


def main() -> NoReturn:
    """``argv``: the descriptor of the connection, and the pid of the parent."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    settle(parent)
    travel_light()
    import miniloader.loader.loading  # noqa: F401 - now, while the parent is importing as well

    _Commands(descriptor).serve()
    raise AssertionError("only a paused load is resumed")


def settle(parent: int) -> None:
    """Die when ``parent`` does, and show our ``/proc/PID`` to who may see it."""
    die_with(parent)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # an interpreter with privileges would hide its /proc/PID


class Commands:
    """Answers requests by its ``do_`` methods, each of which returns its reply."""

    def __init__(self, connection: int) -> None:
        self._connection = connection  # a descriptor: importing socket takes 2 ms
        self._requests = open(connection, "rb", closefd=False)  # noqa: SIM115 - as long as the process

    def serve(self) -> None:
        """Carry out commands until one says to resume; end the process when the parent has gone."""
        for line in self._requests:
            request = json.loads(line)
            command = request.pop("command")
            if command == "resume":
                return
            self._reply(self._carry_out(command, request))
        os._exit(0)  # without the library's finalisers: nobody would see what they do

    def _carry_out(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = getattr(self, f"do_{command}")(**arguments)
        except MiniloaderError as error:
            return {"error": {"kind": type(error).__name__, "message": str(error), "fields": vars(error)}}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the parent that reports it
            import traceback

            traceback.print_exc()
            return {"error": {"kind": type(error).__name__, "message": str(error), "fields": {}}}
        return reply

    def _reply(self, reply: dict[str, Any]) -> None:
        line = json.dumps(reply).encode() + b"\n"
        while line:
            line = line[os.write(self._connection, line) :]


class _Commands(Commands):
    """The steps of a proof."""

    def __init__(self, connection: int) -> None:
        super().__init__(connection)
        self._memory: Memory | None = None

    def do_load(self, path: str, pauses: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        """Load the library ``path``, with the options of :func:`miniloader.load`; its base.

        ``pauses`` are where to stop on the way: "mapped", when all its pages are mapped and none is touched;
        "linked", when everything is relocated and no constructor has run (never, if there is none).
        """
        from miniloader.loader import inspect, load
        from miniloader.loader.memory import Memory

        plan = inspect(path).plan(PAGE_SIZE)
        left = [*pauses]

        def pause(here: str) -> None:
            if here in left:
                left.remove(here)
                self._reply(self._where(here))
                self.serve()

        def on_event(event: Event) -> None:
            if event.stage == "reserve" and self._memory is None:  # it is mapped before what it needs
                self._memory = Memory(path, plan, event.data["address"] - plan.start)
            if event.stage == "map" and event.data["call"].end == plan.end:
                pause("mapped")
            if event.stage == "initialise":
                pause("linked")
            if event.stage == "prepared" and event.library == path:
                raise LoadError(f"{path}: {event.text}")

        load(path, on_event=on_event, **options)
        return self._where("loaded")

    def do_touch(self, ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Read the pages of the vaddr ranges [start, end)."""
        import numpy as np

        memory, buffer = self._mapped, np.empty(_TOUCHED_AT_ONCE, np.uint8)
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
    def _mapped(self) -> Memory:
        if self._memory is None:
            raise WorkerError("no library is mapped yet")
        return self._memory

    def _where(self, here: str) -> dict[str, Any]:
        return {"at": here, "base": self._mapped.bias}

    def _word(self, vaddr: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self._mapped.bias + vaddr)
