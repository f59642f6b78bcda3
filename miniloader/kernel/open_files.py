"""How many files this process may have open, getrlimit(2): also where a filter of calls forbids to ask."""

from __future__ import annotations

import resource
from contextlib import suppress

__all__ = ["allow_open_files", "most_open_files"]


def allow_open_files() -> None:
    """Have this process open as many files as it may; where that is forbidden, as many as until now."""
    with suppress(OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def most_open_files() -> int:
    """How many files this process may have open: by the kernel's list of its limits where it may not ask.

    OSError where that is not to be read, either.

    >>> most_open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    True
    """
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError:
        with open("/proc/self/limits") as rows:
            return next(int(row.split()[3]) for row in rows if row.startswith("Max open files "))
