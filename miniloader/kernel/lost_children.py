"""Whether a process has had children that have ended, which may have left it theirs."""

from __future__ import annotations

import os
import signal
from typing import Final

from miniloader.errors import EvidenceError
from miniloader.kernel.procfs import process_file, read_process_file, read_stat

__all__ = ["has_lost_children"]

_IGNORES_CHILDREN: Final = 1 << (signal.SIGCHLD - 1)  # of SigIgn
_FAULTS_OF_CHILDREN: Final = (8, 10)  # cminflt and cmajflt, counted from the state on


def has_lost_children(pid: int) -> bool:
    """Whether a child of process ``pid`` may have ended; True also where the kernel does not tell.

    Whoever was forked has had page faults: its parent's sums of children's faults are 0 until it has waited
    for one.  Before that such a child is a zombie, but where SIGCHLD is ignored.  (A handler with
    SA_NOCLDWAIT nobody sees.)

    >>> has_lost_children(1 << 30)
    True
    """
    try:
        _, fields = read_stat(pid)
        if any(int(fields[number]) for number in _FAULTS_OF_CHILDREN) or _ignores_children(pid):
            return True
        return any(_is_zombie(child) for child in _children(pid))
    except (EvidenceError, OSError):
        return True


def _ignores_children(pid: int) -> bool:
    lines = read_process_file(pid, "status").splitlines()
    ignored = next(line.split()[1] for line in lines if line.startswith(b"SigIgn:"))
    return bool(int(ignored, 16) & _IGNORES_CHILDREN)


def _children(pid: int) -> list[int]:
    """The children of all its threads; raises OSError where the kernel lists none (CONFIG_PROC_CHILDREN)."""
    threads = os.listdir(process_file(pid, "task"))
    texts = [_text(process_file(pid, f"task/{thread}/children")) for thread in threads]
    return [int(child) for text in texts for child in text.split()]


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def _is_zombie(pid: int) -> bool:
    return read_stat(pid)[1][0] in "ZX"
