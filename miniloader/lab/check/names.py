"""The names of a file: looked up by the compiled loops, or in Python where there are none.

On a processor that the loops do not ship for (riscv64), in a Python without its lock, and where they are
damaged or may not be run, :class:`NamesInPython` does what ``native/names.c`` does: more slowly, by the rules
of glibc's ``elf/dl-lookup.c``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import (
    SHN_ABS,
    SHN_UNDEF,
    STB_GNU_UNIQUE,
    STB_LOCAL,
    STB_WEAK,
    STT_FILE,
    STT_GNU_IFUNC,
    STT_SECTION,
    STT_TLS,
    GnuHash,
    SymbolTable,
    SysvHash,
    gnu_hash,
    sysv_hash,
)
from miniloader.elf.versions import VERSION_HIDDEN
from miniloader.loader.symbol_lookup import DEFINITION, MappedSymbols, look_name_up, look_up
from miniloader.native import Reason, Stopped, buffer_address, gate
from miniloader.values import NamedTuple

__all__ = ["Names", "NamesInPython", "definitions_of", "is_defined", "names_of"]

_STB_GLOBAL: Final = 1
_FOUND: Final = (_STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE)  # bindings
_INTERNAL, _HIDDEN, _PROTECTED = 1, 2, 3  # visibilities (gABI 4, st_other)
_OLDEST: Final = 2  # of the indices of versions: 1 is the file's name, this the first that it defines
_MOST_SHARED: Final = 16  # chains that a symbol is in: linkers make it one
_MOST_STEPS: Final = 1 << 22  # symbols that are looked at: seconds, a hundred times the usual


class _ListedSymbol(NamedTuple):
    """A symbol that its file's hash table leads to; ``version`` is its entry of ``DT_VERSYM``, if any."""

    symbol: int
    defined: bool
    version: int | None


class _How(NamedTuple):
    """Whether versions count; whether PLT entries are found instead of definitions."""

    versioned: bool
    plt_entries: bool


