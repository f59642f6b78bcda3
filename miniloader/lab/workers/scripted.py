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
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from miniloader.errors import EvidenceError, LoadError, SymbolError, UsageError, WorkerError
from miniloader.kernel import syscalls
from miniloader.lab.workers.child import ForkedProcess, death
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
        from miniloader.loader.beside_glibc import dynamic_linker

        address = dynamic_linker.symbol_address(self.handle, os.fsencode(name), version)
        if address is None:
            raise SymbolError(f"{self.path}: no symbol {name}")
        return address


class _Steps(Commands):
    """The commands."""

    def __init__(self, connection: int) -> None:
        super().__init__(connection)
        self._children: dict[int, tuple[ForkedProcess, socket.socket]] = {}
        self._library: HasSymbols | None = None
        self._module = ""
        self._trap = -1

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
            target: Any = sys.modules.get(module or self._module)
            if target is None:
                raise UsageError(f"{function}: no module {module!r} was imported")
            for part in name.split("."):
                target = getattr(target, part)
            value = target(*arguments)
        reply: dict[str, Any] = json.loads(json.dumps({"value": value}, default=repr))
        return reply

    def do_poke(self, address: int, data: Sequence[int]) -> dict[str, Any]:
        """Write bytes by an ordinary store."""
        ctypes.memmove(address, bytes(data), len(data))
        return {}

    def do_trap(self) -> dict[str, Any]:
        """Make a userfaultfd, by which somebody else will see who writes to the memory of this process."""
        try:
            self._trap = syscalls.userfaultfd(os.O_CLOEXEC)
        except OSError as error:
            raise EvidenceError(error.strerror or str(error)) from error
        return {"descriptor": self._trap}

    def do_untrap(self) -> dict[str, Any]:
        """Close it, if there is one."""
        if self._trap >= 0:
            os.close(self._trap)
            self._trap = -1
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
        if pid not in self._children:
            raise WorkerError(f"process {pid}, forked by {os.getpid()}, has ended before")
        process, connection = self._children[pid]
        reply = b""
        with suppress(OSError):  # it has died: there is no reply, then
            connection.sendall(json.dumps(message).encode() + b"\n")
            while not reply.endswith(b"\n") and (part := connection.recv(1 << 16)):
                reply += part
        if not reply.endswith(b"\n"):
            connection.close()
            del self._children[pid]
            raise death(f"process {pid}, forked by {os.getpid()},", process.wait(), request["command"])
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def do_disband(self) -> dict[str, Any]:
        """End and reap all children."""
        for process, _ in self._children.values():
            process.kill()  # unless the library has reaped it, as it may
        return {}

    # -- inside -----------------------------------------------------------------------------------

    def _call_library(self, call: str) -> Any:
        from miniloader.loader.call import parse_call, run_call

        if self._library is None:
            raise UsageError(f"{call}: no library was loaded")
        return run_call(self._library, parse_call(call)).value

    def _fork(self) -> int:
        connection, child_end = socket.socketpair()

        def serve() -> NoReturn:
            os.close(self._connection)
            for end in (connection, *(sibling for _, sibling in self._children.values())):
                end.close()
            steps = _Steps(child_end.detach())
            steps._library, steps._module = self._library, self._module
            _serve(steps)

        process = ForkedProcess(serve)
        child_end.close()
        self._children[process.pid] = process, connection
        return process.pid
