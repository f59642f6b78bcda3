"""What this process is short of, address space or mappings, and which errors that explains.

Where Python cannot map a module it may go on without it, or lose the error: what is met then is any error at
any place.  So it is the kernel that is asked, not the error.
"""

from __future__ import annotations

import errno
import os
import sys

from miniloader.errors import MEMORY_LIMITS, MiniloaderError, printable, without_room
from miniloader.forking import importing

TYPE_CHECKING = False  # typing is slow to import, and --version needs this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

__all__ = [
    "Room",
    "demand_room",
    "fault",
    "mappings_left",
    "refused",
    "shortage",
    "shortage_behind",
    "space_left",
]

#: By the rows of /proc/self/limits, which field of /proc/self/statm they limit, in pages, and who sets them.
_LIMITS: Final = (("Max address space", 0, "ulimit -v"), ("Max data size", 5, "ulimit -d"))
#: What else there may be too little of: where the kernel promises no more than it has, to all together.
_PROMISED: Final = "vm.overcommit_memory=2"
_MANY: Final = sys.maxsize
#: What a system call fails with that a filter does not allow, or that is not there.
_FORBIDDEN: Final = (errno.EPERM, errno.EACCES, errno.ENOSYS)
#: What must be left for Python to import what it needs; where there is less, much goes wrong.  Of the modules
#: but numpy the largest take 10 MiB; the rest is what unwinding has given back by then.
_MAPPINGS: Final = 16
_BYTES: Final = 64 << 20
#: What numpy takes besides its files: OpenBLAS makes buffers at once, and then there is work to be done.
_BUFFERS: Final = 32 << 20
_WORK: Final = 32 << 20
#: What hashlib takes: OpenSSL.
_OPENSSL: Final = 8 << 20, 40


def mappings_left(limit: str = "/proc/sys/vm/max_map_count", maps: str = "/proc/self/maps") -> int:
    """How many mappings more this process may have; very many where nobody tells."""
    try:
        with open(limit) as most, open(maps, "rb") as rows:
            return int(most.read()) - sum(1 for _ in rows)
    except (OSError, ValueError, MemoryError):
        return _MANY


def space_left(
    limits: str = "/proc/self/limits",
    taken: str = "/proc/self/statm",
    overcommit: str = "/proc/sys/vm/overcommit_memory",
    promised: str = "/proc/meminfo",
) -> tuple[int, str]:
    """How many bytes more this process may map, and what says so; very many where nobody does."""
    least = (_promise_left(promised), _PROMISED) if _is_strict(overcommit) else (_MANY, "")
    try:
        with open(limits) as rows, open(taken) as counts:
            pages = counts.read().split()
            for row in rows:
                for name, field, said in _LIMITS:
                    if row.startswith(name) and (most := row[len(name) :].split()[0]).isdigit():
                        size = int(most) - int(pages[field]) * os.sysconf("SC_PAGE_SIZE")
                        least = min(least, (size, said))
    except (OSError, ValueError, IndexError, MemoryError):
        pass
    return least


def _is_strict(overcommit: str) -> bool:
    """Whether memory that is mapped to be written counts for the kernel at once, touched or not."""
    try:
        with open(overcommit) as mode:
            return mode.read().strip() == "2"
    except (OSError, ValueError, MemoryError):
        return False


def _promise_left(promised: str) -> int:
    """How many bytes more the kernel promises: about, since others ask, too, and it keeps some for root."""
    try:
        with open(promised) as rows:
            sizes = {name: int(size.split()[0]) for name, _, size in (row.partition(":") for row in rows)}
        return (sizes["CommitLimit"] - sizes["Committed_AS"]) << 10
    except (OSError, ValueError, LookupError, MemoryError):
        return _MANY


