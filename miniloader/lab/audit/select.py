"""Which processes: by name, by user, by descent; from ``/proc/PID`` (proc(5))."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Final, NoReturn

from miniloader.errors import EvidenceError, ProcessGone, UsageError, printable
from miniloader.kernel.procfs import process_file, read_process_file, read_stat, require_proc
from miniloader.values import dataclass

__all__ = ["choose", "matches", "still_there"]

_KERNEL_THREAD: Final = 0x200000  # PF_KTHREAD, include/linux/sched.h


@dataclass(frozen=True)
class _Candidate:
    """A process that may be chosen: parent, start (in clock ticks), user, and the names it goes by."""

    pid: int
    parent: int
    started: int
    uid: int
    names: tuple[str, ...]


def choose(*, name: str | None = None, user: str | None = None, tree: int | None = None) -> tuple[int, ...]:
    """The processes that fit all that is asked for, by pid; never this one, no kernel threads.

    ``name`` is a shell pattern (or a part) of the name or the program's file name, ``user`` a name or a
    number, ``tree`` a process whose descendants are meant, itself included.  Raises UsageError for an
    unknown user, ProcessGone when there is no process ``tree``, EvidenceError where ``/proc`` is not mounted.
    """
    require_proc()
    candidates = {process.pid: process for process in _all()}
    chosen = set(candidates)
    if tree is not None:
        if tree not in candidates:
            _refuse(tree)
        chosen = _descendants(tree, candidates)
    if user is not None:
        uid = _uid(user)
        chosen = {pid for pid in chosen if candidates[pid].uid == uid}
    if name is not None:
        chosen = {pid for pid in chosen if matches(name, *candidates[pid].names)}
    return tuple(sorted(chosen - {os.getpid()}))


def still_there(family: Mapping[int, int], since: int) -> tuple[int, ...]:
    """Who is still there of a ``family`` (when each pid started, in clock ticks), and whom they forked since.

    A stranger that has got the number of one that ended is left out, and so are children of before ``since``.

    >>> me = os.getpid()
    >>> still_there({me: int(read_stat(me)[1][19]), 1: -1}, since=1 << 62) == (me,)
    True
    """
    candidates = {process.pid: process for process in _all()}
    living = {
        pid for pid, started in family.items() if pid in candidates and candidates[pid].started == started
    }
    recent = {pid: process for pid, process in candidates.items() if process.started >= since}
    forked = set().union(*(_descendants(pid, recent) for pid in living))
    return tuple(sorted((living | forked) - ({os.getpid()} - living)))


def matches(pattern: str, *texts: str) -> bool:
    """Whether a shell pattern fits one of ``texts``; a pattern without wildcards fits what it is a part of.

    >>> matches("lib*", "/lib/libz.so.1", "libz.so.1"), matches("ibz", "libz.so.1"), matches("z*", "libz.so")
    (True, True, False)
    """
    if any(mark in pattern for mark in "*?["):
        return any(fnmatch(text, pattern) for text in texts)
    return any(pattern in text for text in texts)


def _refuse(pid: int) -> NoReturn:
    """Raise what says why there is nothing to look at: UsageError for a kernel thread, else ProcessGone."""
    name, fields = read_stat(pid)
    if int(fields[6]) & _KERNEL_THREAD:
        found = f"a kernel thread ({printable(name)})"
        raise UsageError(
            f"--tree {pid}: {found}, which has no memory of its own, nor have those that it starts"
        )
    raise ProcessGone(
        pid, "has ended, and waits for its parent" if fields[0] == "Z" else "has no memory (any more)"
    )


def _all() -> list[_Candidate]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.append(_read(int(entry)))
            except (EvidenceError, OSError):  # it has ended meanwhile, or has no memory
                continue
    return found


def _read(pid: int) -> _Candidate:
    name, fields = read_stat(pid)
    if fields[20] == "0":  # vsize
        raise EvidenceError(f"process {pid}: has no memory")
    command = os.fsdecode(read_process_file(pid, "cmdline")).split("\0")
    names = (name, os.path.basename(command[0]))
    return _Candidate(pid, int(fields[1]), int(fields[19]), os.stat(process_file(pid, "")).st_uid, names)


def _descendants(root: int, candidates: dict[int, _Candidate]) -> set[int]:
    children: dict[int, list[int]] = {}
    for process in candidates.values():
        children.setdefault(process.parent, []).append(process.pid)
    descendants, waiting = set[int](), [root]
    while waiting:
        pid = waiting.pop()
        if pid not in descendants:
            descendants.add(pid)
            waiting += children.get(pid, [])
    return descendants


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"--user {user}: no such user") from None
