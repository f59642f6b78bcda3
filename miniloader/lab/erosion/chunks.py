"""The chunks of glibc's malloc in another process: which are in use, and which are free.

In the main arena (``[heap]``) each chunk says in its first words how long it is and whether the one before
is in use (glibc's malloc/malloc.c, ``struct malloc_chunk``), from the beginning to the last one, which ends
where the heap does.  Where that does not come out even it is another allocator's, and nothing is said of it.
A chunk that a thread keeps for its next request counts as in use, as it does for malloc.

Threads have arenas of their own, in heaps of up to 64 MiB, each of which begins at a multiple of that with a
``heap_info`` (malloc/arena.c): where the arena is, the heap before, how much is in use.  The first heap of an
arena has the arena itself, and then its chunks.  A heap that is full ends with a mark in place of a last
chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.result import ErodedObjects

__all__ = ["HEAP", "Chunks", "begins_with_chunks", "chunks_between", "chunks_of_arena", "eroded_chunks"]

_BLOCK: Final = 256  # pages that are read at once
_LEAST, _ALIGNED = 32, 16  # bytes of a chunk
_IN_USE: Final = 1  # PREV_INUSE: the chunk before
_FLAGS: Final = 7
_MOST: Final = 4_000_000  # chunks
HEAP: Final = 64 << 20  # bytes: HEAP_MAX_SIZE
_HEAP_INFOS: Final = (48, 32)  # bytes: from glibc 2.35 on, and before
_ARENAS: Final = (2200, 2112, 2192)  # bytes of a malloc_state: of glibc 2.27 on, 2.43 (no fast bins), before
_FENCE: Final = 16  # bytes: the length of a last chunk that is none, before one without a length

Chunks = tuple[NDArray[np.uint64], NDArray[np.bool_]]
"""The address of each chunk, ascending, and whether it is in use."""


def eroded_chunks(memory: PresentMemory, apart: NDArray[np.uint64]) -> tuple[ErodedObjects, ...]:
    """The chunks that begin on the pages at these ascending addresses, in use and free, those of threads'
    arenas apart; none where it is not glibc's heap.
    """
    # What the heap of a child grows by after the fork is a mapping of its own.
    heap = [vma for vma in read_maps(memory.pid) if vma.path == "[heap]"]
    start, end = (heap[0].start, heap[-1].end) if heap else (0, 0)
    inside = (apart >= start) & (apart < end)
    main = [chunks_between(memory, start, end)] if inside.any() else []
    starts = np.unique(apart[~inside] & ~np.uint64(HEAP - 1)).tolist()
    arenas = [chunks_of_arena(memory, start) for start in starts]
    return (
        *_on_pages("malloc chunk", main, apart[inside]),
        *_on_pages("malloc chunk of a thread's arena", arenas, apart[~inside]),
    )


def _on_pages(
    name: str, heaps: Iterable[Chunks | None], apart: NDArray[np.uint64]
) -> Iterator[ErodedObjects]:
    """What begins on these pages, of all heaps that are known to be malloc's."""
    known = [chunks for chunks in heaps if chunks is not None]
    if not known:
        return
    addresses, in_use = (np.concatenate(column) for column in zip(*known, strict=True))
    pages = addresses & ~np.uint64(PAGE_SIZE - 1)
    on = np.isin(pages, apart)
    for state, chosen in (("in use", on & in_use), ("free", on & ~in_use)):
        if chosen.any():
            kind = name.replace("chunk", f"chunk {state}", 1)
            yield ErodedObjects(kind, len(np.unique(pages[chosen])), int(np.count_nonzero(chosen)))


def begins_with_chunks(memory: PresentMemory) -> bool:
    """Whether the heap of a process is malloc's, as far as its first page tells."""
    if not memory.heap:
        return False
    words: list[int] = memory.words(np.array([memory.heap], np.uint64), PAGE_SIZE // 8)[0].tolist()
    return _follow(words, 1, []) >= len(words)


def chunks_of_arena(memory: PresentMemory, start: int) -> Chunks | None:
    """The chunks of a thread's arena in the heap that begins at ``start``; None where none does."""
    arena, before, size, writable = memory.words(np.array([start], np.uint64), 4)[0].tolist()
    if not 0 < size <= writable <= HEAP or size % PAGE_SIZE or writable % PAGE_SIZE or not arena:
        return None
    if not before and arena - start not in _HEAP_INFOS:
        return None
    for offset in _HEAP_INFOS if before else [arena - start + state for state in _ARENAS]:
        first = start + -(-offset // _ALIGNED) * _ALIGNED
        chunks = chunks_between(memory, first, start + size)
        if chunks is not None:
            return chunks
    return None


def chunks_between(memory: PresentMemory, start: int, end: int) -> Chunks | None:
    """The chunks from ``start`` to ``end``, the last of which is free, or has a mark behind it that says that
    no more follow; None where they are not chunks.
    """
    told, at = list[int](), start
    while at < end and len(told) < _MOST:
        base, number = at & -PAGE_SIZE, len(told)
        words, place = _words(memory, base, end), (at - base) // 8 + 1
        if place >= len(words):
            return None
        place = _follow(words, place, told)
        at = base + (place - 1) * 8
        if len(told) == number:  # what is there is no chunk: a mark, maybe, which is three words
            is_mark = words[place] & ~_FLAGS == _FENCE and words[place + 2 : place + 3] in ([0], [_IN_USE])
            return _chunks(start, told, words[place]) if is_mark and told else None
    return _chunks(start, told, 0) if at == end and told else None


def _follow(words: Sequence[int], place: int, told: list[int]) -> int:
    """Add to ``told`` the word of each chunk that says how long it is, from the one at this ``place`` on, as
    far as the ``words`` are those of chunks; the place of the next.
    """
    while place < len(words):
        word = words[place]
        size = word & ~_FLAGS
        if size < _LEAST or size % _ALIGNED:
            break
        told.append(word)
        place += size // 8
    return place


def _chunks(start: int, told: Sequence[int], following: int) -> Chunks:
    """Chunks of which such words are ``told``, and that of what follows them: 0 where the last is free."""
    words = np.array([*told, following], np.uint64)
    sizes = words[:-2] & ~np.uint64(_FLAGS)
    starts = np.uint64(start) + np.cumsum(np.append(np.uint64(0), sizes), dtype=np.uint64)
    return starts, words[1:] & np.uint64(_IN_USE) != 0


def _words(memory: PresentMemory, base: int, end: int) -> list[int]:
    """The words from ``base`` on, as far as the pages are in memory."""
    addresses = np.arange(base, min(base + _BLOCK * PAGE_SIZE, end), PAGE_SIZE, dtype=np.uint64)
    data, read = memory.pages(addresses)
    known = len(addresses) if read.all() else int(np.argmin(read))
    words: list[int] = data[:known].reshape(-1).view(np.uint64).tolist()
    return words
