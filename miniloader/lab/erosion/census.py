"""How many objects of each type lie on pages of a process that runs CPython."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Survey
from miniloader.lab.erosion.objects import Objects, objects_on
from miniloader.lab.erosion.pools import Pools, pools_in
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.result import ErodedObjects
from miniloader.lab.erosion.types import Types

__all__ = ["Census", "objects_at"]

_AT_ONCE: Final = 512  # pages
_MOST_TYPES: Final = 100


class Census:
    """Counts the objects of each type, a part of the pages at a time."""

    def __init__(self, pools: Pools, types: Types) -> None:
        self._pools, self._types = pools, types
        self._numbers, self._pages = Counter[int](), Counter[int]()

    def count(self, addresses: NDArray[np.uint64], words: NDArray[np.uint64]) -> Objects:
        """Count the objects on these pages, and tell where they are."""
        objects = objects_on(addresses, words, self._pools, self._types)
        of_type = self._types.addresses
        numbers = np.bincount(objects.kind, minlength=len(of_type))
        met = np.flatnonzero(numbers)
        row = np.cumsum(numbers > 0) - 1
        places = np.bincount(
            row[objects.kind] * len(addresses) + objects.page, minlength=len(met) * len(addresses)
        )
        pages = np.count_nonzero(places.reshape(len(met), len(addresses)), axis=1)
        for address, number, on in zip(
            of_type[met].tolist(), numbers[met].tolist(), pages.tolist(), strict=True
        ):
            self._numbers[address] += number
            self._pages[address] += on
        return objects

    def objects(self) -> tuple[ErodedObjects, ...]:
        """The types with the most objects, the most first."""
        numbers, pages = Counter[str](), Counter[str]()
        for address, number in self._numbers.items():
            name = self._types.name(address)
            numbers[name] += number
            pages[name] += self._pages[address]
        return tuple(
            ErodedObjects(name, pages[name], number) for name, number in numbers.most_common(_MOST_TYPES)
        )


def objects_at(process: Survey, addresses: NDArray[np.uint64]) -> tuple[ErodedObjects, ...]:
    """The objects on the pages at these ascending addresses now; none where the CPython is not known.

    Raises ProcessGone, or EvidenceError where memory may not be read.
    """
    if process.interpreter is None or not process.interpreter.is_known:
        return ()
    with PresentMemory(process.pid, process.present) as memory:
        pools = pools_in(process.copies.addresses, memory)
        census = Census(pools, Types(memory, pools, process.interpreter.type_address))
        for start in range(0, len(addresses), _AT_ONCE):
            part = addresses[start : start + _AT_ONCE]
            data, read = memory.pages(part)
            if read.any():
                census.count(part[read], data[read].view(np.uint64).reshape(-1, PAGE_SIZE // 8))
        return census.objects()
