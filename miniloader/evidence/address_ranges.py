"""Ranges of addresses, and which of many addresses lie in them: in the time to sort both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["AddressRanges"]

_HIGHEST = (1 << 64) - 1


class AddressRanges:
    """Ranges [start, end), which may overlap.

    >>> ranges = AddressRanges([(0x5000, 0x6000), (0x1000, 0x4000), (0x2000, 0x3000)])
    >>> ranges.meet(np.array([0x0, 0x3000, 0x4000, 0x4800, 0x6000], np.uint64), 0x1000).tolist()
    [False, True, False, True, False]
    >>> ranges.span
    (4096, 24576)
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        rows = sorted((start, end) for start, end in ranges if start < end)
        self._starts = np.array([start for start, _ in rows], np.uint64)
        ends = np.array([min(end, _HIGHEST) for _, end in rows], np.uint64)
        self._ends = np.maximum.accumulate(ends) if rows else ends  # of all that begin no later

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def span(self) -> tuple[int, int]:
        """Where the first begins and the last ends; of none (0, 0)."""
        return (int(self._starts[0]), int(self._ends[-1])) if len(self) else (0, 0)

    def meet(self, addresses: NDArray[np.uint64], length: int) -> NDArray[np.bool_]:
        """Whether any of ``length`` bytes from each of the ``addresses`` on lies in one of the ranges."""
        if not len(self):
            return np.zeros(len(addresses), np.bool_)
        number = self._starts.searchsorted(addresses + np.uint64(length - 1), "right")
        return np.asarray((number > 0) & (self._ends[number - 1] > addresses))
