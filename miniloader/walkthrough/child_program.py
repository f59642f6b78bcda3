"""A program of its own, started afresh: maps a file when asked, and reads and writes what it has mapped.

It answers each line of JSON on standard input with one on standard output; it ends when there are no more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from miniloader.kernel import syscalls
from miniloader.walkthrough.traced_calls import Calls, Mapping

__all__ = ["main"]


class _Requests:
    """What the program can be asked, each by the name of a method that returns a value for JSON."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._mapping = Mapping(0, 0)

    def map(self, path: str, length: int) -> int:
        """Map the file at ``path`` shared, readable and writable; the address."""
        fd = self._calls.open(path, os.O_RDWR)
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        self._mapping = self._calls.mmap(length, protection, syscalls.MAP_SHARED, fd)
        self._calls.close(fd)  # the mapping keeps the file
        return self._mapping.address

    def store(self, offset: int, text: str) -> None:
        """Write text into the mapping."""
        self._calls.store(self._mapping.address + offset, text.encode(), f"mapping[{offset}]")

    def load(self, offset: int, length: int) -> str:
        """Read text from the mapping."""
        name = f"mapping[{offset}:{offset + length}]"
        return self._calls.load(self._mapping.address + offset, length, name).decode()

    def parents(self) -> list[int]:
        """The ids of this program's parent, its parent's parent and so on."""
        ancestors, pid = [], os.getppid()
        while pid > 0:
            ancestors.append(pid)
            try:
                with open(f"/proc/{pid}/stat") as file:
                    pid = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                break
        return ancestors


def main() -> None:
    """Serve standard input until it ends."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # or its /proc/PID would not be ours to read
    calls = Calls()
    requests = _Requests(calls)
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            value = getattr(requests, request.pop("request"))(**request)
            reply = {"value": value, "calls": calls.taken()}
        except OSError as error:
            reply = {"error": [error.errno, error.strerror]}
        print(json.dumps(reply), flush=True)
