"""Opening files under ``/proc/PID``, with every refusal turned into a sentence.

All of :mod:`miniloader.kernel` goes through here, so that a process that ended, a process of somebody
else and a ``/proc`` that is not there read the same wherever they are met.  Sources: proc(5), and
``ptrace_may_access`` (ptrace(2), "Ptrace access mode checking") for who may read what.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from miniloader.errors import EvidenceError, ProcessGone

__all__ = [
    "NO_MEMORY",
    "open_process_file",
    "process_file",
    "read_command",
    "read_owner",
    "read_proc_file",
    "read_process_file",
    "read_stat",
    "refusal",
    "require_proc",
]

NO_MEMORY: Final = "has no memory (it has ended or executed another program, or is a kernel thread)"

_PTRACE: Final = "be its owner, or have CAP_SYS_PTRACE"
# What one must be to read another process's file; all need ptrace read access, those with mode 0400 also
# pass the permission check of the file itself.
_NEEDS: Final = {
    "maps": _PTRACE,
    "smaps": _PTRACE,
    "smaps_rollup": _PTRACE,
    "pagemap": (
        "be its owner (and dumpable, PR_SET_DUMPABLE), or have CAP_SYS_PTRACE, CAP_SYS_ADMIN"
        " and CAP_DAC_READ_SEARCH together"
    ),
}
_CHUNK: Final = 1 << 16  # bytes
_STARTED: Final = 19  # which of the fields of stat
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM})


def process_file(pid: int | None, name: str) -> str:
    """The path of ``name`` of process ``pid``; None and our own pid mean ``/proc/self``.

    ``self`` is right even where ``/proc`` belongs to another pid namespace than ours.
    """
    if pid in _living and name.partition("/")[0] in _OF_MEMORY:
        pid = _thread_for(pid)
    return f"/proc/{'self' if pid is None or pid == os.getpid() else pid}/{name}"


#: What is of the memory, which a process has as long as any thread of it: those of the first tell it no more
#: when that has ended (pthread_exit(3) in main), and the process itself goes on.
_OF_MEMORY: Final = frozenset(
    "auxv cmdline cwd environ exe maps map_files mem pagemap root smaps smaps_rollup".split()
)
_living: Final[dict[int | None, int]] = {}  # of such processes a thread that lived


def _thread_for(pid: int | None) -> int | None:
    """A thread that lives of process ``pid``, whose first one has ended; else ``pid`` itself."""
    if pid is None or pid == os.getpid():
        return pid
    known = _living.pop(pid, None)
    try:
        threads = [str(known)] if known else []
        for thread in [*threads, *os.listdir(f"/proc/{pid}/task")]:
            if thread != str(pid) and not _has_ended(f"/proc/{pid}/task/{thread}/stat"):
                _living[pid] = int(thread)
                return int(thread)
            if thread == str(pid) and not _has_ended(f"/proc/{pid}/stat"):
                break
    except OSError:
        pass
    return pid


def _has_ended(stat: str) -> bool:
    return _state(stat) in b"ZX"


def _state(stat: str) -> bytes:
    """The letter of a process's or a thread's state; none where it is not there any more."""
    try:
        with open(stat, "rb") as file:
            return file.read().rpartition(b") ")[2][:1]
    except OSError:
        return b""


def require_proc() -> None:
    """Raise EvidenceError where ``/proc`` is not mounted: then nobody can say what there is."""
    if not os.path.exists("/proc/self"):
        raise EvidenceError("/proc: not mounted here", hint="mount it: mount -t proc proc /proc")


def _lives(pid: int | None) -> bool:
    """Whether there is such a process, asked without ``/proc``."""
    try:
        os.kill(pid or os.getpid(), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):  # no such process; no such number
        return False
    return True


def _is_zombie(pid: int | None) -> bool:
    """Whether it has ended and waits for its parent: the state in ``stat``, which everybody may read."""
    return _state(process_file(pid, "stat")) == b"Z"


def _is_not_dumpable(pid: int | None) -> bool:
    """Whether it is a process of this user (its real user), whose memory the kernel shows to root alone.

    Its files below ``/proc/PID`` belong to root then (PR_SET_DUMPABLE, prctl(2)).
    """
    try:
        with open(process_file(pid, "status"), "rb") as file:
            users = next(line.split() for line in file if line.startswith(b"Uid:"))
        return int(users[1]) == os.getuid() != os.stat(process_file(pid, "stat")).st_uid
    except (OSError, StopIteration):
        return False


def refusal(pid: int | None, name: str, error: OSError) -> EvidenceError:
    """Why ``/proc/PID/name`` cannot be read, and what would be needed; to be raised."""
    path = process_file(pid, name)
    if error.errno == errno.ESRCH:
        return ProcessGone(pid, NO_MEMORY)
    if error.errno == errno.ENOENT:
        try:
            require_proc()
        except EvidenceError as absent:
            return absent
        if os.path.exists(process_file(pid, "")):
            return EvidenceError(f"{path}: this kernel has no such file")
        if _lives(pid):
            return EvidenceError(f"{path}: /proc hides process {pid} (hidepid, or another pid namespace)")
        return ProcessGone(pid, "there is none (any more)")
    if error.errno in _DENIED:
        if _is_zombie(pid):  # it belongs to nobody any more: denied to its owner, empty for root
            return ProcessGone(pid, NO_MEMORY)
        if _is_not_dumpable(pid):
            hint = "it has run a set-user-ID program or one that its user may not read, or called prctl(2)"
            return EvidenceError(
                f"{path}: {error.strerror}: a process of this user, yet not dumpable", hint=hint
            )
        return EvidenceError(f"{path}: {error.strerror}", hint=f"to read it: {_NEEDS.get(name, _PTRACE)}")
    return EvidenceError(f"{path}: {error.strerror}")


def open_process_file(pid: int | None, name: str) -> int:
    """A descriptor for reading ``/proc/PID/name``; raises what :func:`refusal` makes of a failure."""
    try:
        return os.open(process_file(pid, name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if pid not in _living and _thread_for(pid) != pid:
            return open_process_file(pid, name)
        raise refusal(pid, name, error) from error


def read_stat(pid: int) -> tuple[str, list[str]]:
    """The name of process ``pid``, and the fields of its ``stat`` from ``state`` on (proc_pid_stat(5)).

    Where its first thread has ended and another lives, they are that one's, but for when it started.
    """
    name, fields = _parsed_stat(read_process_file(pid, "stat"))
    if fields[0] == "Z" and (thread := _thread_for(pid)) != pid:
        _, others = _parsed_stat(read_process_file(thread, "stat"))
        others[_STARTED] = fields[_STARTED]
        return name, others
    return name, fields


def _parsed_stat(text: bytes) -> tuple[str, list[str]]:
    before, _, after = os.fsdecode(text).rpartition(") ")
    return before.partition("(")[2], after.split()


def read_command(pid: int) -> tuple[str, ...]:
    """The command line of process ``pid``: its arguments; a process may have written anything there.

    Raises ProcessGone also where it has none, having no memory.
    """
    return tuple(os.fsdecode(read_process_file(pid, "cmdline").rstrip(b"\0")).split("\0"))


def read_owner(pid: int) -> int:
    """The user (by number) that process ``pid`` acts as: its effective one.

    The directory is always that user's, also where the files in it are root's, as those of a process that is
    not dumpable are (``task_dump_owner``, fs/proc/base.c).
    """
    try:
        return os.stat(process_file(pid, "")).st_uid
    except OSError as error:
        raise refusal(pid, "", error) from error


def read_process_file(pid: int | None, name: str) -> bytes:
    """All of ``/proc/PID/name``; raises what :func:`refusal` makes of a failure.

    Nothing at all means that the process has no memory: it is a zombie, or a kernel thread.
    """
    fd = open_process_file(pid, name)
    try:
        text = _whole(fd)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise refusal(pid, name, error) from error
        text = b""
    finally:
        os.close(fd)
    if text:
        return text
    if pid not in _living and name in _OF_MEMORY and _thread_for(pid) != pid:
        return read_process_file(pid, name)
    raise ProcessGone(pid, NO_MEMORY)


def read_proc_file(path: str) -> bytes:
    """All of a file below ``/proc`` that is of no other process (there may be nothing in it).

    Raises EvidenceError: without it nobody can tell what ``path`` would have said.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _whole(fd)
        finally:
            os.close(fd)
    except OSError as error:
        require_proc()
        raise EvidenceError(f"{path}: {error.strerror}") from error


def _whole(fd: int) -> bytes:
    """Read to the end; the kernel gives what fits its own buffer (a page or a few) at a time."""
    parts = list[bytes]()
    while part := os.read(fd, _CHUNK):
        parts.append(part)
    return b"".join(parts)
