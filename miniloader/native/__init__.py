"""The inner loops of linking, in C: looking up names (``names.c``), writing words (``words.c``).

A library of medium size has ten thousand names to look up and a hundred thousand words to relocate.  What
one of them takes in Python, or numpy for each pass over all of them, is a hundred times what ld.so takes.
So these loops are C, and nothing else is: which libraries there are, in which order, by which rules is
Python's to say. They work where the library lies in memory, as ld.so does: nothing is copied.

They are compiled once, for x86-64, and lie beside this file (``python -m fixtures.build --prebuilt`` makes
them anew, and a test compares).  ``loops.h`` has the structures; they are declared here again, field by
field.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import LoadError
from miniloader.machine.relocation import Kind

__all__ = [
    "DEFINITION",
    "INDIRECT_FUNCTION",
    "UNBOUND",
    "UNIQUE",
    "Found",
    "Job",
    "Names",
    "Reason",
    "Stopped",
    "copy",
    "functions",
    "kinds_table",
    "look_name_up",
    "look_up",
    "resolve",
]

DEFINITION: Final = np.dtype([
    ("owner", "i8"), ("symbol", "i8"),
    ("address", "u8"), ("value", "u8"), ("size", "u8"), ("info", "u8"), ("shndx", "u8"),
])  # fmt: skip
"""What a symbol is bound to: the position of a library in a scope (-1: none), its symbol there, and of that
one the address and the fields of the symbol table.  Without one all is 0 but ``info``, the symbol's own."""

#: What is met while names are looked up: a need that nobody fulfils, unique symbols, IFUNCs.
UNBOUND, UNIQUE, INDIRECT_FUNCTION = 1, 2, 4

_KIND: Final = np.dtype([("formula", "u1"), ("size", "u1"), ("signed", "u1"), ("call", "u1")])
_KINDS: Final = 256
#: In the order of loops.h, from 1 on; all others are one more.
_FORMULAS: Final = ("none", "B + A", "S + A", "S", "S + A - P", "Z + A", "indirect")
_TAGS: Final = (
    *(DT_STRTAB, DT_STRSZ, DT_SYMTAB, DT_GNU_HASH, DT_HASH),
    *(DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM, DT_VERDEF, DT_VERDEFNUM),
)
_VERSIONED, _PLT_ENTRIES = 1, 2
_ALL: Final = (1 << 64) - 1

Span = tuple[int, int]
"""The vaddrs from the first up to but not including the last."""


class Reason(IntEnum):
    """Why a loop stopped."""

    GONE = 1
    NO_TABLE = 2
    TOO_MUCH = 3
    OUTSIDE = 4
    NO_KIND = 5
    NO_SYMBOL = 6
    NOT_RELATIVE = 7
    NO_CODE = 8
    TOO_FAR = 9


class Stopped(Exception):
    """A loop met what it cannot do, at the word ``where`` (a vaddr): ``what`` is the kind, value or
    symbol that is wrong."""

    def __init__(self, reason: Reason, where: int = 0, what: int = 0) -> None:
        super().__init__(reason, where, what)
        self.reason, self.where, self.what = reason, where, what


def _words(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_uint64) for name in names.split()]


class _Table(ctypes.Structure):
    _fields_ = _words(
        "bias readable readable_count"
        " strtab strsz symtab gnu_hash sysv_hash versym verneed verneednum verdef verdefnum"
        " count labels_count labels rows strings versions bloom buckets chains sysv_buckets sysv_chains"
        " bloom_mask shift bucket_count chain_count first sysv_bucket_count sysv_chain_count"
    )


class _Job(ctypes.Structure):
    _fields_ = _words(
        "bias page_size start kinds writable code pointers parts"
        " writable_count code_count pointer_count part_count pages where what"
    )


@lru_cache(maxsize=1)
def functions() -> ctypes.PyDLL:
    """The loops themselves; they keep Python's lock, as one loop at a time has SIGBUS to itself."""
    path = Path(__file__).with_name("loops-x86_64.so")
    try:
        library = ctypes.PyDLL(os.fspath(path))
    except OSError as error:
        raise LoadError(f"the loader's own loops cannot be used: {error}") from None
    for name, arguments in (
        *(("copy", 4), ("open_table", 2), ("list_versions", 1), ("missing_version", 4), ("text_at", 6)),
        *(("look_up", 12), ("look_name_up", 5)),
        *(("survey", 3), ("use", 3), ("gather", 6), ("relocate", 12)),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_uint64] * arguments, ctypes.c_int64
    return library


def _text(text: bytes) -> bytearray:
    return bytearray(text + b"\0")  # not a ctypes array, each of which makes a type of its own


