"""Looking names up in the dynamic symbols of libraries in memory, by the loops of :mod:`miniloader.native`.

A library's hash table, symbols, strings and versions are read where they lie, and only inside what is known
to be readable.  The rules are those of glibc's ``elf/dl-lookup.c``.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress, count
from typing import Final

from miniloader.arrays import NDArray, np
from miniloader.elf.dynamic import (
    DT_GNU_HASH,
    DT_HASH,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMENT,
    DT_SYMTAB,
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    DT_VERSYM,
)
from miniloader.native import (
    ADDRESS_MASK,
    NEWEST,
    PLT_ENTRIES,
    VERSIONED,
    LinkStructure,
    Reason,
    Stopped,
    SymbolsStructure,
    buffer_address,
    run,
)
from miniloader.values import NamedTuple

__all__ = [
    "DEFINITION",
    "Lookup",
    "MappedSymbols",
    "VaddrRange",
    "column",
    "field_at",
    "look_name_up",
    "look_up",
    "places_of",
    "spans_array",
]

DEFINITION: Final = [
    ("owner", "i8"), ("symbol", "i8"),
    ("address", "u8"), ("value", "u8"), ("size", "u8"), ("info", "u8"), ("shndx", "u8"),
]  # fmt: skip
"""What a symbol is bound to: the position of a library in a scope (-1: none), its symbol there, and of that
one the address and the fields of the symbol table.  Without one all is 0 but ``info``, the symbol's own."""

_PLACES: Final = {name: place for place, (name, _) in enumerate(DEFINITION)}

_TAGS: Final = (
    *(DT_STRTAB, DT_STRSZ, DT_SYMTAB, DT_GNU_HASH, DT_HASH),
    *(DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM, DT_VERDEF, DT_VERDEFNUM),
)

VaddrRange = tuple[int, int]
"""The vaddrs from the first up to but not including the last."""


def spans_array(spans: Iterable[VaddrRange]) -> array[int]:
    """The ends of ranges one after the other, as the loops take them.

    >>> spans_array([(0x1000, 0x2000), (0x3000, 0x3800)]).tolist() == [0x1000, 0x2000, 0x3000, 0x3800]
    True
    """
    return array("Q", chain.from_iterable(spans))


def column(definitions: array[int], name: str) -> array[int]:
    """A field of each of the rows of :data:`DEFINITION` that follow one another in ``definitions``.

    >>> column(array("q", [0, 5, *bytes(5), -1, 0, *bytes(5)]), "owner").tolist()
    [0, -1]
    """
    return definitions[_PLACES[name] :: len(DEFINITION)]


def field_at(definitions: array[int], place: int, name: str) -> int:
    """A field of one of the rows of :data:`DEFINITION` that follow one another in ``definitions``."""
    return definitions[place * len(DEFINITION) + _PLACES[name]]


def places_of(asked: Sequence[int], addresses: array[int]) -> array[int]:
    """Where in ``addresses`` any of those ``asked`` for, which ascend, is.

    >>> places_of([7, 9], array("Q", [9, 8, 7, 7])).tolist()
    [0, 2, 3]
    """
    places, listed = array("q", [0]) * len(addresses), ctypes.c_uint64()
    numbers = array("Q", asked)
    run("list_asked", addresses, len(addresses), numbers, len(numbers), places, ctypes.addressof(listed))
    return places[: listed.value]


def _text(text: bytes) -> bytearray:
    return bytearray(text + b"\0")  # not a ctypes array, each of which makes a type of its own


