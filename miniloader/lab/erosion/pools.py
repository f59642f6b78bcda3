"""The pools of CPython's own allocator in another process, and glibc's chunks: where a block begins.

A pool is 16 KiB since 3.10, and says at its beginning how long its blocks are (Objects/obmalloc.c); it says
so several times, so that what is no pool is told from one.  malloc writes the length in front of a chunk
(glibc's malloc/malloc.c).
"""

from __future__ import annotations

from dataclasses import field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.forking import cached_property
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.chunks import begins_with_chunks
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.values import dataclass

__all__ = ["BEFORE", "DEBUGGED", "POOL", "Pools", "is_chunk", "pools_in"]

POOL: Final = 16 << 10
"""Bytes of a pool."""
_HEAD: Final = 48
_ALIGNED: Final = 16
_CLASSES: Final = 32  # of sizes: 16, 32, … 512 bytes
_SMALL: Final = _ALIGNED * _CLASSES
_LARGEST: Final = 1 << 40  # bytes of a chunk
BEFORE: Final = 5
"""How many words before a page are looked at: as many as may stand before an object, and a length."""
#: What is in front of a block that PYTHONMALLOC=debug has given: ``o`` for objects, and forbidden bytes.
DEBUGGED: Final = np.uint64(0xFDFDFDFDFDFDFD6F)
_FEWEST: Final = 16  # an arena has 64, and the interpreter alone needs more than one


