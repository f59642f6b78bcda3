"""Relocating a library in memory with the loops of :mod:`miniloader.native`: what they take and give."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.tables import RELOCATION, Table
from miniloader.loader.symbol_lookup import VaddrRange, spans_array
from miniloader.machine.relocation import Kind
from miniloader.native import (
    ADDRESS_MASK,
    FORMULAS,
    KINDS,
    JobStructure,
    Stopped,
    buffer_address,
    functions,
    run,
)

__all__ = ["RelocationJob", "kinds_table", "resolve"]

_KIND: Final = np.dtype([("formula", "u1"), ("size", "u1"), ("signed", "u1"), ("call", "u1")])


def resolve(addresses: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
    """Replace the resolvers at ``places`` by what they choose; Python's lock is free meanwhile."""
    _resolve()(buffer_address(addresses), buffer_address(places), len(places))


@lru_cache(maxsize=1)
def _resolve() -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 3)(("resolve", functions()))


def kinds_table(kinds: Mapping[int, Kind]) -> NDArray[Any]:
    """What the loops have to know of each relocation kind, by its number."""
    table = np.zeros(KINDS, _KIND)
    for code, kind in kinds.items():
        formula = FORMULAS.index(kind.formula) + 1 if kind.formula in FORMULAS else len(FORMULAS) + 1
        table[code] = formula, kind.size, kind.signed, kind.call
    return table


class RelocationJob:
    """The relocation of one library, mapped at ``bias``.

    What is relocated has to be inside ``writable``; what is at ``pointers`` has to lead into ``code``.
    ``parts`` are the rows to work on, vaddr and count, all readable; ``pages`` the vaddrs whose pages are
    counted. :class:`Stopped` says at which word it ends.
    """

    def __init__(
        self,
        bias: int,
        kinds: NDArray[Any],
        *,
        writable: Sequence[VaddrRange],
        code: Sequence[VaddrRange],
        pointers: Sequence[VaddrRange],
        parts: Sequence[tuple[int, int]],
        pages: VaddrRange,
        page_size: int,
    ) -> None:
        self._bias, self._start, self._page_size = bias, pages[0], page_size
        self._pages = np.zeros((pages[1] - pages[0]) // page_size, np.uint8)
        lists = writable, code, pointers, [self._part(*part) for part in parts]
        spans, counts = spans_array(chain.from_iterable(lists)), [len(part) for part in lists]
        self._kept, self._used = (kinds, spans), np.empty(0, np.uint8)
        places = [buffer_address(spans) + 16 * sum(counts[:index]) for index in range(len(counts))]
        self._job = JobStructure(
            *(bias & ADDRESS_MASK, page_size, pages[0], buffer_address(kinds)),
            *places,
            *counts,
            buffer_address(self._pages),
        )
        self._place = ctypes.addressof(self._job)

    def survey(self) -> tuple[dict[int, int], int]:
        """How many rows there are of each kind, and the highest symbol that they have."""
        counts, highest = np.zeros(KINDS, np.uint64), ctypes.c_uint64()
        self._run("survey", counts, ctypes.addressof(highest))
        kinds = counts.nonzero()[0]
        return dict(zip(kinds.tolist(), counts[kinds].tolist(), strict=True)), highest.value

    def used(self, symbols: int) -> NDArray[np.int64]:
        """Which of so many symbols have to be bound, ascending."""
        self._used = np.zeros(symbols, np.uint8)
        self._run("use", self._used, symbols)
        return self._used.nonzero()[0]

    def rows(self, code: int, count: int) -> Table:
        """The rows of a kind, of which there are ``count``: a copy.  Their symbols are used."""
        rows = np.empty(count, RELOCATION)
        self._run("gather", code, rows, count, self._used, len(self._used))
        return rows

    def relocate(
        self,
        located: Table,
        added: NDArray[np.uint64],
        head: tuple[int, int],
        called: NDArray[np.int64],
        pointed: NDArray[np.int64],
        addresses: NDArray[np.uint64],
        definitions: Table,
        late: NDArray[np.bool_],
    ) -> None:
        """Write all words but those of symbols that are ``late``, and of formulas that are not the loops'.

        First come the rows ``located``, of B + A; then the load bias is added at the vaddrs ``added``; then
        come the rows of ``head`` (vaddr and count), of B + A, and those surveyed.  ``called`` and
        ``pointed`` say where each symbol is in ``addresses``, ``definitions`` and ``late``.
        """
        first = spans_array([self._part(*head)])
        self._run(
            "relocate",
            *(located, len(located), added, len(added), first),
            *(called, pointed, len(called), addresses, definitions, late),
        )

    def note(self, vaddrs: NDArray[np.uint64], size: int) -> None:
        """Count the pages of words that others write."""
        for ends in (vaddrs, vaddrs + np.uint64(size - 1)):
            self._pages[(ends.astype(np.int64) - self._start) // self._page_size] = 1

    @property
    def pages(self) -> int:
        """How many pages have been written to."""
        return int(np.count_nonzero(self._pages))

    def _part(self, vaddr: int, count: int) -> tuple[int, int]:
        return (self._bias + vaddr) & ADDRESS_MASK, count

    def _run(self, name: str, *arguments: Any) -> None:
        try:
            run(name, self._place, *arguments)
        except Stopped as stopped:
            raise Stopped(stopped.reason, self._job.where, self._job.what) from None
