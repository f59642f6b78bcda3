"""How a process has ended that is no child of ours, as far as the kernel tells.

A pidfd that was opened before tells it once the process is reaped (6.15); until then ``/proc/PID/stat`` of a
zombie does.  Source: ``include/uapi/linux/pidfd.h``, proc_pid_stat(5).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.procfs import process_file

__all__ = ["exit_code"]

_GET_INFO: Final = 3 << 30 | 64 << 16 | 0xFF << 8 | 11  # PIDFD_GET_INFO with the first struct pidfd_info
_EXIT: Final = 1 << 3  # PIDFD_INFO_EXIT


def exit_code(pid: int, descriptor: int) -> int | None:
    """The exit status of the process that the pidfd ``descriptor`` is of, or a signal's number below zero.

    None where it runs, or nobody tells.
    """
    information = (ctypes.c_uint64 * 8)(_EXIT)
    try:
        syscalls.ioctl(descriptor, _GET_INFO, ctypes.addressof(information))
        if information[0] & _EXIT:
            return os.waitstatus_to_exitcode(information[7] >> 32)
    except OSError:
        pass
    try:
        with open(process_file(pid, "stat"), "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except (OSError, EvidenceError):
        return None
    return os.waitstatus_to_exitcode(int(words[49])) if words[0] == b"Z" and len(words) > 49 else None
