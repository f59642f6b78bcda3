"""The chunks of glibc's malloc in the heap of another process: which are in use, and which are free.

In the main arena (``[heap]``) each chunk says in its first words how long it is and whether the one before
is in use (glibc's malloc/malloc.c, ``struct malloc_chunk``), from the beginning to the last one, which ends
where the heap does.  Where that does not come out even it is another allocator's, and nothing is said of it.
A chunk that a thread keeps for its next request counts as in use, as it does for malloc.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.result import ErodedObjects

__all__ = ["chunks_between", "eroded_chunks"]

_BLOCK: Final = 256  # pages that are read at once
_LEAST, _ALIGNED = 32, 16  # bytes of a chunk
_IN_USE: Final = 1  # PREV_INUSE: the chunk before
_FLAGS: Final = 7
_MOST: Final = 4_000_000  # chunks

Chunks = tuple[NDArray[np.uint64], NDArray[np.bool_]]
"""The address of each chunk, ascending, and whether it is in use."""


def eroded_chunks(memory: PresentMemory, apart: NDArray[np.uint64]) -> tuple[ErodedObjects, ...]:
    """The chunks that begin on the pages at these ascending addresses, in use and free; none where it is not
    glibc's heap.
    """
    heap = next((vma for vma in read_maps(memory.pid) if vma.path == "[heap]"), None)
    inside = apart[(apart >= heap.start) & (apart < heap.end)] if heap is not None else apart[:0]
    chunks = chunks_between(memory, heap.start, heap.end) if heap is not None and len(inside) else None
    if chunks is None:
        return ()
    addresses, in_use = chunks
    pages = addresses & ~np.uint64(PAGE_SIZE - 1)
    on = np.isin(pages, inside)
    kinds = (("malloc chunk in use", on & in_use), ("malloc chunk free", on & ~in_use))
    return tuple(
        ErodedObjects(name, len(np.unique(pages[chosen])), int(np.count_nonzero(chosen)))
        for name, chosen in kinds
        if chosen.any()
    )


def chunks_between(memory: PresentMemory, start: int, end: int) -> Chunks | None:
    """The chunks from ``start`` to ``end``, the last of which is free; None where they are not chunks."""
    starts, used = list[int](), list[bool]()
    at, words, base = start, list[int](), start
    while at < end and len(starts) < _MOST:
        place = (at - base) // 8 + 1
        if not 0 <= place < len(words):
            base = at & -PAGE_SIZE
            words, place = _words(memory, base, end), (at - base) // 8 + 1
            if place >= len(words):
                return None
        size = words[place] & ~_FLAGS
        if size < _LEAST or size % _ALIGNED or size > end - at:
            return None
        if starts:
            used.append(bool(words[place] & _IN_USE))
        starts.append(at)
        at += size
    if at != end or not starts:
        return None
    used.append(False)  # what is left of the heap
    return np.array(starts, np.uint64), np.array(used, np.bool_)


def _words(memory: PresentMemory, base: int, end: int) -> list[int]:
    """The words from ``base`` on, as far as the pages are in memory."""
    addresses = np.arange(base, min(base + _BLOCK * PAGE_SIZE, end), PAGE_SIZE, dtype=np.uint64)
    data, read = memory.pages(addresses)
    known = len(addresses) if read.all() else int(np.argmin(read))
    words: list[int] = data[:known].reshape(-1).view(np.uint64).tolist()
    return words
