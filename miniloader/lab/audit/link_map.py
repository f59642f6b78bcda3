"""In which order ld.so has loaded what a process has: the list that it keeps for debuggers.

The program's ``DT_DEBUG`` leads there.  Source: glibc's ``elf/link.h``, ``r_debug`` and ``link_map``: each
field that is read, and each before, takes as much as an address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["loaded_order"]

Words = Callable[[NDArray[np.uint64], int], tuple[NDArray[np.uint64], NDArray[np.bool_]]]
"""The words of so many bytes at some addresses of a process, and which of them could be read."""

_DT_DEBUG: Final = 21
_MAP_AT: Final = 1  # r_debug.r_map, in words
_DYNAMIC, _NEXT = 2, 3  # l_ld, l_next
_MOST: Final = 1 << 16  # libraries; ld.so itself has no limit, but a ring has no end


def loaded_order(words: Words, dynamic: int, entries: int, size: int) -> tuple[int, ...]:
    """The addresses of the dynamic sections of all that ld.so has loaded, the program's first.

    ``dynamic`` is where the program's own is, which has so many ``entries``; a word has ``size`` bytes.  None
    where that cannot be read.
    """
    return tuple(_walk(words, dynamic, entries, size))


def _walk(words: Words, dynamic: int, entries: int, size: int) -> Iterator[int]:
    pairs = np.uint64(dynamic) + np.arange(2 * entries, dtype=np.uint64) * np.uint64(size)
    values, _ = words(pairs, size)
    tags, contents = values[::2].tolist(), values[1::2].tolist()
    debug = next((value for tag, value in zip(tags, contents, strict=True) if tag == _DT_DEBUG), 0)
    at = _word(words, debug + _MAP_AT * size, size) if debug else 0
    for _ in range(_MOST):
        if not at:
            return
        yield _word(words, at + _DYNAMIC * size, size)
        at = _word(words, at + _NEXT * size, size)


def _word(words: Words, address: int, size: int) -> int:
    """The word at ``address``; 0 where it cannot be read."""
    values, done = words(np.array([address % 2**64], np.uint64), size)
    return int(values[0]) if done[0] else 0
