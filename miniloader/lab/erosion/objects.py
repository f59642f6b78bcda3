"""Which CPython objects lie on pages of another process, told from their bytes alone.

An object begins with its reference count and a pointer to its type; two words of the collector's stand
before, where its type is collected, and two more before these, where its dict is managed.  Where all of that
begins is where a block begins, of a pool or of malloc (:mod:`miniloader.lab.erosion.pools`).  Only what fits
in all these respects is an object: bytes that merely look like one are not.  The data of a program or a
library has no blocks: an object there (a type, a small int, a name) is told by its count and its type alone.

Sources: Include/object.h, Include/internal/pycore_gc.h, Objects/typeobject.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.lab.erosion.pools import BEFORE, DEBUGGED, POOL, Pools, is_chunk
from miniloader.lab.erosion.types import Types
from miniloader.values import NamedTuple

__all__ = ["Objects", "objects_in_blocks", "objects_on", "static_objects", "together"]

_LEAST_ADDRESS: Final = 1 << 20
_MOST_ADDRESS: Final = 1 << 47
_COUNT: Final = np.uint64(0x0000FFFFFFFFFFFF)  # from 3.14 on flags stand in the two bytes above
_MOST_COUNTED: Final = np.uint64(1 << 20)  # references to a static object; programs begin above, at 4 MiB
_IMMORTAL_AT_FIRST: Final = np.uint64(999_999_999)
_IMMORTAL: Final = np.uint64(3 << 30)


class Objects(NamedTuple):
    """The objects that were found on some pages, a row each.

    ``page`` is the row of the page that the reference count is on, ``word`` its place there, ``kind`` the row
    of its type in :class:`~miniloader.lab.erosion.types.Types`, ``before`` how many words of its block stand
    before it.
    """

    page: NDArray[np.intp]
    word: NDArray[np.intp]
    kind: NDArray[np.intp]
    before: NDArray[np.intp]

    def on(self, pages: NDArray[np.bool_]) -> Objects:
        """Only the objects on the pages that are chosen, whose rows are counted anew."""
        chosen = pages[self.page]
        rows = np.cumsum(pages) - 1
        return Objects(rows[self.page[chosen]], self.word[chosen], self.kind[chosen], self.before[chosen])


def objects_on(
    addresses: NDArray[np.uint64], words: NDArray[np.uint64], pools: Pools, types: Types
) -> Objects:
    """The objects on the pages at these ascending ``addresses``, whose bytes are ``words``, a row a page."""
    of_files = pools.of_files(addresses)
    if not of_files.any():
        return objects_in_blocks(addresses, words, pools, types)
    static, others = np.flatnonzero(of_files), np.flatnonzero(~of_files)
    return together(
        objects_in_blocks(addresses[others], words[others], pools, types),
        others,
        static_objects(words[static], types),
        static,
    )


def together(
    in_blocks: Objects, others: NDArray[np.intp], of_files: Objects, static: NDArray[np.intp]
) -> Objects:
    """The objects on pages with blocks, which are the rows ``others``, and on ``static`` ones."""
    pages = np.append(others[in_blocks.page], static[of_files.page])
    columns = (np.append(*pair) for pair in zip(in_blocks[1:], of_files[1:], strict=True))
    return Objects(pages, *columns)


def objects_in_blocks(
    addresses: NDArray[np.uint64], words: NDArray[np.uint64], pools: Pools, types: Types
) -> Objects:
    """The objects on pages of anonymous memory."""
    places, pointers = _candidates(words)
    chosen, kind = types.rows_of(pointers)
    width = words.shape[1]  # a power of two
    page, word = places[chosen] >> (width.bit_length() - 1), places[chosen] & (width - 1)
    before = types.before[kind]
    block, needed = word - before, types.sizes[kind]
    of_page = pools.of(addresses)
    offset = (addresses & np.uint64(POOL - 1)).astype(np.int64)
    fits = pools.begins(of_page[page], offset[page] + 8 * block, needed)
    front = np.concatenate([pools.before(addresses, words), words], axis=1)[page, BEFORE + block - 1]
    if not pools.usual:
        fits |= front == DEBUGGED
    large = np.flatnonzero((of_page[page] < 0) & (block % 2 == 0) & ~fits)
    space = pools.spaces(addresses)[page[large]] - 8 * block[large] + 16  # of the whole chunk
    fits[large] = is_chunk(front[large], needed[large], pools.chunks_above, space)
    fits[1:] &= _first_of_block(page * width + block, fits)
    return Objects(page[fits], word[fits], kind[fits], before[fits])


def static_objects(words: NDArray[np.uint64], types: Types) -> Objects:
    """The objects on pages of the data of files, which the compiler has put at multiples of 8 bytes.

    A pointer of a program that is not relocated is as small as a count may be, so only such numbers count as
    have been counted to, or begin there for what never goes.  No words of the collector's are in front.
    """
    counts, pointers = words[:, :-1] & _COUNT, words[:, 1:]
    possible = (counts != 0) & ((counts < _MOST_COUNTED) | _is_immortal(counts))
    page, word = np.nonzero(possible & (pointers >= _LEAST_ADDRESS) & (pointers % 8 == 0))
    chosen, kind = types.rows_of(pointers[page, word])
    return Objects(page[chosen], word[chosen], kind, np.zeros(len(kind), np.intp))


def _is_immortal(counts: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which counts are those of objects that are not freed: about 999,999,999 in 3.11, near 2**32 since."""
    near = np.uint64(1 << 24)
    of_first = counts - (_IMMORTAL_AT_FIRST - near) < np.uint64(2) * near
    return np.asarray(of_first | (counts >= _IMMORTAL) & (counts < np.uint64(1 << 32)))


def _first_of_block(blocks: NDArray[np.intp], fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of all but the first do not lie in the block of the one before that fits.

    A tuple of two types looks like an object of the first, behind a head: its length passes for a count.
    """
    latest = np.maximum.accumulate(np.where(fits, np.arange(len(blocks)), -1))[:-1]
    return np.asarray((latest < 0) | (blocks[1:] != blocks[latest]))


def _candidates(words: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Where a count may be that an address follows, as numbers of words; and these addresses.

    Blocks begin at multiples of 16 bytes, and so do the pairs of words in front of a count, so it does, too.
    """
    flat = words.reshape(-1)
    counts, pointers = flat[::2], flat[1::2]
    possible = (counts & _COUNT) - np.uint64(1) < np.uint64(0xFFFFFFFF)
    possible &= pointers - np.uint64(_LEAST_ADDRESS) < np.uint64(_MOST_ADDRESS - _LEAST_ADDRESS)
    places = np.flatnonzero(possible)
    pointers = pointers[places]
    chosen = pointers & np.uint64(7) == 0
    return 2 * places[chosen], pointers[chosen]
