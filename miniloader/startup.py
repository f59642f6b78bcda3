"""What a process of our own, a command or a worker, does before it imports anything large."""

from __future__ import annotations

import gc
import os
import sys

from miniloader.forking import importing
from miniloader.later import Later, leaving_out

__all__ = ["import_numpy", "travel_light"]

_DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")


def travel_light() -> None:
    """Leave out of start-up what nobody uses here: a fifth of it."""
    gc.set_threshold(1_000_000)  # imports make many objects and no garbage to look for
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # importing numpy starts threads, for nothing here
    for name in _DOCSTRINGS:  # and gives functions written in C their docstrings, but under `python -OO`
        sys.modules.setdefault(name, type(sys)(name))


def import_numpy() -> None:
    """Import numpy without what it takes to describe itself to :func:`help`: a tenth of it.

    For a process that runs nobody else's Python: numpy's functions have no ``__signature__`` in it.
    """
    with leaving_out("inspect", "pickle", "platform"):
        inspect: object = sys.modules["inspect"]
        if isinstance(inspect, Later):  # or somebody else uses it
            vars(inspect).update(cleandoc=str, signature=lambda _: None)
        with importing:
            import numpy  # noqa: F401 - for all who import it later