class NamesInPython:
    """The dynamic symbols of a file; ``rows`` are those of ``symbols`` in fields of 64 bits."""

    def __init__(self, symbols: SymbolTable, rows: NDArray[np.void]) -> None:
        self._symbols, self.rows = symbols, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, symbol: int) -> bytes:
        """The name of a symbol; empty where it is outside of the strings."""
        return self._symbols.name_bytes(symbol)

    def version(self, symbol: int) -> str | None:
        """The name of a symbol's version; None for none, and for the base version."""
        version = self._symbols.version(symbol)
        return None if version is None else version.name

    def candidates(self, name: bytes) -> Sequence[_ListedSymbol]:
        """What can be bound to of that ``name``, and undefined symbols that have a value, in chain order."""
        return self._by_name.get(name, ())

    def find(self, name: bytes, version: str | None, *, plt_entries: bool = False) -> int | None:
        """The symbol that ``name`` is bound to, of the ``version`` or for who asks for none."""
        default = []
        for symbol, defined, number in self.candidates(name):
            if defined is plt_entries:
                continue
            if number is None:
                return symbol
            hidden, labelled = bool(number & VERSION_HIDDEN), self.version(symbol)
            if version is None:
                if number & ~VERSION_HIDDEN <= _OLDEST:
                    return symbol
                default += [] if hidden else [symbol]
            elif labelled == version or (labelled is None and not hidden):
                return symbol
        return default[0] if len(default) == 1 else None

    @cached_property
    def _by_name(self) -> Mapping[bytes, Sequence[_ListedSymbol]]:
        by_name: dict[bytes, list[_ListedSymbol]] = defaultdict(list)
        versym = self._symbols.versym
        for symbol, name in self._reached():
            defined = bool(self.rows["shndx"][symbol] != SHN_UNDEF)
            number = int(versym[symbol]) if len(versym) else None
            by_name[name].append(_ListedSymbol(symbol, defined, number))
        return dict(by_name)

    def _reached(self) -> Iterator[tuple[int, bytes]]:
        """Each symbol that may be bound to, in chain order, where the hash of its name leads to it."""
        info, shndx, value = (self.rows[field] for field in ("info", "shndx", "value"))
        kind = info & 0xF
        usable = np.isin(info >> 4, _FOUND) & ~np.isin(self.rows["other"] & 3, (_INTERNAL, _HIDDEN))
        usable &= (kind <= STT_TLS) & (kind != STT_SECTION) & (kind != STT_FILE) | (kind == STT_GNU_IFUNC)
        usable &= (value != 0) | (shndx == SHN_ABS) | (kind == STT_TLS)
        table = self._symbols.hash
        if isinstance(table, GnuHash):
            return self._in_gnu_hash(table, usable)
        return self._in_sysv_hash(table, usable) if table is not None else iter(())

    def _in_gnu_hash(self, table: GnuHash, usable: NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
        ends = np.cumsum(table.chains & 1)
        chain = ends - (table.chains & 1)  # the number of each symbol's chain
        wide = table.bloom.dtype == np.dtype("<u8")  # of others the loops, too, let every hash pass
        for at in np.flatnonzero(usable[table.first : table.first + len(table.chains)]).tolist():
            name = self.name(at + table.first)
            hashed = gnu_hash(name)
            start = int(table.buckets[hashed % len(table.buckets)]) - table.first
            if hashed | 1 != int(table.chains[at]) | 1 or not 0 <= start <= at or chain[start] != chain[at]:
                continue
            if not wide or table.may_have(hashed):
                yield at + table.first, name

    def _in_sysv_hash(self, table: SysvHash, usable: NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
        chains, steps = table.chains.tolist(), 0
        for bucket, symbol in enumerate(table.buckets.tolist()):
            while 0 < symbol < len(chains):
                steps += 1
                if steps > _MOST_SHARED * len(chains):  # chains that lead in a circle, or into each other
                    raise Stopped(Reason.TOO_MUCH)
                if usable[symbol] and sysv_hash(name := self.name(symbol)) % len(table.buckets) == bucket:
                    yield symbol, name
                symbol = chains[symbol]

    @cached_property
    def fields(self) -> list[tuple[int, int, int, int, int]]:
        """Of each symbol: info, other, shndx, value, size."""
        names = ("info", "other", "shndx", "value", "size")
        return list(zip(*(self.rows[name].tolist() for name in names), strict=True))

    def definitions_of(
        self, wanted: Iterable[int], scope: Sequence[NamesInPython], home: int | None, how: _How
    ) -> Iterator[tuple[int, ...]]:
        """As the function of that name, for symbols of this file: rows of :data:`DEFINITION`."""
        steps = 0
        for symbol in wanted:
            if symbol >= len(self):
                raise Stopped(Reason.NO_TABLE)
            info, other, shndx, *_ = self.fields[symbol]
            stays = other & 3 in (_INTERNAL, _HIDDEN) or info >> 4 == STB_LOCAL
            stays = stays or (other & 3 == _PROTECTED and shndx != SHN_UNDEF)
            at_home = home if stays or shndx != SHN_UNDEF else None  # where it is unless found before
            if stays and how.plt_entries:
                at_home, before = None, scope[:0]
            else:
                before = scope if at_home is None else scope[: 0 if stays else at_home]
            name = self.name(symbol)
            version = self.version(symbol) if how.versioned else None
            for place, names in enumerate(before):
                steps += 1 + len(names.candidates(name))
                there = names.find(name, version, plt_entries=how.plt_entries)
                if there is not None:
                    yield _definition(place, there, names)
                    break
            else:
                yield (-1, 0, 0, 0, 0, info, 0) if at_home is None else _definition(at_home, symbol, self)
            if steps > _MOST_STEPS:
                raise Stopped(Reason.TOO_MUCH)


def _definition(place: int, symbol: int, names: NamesInPython) -> tuple[int, ...]:
    info, _, shndx, value, size = names.fields[symbol]
    return place, symbol, value, value, size, info, shndx


# ------------------------------------------------------------------------------------------------ both ways
Names = MappedSymbols | NamesInPython
"""The dynamic symbols of a file.  All of a process are of one class."""


def names_of(
    symbols: SymbolTable, rows: NDArray[np.void], tables: bytearray, tags: Mapping[int, int]
) -> Names:
    """What looks names up in ``symbols``, whose ``rows`` and other tables lie in ``tables`` at ``tags``.

    :class:`Stopped` for tables that do not let it.
    """
    if gate.lacks_own_code() is not None:
        return NamesInPython(symbols, rows)
    return MappedSymbols(buffer_address(tables), [(0, len(tables))], tags, at_least=len(symbols))


def definitions_of(
    names: Names,
    wanted: NDArray[np.int64],
    scope: Sequence[Names],
    home: int | None,
    *,
    versioned: bool = True,
    plt_entries: bool = False,
) -> NDArray[np.void]:
    """What the symbols ``wanted`` are bound to in ``scope``: rows of
    :data:`~miniloader.loader.symbol_lookup.DEFINITION`.  ``home`` is the place of their own file in it;
    :func:`~miniloader.loader.symbol_lookup.look_up` has the rules.  :class:`Stopped` where it takes too long.
    """
    if isinstance(names, NamesInPython):
        members = [member for member in scope if isinstance(member, NamesInPython)]
        rows = names.definitions_of(wanted.tolist(), members, home, _How(versioned, plt_entries))
        return np.array(list(rows), DEFINITION)
    mapped = [member for member in scope if isinstance(member, MappedSymbols)]
    how = {"versioned": versioned, "plt_entries": plt_entries}
    return np.frombuffer(look_up(names, wanted, mapped, [0] * len(mapped), home, **how).rows, DEFINITION)


def is_defined(names: Names, name: bytes) -> bool:
    """Whether there is a definition of ``name`` for who asks for no version."""
    if isinstance(names, NamesInPython):
        return names.find(name, None) is not None
    return look_name_up(name, [names], [0])[0] >= 0
