"""A program of its own, started afresh: maps a file when asked, and reads and writes what it has mapped.

A worker as :mod:`miniloader.lab.workers` describes them; a reply has the ``value``, and the ``calls`` made.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from miniloader.kernel import syscalls
from miniloader.lab.workers.worker import Commands, settle
from miniloader.walkthrough.traced_calls import Calls, Mapping

__all__ = ["main"]


def main() -> None:
    """``argv``: the descriptor of the connection, and the pid of the parent."""
    settle(int(sys.argv[2]))
    _MappingCommands(int(sys.argv[1])).serve()


class _MappingCommands(Commands):
    """The commands of a program that maps one file."""

    def __init__(self, connection: int) -> None:
        super().__init__(connection)
        self._calls = Calls()
        self._mapping = Mapping(0, 0)

    def do_map(self, path: str, length: int) -> dict[str, Any]:
        """Map the file at ``path`` shared, readable and writable; the address."""
        fd = self._calls.open(path, os.O_RDWR)
        both = syscalls.PROT_READ | syscalls.PROT_WRITE
        self._mapping = self._calls.mmap(length, both, syscalls.MAP_SHARED, fd)
        self._calls.close(fd)  # the mapping keeps the file
        return self._answer(self._mapping.address)

    def do_store(self, offset: int, text: str) -> dict[str, Any]:
        """Write text into the mapping."""
        self._calls.store(self._mapping.address + offset, text.encode(), f"mapping[{offset}]")
        return self._answer(None)

    def do_load(self, offset: int, length: int) -> dict[str, Any]:
        """Read text from the mapping."""
        name = f"mapping[{offset}]" if length == 1 else f"mapping[{offset}:{offset + length}]"
        return self._answer(self._calls.load(self._mapping.address + offset, length, name).decode())

    def do_parents(self) -> dict[str, Any]:
        """The pids of this program's parent, its parent's parent and so on."""
        ancestors, pid = [], os.getppid()
        while pid > 0:
            ancestors.append(pid)
            try:
                with open(f"/proc/{pid}/stat") as file:
                    pid = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                break
        return self._answer(ancestors)

    def _answer(self, value: object) -> dict[str, Any]:
        return {"value": value, "calls": self._calls.taken()}