@dataclass(frozen=True, eq=False)
class Pools:
    """The pools of a process, a row each by ascending address: ``starts``, the ``sizes`` of their blocks, and
    the ``ends`` of what has been in use, in bytes from the start.  ``files`` has where data of files begins
    and ends, in turn: no pool is there.  Chunks of objects have more bytes than ``chunks_above``: what is
    smaller comes from pools, where there are any (``PYTHONMALLOC=malloc``: there are none); none has
    where malloc is not glibc's.  ``usual``: the objects are in pools, and nothing of a debugging allocator is
    in front of them.  ``memory`` is where all that is (None: what is around pages is not known).
    """

    starts: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    ends: NDArray[np.int64]
    files: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    chunks_above: int = _SMALL
    usual: bool = True
    memory: PresentMemory | None = None

    def of(self, addresses: NDArray[np.uint64]) -> NDArray[np.intp]:
        """The row of the pool that each address lies in; -1 where it lies in none."""
        if not len(self.starts):
            return np.full(len(addresses), -1)
        starts = addresses & ~np.uint64(POOL - 1)
        rows = np.minimum(np.searchsorted(self.starts, starts), len(self.starts) - 1)
        return np.where(self.starts[rows] == starts, rows, -1)

    def around(self, addresses: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Of each page, a row: the size and the end of its pool (0: it is in none), and its place there; how
        far its mapping goes on (:meth:`spaces`), and what is before it (:meth:`before`).
        """
        rows, columns = self.of(addresses), np.zeros((len(addresses), 4 + BEFORE), np.int64)
        inside = np.flatnonzero(rows >= 0)
        columns[inside, 0], columns[inside, 1] = self.sizes[rows[inside]], self.ends[rows[inside]]
        columns[:, 2] = addresses & np.uint64(POOL - 1)
        columns[:, 3] = self.spaces(addresses)
        columns[:, 4:] = self.before(addresses, words).view(np.int64)
        return columns

    def before(self, addresses: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The last words before each of the pages at these ascending addresses, whose own are ``words``.

        A chunk of malloc begins where it comes to be, and its length may be on the page before.  Zeroes where
        that is not in memory, and in pools, which begin with a page.
        """
        fronts = np.zeros((len(addresses), BEFORE), np.uint64)
        follows = np.append(False, np.diff(addresses) == PAGE_SIZE)
        fronts[1:][follows[1:]] = words[:-1][follows[1:], -BEFORE:]
        others = np.flatnonzero(~follows & ~self.holds(addresses))
        if self.memory is not None and len(others):
            fronts[others] = self.memory.words(addresses[others] - np.uint64(8 * BEFORE), BEFORE)
        return fronts

    def spaces(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """How many bytes there are from these addresses to the end of their memory; no chunk is longer.

        Where programs begin low, addresses of the heap look like lengths.
        """
        if self.memory is None or not len(self.memory.anonymous):
            return np.full(len(addresses), _LARGEST)
        edges = self.memory.anonymous
        at = np.searchsorted(edges, addresses, side="right")
        ends = edges[np.minimum(at, len(edges) - 1)]
        return np.where(at % 2 == 1, (ends - addresses).astype(np.int64), 0)

    @cached_property
    def edges(self) -> NDArray[np.uint64]:
        """Where memory of pools begins and ends, in turn: neighbours are one."""
        if not len(self.starts):
            return np.empty(0, np.uint64)
        gaps = np.flatnonzero(np.diff(self.starts) != POOL) + 1
        first, last = np.append(0, gaps), np.append(gaps - 1, len(self.starts) - 1)
        return np.stack([self.starts[first], self.starts[last] + np.uint64(POOL)], axis=1).reshape(-1)

    def holds(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which addresses lie in a pool."""
        return np.asarray(np.searchsorted(self.edges, addresses, side="right") % 2 == 1)

    def of_files(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which addresses lie in the data of a file."""
        return np.asarray(np.searchsorted(self.files, addresses, side="right") % 2 == 1)

    def begins(
        self, rows: NDArray[np.intp], offsets: NDArray[np.int64], needed: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether a block begins at these bytes of the pools ``rows``, with the bytes that are ``needed``."""
        if not len(self.starts):
            return np.zeros(len(rows), np.bool_)
        sizes, offsets = self.sizes[rows], offsets - _HEAD
        inside = (rows >= 0) & (offsets >= 0) & (offsets < self.ends[rows] - _HEAD)
        return np.asarray(inside & (offsets % sizes == 0) & (needed <= sizes))


def pools_in(addresses: NDArray[np.uint64], memory: PresentMemory) -> Pools:
    """The pools that begin on the pages at these ascending ``addresses`` of anonymous memory."""
    starts = addresses[addresses & np.uint64(POOL - 1) == 0]
    heads = memory.words(starts, _HEAD // 8)
    low, high = heads & np.uint64(0xFFFFFFFF), (heads >> np.uint64(32)).astype(np.int64)
    number, last, end = high[:, 4], high[:, 5], low[:, 5].astype(np.int64)
    sizes = _ALIGNED * (np.minimum(number, _CLASSES) + 1)
    blocks = end - _HEAD
    valid = (number < _CLASSES) & (last == POOL - sizes) & (blocks >= 0) & (end <= POOL)
    valid &= (blocks % sizes == 0) & (low[:, 0].astype(np.int64) <= blocks // sizes)
    starts = starts[valid]
    has_pools, has_chunks = len(starts) >= _FEWEST, begins_with_chunks(memory)
    above = (_SMALL if has_pools else _ALIGNED) if has_chunks else _LARGEST
    first = memory.words(starts[:_FEWEST] + np.uint64(_HEAD), 2)[:, 1]
    usual = has_pools and has_chunks and not (first == DEBUGGED).any()
    return Pools(starts, sizes[valid], end[valid], memory.files, above, usual, memory)


def is_chunk(
    lengths: NDArray[np.uint64],
    needed: NDArray[np.int64],
    above: int = _SMALL,
    space: NDArray[np.int64] | int = _LARGEST,
) -> NDArray[np.bool_]:
    """Whether the words in front of blocks are ``lengths`` of chunks that have the bytes that are ``needed``,
    where there is so much ``space``.

    Only chunks of more bytes than ``above`` count (:attr:`Pools.chunks_above`).
    """
    size = lengths & ~np.uint64(7)
    fits = (size > np.uint64(above)) & (size < np.uint64(_LARGEST)) & (size & np.uint64(8) == 0)
    fits &= size.astype(np.int64) <= space
    return np.asarray(fits & (needed.astype(np.uint64) <= size - np.uint64(8)))
