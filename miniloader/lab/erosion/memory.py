"""The pages of one process that erosion can happen to: private ones, copied or still the file's own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miniloader.lab.audit.survey import Survey
from miniloader.values import dataclass

__all__ = ["PrivateMemory", "private_memory"]


@dataclass(frozen=True, eq=False)
class PrivateMemory:
    """The present pages in private memory of one process, a row each, by ascending address.

    ``copied``: an anonymous page; else one of a file, in a mapping that may be written to.  ``several``: its
    frame is mapped more than once.  ``started`` and ``pid`` give the order in which relatives were forked;
    ``stack`` is where the program's stack began, the same for all who were forked and did not execute another
    program.
    """

    pid: int
    parent: int
    started: int
    stack: int
    addresses: NDArray[np.uint64]
    frames: NDArray[np.uint64]
    copied: NDArray[np.bool_]
    several: NDArray[np.bool_]


def private_memory(process: Survey) -> PrivateMemory:
    """What ``process`` has that may erode; its frames must be known (level ``frames``)."""
    copies, originals, rows = process.copies, process.originals, process.writable
    addresses = np.concatenate([copies.addresses, originals.addresses[rows]])
    order = np.argsort(addresses, kind="stable")
    copied = np.arange(len(addresses)) < len(copies.addresses)
    exclusive = np.concatenate([copies.exclusive, originals.exclusive[rows]])
    return PrivateMemory(
        pid=process.pid,
        parent=process.parent,
        started=process.started,
        stack=process.stack,
        addresses=addresses[order],
        frames=np.concatenate([copies.frames, originals.frames[rows]])[order],
        copied=copied[order],
        several=~exclusive[order],
    )
