"""Where text for people goes."""

from __future__ import annotations

from rich.console import Console

__all__ = ["console"]


def console(*, stderr: bool = False) -> Console:
    """Standard output (or error) for people.

    rich takes the width from the terminal, writes plain text into pipes, and honours ``NO_COLOR``,
    ``TERM`` and ``COLUMNS``.  Strings are shown as they are: markup and emoji codes are off, since names
    such as ``[heap]`` come from outside.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
