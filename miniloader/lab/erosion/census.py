"""How many objects of each type lie on pages of a process that runs CPython."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.frames import distinct
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Survey
from miniloader.lab.erosion.object_loop import ObjectLoop, has_loop
from miniloader.lab.erosion.objects import Objects, objects_in_blocks, static_objects, together
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
        self._loop = ObjectLoop(pools, types) if has_loop() and pools.usual else None
        self._numbers, self._pages = Counter[int](), Counter[int]()

    def count(
        self, addresses: NDArray[np.uint64], words: NDArray[np.uint64], listed: NDArray[np.bool_]
    ) -> tuple[Objects, NDArray[np.bool_]]:
        """Count the objects on these pages: those on pages to be ``listed``, and which pages have any.

        The rows of the objects are counted among the pages that are listed.
        """
        of_files = self._pools.of_files(addresses)
        if not of_files.any():
            return self._count_blocks(addresses, words, listed)
        static, others = np.flatnonzero(of_files), np.flatnonzero(~of_files)
        holds = np.zeros(len(addresses), np.bool_)
        in_blocks, holds[others] = self._count_blocks(addresses[others], words[others], listed[others])
        objects = static_objects(words[static], self._types)
        holds[static[objects.page]] = True
        self._add(*self._counted(objects, len(static)))
        rows = np.cumsum(listed) - 1
        objects = objects.on(listed[static])
        merged = together(in_blocks, rows[others[listed[others]]], objects, rows[static[listed[static]]])
        return merged, holds

    def _count_blocks(
        self, addresses: NDArray[np.uint64], words: NDArray[np.uint64], listed: NDArray[np.bool_]
    ) -> tuple[Objects, NDArray[np.bool_]]:
        """As :meth:`count`, of pages of anonymous memory."""
        if self._loop is not None:
            numbers, pages, objects, holds = self._loop.count(addresses, words, listed)
        else:
            objects = objects_in_blocks(addresses, words, self._pools, self._types)
            numbers, pages = self._counted(objects, len(addresses))
            holds = np.zeros(len(addresses), np.bool_)
            holds[objects.page] = True
            objects = objects.on(listed)
        self._add(numbers, pages)
        return objects, holds

    def _add(self, numbers: NDArray[np.int64], pages: NDArray[np.int64]) -> None:
        """Add to what was counted: so many objects of each type, on so many pages."""
        met = np.flatnonzero(numbers)
        for address, number, on in zip(
            self._types.addresses[met].tolist(), numbers[met].tolist(), pages[met].tolist(), strict=True
        ):
            self._numbers[address] += number
            self._pages[address] += on

    def _counted(self, objects: Objects, number: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """How many objects of each type there are, and on how many of a ``number`` of pages."""
        length = len(self._types.addresses)
        kinds = distinct(objects.kind * number + objects.page) // max(number, 1)
        return np.bincount(objects.kind, minlength=length), np.bincount(kinds, minlength=length)

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
                words = data[read].view(np.uint64).reshape(-1, PAGE_SIZE // 8)
                census.count(part[read], words, np.zeros(len(words), np.bool_))
        return census.objects()
