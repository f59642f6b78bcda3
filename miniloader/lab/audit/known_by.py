"""What a process is known by: its name, parent, user, start, command line and control group."""

from __future__ import annotations

import pwd
from collections.abc import Callable

from miniloader.errors import EvidenceError
from miniloader.kernel.control_groups import read_control_groups
from miniloader.kernel.procfs import read_command, read_owner, read_stat
from miniloader.values import dataclass

__all__ = ["KnownBy", "Users", "known_by"]


@dataclass(frozen=True)
class KnownBy:
    """What a process is known by; ``parent`` is a pid, ``started`` in clock ticks since boot.

    ``stack`` is where the program's stack began.  ``user`` is a name (else a number), ``command`` the command
    line, ``cgroup`` the path of the most telling control group; "" for what the kernel does not tell.
    """

    pid: int
    name: str
    parent: int
    started: int
    stack: int
    user: str
    command: str
    cgroup: str


class Users:
    """The names of users, each looked up once.

    >>> Users().name(0), Users().name(1 << 30)
    ('root', '1073741824')
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def name(self, number: int) -> str:
        """What the user of this number is called; the number itself for one that nobody knows here."""
        if number not in self._names:
            try:
                self._names[number] = pwd.getpwuid(number).pw_name
            except KeyError:
                self._names[number] = str(number)
        return self._names[number]


def known_by(pid: int, users: Users) -> KnownBy:
    """What process ``pid`` is known by; raises ProcessGone, EvidenceError where ``/proc`` hides it.

    >>> import os
    >>> known_by(os.getpid(), Users()).user == Users().name(os.geteuid())
    True
    """
    name, fields = read_stat(pid)
    return KnownBy(
        pid=pid,
        name=name,
        parent=int(fields[1]),
        started=int(fields[19]),
        stack=int(fields[25]),
        user=_told(lambda: users.name(read_owner(pid))),
        command=_told(lambda: " ".join(read_command(pid))),
        cgroup=_told(lambda: read_control_groups(pid).path),
    )


def _told(read: Callable[[], str]) -> str:
    try:
        return read()
    except EvidenceError:  # no control groups here, or it has ended: whoever looks on finds that out
        return ""
