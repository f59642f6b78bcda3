"""``/proc/PID/mountinfo``: on which file system a path lies.  Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re

from miniloader.kernel.procfs import read_process_file
from miniloader.values import dataclass

__all__ = ["Mount", "mount_of"]

_LINE = re.compile(rb"^\d+ \d+ (\d+):(\d+) \S+ (\S+) .*? - (\S+) ", re.MULTILINE)
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted; ``device`` is (major, minor), ``kind`` reads like ``ext4``."""

    device: tuple[int, int]
    point: str
    kind: str


def mount_of(pid: int | None, path: str) -> Mount | None:
    """The mount that the absolute ``path`` of process ``pid`` (None: this one) lies on.

    Raises ProcessGone, or EvidenceError where that may not be read.
    """
    mount = None
    for major, minor, escaped, kind in _LINE.findall(read_process_file(pid, "mountinfo")):
        point = os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), escaped))
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (mount is None or len(point) >= len(mount.point)):  # a later one covers an earlier
            mount = Mount((int(major), int(minor)), point, os.fsdecode(kind))
    return mount
