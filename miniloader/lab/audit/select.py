"""Which processes: by name, by user, by descent; from ``/proc/PID`` (proc(5))."""

from __future__ import annotations

import os
import pwd

from miniloader.errors import EvidenceError, UsageError
from miniloader.kernel.procfs import process_file, read_process_file, read_stat, require_proc
from miniloader.lab.audit.audit import matches
from miniloader.values import dataclass

__all__ = ["choose"]


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    uid: int
    names: tuple[str, ...]


def choose(*, name: str | None = None, user: str | None = None, tree: int | None = None) -> tuple[int, ...]:
    """The processes that fit all that is asked for, by pid; never this one, no kernel threads.

    ``name`` is a shell pattern (or a part) of the name or the program's file name, ``user`` a name or a
    number, ``tree`` a process whose descendants are meant, itself included.  Raises UsageError for an
    unknown user, or when there is no process ``tree``; EvidenceError where ``/proc`` is not mounted.
    """
    require_proc()
    every = {one.pid: one for one in _all()}
    chosen = set(every)
    if tree is not None:
        if tree not in every:
            raise UsageError(f"--tree {tree}: there is no such process")
        chosen = _descendants(tree, every)
    if user is not None:
        uid = _uid(user)
        chosen = {pid for pid in chosen if every[pid].uid == uid}
    if name is not None:
        chosen = {pid for pid in chosen if matches(name, *every[pid].names)}
    return tuple(sorted(chosen - {os.getpid()}))


def _all() -> list[_Process]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.append(_read(int(entry)))
            except (EvidenceError, OSError):  # it has ended meanwhile, or has no memory
                continue
    return found


def _read(pid: int) -> _Process:
    name, fields = read_stat(pid)
    if fields[20] == "0":  # vsize
        raise EvidenceError(f"process {pid}: has no memory")
    command = os.fsdecode(read_process_file(pid, "cmdline")).split("\0")
    names = (name, os.path.basename(command[0]))
    return _Process(pid, int(fields[1]), os.stat(process_file(pid, "")).st_uid, names)


def _descendants(root: int, every: dict[int, _Process]) -> set[int]:
    children: dict[int, list[int]] = {}
    for one in every.values():
        children.setdefault(one.parent, []).append(one.pid)
    found, left = set[int](), [root]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"--user {user}: no such user") from None
