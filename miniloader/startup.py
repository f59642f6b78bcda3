"""What a process of our own, a command or a worker, does before it imports anything large."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["travel_light"]

_DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")


def travel_light() -> None:
    """Leave out of start-up what nobody uses here: a fifth of it."""
    gc.set_threshold(1_000_000)  # imports make many objects and no garbage to look for
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # importing numpy starts threads, for nothing here
    for name in _DOCSTRINGS:  # and gives functions written in C their docstrings, but under `python -OO`
        sys.modules.setdefault(name, type(sys)(name))
