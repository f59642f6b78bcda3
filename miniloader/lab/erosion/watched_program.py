"""In a program whose forks are watched: what it does for that, before each fork and at its end.

A process of its own watches (:mod:`miniloader.lab.erosion.fork_watch`); it is no child of the program, which
may wait for all that it has.  Before each fork the program leaves a copy of itself that only waits, so that
what was where is known however long ago the fork was.  Nothing of ours runs in whoever is forked.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from miniloader.native import buffer_address, functions

__all__ = ["watch"]

_START: Final = "import sys; sys.path[:] = sys.argv[6:]; from {} import main; main(*sys.argv[1:6])"
_WALL: Final = 0x40000000  # __WALL: children, too, that tell nobody of their end


def watch(program: str, file: str, form: str, path: Sequence[str]) -> None:
    """Have the module ``program`` watch whom this process forks from now on.

    Its ``main`` gets a pid, the abstract address where it is to listen, a descriptor by which it says that it
    does, and the ``file`` and the ``form`` of what it is to tell; its ``sys.path`` is ``path``.  It is waited
    for twice: until then, and at the end, until it has told.
    """
    name = f"miniloader-{os.getpid()}-{os.urandom(8).hex()}"
    ready, telling = os.pipe()
    words = (str(os.getpid()), name, str(telling), file, form)
    try:
        # It forks at once, and this one ends: who watches is no child of this process.
        subprocess.run(
            [sys.executable, "-P", "-c", _START.format(program), *words, *path],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[telling],
            start_new_session=True,  # Ctrl-C is the program's
            check=False,
        )
        os.close(telling)
        telling = -1
        watches = bool(os.read(ready, 1))
    finally:
        for descriptor in {ready, telling} - {-1}:
            os.close(descriptor)
    if watches:
        _WatchedProgram(name.encode())


class _WatchedProgram:
    """This process, whose forks are watched by who listens at the abstract address ``name``."""

    def __init__(self, name: bytes) -> None:
        self._name, self._pid, self._copies = bytearray(name), os.getpid(), list[int]()
        self._keep_as_it_is = functions().keep_as_it_is
        os.register_at_fork(before=self._keep)
        atexit.register(self._end)

    def _keep(self) -> None:
        """Leave a copy of this process as it is now; earlier ones that have ended are no zombies any more."""
        self._copies = [pid for pid in self._copies if _is_there(pid)]
        copy = self._keep_as_it_is(buffer_address(self._name), len(self._name))
        if copy > 0:
            self._copies.append(copy)

    def _end(self) -> None:
        """At the end of the program itself, have told what was seen, and wait for that."""
        if os.getpid() != self._pid:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(b"\0" + self._name)
            connection.send(b"end")
            connection.recv(1)


def _is_there(pid: int) -> bool:
    """Whether a copy of this process runs: reaped, where it has ended; and those of a parent are not ours."""
    try:
        return os.waitpid(pid, os.WNOHANG | _WALL)[0] == 0
    except ChildProcessError:
        return False
