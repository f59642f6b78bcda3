"""Relocating a library in memory with the loops of :mod:`miniloader.native`: what they take and give."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from miniloader.loader.symbol_lookup import VaddrRange, spans_array
from miniloader.machine.relocation import Kind
from miniloader.native import (
    ADDRESS_MASK,
    FORMULAS,
    KINDS,
    JobStructure,
    Stopped,
    buffer_address,
    run,
    unlocked,
)

__all__ = ["ROW", "RelocationJob", "Row", "kinds_table", "resolve"]

_KIND: Final = struct.Struct("4B")  # formula, size, signed, call
#: Offset, type, symbol and addend of a relocation, as a file has them.
ROW: Final = struct.Struct("<QIIq")

Row = tuple[int, int, int, int]
"""Offset, type, symbol and addend of a relocation: what :data:`~miniloader.elf.tables.RELOCATION` has."""


def resolve(addresses: array[int], places: array[int]) -> None:
    """Replace the resolvers at ``places`` by what they choose; Python's lock is free meanwhile."""
    call = unlocked("resolve", None, *[ctypes.c_uint64] * 3)
    call(buffer_address(addresses), buffer_address(places), len(places))


def kinds_table(kinds: Mapping[int, Kind]) -> bytearray:
    """What the loops have to know of each relocation kind, by its number."""
    table = bytearray(_KIND.size * KINDS)
    for code, kind in kinds.items():
        formula = FORMULAS.index(kind.formula) + 1 if kind.formula in FORMULAS else len(FORMULAS) + 1
        _KIND.pack_into(table, _KIND.size * code, formula, kind.size, kind.signed, kind.call)
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
        kinds: bytearray,
        *,
        writable: Sequence[VaddrRange],
        code: Sequence[VaddrRange],
        pointers: Sequence[VaddrRange],
        parts: Sequence[tuple[int, int]],
        pages: VaddrRange,
        page_size: int,
    ) -> None:
        self._bias, self._start, self._page_size = bias, pages[0], page_size
        self._pages = bytearray((pages[1] - pages[0]) // page_size)
        lists = writable, code, pointers, [self._part(*part) for part in parts]
        spans, counts = spans_array(chain.from_iterable(lists)), [len(part) for part in lists]
        self._kept, self._used = (kinds, spans), bytearray()
        places = [buffer_address(spans) + 16 * sum(counts[:index]) for index in range(len(counts))]
        self._job = JobStructure(
            *(bias & ADDRESS_MASK, page_size, pages[0], buffer_address(kinds)),
            *places,
            *counts,
            buffer_address(self._pages),
        )
        self._place = ctypes.addressof(self._job)

    def survey(self, codes: Iterable[int]) -> tuple[dict[int, int], int]:
        """How many rows there are of those kinds among ``codes`` that have any, and the highest symbol."""
        counts, highest = array("Q", bytes(8 * KINDS)), ctypes.c_uint64()
        self._run("survey", counts, ctypes.addressof(highest))
        return {code: counts[code] for code in codes if counts[code]}, highest.value

    def used(self, symbols: int) -> array[int]:
        """Which of so many symbols have to be bound, ascending."""
        self._used = bytearray(symbols)
        self._run("use", self._used, symbols)
        wanted, listed = array("q", [0]) * (symbols - self._used.count(0)), ctypes.c_uint64()
        run("list_set", self._used, symbols, wanted, ctypes.addressof(listed))
        return wanted

    def rows(self, code: int, count: int) -> list[Row]:
        """The rows of a kind, of which there are ``count``.  Their symbols are used."""
        rows = bytearray(ROW.size * count)
        self._run("gather", code, rows, count, self._used, len(self._used))
        return list(ROW.iter_unpack(rows))

    def relocate(
        self,
        located: array[int],
        relr: tuple[int, int],
        added: array[int],
        head: tuple[int, int],
        called: array[int],
        pointed: array[int],
        addresses: array[int],
        definitions: array[int],
        late: bytearray,
    ) -> None:
        """Write all words but those of symbols that are ``late``, and of formulas that are not the loops'.

        First come the rows ``located``, of B + A, three words each; then the load bias is added to the words
        of the RELR table ``relr`` (vaddr and count of its entries) and at the vaddrs ``added``; then come
        the rows of ``head`` (vaddr and count), of B + A, and those surveyed.  ``called`` and ``pointed`` say
        where each symbol is in ``addresses``, ``definitions`` and ``late``.
        """
        packed, first = (spans_array([self._part(*part)]) for part in (relr, head))
        self._run(
            "relocate",
            *(located, len(located) * located.itemsize // ROW.size, packed, added, len(added), first),
            *(called, pointed, len(called), addresses, definitions, late),
        )

    def note(self, vaddrs: Iterable[int], size: int) -> None:
        """Count the pages of words that others write."""
        for vaddr in vaddrs:
            for end in (vaddr, vaddr + size - 1):
                self._pages[(end - self._start) // self._page_size] = 1

    @property
    def pages(self) -> int:
        """How many pages have been written to."""
        return len(self._pages) - self._pages.count(0)

    def _part(self, vaddr: int, count: int) -> tuple[int, int]:
        return (self._bias + vaddr) & ADDRESS_MASK, count

    def _run(self, name: str, *arguments: Any) -> None:
        try:
            run(name, self._place, *arguments)
        except Stopped as stopped:
            raise Stopped(stopped.reason, self._job.where, self._job.what) from None
