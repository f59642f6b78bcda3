"""Which processes: by name, command line, user, control group, unit, container, or descent."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from typing import Final, NoReturn

from miniloader.errors import EvidenceError, ProcessGone, UsageError, printable
from miniloader.kernel.control_groups import ControlGroups, read_control_groups
from miniloader.kernel.procfs import read_command, read_owner, read_stat, require_proc
from miniloader.values import dataclass
from miniloader.whole_numbers import whole_number

__all__ = ["CRITERIA", "choose", "matches", "still_there"]

_KERNEL_THREAD: Final = 0x200000  # PF_KTHREAD, include/linux/sched.h
_IDENTIFIER: Final = 32  # digits at least of a container's identifier; shorter is a name


@dataclass(frozen=True)
class _Candidate:
    """A process that may be chosen: parent, start (in clock ticks), name; the rest is read when asked for."""

    pid: int
    parent: int
    started: int
    name: str

    @property
    def command(self) -> tuple[str, ...]:
        return read_command(self.pid)

    @property
    def groups(self) -> ControlGroups:
        return read_control_groups(self.pid)


def _fits_name(process: _Candidate, pattern: str) -> bool:
    return matches(pattern, process.name) or matches(pattern, os.path.basename(process.command[0]))


def _fits_command(process: _Candidate, pattern: str) -> bool:
    return matches(pattern, " ".join(process.command))


def _fits_user(process: _Candidate, user: str) -> bool:
    return read_owner(process.pid) == _uid(user)


def _fits_cgroup(process: _Candidate, pattern: str) -> bool:
    return any(matches(pattern, path, path.removeprefix("/")) for path in process.groups.paths)


def _fits_unit(process: _Candidate, pattern: str) -> bool:
    units = process.groups.units
    return any(fnmatch(text, pattern) for unit in units for text in (unit, unit.rpartition(".")[0]))


def _fits_container(process: _Candidate, container: str) -> bool:
    return bool(_meant(process, container))


def _meant(process: _Candidate, container: str) -> set[str]:
    """Which containers that a process is in are called so: a name whole, an identifier by its beginning."""
    identifiers = process.groups.containers
    return {
        name
        for name in identifiers
        if name == container or (len(name) >= _IDENTIFIER and name.startswith(container))
    }


#: How a process may be asked for, each with whether a process fits a text.
CRITERIA: Final[Mapping[str, Callable[[_Candidate, str], bool]]] = {
    "name": _fits_name,
    "command": _fits_command,
    "user": _fits_user,
    "cgroup": _fits_cgroup,
    "unit": _fits_unit,
    "container": _fits_container,
}


def choose(*, tree: int | None = None, **criteria: str | None) -> tuple[int, ...]:
    """The processes that fit all that is asked for, by pid; never this one, no kernel threads.

    ``tree`` is a process whose descendants are meant, itself included; the other words are those of CRITERIA:

    - ``name``: a shell pattern (or a part) of the name or of the program's file name
    - ``command``: one of the command line, its arguments joined by spaces
    - ``user``: a user's name or number
    - ``cgroup``: a pattern (or a part) of the path of one of its control groups, with its first "/" or not
    - ``unit``: a unit of systemd, with its ending or without, or a pattern: ``nginx``, ``app-*.scope``
    - ``container``: how a container's identifier begins, or its name where the control group has that

    Raises UsageError for an unknown user, or where ``container`` fits several containers; ProcessGone when
    there is no process ``tree``, EvidenceError where ``/proc`` is not mounted.

    >>> os.getpid() in choose(), choose(user="0", name="no process is called so")
    (False, ())
    """
    require_proc()
    candidates = {process.pid: process for process in _all()}
    chosen = set(candidates)
    if tree is not None:
        if tree not in candidates:
            _refuse(tree)
        chosen = _descendants(tree, candidates)
    for criterion, text in criteria.items():
        if text is not None:
            _refuse_unknown(criterion, text)
            chosen = {pid for pid in chosen if _fits(CRITERIA[criterion], candidates[pid], text)}
    if criteria.get("container") is not None:
        _refuse_several(str(criteria["container"]), (candidates[pid] for pid in chosen))
    return tuple(sorted(chosen - {os.getpid()}))


def _refuse_unknown(criterion: str, text: str) -> None:
    """Raise UsageError for what can fit nobody, whoever there is."""
    if criterion == "user":
        _uid(text)
    if not text:
        raise UsageError(
            f"--{criterion} '': an empty text fits every process", hint="for that there is --all"
        )


def _fits(fits: Callable[[_Candidate, str], bool], process: _Candidate, text: str) -> bool:
    try:
        return fits(process, text)
    except EvidenceError:  # it has ended meanwhile, or there are no control groups
        return False


def _refuse_several(container: str, processes: Iterable[_Candidate]) -> None:
    """Raise UsageError where the beginning of an identifier is that of several containers."""
    identifiers = set[str]()
    for process in processes:
        try:
            identifiers |= _meant(process, container)
        except EvidenceError:  # it has ended meanwhile
            continue
    if len(identifiers) > 1:
        listed = ", ".join(sorted(identifiers))
        raise UsageError(f"--container {container}: {len(identifiers)} begin so: {listed}")


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
    """Whether a shell pattern fits, or is, one of ``texts``; one without wildcards fits what it is part of.

    >>> matches("lib*", "/lib/libz.so.1", "libz.so.1"), matches("ibz", "libz.so.1"), matches("z*", "libz.so")
    (True, True, False)
    >>> matches("lib[1].so", "lib[1].so")
    True
    """
    if pattern in texts:
        return True
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
    return _Candidate(pid, int(fields[1]), int(fields[19]), name)


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
    number = whole_number(user)
    if number is not None:
        return number
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"--user {user}: no such user") from None
