"""What this process may do: its user, its capabilities, and the settings that limit both.

Sources: proc_pid_status(5), capabilities(7), user_namespaces(7), proc(5) (hidepid),
Documentation/admin-guide/LSM/Yama.rst (ptrace_scope).
"""

from __future__ import annotations

import os
from typing import Final

from miniloader.kernel.procfs import read_process_file
from miniloader.values import dataclass

__all__ = ["CAPABILITIES", "Privileges", "privileges"]

CAPABILITIES: Final = {
    "CAP_DAC_READ_SEARCH": (2, "open files that are for their owner alone"),
    "CAP_SYS_PTRACE": (19, "ask about processes of other users"),
    "CAP_SYS_ADMIN": (21, "see page frame numbers"),
}
"""The capabilities that matter here: their bit (capabilities(7)) and what each is for."""

_WHOLE_RANGE: Final = ["0", "0", "4294967295"]  # the uid_map of the initial user namespace


@dataclass(frozen=True)
class Privileges:
    """Who we are; None where ``/proc`` does not say.

    ``capabilities`` are the effective ones of CAPABILITIES; they count for nothing here unless
    ``initial_user_namespace``.  ``ptrace_scope`` is Yama's setting (None: no Yama), ``hidepid`` the mount
    option of ``/proc`` (None: not set).
    """

    uid: int
    capabilities: tuple[str, ...]
    initial_user_namespace: bool | None
    ptrace_scope: int | None
    hidepid: str | None


def _words(path: str) -> list[str] | None:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).split()
    except OSError:
        return None  # not there, or not for us: the caller says that it is not known


def _effective() -> int:
    """The mask of effective capabilities."""
    for line in read_process_file(None, "status").splitlines():
        if line.startswith(b"CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _hidepid() -> str | None:
    """The hidepid option of the mount at ``/proc``; the last mount there is the one that is seen."""
    option = None
    for line in read_process_file(None, "mounts").splitlines():
        _, where, kind, options, *_ = os.fsdecode(line).split(" ")
        if (where, kind) == ("/proc", "proc"):
            values = (word.partition("=")[2] for word in options.split(",") if word.startswith("hidepid="))
            option = next(values, None)
    return option


def privileges() -> Privileges:
    """What this process may do now; raises EvidenceError where ``/proc`` is not there."""
    mask = _effective()
    uid_map = _words("/proc/self/uid_map")
    scope = _words("/proc/sys/kernel/yama/ptrace_scope")
    return Privileges(
        uid=os.geteuid(),
        capabilities=tuple(name for name, (bit, _) in CAPABILITIES.items() if mask >> bit & 1),
        initial_user_namespace=None if uid_map is None else uid_map == _WHOLE_RANGE,
        ptrace_scope=int(scope[0]) if scope else None,
        hidepid=_hidepid(),
    )
