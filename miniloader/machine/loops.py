"""The inner loops of linking, in C: see ``loops.c``, whose structures and functions are declared here.

They are compiled once, for x86-64, and lie beside this file (``python -m fixtures.build --prebuilt`` makes them
anew, and a test compares).  Arrays go in and out as numpy's; who calls holds the loader's lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.source import Bytes
from miniloader.elf.symbols import GnuHash, SymbolTable, SysvHash
from miniloader.elf.tables import RELOCATION, Table, symbol_dtype
from miniloader.errors import LoadError
from miniloader.machine.relocation import Kind
from miniloader.values import dataclass

__all__ = ["DEFINITION", "Job", "Names", "Range", "Reason", "Stopped", "kinds_table", "look_up"]

DEFINITION: Final = np.dtype([
    ("owner", "i8"), ("symbol", "i8"),
    ("address", "u8"), ("value", "u8"), ("size", "u8"), ("info", "u8"), ("shndx", "u8"),
])  # fmt: skip
"""What a symbol is bound to: the position of a library in a scope (-1: none), its symbol there, and of that one
the address and the fields of the symbol table (0: none)."""

_KIND: Final = np.dtype([("formula", "u1"), ("size", "u1"), ("signed", "u1"), ("call", "u1")])
_SPAN: Final = np.dtype([("start", "u8"), ("end", "u8")])
_RANGE: Final = np.dtype([("start", "u8"), ("end", "u8"), ("file_offset", "i8"), ("first", "u8")])
_WORD: Final = np.dtype([("vaddr", "u8"), ("value", "u8"), ("size", "u8")])
_KINDS: Final = 256
_WINDOW: Final = 1 << 16
#: In the order of loops.c, from 1 on; all others are one more.
_FORMULAS: Final = ("none", "B + A", "S + A", "S", "S + A - P", "Z + A", "indirect")
_GNU_HASH, _SYSV_HASH = 1, 2
_ALL: Final = (1 << 64) - 1


class Reason(IntEnum):
    """Why a loop stopped."""

    OUTSIDE = 1
    NO_KIND = 2
    NO_SYMBOL = 3
    NOT_RELATIVE = 4
    NO_CODE = 5
    TOO_FAR = 6
    CUT_SHORT = 7
    FAILED = 8


class Stopped(Exception):  # noqa: N818 - it is not told to anybody, only handled
    """A loop met what it cannot do: ``where`` is a row's number or a vaddr, ``error`` is errno, or the value
    that does not fit."""

    def __init__(self, reason: Reason, where: int, error: int) -> None:
        super().__init__(reason, where, error)
        self.reason, self.where, self.error = reason, where, error


def _fields(words: str, halves: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_uint64) for name in words.split()] + [
        (name, ctypes.c_uint32) for name in halves.split()
    ]


class _Table(ctypes.Structure):
    _fields_ = _fields(
        "rows strings versym versions labels bloom buckets chains count size version_count",
        "hash shift bloom_mask bucket_count chain_count first",
    )


class _Job(ctypes.Structure):
    _fields_ = _fields(
        "bias page_size fd kinds segments code pointers ranges"
        " symbols segment_count code_count pointer_count range_count window_count"
        " copied written words_of words laid where error",
        "",
    )


@lru_cache(maxsize=1)
def _loops() -> ctypes.CDLL:
    path = Path(__file__).with_name("loops-x86_64.so")
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise LoadError(f"the loader's own loops cannot be used: {error}") from None
    word = ctypes.c_uint64
    library.look_up.argtypes = [word] * 9
    library.look_up.restype = None
    for name, arguments in (("survey", 5), ("compute", 8), ("relocate", 7)):
        function = getattr(library, name)
        function.argtypes, function.restype = [word] * arguments, ctypes.c_int64
    return library


def _at(array: NDArray[Any]) -> int:
    """Where the elements of an array (contiguous, and kept by the caller) are."""
    return int(array.__array_interface__["data"][0])


# ----------------------------------------------------------------------------------------------- names
class Names:
    """A symbol table as the loops read it."""

    def __init__(self, table: SymbolTable) -> None:
        if table.rows.dtype != symbol_dtype(64, "<") or len(table.versym) not in (0, len(table.rows)):
            raise LoadError("symbols of another machine cannot be looked up")
        labels, versions = _labels(table)
        hashed, words = table.hash, [np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint32)]
        kind = shift = first = 0
        if isinstance(hashed, GnuHash):
            kind, shift, first = _GNU_HASH, hashed.shift, hashed.first
            words = [hashed.bloom, hashed.buckets, hashed.chains]
        elif isinstance(hashed, SysvHash):
            kind, words[1:] = _SYSV_HASH, [hashed.buckets, hashed.chains]
        # What the structure points at lives as long as this object.
        self._kept = kept = [
            *(table.rows, _octets(table.strings), table.versym, versions, _octets(labels)),
            *map(np.ascontiguousarray, words),
        ]
        places = [_at(array) if len(array) else 0 for array in kept]
        counts = len(table.rows), len(table.strings), len(versions)
        bloom, buckets, chains = map(len, words)
        structure = _Table(*places, *counts, kind, shift, max(bloom - 1, 0), buckets, chains, first)
        self._structure = structure
        self.place = ctypes.addressof(structure)


def _octets(data: Bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)


def _labels(table: SymbolTable) -> tuple[bytes, NDArray[np.uint32]]:
    """The names of the versions one after the other, and where in them each begins, by its index; 0: none."""
    named = {index: version.name for index, version in table.versions.items() if not version.base}
    places = np.zeros(max(named, default=-1) + 1, np.uint32)
    texts, end = [b""], 1
    for index, name in named.items():
        texts.append(name.encode("utf-8", "backslashreplace"))
        places[index] = end
        end += len(texts[-1]) + 1
    return b"\0".join([*texts, b""]), places


def look_up(
    mine: Names,
    wanted: NDArray[np.int64],
    scope: Sequence[Names],
    biases: Sequence[int],
    own: int | None,
    *,
    versioned: bool = True,
) -> Table:
    """What the symbols ``wanted`` (indices in ``mine``) are bound to in ``scope``: rows of :data:`DEFINITION`.

    ``own`` is the position of their own library.  What is local, hidden, internal or protected is bound there;
    so is all that it defines itself, unless a library before it does, too.  With ``None`` names are looked for
    wherever they come from.  Versions count where they are ``versioned``.
    """
    found = np.empty(len(wanted), DEFINITION)
    wanted = np.ascontiguousarray(wanted, np.int64)
    tables = (ctypes.c_uint64 * len(scope))(*[names.place for names in scope])
    offsets = (ctypes.c_uint64 * len(scope))(*biases)
    _loops().look_up(
        *(mine.place, _at(wanted), len(wanted)),
        *(ctypes.addressof(tables), ctypes.addressof(offsets), len(scope)),
        *(_ALL if own is None else own, versioned, _at(found)),
    )
    return found


# ----------------------------------------------------------------------------------------------- words
@dataclass(frozen=True)
class Range:
    """Whole pages, by vaddrs, that can be written to: of the file from ``file_offset`` on, or anonymous
    (``None``)."""

    start: int
    end: int
    file_offset: int | None


def kinds_table(kinds: Mapping[int, Kind]) -> NDArray[Any]:
    """What the loops have to know of each relocation kind, by its number."""
    table = np.zeros(_KINDS, _KIND)
    for code, kind in kinds.items():
        known = kind.formula in _FORMULAS
        formula = _FORMULAS.index(kind.formula) + 1 if known else len(_FORMULAS) + 1
        table[code] = formula, kind.size, kind.signed, kind.call
    return table


class Job:
    """The relocation of one library, mapped at ``bias``, whose file is ``fd``.

    ``segments`` are the vaddrs that may be relocated; what is at ``pointers`` has to lead into ``code``;
    ``symbols`` is how many there are.  ``ranges`` are the pages they lie on.
    """

    def __init__(
        self,
        *,
        bias: int,
        fd: int,
        page_size: int,
        kinds: NDArray[Any],
        segments: Sequence[tuple[int, int]],
        code: Sequence[tuple[int, int]],
        pointers: Sequence[tuple[int, int]],
        ranges: Sequence[Range],
        symbols: int,
    ) -> None:
        rows, windows = [], 0
        for one in ranges:
            rows.append((one.start, one.end, -1 if one.file_offset is None else one.file_offset, windows))
            windows += -(-(one.end - one.start) // _WINDOW)
        self._ranges, self._page_size = ranges, page_size
        spans = [np.array(list(part), _SPAN) for part in (segments, code, pointers)]
        masks = np.zeros((2, windows), np.uint16)
        self._copied, self._written = masks
        words_of, laid = np.zeros(windows + 2, np.uint64), np.zeros(windows, np.uint8)
        self._kept = [kinds, *spans, np.array(rows, _RANGE), masks, words_of, laid]
        places = [_at(array) for array in (kinds, *spans, self._kept[4])]
        counts = symbols, *map(len, spans), len(rows), windows
        self._structure = _Job(
            *(bias & _ALL, page_size, fd, *places, *counts),
            *(_at(self._copied), _at(self._written), _at(words_of), 0, _at(laid), 0, 0),
        )
        self._place = ctypes.addressof(self._structure)

    @property
    def pages(self) -> int:
        """How many pages are written."""
        return int(np.unpackbits(self._written.view(np.uint8)).sum())

    def note(self, vaddrs: Iterable[int]) -> None:
        """Count the pages at ``vaddrs`` as written: words there are, by others."""
        self._mark(self._written, vaddrs)

    def _mark(self, pages: NDArray[np.uint16], vaddrs: Iterable[int]) -> None:
        first = 0
        for one in self._ranges:
            for vaddr in vaddrs:
                if one.start <= vaddr < one.end:
                    window, away = divmod(vaddr - one.start, _WINDOW)
                    pages[first + window] |= 1 << away // self._page_size
            first += -(-(one.end - one.start) // _WINDOW)

    def survey(self, rows: Table) -> tuple[list[int], NDArray[np.int64]]:
        """How many ``rows`` there are of each kind, and the symbols (ascending) that have to be bound.

        Raises :class:`Stopped`, with a row's number.
        """
        counts, used = np.zeros(_KINDS, np.uint64), np.zeros(self._structure.symbols, np.uint8)
        self._call("survey", _at(rows), len(rows), _at(counts), _at(used))
        return counts.tolist(), np.flatnonzero(used)

    def compute(
        self,
        rows: Table,
        called: NDArray[np.int64],
        pointed: NDArray[np.int64],
        addresses: NDArray[np.uint64],
        found: Table,
        late: NDArray[np.bool_],
    ) -> None:
        """Work out, once, the words of the ``rows`` that have been surveyed, but for those of other formulas
        and of symbols that are ``late``.

        ``called`` and ``pointed`` say where each symbol is in ``addresses``, ``found`` and ``late``.  Raises
        :class:`Stopped`, with a row's number.
        """
        words = np.empty(len(rows), _WORD)
        self._kept.append(words)
        self._structure.words = _at(words)
        arrays = called, pointed, addresses, found, late
        self._call("compute", _at(rows), len(rows), *map(_at, arrays))

    def relocate(
        self,
        added: NDArray[np.uint64],
        known: Table,
        file_offset: int,
        count: int,
        *,
        copied: Iterable[int] = (),
    ) -> None:
        """Write all words: the load bias is added at the vaddrs ``added``; ``known`` rows, and ``count`` rows of
        the file from ``file_offset`` on, are bias + addend; then come those computed.

        The pages at the vaddrs ``copied`` are not as in the file any more.  Raises :class:`Stopped`, with a
        row's number or a vaddr.
        """
        self._mark(self._copied, copied)
        self._call("relocate", _at(added), len(added), _at(known), len(known), file_offset, count)

    def _call(self, name: str, *arguments: int) -> None:
        reason = getattr(_loops(), name)(self._place, *arguments)
        if reason:
            raise Stopped(Reason(reason), self._structure.where, self._structure.error)
