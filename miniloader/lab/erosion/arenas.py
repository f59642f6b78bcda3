"""What glibc's malloc holds free in the arenas of threads: memory that one arena for all would use again.

Each thread has an arena of its own, up to eight for each processor (glibc's malloc/arena.c), and what one
thread has freed is given to no other.  ``MALLOC_ARENA_MAX=1`` has all use one, and wait for each other.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.process_pages import PageColumns
from miniloader.lab.erosion.chunks import HEAP, Chunks, chunks_of_arena
from miniloader.lab.erosion.present_memory import PresentMemory

__all__ = ["free_in_arenas"]

_MOST: Final = 256 << 20  # bytes that are read of one process
_HEAD: Final = np.uint64(32)  # bytes of a free chunk that malloc has there: sizes, and what leads to others


def free_in_arenas(pid: int, copies: PageColumns) -> int | None:
    """How many bytes of its own memory ``pid`` has in free chunks of threads' arenas.

    ``copies`` are its anonymous pages.  None where it may not be read, or has too much of it to be read.
    """
    heaps = np.flatnonzero((copies.begins % np.uint64(HEAP) == 0) & (np.diff(copies.starts) > 0)).tolist()
    if not heaps:
        return 0
    addresses = copies.addresses_in(heaps)
    if len(addresses) * PAGE_SIZE > _MOST:
        return None
    own = addresses[copies.exclusive[copies.rows(heaps)]]
    starts = addresses[addresses % np.uint64(HEAP) == 0].tolist()
    try:
        with PresentMemory(pid, addresses) as memory:
            arenas = [chunks_of_arena(memory, start) for start in starts]
    except EvidenceError:
        return None
    return sum(_free(chunks, own) for chunks in arenas if chunks is not None)


def _free(chunks: Chunks, own: NDArray[np.uint64]) -> int:
    """The bytes of ``own`` pages in free ``chunks``, but for what malloc itself has there.

    >>> starts = np.array([0, 4096, 8192 + 1024], np.uint64)
    >>> _free((starts, np.array([True, False, True])), np.array([4096, 8192], np.uint64))
    5088
    """
    starts, in_use = chunks
    ends = np.append(starts[1:], (starts[:1] & ~np.uint64(HEAP - 1)) + np.uint64(HEAP))
    first, last = starts[~in_use] + _HEAD, ends[~in_use]
    return int((_below(last, own) - _below(np.minimum(first, last), own)).sum())


def _below(addresses: NDArray[np.uint64], own: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many bytes of ``own`` pages lie below each address."""
    begun = np.searchsorted(own, addresses, side="right")
    pages = np.append(np.uint64(0), own)[begun]  # the last that has begun
    of_last = np.minimum(addresses - pages, np.uint64(PAGE_SIZE)).astype(np.int64)
    return np.asarray(np.where(begun > 0, (begun - 1) * PAGE_SIZE + of_last, 0), np.int64)
