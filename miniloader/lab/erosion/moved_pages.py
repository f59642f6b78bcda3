"""Pages that the kernel moves to other frames while several page tables are read, one after another.

Compaction, and balancing between nodes, give a page that relatives share another frame, for all of them at
once.  Whose page table was read before then has the old frame, whose was read after it the new one: that
looks as if the page were two.  So what is two frames counts only if it is when both are read anew.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.pagemap import FRAME, PRESENT, PageMap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.pairs import Pair

__all__ = ["frames_at", "without_moved"]

_NEAR: Final = 512  # to read that many entries of a page table too many costs less than another call
_MOST_ROUNDS: Final = 8  # to read what moves again each time


def frames_at(pagemap: PageMap, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The frames of the pages at these ascending addresses now; 0 for what is not in memory.

    Raises ProcessGone, or EvidenceError.
    """
    frames = np.empty(len(addresses), np.uint64)
    edges = np.flatnonzero(np.diff(addresses) > np.uint64(_NEAR * PAGE_SIZE)) + 1
    for first, last in pairwise([0, *edges.tolist(), len(addresses)] if len(addresses) else []):
        start = int(addresses[first])
        entries = pagemap.read(start, int(addresses[last - 1]) + PAGE_SIZE)
        entries = entries[(addresses[first:last] - np.uint64(start)) // np.uint64(PAGE_SIZE)]
        frames[first:last] = np.where(entries & PRESENT, entries & FRAME, np.uint64(0))
    return frames


def without_moved(pair: Pair) -> Pair:
    """``pair``, where the pages that were moved between two reads are one frame for both, as they are.

    A page that is in memory no more, or of a process that has ended, stays what it was when it was seen.
    """
    with suppress(EvidenceError), ExitStack() as stack:
        maps = [stack.enter_context(PageMap(pid)) for pid in (pair.pid, pair.relative)]
        rows, latest = np.arange(len(pair.apart)), [frames.copy() for frames in pair.frames]
        common = np.zeros(len(rows), np.bool_)
        for _ in range(_MOST_ROUNDS):
            frames = [frames_at(pagemap, pair.apart[rows]) for pagemap in maps]
            common[rows] = (frames[0] == frames[1]) & (frames[0] != 0)
            # Neither has changed since it was read before the other was: they have been two all the while.
            stable = (frames[0] == latest[0][rows]) & (frames[1] == latest[1][rows])
            for column, numbers in zip(latest, frames, strict=True):
                column[rows] = np.where(numbers, numbers, column[rows])
            rows = rows[~stable & ~common[rows]]
            if not len(rows):
                break
        return _with_one_frame(pair, common, (latest[0], latest[1]))
    return pair


def _with_one_frame(
    pair: Pair, common: NDArray[np.bool_], frames: tuple[NDArray[np.uint64], NDArray[np.uint64]]
) -> Pair:
    moved = pair.apart[common]
    return replace(
        pair,
        together=np.union1d(pair.together, moved),
        apart=pair.apart[~common],
        proven=np.setdiff1d(pair.proven, moved, assume_unique=True),
        frames=(frames[0][~common], frames[1][~common]),
        several=pair.several[~common],
    )
