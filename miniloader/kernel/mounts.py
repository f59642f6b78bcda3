"""``/proc/PID/mountinfo``: on which file system a path lies.  Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from miniloader.errors import EvidenceError
from miniloader.kernel.procfs import read_process_file
from miniloader.values import dataclass

__all__ = ["Mount", "ServedMounts", "mount_of"]

_LINE = re.compile(rb"^\d+ \d+ (\d+):(\d+) \S+ (\S+) .*? - (\S+) ", re.MULTILINE)
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted; ``device`` is (major, minor), ``kind`` reads like ``ext4``."""

    device: tuple[int, int]
    point: str
    kind: str


_SERVED = ("fuse", "nfs")  # how the kinds begin whose files a process, or another machine, gives


class ServedMounts:
    """What of a process's mounts (None: this one's) a server answers for, whom a reader waits for.

    None are known where the mounts of that process may not be read.
    """

    def __init__(self, pid: int | None) -> None:
        try:
            mounts = tuple(_mounts(pid))
        except EvidenceError:
            mounts = ()
        self._devices = {mount.device for mount in mounts if mount.kind.startswith(_SERVED)}
        self._mounts = mounts if self._devices else ()

    def have(self, path: str, device: tuple[int, int]) -> bool:
        """Whether the absolute ``path``, or what is on ``device``, is one of these files."""
        mount = _innermost(self._mounts, path)
        return device in self._devices or (mount is not None and mount.device in self._devices)


def mount_of(pid: int | None, path: str) -> Mount | None:
    """The mount that the absolute ``path`` of process ``pid`` (None: this one) lies on.

    Raises ProcessGone, or EvidenceError where that may not be read.
    """
    return _innermost(_mounts(pid), path)


def _mounts(pid: int | None) -> Iterator[Mount]:
    for major, minor, escaped, kind in _LINE.findall(read_process_file(pid, "mountinfo")):
        point = os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), escaped))
        yield Mount((int(major), int(minor)), point, os.fsdecode(kind))


def _innermost(mounts: Iterable[Mount], path: str) -> Mount | None:
    innermost = None
    for mount in mounts:
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        if inside and (innermost is None or len(mount.point) >= len(innermost.point)):  # a later one covers
            innermost = mount
    return innermost
