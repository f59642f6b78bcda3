"""A worker that a test leads: it opens a library or imports a module, calls, writes, and forks.

:func:`main` is its program, for a :class:`~miniloader.lab.workers.crew.Crew`.  A process that it
forks is asked through it: requests and replies go down and up the line of descent, and each process
answers one at a time.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from miniloader.errors import LoadError, SymbolError, UsageError, WorkerError
from miniloader.lab.workers.child import kill
from miniloader.lab.workers.worker import Commands, settle
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.loader.call import HasSymbols

__all__ = ["main"]


def main() -> NoReturn:
    """``argv``: the descriptor of the connection, and the pid of the parent."""
    settle(int(sys.argv[2]))
    _serve(_Steps(int(sys.argv[1])))


def _serve(steps: _Steps) -> NoReturn:
    """Answer until the other end has gone, or what is called wants to exit."""
    status = 1
    try:
        steps.serve()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)  # as the interpreter does
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        os._exit(status)


@dataclass(frozen=True)
class _Opened:
    """A library that dlopen(3) has opened."""

    path: str
    handle: int

    def address(self, name: str, version: str | None = None) -> int:
        """The address of a symbol; SymbolError where there is none."""
        from miniloader.loader.beside_glibc import host

        found = host.symbol_address(self.handle, os.fsencode(name), version)
        if found is None:
            raise SymbolError(f"{self.path}: no symbol {name}")
        return found


class _Steps(Commands):
    """The commands."""

    def __init__(self, connection: int) -> None:
        super().__init__(connection)
        self._children: dict[int, socket.socket] = {}
        self._library: HasSymbols | None = None
        self._module = ""

    def do_load(self, path: str) -> dict[str, Any]:
        """Load the library as :func:`miniloader.load` does."""
        from miniloader.loader import load

        self._library = load(path)
        return {}

    def do_dlopen(self, path: str) -> dict[str, Any]:
        """Open the library with dlopen(3), all symbols bound."""
        try:
            handle = ctypes.CDLL(path, os.RTLD_NOW)._handle
        except OSError as error:
            raise LoadError(f"{path}: the system's loader refuses it: {error}") from error
        self._library = _Opened(path, handle)
        return {}

    def do_import(self, module: str) -> dict[str, Any]:
        """Import a Python module."""
        importlib.import_module(module)
        self._module = module
        return {}

    def do_call(self, function: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """Call a function of the library (``demo_add(1, 2)->long``), or one of a module (``handle``).

        A value that JSON does not have comes back as its ``repr``.
        """
        if "(" in function:
            value = self._call_library(function)
        else:
            module, _, name = function.rpartition(":")
            found: Any = sys.modules.get(module or self._module)
            if found is None:
                raise UsageError(f"{function}: no module {module!r} was imported")
            for part in name.split("."):
                found = getattr(found, part)
            value = found(*arguments)
        reply: dict[str, Any] = json.loads(json.dumps({"value": value}, default=repr))
        return reply

    def do_poke(self, address: int, data: Sequence[int]) -> dict[str, Any]:
        """Write bytes by an ordinary store."""
        ctypes.memmove(address, bytes(data), len(data))
        return {}

    def do_fork(self, children: int) -> dict[str, Any]:
        """Fork that many children, each of which is led as this process is."""
        return {"pids": [self._fork() for _ in range(children)]}

    def do_relay(self, route: Sequence[int], request: dict[str, Any]) -> dict[str, Any]:
        """Have the descendant at the end of ``route``, by pid, carry out ``request``; its reply."""
        if not route:
            return self._carry_out(request.pop("command"), request)
        pid, *further = route
        message = {"command": "relay", "route": further, "request": request}
        reply, child = b"", self._children.get(pid)
        if child is None:
            raise WorkerError(f"process {pid}, forked by {os.getpid()}: has ended before")
        with suppress(OSError):  # it has died: there is no reply, then
            child.sendall(json.dumps(message).encode() + b"\n")
            while not reply.endswith(b"\n") and (part := child.recv(1 << 16)):
                reply += part
        if not reply.endswith(b"\n"):
            raise WorkerError(f"process {pid}, forked by {os.getpid()}: {self._death(pid)}")
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def do_disband(self) -> dict[str, Any]:
        """End and reap all children."""
        for pid in self._children:
            kill(pid)  # unless the library has reaped it, as it may
        return {}

    # -- inside -----------------------------------------------------------------------------------

    def _call_library(self, call: str) -> Any:
        from miniloader.loader.call import parse_call, run_call

        if self._library is None:
            raise UsageError(f"{call}: no library was loaded")
        return run_call(self._library, parse_call(call)).value

    def _fork(self) -> int:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                settle(parent)
                os.close(self._connection)
                for end in (ours, *self._children.values()):
                    end.close()
                steps = _Steps(theirs.detach())
                steps._library, steps._module = self._library, self._module
                _serve(steps)
            finally:
                os._exit(1)
        theirs.close()
        self._children[pid] = ours
        return pid

    def _death(self, pid: int) -> str:
        """How a child ended; it is reaped."""
        self._children.pop(pid).close()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