class MappedSymbols:
    """The dynamic symbols of a library in memory: ``tags`` of its dynamic section are vaddrs (or numbers).

    Only what is ``readable`` is read.  There are ``at_least`` so many symbols.  ``check`` has every name
    looked at.  Raises :class:`Stopped` for tables that are not where they have to be.
    """

    def __init__(
        self,
        bias: int,
        readable: Sequence[VaddrRange],
        tags: Mapping[int, int],
        *,
        at_least: int = 0,
        check: bool = False,
    ) -> None:
        if tags.get(DT_SYMENT, 24) != 24:
            raise Stopped(Reason.NO_TABLE)
        # What the structure points at lives as long as this object.
        self._spans = spans_array(readable)
        self._table = table = SymbolsStructure(
            *(bias & ADDRESS_MASK, buffer_address(self._spans), len(readable)),
            *[tags.get(tag, 0) for tag in _TAGS],
            at_least,
        )
        self.place = ctypes.addressof(table)
        run("open_table", self.place, check)
        if table.labels_count:
            self._labels = bytearray(4 * table.labels_count)
            table.labels = buffer_address(self._labels)
            run("list_versions", self.place)

    @classmethod
    def opened(cls, link: LinkStructure) -> MappedSymbols:
        """The dynamic symbols that linking has opened, in ``link``, which is kept from now on."""
        names = cls.__new__(cls)
        names._table = link.table
        names.place = ctypes.addressof(link)
        return names

    def __len__(self) -> int:
        return int(self._table.count)

    def name(self, symbol: int) -> bytes:
        """The name of a symbol."""
        return self._string(0, symbol)

    def _string(self, at: int, symbol: int) -> bytes:
        room, length = 256, ctypes.c_uint64()
        while True:
            copy = bytearray(room)
            run("text_at", self.place, at, symbol & ADDRESS_MASK, copy, room, ctypes.addressof(length))
            if length.value < room:
                return bytes(copy[: length.value])
            room = length.value + 1

    def missing_version(self, file: bytes, needed: MappedSymbols) -> bytes | None:
        """The first version asked of the library ``needed``, whose name is ``file``, that it lacks.

        As glibc: a library without any versions lacks none, and what is needed weakly may be missing.
        """
        text, missing = _text(file), ctypes.c_uint64()
        run("missing_version", self.place, text, needed.place, ctypes.addressof(missing))
        return self._string(missing.value, -1) if missing.value else None


class Lookup(NamedTuple):
    """What was found: ``rows`` of :data:`DEFINITION`, one after the other, and which of them are IFUNCs (a
    byte each); which libraries of the scope define any; what was met (:data:`UNBOUND` and its like)."""

    rows: array[int]
    indirect: bytearray
    owners: list[int]
    met: int


def look_up(
    library: MappedSymbols,
    wanted: array[int] | NDArray[np.int64],
    scope: Sequence[MappedSymbols],
    biases: Sequence[int],
    own: int | None,
    *,
    versioned: bool = True,
    plt_entries: bool = False,
) -> Lookup:
    """What the symbols ``wanted`` (indices in ``library``) are bound to in ``scope``.

    Its libraries lie at ``biases``; ``own`` is the position of their own library.  What is local, hidden,
    internal or protected is bound there; so is all that it defines itself, unless a library before it does,
    too.  With ``None`` names are looked for wherever they come from.  Versions count where they are
    ``versioned``.  ``plt_entries`` are what is found instead of definitions: undefined symbols that have a
    value.
    """
    definitions, met = array("q", bytes(8 * len(DEFINITION))) * len(wanted), ctypes.c_uint64()
    indirect, owners = bytearray(len(wanted)), bytearray(len(scope))
    tables, offsets = _scope(scope, biases)
    how = versioned * VERSIONED + plt_entries * PLT_ENTRIES
    run(
        "look_up",
        *(library.place, wanted, len(wanted)),
        *(tables, offsets, len(scope)),
        *(ADDRESS_MASK if own is None else own, how, definitions),
        *(indirect, owners, ctypes.addressof(met)),
    )
    return Lookup(definitions, indirect, list(compress(count(), owners)), met.value)


def look_name_up(
    name: bytes, scope: Sequence[MappedSymbols], biases: Sequence[int], *, newest: bool = False
) -> array[int]:
    """What ``name`` is bound to in ``scope``, whose libraries lie at ``biases``: a row of :data:`DEFINITION`.

    Of several versions it is the base or the oldest, as for a library that asks for none; or the ``newest``,
    which is nobody's default but dlsym(3)'s.
    """
    definition = array("q", bytes(8 * len(DEFINITION)))
    text, (tables, offsets) = _text(name), _scope(scope, biases)
    run("look_name_up", text, tables, offsets, len(scope), newest * NEWEST, definition)
    return definition


def _scope(scope: Sequence[MappedSymbols], biases: Sequence[int]) -> tuple[array[int], array[int]]:
    return array("Q", [names.place for names in scope]), array("Q", [bias & ADDRESS_MASK for bias in biases])
