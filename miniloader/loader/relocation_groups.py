"""A library's relocations, sorted by what it takes to apply them."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import compress, count
from operator import itemgetter
from typing import Final

from miniloader.arrays import NDArray, np
from miniloader.elf import ElfImage
from miniloader.elf.dynamic import (
    DT_GNU_HASH,
    DT_HASH,
    DT_JMPREL,
    DT_PLTGOT,
    DT_REL,
    DT_RELA,
    DT_STRTAB,
    DT_SYMTAB,
    DT_VERSYM,
)
from miniloader.elf.header import Segment
from miniloader.elf.relocations import RelocationTable, kind_name
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import LoadError
from miniloader.forking import cached_property
from miniloader.machine.relocation import KINDS, Kind
from miniloader.native import KINDS as NUMBER_OF_KINDS
from miniloader.native import run
from miniloader.values import dataclass

__all__ = ["TLS", "Sorted", "refuse_kind", "sort_relocations", "symbols_of"]

#: Formulas of thread-local storage.
TLS: Final = ("module", "module offset", "thread offset", "descriptor")
_RELATIVE: Final = "B + A"
_PLT: Final = "DT_JMPREL"
#: The addresses in the dynamic section that glibc adds the load bias to, for whoever reads them in memory.
_LOCATED: Final = (
    *(DT_HASH, DT_PLTGOT, DT_STRTAB, DT_SYMTAB),
    *(DT_RELA, DT_REL, DT_JMPREL, DT_VERSYM, DT_GNU_HASH),
)
_WORD: Final = 8
_SMALL: Final = 256


@dataclass(frozen=True, eq=False)
class LazySlots:
    """The PLT slots left for their first call, in the order in which the PLT counts them, from 0 on."""

    offsets: array[int]
    symbols: array[int]

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, eq=False)
class Sorted:
    """A library's relocations by what they need: ``rows`` of each formula, in table order.

    ``located`` are rows of B + A in the dynamic section, which no relocation asks for, three words each;
    ``lazy`` the PLT slots left for their first call, if any.
    """

    image: ElfImage
    kinds: Mapping[int, Kind]
    located: array[int]
    lazy: LazySlots

    @property
    def dynamic(self) -> Table:
        """The rows that are ``located``, as an array."""
        return np.asarray(self.located).view(RELOCATION)

    @property
    def relr(self) -> NDArray[np.uint64]:
        """The vaddrs of the words that the load bias is added to."""
        return self.image.relocations.relr

    @property
    def relr_part(self) -> tuple[int, int]:
        """The RELR table: vaddr and count of its entries."""
        table = self.image.relocations.relr_table
        return table.vaddr, table.count

    @property
    def head(self) -> tuple[int, int]:
        """The rows that are of B + A, says the file: vaddr and count."""
        heads = ((t.vaddr, t.head) for t in self.image.relocations.tables if t.head)
        return next(heads, (0, 0))  # only DT_RELA can have one

    @property
    def parts(self) -> list[tuple[int, int]]:
        """All other rows but the lazy ones and those unpacked: the vaddr and count of each part."""
        return [
            (table.vaddr + first * table.entry_size, table.count - first)
            for table in self.image.relocations.tables
            if (first := table.head + (len(self.lazy) if table.name == _PLT else 0)) < table.count
            and not table.unpacked
        ]

    @property
    def unpacked(self) -> list[bytearray]:
        """The tables that are not in memory as they are applied: Android's packed ones, before all others."""
        return [table.unpacked for table in self.image.relocations.tables if table.unpacked]

    @cached_property
    def relative(self) -> Table:
        """All rows of B + A."""
        return np.concatenate(
            [np.empty(0, RELOCATION), *(rows for kind, rows in self._groups if _adds(kind))]
        )

    @cached_property
    def others(self) -> tuple[tuple[Kind, Table], ...]:
        """The kinds of all others, and their rows."""
        return tuple((kind, rows) for kind, rows in self._groups if not _adds(kind))

    def of(self, *formulas: str) -> Iterator[tuple[Kind, Table]]:
        """The kinds with one of ``formulas``, and their rows."""
        return ((kind, rows) for kind, rows in self.others if kind.formula in formulas)

    def targets(self) -> Iterator[NDArray[np.uint64]]:
        """The vaddrs written, an array for each kind; and the last byte of those that are longer."""
        yield self.dynamic["offset"]
        yield self.relr
        relative = self.relative["offset"]
        yield relative
        yield np.asarray(self.lazy.offsets)
        if len(relative) and int(np.bitwise_or.reduce(relative)) & 7:
            yield relative + np.uint64(_WORD - 1)
        for kind, rows in self.others:
            yield rows["offset"]
            yield rows["offset"] + np.uint64(kind.size - 1)

    @cached_property
    def _groups(self) -> tuple[tuple[Kind, Table], ...]:
        tables = self.image.relocations.tables
        parts = (table.rows[len(self.lazy) if table.name == _PLT else 0 :] for table in tables)
        rows = np.concatenate([np.empty(0, RELOCATION), *parts])
        codes = _distinct(rows["type"])
        for code in codes:
            refuse_kind(self.image, self.kinds, code, int(rows["symbol"][np.argmax(rows["type"] == code)]))
        return tuple(
            (self.kinds[code], rows[rows["type"] == code])
            for code in codes
            if self.kinds[code].formula != "none"
        )


