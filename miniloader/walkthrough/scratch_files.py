"""Where chapters put fresh files: directories on a disk and in memory, and the file systems they are on."""

from __future__ import annotations

import os
from typing import Final

from miniloader.errors import EvidenceError
from miniloader.files import working_directory
from miniloader.kernel.mounts import mount_of
from miniloader.values import dataclass

__all__ = ["ScratchDirectory", "file_system_of", "scratch_directory"]

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NOT_FOR_FILES: Final = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"})


@dataclass(frozen=True)
class ScratchDirectory:
    """A directory for fresh files, and the type of its file system.

    >>> str(ScratchDirectory("/var/tmp", "ext4"))
    'ext4 (/var/tmp)'
    """

    directory: str
    file_system: str

    def __str__(self) -> str:
        return f"{self.file_system} ({self.directory})"


def scratch_directory(kind: str) -> ScratchDirectory:
    """A writable directory on ``tmpfs``, or, for any other ``kind``, on a disk if there is one.

    Where no disk can be written, a directory in memory has to do.  Raises EvidenceError where there is none.
    """
    if kind == "tmpfs":
        wanted = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/tmp", "/run"]
    else:
        home = os.path.expanduser("~")
        wanted = [os.environ.get("TMPDIR", ""), "/var/tmp", "/tmp", home, working_directory()]
    writable = (path for path in wanted if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK))
    directories = [
        scratch
        for path in writable
        if (scratch := ScratchDirectory(path, file_system_of(path))).file_system not in _NOT_FOR_FILES
    ]
    if kind == "tmpfs":
        directories = [scratch for scratch in directories if scratch.file_system in _IN_MEMORY]
    if not directories:
        raise EvidenceError(f"no {kind} directory that we may write in", hint="set TMPDIR to one")
    return min(
        directories, key=lambda scratch: scratch.file_system in _IN_MEMORY
    )  # the first of them: disks before memory


def file_system_of(path: str) -> str:
    """The type of the file system that ``path`` is on, as mountinfo names it; "?" when not told."""
    try:
        mount = mount_of(None, os.path.realpath(path))
    except EvidenceError:
        return "?"
    return mount.kind if mount is not None else "?"