def shortage(size: int = _BYTES, mappings: int = _MAPPINGS) -> str:
    """What this process has less left of than ``size`` bytes and ``mappings``, as a phrase; "" of neither.

    >>> shortage(1 << 62).endswith("(ulimit -v)") or shortage(1 << 62)
    ''
    """
    if mappings_left() < mappings:
        return "too few mappings (vm.max_map_count)"
    left, said = space_left()
    what = "memory" if said == _PROMISED else "address space"
    return f"too little {what}, {max(left, 0) >> 20} MiB are left ({said})" if left < size else ""


def shortage_behind(error: BaseException) -> str:
    """What is said of an error that a shortage explains, or what is forbidden here; "" of another one."""
    match error:
        case MemoryError():
            return f"too little memory ({MEMORY_LIMITS})"
        case SystemError() if "without" in str(error):  # "error return without exception set", and its like
            return f"too little memory ({MEMORY_LIMITS}), or a fault of Python's own: {error}"
        case ImportError() | OSError() if library := without_room(str(error)):
            return f"{library}: too little memory, or too few mappings ({MEMORY_LIMITS})"
        case OSError(errno=int(number)) if number in _FORBIDDEN:
            return refused(error)
        case Exception() if short := shortage():
            return f"{short}: {type(error).__name__}: {error}"
    return ""


def refused(error: OSError, hint: str = "") -> str:
    """What the kernel has refused, and what may be behind that, with a ``hint`` where it is a filter.

    >>> refused(FileNotFoundError(2, "No such file or directory", "x.so"))
    'x.so: No such file or directory'
    >>> refused(OSError(38, "Function not implemented", "/proc/self"))
    '/proc/self: Function not implemented: a system call is forbidden here (seccomp?)'
    """
    said = f"{printable(error.filename)}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno == errno.ENOSYS or (error.filename is None and error.errno in _FORBIDDEN):
        said += f": a system call is forbidden here (seccomp?){hint}"
    return f"{said} ({MEMORY_LIMITS})" if error.errno == errno.ENOMEM else said


def fault(error: BaseException, hint: str = "") -> str:
    """What is said of an error that nobody raised on purpose: the shortage behind it, else whose fault it is.

    >>> fault(KeyError("x"), "; and what to do")
    "a fault of miniloader's own, KeyError: 'x'; and what to do"
    >>> fault(PermissionError(1, "Operation not permitted"))
    'Operation not permitted: a system call is forbidden here (seccomp?)'
    """
    own = f"a fault of miniloader's own, {type(error).__name__}: {error}{hint}"
    return shortage_behind(error) or own


# --------------------------------------------------------------------------------- before it is met
class Room:
    """Refuses, on :data:`sys.meta_path`, to import what there is no room for and what fails badly then.

    OpenBLAS ends the process, or crashes it; hashlib prints a traceback for each algorithm that it lacks.
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """Nothing, since others find modules; MiniloaderError where there is no room for this one."""
        if name == "hashlib":
            size, mappings = _OPENSSL
        elif name == "numpy" and space_left()[0] != _MANY:
            size, mappings = _of_numpy() + _WORK, _MAPPINGS
        else:
            return
        if short := shortage(size, mappings):
            raise MiniloaderError(
                f"{name}: {short}", hint=f"{size >> 20} MiB and {mappings} mappings are needed"
            )


def demand_room() -> None:
    """Have this process not begin to import what there is no room for (:class:`Room`)."""
    if not any(isinstance(finder, Room) for finder in sys.meta_path):
        sys.meta_path.insert(0, Room())


def _of_numpy() -> int:
    """Bytes that numpy takes as it is imported: those of its libraries, and buffers of OpenBLAS."""
    with importing:
        from importlib.machinery import PathFinder
    spec = PathFinder.find_spec("numpy")
    if spec is None or not spec.origin:
        return 0
    directory = os.path.dirname(spec.origin)
    size = 0
    for place in (f"{directory}.libs", f"{directory}/_core", f"{directory}/core"):
        try:
            files = list(os.scandir(place))
        except OSError:
            continue
        for file in files:
            if ".so" in file.name and "test" not in file.name:
                size += file.stat().st_size + (_BUFFERS if "openblas" in file.name else 0)
    return size
