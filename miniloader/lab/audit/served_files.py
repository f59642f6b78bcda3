"""Files that a server gives, on FUSE or NFS: read by a process that is left when the server does not answer.

Any call about such a file may be the first that is not answered, whatever was before: opening it, asking for
its status, reading again what was read already.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from miniloader.elf import Source
from miniloader.files import open_regular
from miniloader.lab.workers.patient import Blocked, PatientProcess

__all__ = ["UNANSWERED", "ServedFile"]

UNANSWERED: Final = "whoever serves the file does not answer"
_MOST: Final = 1 << 20  # bytes that are asked for at once
_MOST_OPEN: Final = 64


class ServedFile:
    """The file at ``path``, about which ``process`` makes the system calls; they raise as those of :mod:`os`.

    ``silent`` is whether one of them was not answered; then none is made any more.
    """

    def __init__(self, process: PatientProcess, path: str) -> None:
        self._process, self._path = process, path
        self._identity: tuple[int, int] | None = None
        self.silent = False

    def source(self) -> Source:
        """It, to be read; raises as :meth:`Source.open`."""
        return Source(-1, self._path, calls=self)

    def fstat(self, _: int) -> os.stat_result:
        """Its status."""
        status = self._call(os.fstat)
        self._identity = status.st_dev, status.st_ino
        return status  # type: ignore[no-any-return]  # that of fstat

    def pread(self, _: int, length: int, offset: int) -> bytes:
        """As many bytes as there are from ``offset`` on, at most ``length``."""
        parts = []
        while length and (part := self._call(os.pread, min(length, _MOST), offset)):
            parts.append(part)
            length, offset = length - len(part), offset + len(part)
        return b"".join(parts)

    def preadv(self, _: int, buffers: Any, offset: int) -> int:
        """As many bytes as there are, at most a megabyte, into the first of the ``buffers``."""
        part = self._call(os.pread, min(len(buffers[0]), _MOST), offset)
        buffers[0][: len(part)] = part
        return len(part)

    def lseek(self, _: int, offset: int, whence: int) -> int:
        """Where data or a hole is next; where the descriptor stands is nobody's but the process's own."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            return 0
        return int(self._call(os.lseek, offset, whence))

    def close(self, _: int) -> None:
        """Nothing: the process closes what it has not been asked about for long."""

    def _call(self, function: Any, *arguments: int) -> Any:
        if self.silent:
            raise TimeoutError(errno.ETIMEDOUT, UNANSWERED)
        try:
            return self._process.call(_on_file, self._path, self._identity, function, *arguments)
        except Blocked:
            self.silent = True
            raise TimeoutError(errno.ETIMEDOUT, UNANSWERED) from None


_opened: dict[str, int] = {}  # in the process that reads: the descriptors, by path


def _on_file(path: str, identity: tuple[int, int] | None, function: Any, *arguments: int) -> Any:
    """In the process that reads: make a call with the descriptor of the file, which is still that file's."""
    descriptor = _opened.pop(path, None)
    if descriptor is None:
        descriptor = open_regular(path)
    _opened[path] = descriptor  # the last is the one that was used most lately
    if len(_opened) > _MOST_OPEN:
        os.close(_opened.pop(next(iter(_opened))))
    status = os.fstat(descriptor) if identity else None
    if status is not None and (status.st_dev, status.st_ino) != identity:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return function(descriptor, *arguments)
