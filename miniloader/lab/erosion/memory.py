"""The pages of one process that erosion can happen to: private ones, copied or still the file's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.procfs import read_stat
from miniloader.lab.audit.process_pages import PageColumns, Pages
from miniloader.lab.audit.survey import Survey
from miniloader.values import dataclass

__all__ = ["PrivateMemory", "memory_in", "private_memory"]


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
    known = process.known
    lineage = known.pid, known.parent, known.started, known.stack
    return _private_memory(lineage, process.copies, process.originals, process.writable)


def memory_in(pid: int, pages: Pages) -> PrivateMemory:
    """What process ``pid`` has that may erode, whose ``pages`` were read with their frames.

    Raises ProcessGone, or EvidenceError where nothing may be known of it.
    """
    _, fields = read_stat(pid)
    lineage = pid, int(fields[1]), int(fields[19]), int(fields[25])
    return _private_memory(lineage, pages.copies, pages.originals, pages.writable)


def _private_memory(
    lineage: tuple[int, int, int, int], copies: PageColumns, originals: PageColumns, writable: Sequence[int]
) -> PrivateMemory:
    pid, parent, started, stack = lineage
    rows = originals.rows(writable)
    addresses = np.concatenate([copies.addresses, originals.addresses[rows]])
    order = np.argsort(addresses, kind="stable")
    copied = np.arange(len(addresses)) < len(copies)
    exclusive = np.concatenate([copies.exclusive, originals.exclusive[rows]])
    return PrivateMemory(
        pid=pid,
        parent=parent,
        started=started,
        stack=stack,
        addresses=addresses[order],
        frames=np.concatenate([copies.frames, originals.frames_at(rows)])[order],
        copied=copied[order],
        several=~exclusive[order],
    )
