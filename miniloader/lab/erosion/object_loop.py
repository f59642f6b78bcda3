"""What is told of pages in C (``miniloader/native/objects.c``): which are equal, which objects lie on them.

Where that code cannot be used numpy tells the same, in five times the time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import MiniloaderError
from miniloader.lab.erosion.objects import Objects
from miniloader.lab.erosion.pools import Pools
from miniloader.lab.erosion.types import MOST_MET, Types
from miniloader.native import functions, run

__all__ = ["ObjectLoop", "equal_pages", "has_loop"]

_HOLDS: Final = 2  # a page's mark: objects begin there
_PLACES: Final = 2 * MOST_MET  # of pointers that were met, of which there are at most as many


@lru_cache(maxsize=1)
def has_loop() -> bool:
    """Whether the compiled code can be used here."""
    try:
        functions()
    except MiniloaderError:
        return False
    return True


def equal_pages(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of the pages, a row of words each, hold the same bytes in both."""
    if not has_loop():
        return np.asarray((first == second).all(axis=1))
    same = np.empty(len(first), np.bool_)
    run("compare_pages", first, second, len(first), first.shape[1] * 8, same)
    return same


class ObjectLoop:
    """Counts objects in C.  What pointers lead to is kept for the next pages."""

    def __init__(self, pools: Pools, types: Types) -> None:
        self._pools, self._types = pools, types
        self._met = np.zeros((_PLACES, 2), np.uint64)
        self._fresh = np.empty(MOST_MET, np.uint64)
        self._found = np.zeros(3, np.uint64)

    def count(
        self, addresses: NDArray[np.uint64], words: NDArray[np.uint64], listed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Objects, NDArray[np.bool_]]:
        """How many objects of each type there are, on how many pages; those on pages ``listed``; who has any.

        Types are the rows of :class:`~miniloader.lab.erosion.types.Types`.
        """
        marks = listed.astype(np.uint8)
        around, width = self._pools.around(addresses, words), words.shape[1]
        room = np.empty((np.count_nonzero(listed) * width // 2, 3), np.uint64)
        edges = self._pools.edges
        while True:
            types = np.zeros((len(self._types.addresses), 5), np.int64)
            types[:, 0], types[:, 1] = self._types.sizes, self._types.before
            run(
                "count_objects", words, len(words), width, around, marks, edges, len(edges),
                self._met, types, room, self._fresh, self._found,
            )  # fmt: skip
            if not self._met_more():
                break
        page, word, kind = room[: int(self._found[2])].T.astype(np.intp)
        objects = Objects(page, word, kind, self._types.before[kind])
        return types[:, 2], types[:, 3], objects, marks & _HOLDS != 0

    def _met_more(self) -> bool:
        """Say where the pointers lead that were met first just now; whether any leads to a type."""
        places = self._fresh[: int(self._found[1])].astype(np.intp)
        if not len(places):
            return False
        places = places[np.argsort(self._met[places, 0])]
        self._met[places, 1] = rows = self._types.met(self._met[places, 0])
        return bool(rows.any())