def _adds(kind: Kind) -> bool:
    return kind.formula == _RELATIVE


def sort_relocations(image: ElfImage, *, lazy: bool = False) -> Sorted:
    """Sort the relocations of ``image`` by kind; :class:`LoadError` for a kind that is not known here.

    With ``lazy`` the PLT's slots (``S`` in ``DT_JMPREL``) are kept apart.
    """
    kinds = KINDS.get(image.header.machine)
    if kinds is None:
        raise LoadError(f"{image.path}: relocations of {image.header.machine} cannot be applied")
    later = LazySlots(array("Q"), array("I"))
    for table in image.relocations.tables:
        if not table.addends:
            raise LoadError(f"{image.path}: {table.name}: found REL, expected RELA on this machine")
        if lazy and table.name == _PLT:
            later = _lazy_slots(table, next(code for code, kind in kinds.items() if kind.call))
    return Sorted(image, kinds, _located(image), later)


def _lazy_slots(table: RelocationTable, code: int) -> LazySlots:
    """The ``table``'s first rows, as far as they are of kind ``code``: the PLT counts them without a gap."""
    words, halves = array("Q"), array("I")  # of Elf64_Rela: offset, kind and symbol, addend
    data = table.bytes_behind(0)
    words.frombytes(data)
    halves.frombytes(data)
    kinds, symbols = halves[2::6], halves[3::6]
    count = next(compress(range(len(kinds)), map(code.__ne__, kinds)), len(kinds))
    return LazySlots(words[::3][:count], symbols[:count])


def symbols_of(table: RelocationTable, codes: Collection[int]) -> array[int]:
    """The symbols of the rows of Elf64_Rela behind the ``table``'s head whose kind is among ``codes``."""
    count, listed = table.count - table.head, ctypes.c_uint64()
    rows, symbols = bytearray(table.bytes_behind(table.head)), array("q", [0]) * count
    run("list_symbols", rows, count, _marked(frozenset(codes)), symbols, ctypes.addressof(listed))
    return symbols[: listed.value]


@lru_cache(maxsize=4)
def _marked(codes: frozenset[int]) -> bytearray:
    """A byte for each kind: whether it is among ``codes``."""
    return bytearray(map(codes.__contains__, range(NUMBER_OF_KINDS)))


def refuse_kind(image: ElfImage, kinds: Mapping[int, Kind], code: int, symbol: int) -> None:
    """Raise :class:`LoadError` if relocations of kind ``code`` (with ``symbol``) cannot be applied."""
    kind = kinds.get(code)
    if kind is None:
        raise LoadError(
            f"{image.path}: relocation kind {kind_name(image.header.machine, code)}: not supported here"
        )
    if kind.formula == "copy":
        raise LoadError(
            f"{image.path}: {kind.name} of {image.symbols.name(symbol)}: a library cannot ask for one",
            hint="only a program that is not position-independent can; link it with -shared -fPIC",
        )


def _writable(image: ElfImage, part: Segment) -> bool:
    writable = (load for load in image.loads if "w" in load.flags)
    return any(load.vaddr <= part.vaddr and part.file_end <= load.file_end for load in writable)


@lru_cache(maxsize=1)
def _relative(machine: str) -> int:
    """The first kind that only adds the load bias."""
    return next(code for code, kind in KINDS[machine].items() if _adds(kind))


def _located(image: ElfImage) -> array[int]:
    """The addresses in the dynamic section as relocations, unless it is read-only (glibc: dl_relocate_ld)."""
    segment = image.segment("PT_DYNAMIC")
    if segment is None or "w" not in segment.flags or not _writable(image, segment):
        return array("Q")
    last = dict(zip(map(itemgetter(0), image.dynamic.entries), count()))  # where each tag is, as ld.so has it
    places = {tag: last[tag] for tag in _LOCATED if tag in last}
    tags, kind, first = image.dynamic.tags, _relative(image.header.machine), segment.vaddr + _WORD
    rows = array("Q")
    for tag, place in places.items():
        rows.extend((first + 2 * _WORD * place, kind, tags[tag]))  # symbol 0
    return rows


def _distinct(codes: NDArray[np.uint32]) -> list[int]:
    """The different values among ``codes``: most are small, and numpy's ``unique`` would sort all of them."""
    small = codes[codes < _SMALL]
    distinct = np.flatnonzero(np.bincount(small)).tolist()
    return distinct if len(small) == len(codes) else [*distinct, *set(codes[codes >= _SMALL].tolist())]
