"""What can go wrong, as a tree.

::

    MiniloaderError            1  anything miniloader raises on purpose
    ├── ElfError               1  the file is at fault: field, found, expected
    ├── LoadError              1  the file is well formed, yet it cannot be loaded here
    │   ├── SymbolError        1  a symbol (or its version) is not where it should be
    │   └── UnsupportedError   3  nothing is loaded on this processor, or beside this C library
    ├── WorkerError            1  a process we started died, or did not answer
    ├── UsageError             2  the request itself makes no sense
    └── EvidenceError          3  the kernel, or our permissions, cannot tell
        └── ProcessGone        1  the process that was asked about has ended, or never was

The number is the exit status of the command line.  A message is one line and reads
``where: what, found, expected; what to do next``; names taken from a file are quoted so that
control characters in them stay inert.
"""

from __future__ import annotations

import os
import sys

from miniloader.forking import importing

TYPE_CHECKING = False  # typing is slow to import, and --version needs this module
if TYPE_CHECKING:
    from typing import ClassVar, Final

__all__ = [
    "MEMORY_LIMITS",
    "NO_ROOM",
    "PROCESS_LIMITS",
    "ElfError",
    "EvidenceError",
    "LoadError",
    "MiniloaderError",
    "ProcessGone",
    "SymbolError",
    "UnsupportedError",
    "UsageError",
    "WorkerError",
    "printable",
    "shortened",
    "tell",
    "without_room",
]

MEMORY_LIMITS: Final = "ulimit -v, a control group, vm.overcommit_memory, vm.max_map_count"
"""What may be behind a system call that fails for lack of memory, or of mappings (ENOMEM)."""
PROCESS_LIMITS: Final = "ulimit -u, pids.max of a control group"
"""What may be behind a process that cannot be started (EAGAIN)."""
NO_ROOM: Final = f"too little memory, or too few mappings: {MEMORY_LIMITS}"
"""What to say then."""


_LONGEST = 4096  # characters: PATH_MAX; mangled names of C++ templates come near


def shortened(text: str, most: int = _LONGEST) -> str:
    """``text``, or of one longer than ``most`` characters its two ends, and how much is left out between.

    >>> shortened("x" * 100 + "y" * 100, 8)
    'xxxxxx[192 characters]yy'
    """
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end]}[{len(text) - most:,} characters]{text[-end:]}"


def printable(text: object) -> str:
    """``text`` on one line, with every character that a terminal could act on escaped; :func:`shortened`."""
    plain = shortened(os.fsdecode(text) if isinstance(text, (bytes, os.PathLike)) else str(text))
    return plain if plain.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


def tell(text: str) -> None:
    """Print a line on standard error; nothing where that is closed, full, or has lost its reader.

    ``print`` takes standard output where ``sys.stderr`` is None.
    """
    if sys.stderr is not None:
        try:  # noqa: SIM105 - contextlib is slow to import
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody hears of it
            pass


class MiniloaderError(Exception):
    """Base of everything miniloader raises on purpose; ``str()`` is one printable line.

    ``ld_so`` is what ld.so says in the same case, for programs that read dlerror(3), where that is known.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, ld_so: str | None = None) -> None:
        self.message = printable(message)
        self.ld_so = ld_so
        self.hint = printable(hint) if hint is not None else None
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ElfError(MiniloaderError):
    """A fault of the file itself.

    ``path`` names the file, ``field`` the gABI field (``e_phnum``, ``PT_LOAD[1].p_align``),
    ``found`` and ``expected`` say what is wrong with it.
    """

    def __init__(
        self, path: str | None, field: str, found: str, expected: str, *, hint: str | None = None
    ) -> None:
        self.path, self.field, self.found, self.expected = path, field, found, expected
        where = f"{path}: " if path is not None else ""
        super().__init__(f"{where}{field}: found {found}, expected {expected}", hint=hint)


class LoadError(MiniloaderError):
    """The file is well formed, yet it cannot be loaded in this process."""


class SymbolError(LoadError, AttributeError, LookupError):
    """A symbol, or the version of it that is asked for, is not defined where it should be.

    Python's own names for that are among its bases, since ``library.name`` and ``library["name"]`` raise it.
    """


class UnsupportedError(LoadError):
    """No library can be loaded on this processor, or beside this C library, whatever the file."""

    exit_status = 3


class WorkerError(MiniloaderError):
    """A process that miniloader started died, or stopped answering."""


class UsageError(MiniloaderError):
    """The request itself makes no sense (a wrong signature, an impossible number)."""

    exit_status = 2


class EvidenceError(MiniloaderError):
    """The kernel, or the permissions of this process, cannot tell."""

    exit_status = 3


class ProcessGone(EvidenceError):
    """The process that was asked about has ended (or runs another program now); ``pid`` says which."""

    exit_status = 1

    def __init__(self, pid: int | None, what: str, *, hint: str | None = None) -> None:
        self.pid = pid
        super().__init__(f"process {'self' if pid is None else pid}: {what}", hint=hint)


def without_room(said: str) -> str:
    """The library that ld.so says it could not map for lack of memory, or of mappings; "" where it says else.

    >>> without_room("Original error was: libz.so.1: failed to map segment from shared object")
    'libz.so.1'
    >>> without_room("libz.so: cannot apply additional memory protection after relocation")
    'libz.so'
    """
    with importing:
        import re

    failures = "failed to map segment from|cannot (?:map zero-fill|change memory|create|allocate|apply)"
    found = re.search(rf"(\S+): (?:{failures})(?!.*(?:not permitted|denied))", said)
    return found[1] if found is not None else ""