def _at(data: NDArray[Any] | array[int] | bytearray) -> int:
    """Where the elements of an array (contiguous, writable, and kept by the caller) are.

    numpy's stubs do not say that its arrays are buffers before Python 3.12.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if len(data) else 0  # type: ignore[arg-type]


def _run(name: str, *arguments: int) -> None:
    reason = getattr(functions(), name)(*arguments)
    if reason:
        raise Stopped(Reason(reason))


def copy(to: int, from_: int, length: int) -> None:
    """Copy bytes from address to address; :class:`Stopped` with the one that could not be read or written."""
    where = ctypes.c_uint64()
    try:
        _run("copy", to, from_, length, ctypes.addressof(where))
    except Stopped as stopped:
        raise Stopped(stopped.reason, where.value) from None


# ----------------------------------------------------------------------------------------------- names
class Names:
    """The dynamic symbols of a library in memory: ``tags`` of its dynamic section are vaddrs (or numbers).

    Only what is ``readable`` is read.  There are ``at_least`` so many symbols.  ``check`` has every name
    looked at.  Raises :class:`Stopped` for tables that are not where they have to be.
    """

    def __init__(
        self,
        bias: int,
        readable: Sequence[Span],
        tags: Mapping[int, int],
        *,
        at_least: int = 0,
        check: bool = False,
    ) -> None:
        if tags.get(DT_SYMENT, 24) != 24:
            raise Stopped(Reason.NO_TABLE)
        # What the structure points at lives as long as this object.
        self._spans = _spans(readable)
        self._table = table = _Table(
            *(bias & _ALL, _at(self._spans), len(readable)),
            *[tags.get(tag, 0) for tag in _TAGS],
            at_least,
        )
        self.place = ctypes.addressof(table)
        _run("open_table", self.place, check)
        if table.labels_count:
            self._labels = np.zeros(table.labels_count, np.uint32)
            table.labels = _at(self._labels)
            _run("list_versions", self.place)

    def __len__(self) -> int:
        return int(self._table.count)

    def name(self, symbol: int) -> bytes:
        """The name of a symbol."""
        return self._string(0, symbol)

    def _string(self, at: int, symbol: int) -> bytes:
        room, length = 256, ctypes.c_uint64()
        while True:
            copy = bytearray(room)
            _run("text_at", self.place, at, symbol & _ALL, _at(copy), room, ctypes.addressof(length))
            if length.value < room:
                return bytes(copy[: length.value])
            room = length.value + 1

    def missing_version(self, file: bytes, other: Names) -> bytes | None:
        """The first version that is needed of ``file``, and that ``other``, which is that one's, lacks.

        As glibc: a library without any versions lacks none, and what is needed weakly may be missing.
        """
        text, missing = _text(file), ctypes.c_uint64()
        _run("missing_version", self.place, _at(text), other.place, ctypes.addressof(missing))
        return self._string(missing.value, -1) if missing.value else None


def _spans(spans: Iterable[Span]) -> array[int]:
    return array("Q", chain.from_iterable(spans))


class Found(NamedTuple):
    """What was found: ``rows`` of :data:`DEFINITION`, and which of them are IFUNCs; which libraries of the
    scope define any; what was met (:data:`UNBOUND` and its like)."""

    rows: Table
    indirect: NDArray[np.bool_]
    owners: list[int]
    met: int


def look_up(
    mine: Names,
    wanted: NDArray[np.int64],
    scope: Sequence[Names],
    biases: Sequence[int],
    own: int | None,
    *,
    versioned: bool = True,
    plt_entries: bool = False,
) -> Found:
    """What the symbols ``wanted`` (indices in ``mine``) are bound to in ``scope``.

    Its libraries lie at ``biases``; ``own`` is the position of their own library.  What is local, hidden,
    internal or protected is bound there; so is all that it defines itself, unless a library before it does,
    too.  With ``None`` names are looked for wherever they come from.  Versions count where they are
    ``versioned``.  ``plt_entries`` are what is found instead of definitions: undefined symbols that have a
    value.
    """
    found, owners, met = np.empty(len(wanted), DEFINITION), np.zeros(len(scope), np.uint8), ctypes.c_uint64()
    indirect = np.zeros(len(wanted), np.bool_)
    wanted = np.ascontiguousarray(wanted, np.int64)
    tables, offsets = _scope(scope, biases)
    how = versioned * _VERSIONED + plt_entries * _PLT_ENTRIES
    _run(
        "look_up",
        *(mine.place, _at(wanted), len(wanted)),
        *(_at(tables), _at(offsets), len(scope)),
        *(_ALL if own is None else own, how, _at(found)),
        *(_at(indirect), _at(owners), ctypes.addressof(met)),
    )
    return Found(found, indirect, owners.nonzero()[0].tolist(), met.value)


def look_name_up(name: bytes, scope: Sequence[Names], biases: Sequence[int]) -> Table:
    """What ``name``, of any version, is bound to in ``scope``, whose libraries lie at ``biases``: one row."""
    found = np.empty(1, DEFINITION)
    text, (tables, offsets) = _text(name), _scope(scope, biases)
    _run("look_name_up", _at(text), _at(tables), _at(offsets), len(scope), _at(found))
    return found


def _scope(scope: Sequence[Names], biases: Sequence[int]) -> tuple[array[int], array[int]]:
    return array("Q", [names.place for names in scope]), array("Q", [bias & _ALL for bias in biases])


# ----------------------------------------------------------------------------------------------- words
def resolve(addresses: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
    """Replace the resolvers at ``places`` by what they choose; Python's lock is free meanwhile."""
    _resolve()(_at(addresses), _at(places), len(places))


