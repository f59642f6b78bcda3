"""The exit statuses of every command: for what ends it, for its help, for its manual page."""

from __future__ import annotations

__all__ = ["CLOSED_PIPE", "EXIT_STATUSES", "INTERRUPTED"]

#: What a shell says of a program that SIGINT or SIGPIPE has ended: it said nothing false until then.
INTERRUPTED, CLOSED_PIPE = 130, 141

#: What each exit status means: the help, the manual pages.
EXIT_STATUSES: tuple[tuple[int, str], ...] = (
    (0, "done, or proven"),
    (1, "failed, or refuted; a file or a process is not there"),
    (2, "wrong usage"),
    (3, "the kernel or the permissions here cannot tell; this machine or installation lacks what is needed"),
    (INTERRUPTED, "interrupted by Ctrl-C"),
    (CLOSED_PIPE, "who read the output (head, less) has closed it"),
)
