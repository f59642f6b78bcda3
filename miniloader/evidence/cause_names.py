"""What the causes of private pages are called; a set of them is a number, with a bit for each."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ["CAUSES", "Cause", "bit", "cause_names"]

Cause = Literal["relocation", "overwritten", "loader", "bss", "write", "identical", "unknown"]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)
"""Every cause; cause ``CAUSES[i]`` is bit ``i`` of a set."""


def bit(cause: Cause) -> int:
    """The bit that stands for ``cause`` in a set of causes.

    >>> bit("relocation") | bit("write")
    17
    """
    return 1 << CAUSES.index(cause)


def cause_names(causes: int) -> tuple[Cause, ...]:
    """The causes in the set ``causes``, in the order of CAUSES.

    >>> cause_names(17)
    ('relocation', 'write')
    """
    return tuple(cause for index, cause in enumerate(CAUSES) if causes >> index & 1)