@lru_cache(maxsize=1)
def _resolve() -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 3)(("resolve", functions()))


def kinds_table(kinds: Mapping[int, Kind]) -> NDArray[Any]:
    """What the loops have to know of each relocation kind, by its number."""
    table = np.zeros(_KINDS, _KIND)
    for code, kind in kinds.items():
        known = kind.formula in _FORMULAS
        formula = _FORMULAS.index(kind.formula) + 1 if known else len(_FORMULAS) + 1
        table[code] = formula, kind.size, kind.signed, kind.call
    return table


class Job:
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
        writable: Sequence[Span],
        code: Sequence[Span],
        pointers: Sequence[Span],
        parts: Sequence[tuple[int, int]],
        pages: Span,
        page_size: int,
    ) -> None:
        self._bias, self._start, self._page_size = bias, pages[0], page_size
        self._pages = np.zeros((pages[1] - pages[0]) // page_size, np.uint8)
        lists = writable, code, pointers, [self._part(*part) for part in parts]
        spans, counts = _spans(chain.from_iterable(lists)), [len(part) for part in lists]
        self._kept, self._used = (kinds, spans), np.empty(0, np.uint8)
        places = [_at(spans) + 16 * sum(counts[:before]) for before in range(len(counts))]
        self._job = _Job(*(bias & _ALL, page_size, pages[0], _at(kinds)), *places, *counts, _at(self._pages))
        self._place = ctypes.addressof(self._job)

    def survey(self) -> tuple[dict[int, int], int]:
        """How many rows there are of each kind, and the highest symbol that they have."""
        counts, highest = np.zeros(_KINDS, np.uint64), ctypes.c_uint64()
        self._run("survey", _at(counts), ctypes.addressof(highest))
        kinds = counts.nonzero()[0]
        return dict(zip(kinds.tolist(), counts[kinds].tolist(), strict=True)), highest.value

    def used(self, symbols: int) -> NDArray[np.int64]:
        """Which of so many symbols have to be bound, ascending."""
        self._used = np.zeros(symbols, np.uint8)
        self._run("use", _at(self._used), symbols)
        return self._used.nonzero()[0]

    def rows(self, code: int, count: int) -> Table:
        """The rows of a kind, of which there are ``count``: a copy.  Their symbols are used."""
        rows = np.empty(count, RELOCATION)
        self._run("gather", code, _at(rows), count, _at(self._used), len(self._used))
        return rows

    def relocate(
        self,
        known: Table,
        added: NDArray[np.uint64],
        head: tuple[int, int],
        called: NDArray[np.int64],
        pointed: NDArray[np.int64],
        addresses: NDArray[np.uint64],
        found: Table,
        late: NDArray[np.bool_],
    ) -> None:
        """Write all words but those of symbols that are ``late``, and of formulas that are not the loops'.

        First come the ``known`` rows, of B + A; then the load bias is added at the vaddrs ``added``; then
        come the rows of ``head`` (vaddr and count), of B + A, and those surveyed.  ``called`` and
        ``pointed`` say where each symbol is in ``addresses``, ``found`` and ``late``.
        """
        first = _spans([self._part(*head)])
        self._run(
            "relocate",
            *(_at(known), len(known), _at(added), len(added), _at(first)),
            *(_at(called), _at(pointed), len(called), _at(addresses), _at(found), _at(late)),
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
        return (self._bias + vaddr) & _ALL, count

    def _run(self, name: str, *arguments: int) -> None:
        try:
            _run(name, self._place, *arguments)
        except Stopped as stopped:
            raise Stopped(stopped.reason, self._job.where, self._job.what) from None
