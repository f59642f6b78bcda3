"""Which definition a symbol is bound to: scopes, and lookups for all names of a library at once.

A scope is a sequence of libraries, looked through in order; the first that defines a name (weak or not) wins.
dlopen(3)'s is the process's global scope, then the library and its dependencies, breadth first.  The
rules for versions are those of glibc's ``elf/dl-lookup.c``: a name with a version matches that version,
or an unversioned definition; a name without one matches the base or the oldest version, else the only
visible one.  The look-ups themselves are in :mod:`miniloader.machine.loops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import (
    SHN_ABS,
    SHN_UNDEF,
    STB_LOCAL,
    STV_HIDDEN,
    STV_INTERNAL,
    STV_PROTECTED,
    SymbolTable,
)
from miniloader.elf.tables import Table
from miniloader.machine import loops
from miniloader.values import dataclass

__all__ = ["Bindings", "Definer", "bind", "find_names"]

_names: Final[WeakKeyDictionary[SymbolTable, loops.Names]] = WeakKeyDictionary()


class Definer(Protocol):
    """A library whose symbols others can be bound to."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def bias(self) -> int:
        """Its load bias."""
        ...

    @property
    def build_id(self) -> str | None:
        """The build-id of what is mapped, in hexadecimal."""
        ...

    @property
    def symbols(self) -> SymbolTable:
        """Its dynamic symbols."""
        ...


@dataclass(frozen=True, eq=False)
class Bindings:
    """What the symbols ``wanted`` (indices, ascending) of one library are bound to.

    ``found`` has a row of :data:`~miniloader.machine.loops.DEFINITION` for each.

    The last ``pointers`` of them are there a second time, as all but calls are bound: a program that is not
    position-independent takes the entry in its own PLT for a function's address, and so everybody has to.
    """

    wanted: NDArray[np.int64]
    scope: Sequence[Definer]
    found: Table
    pointers: int = field(default=0, kw_only=True)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The position in ``scope`` of the library each is bound to, -1 for none."""
        return self.field("owner")

    @property
    def symbol(self) -> NDArray[np.int64]:
        """Its index in that library's table."""
        return self.field("symbol")

    def addresses(self) -> NDArray[np.uint64]:
        """Bias + value of each definition; the plain value of an absolute symbol; 0 for none."""
        return np.array(self.found["address"])

    def label(self, place: int) -> str:
        """The name of the symbol that ``wanted[place]`` is bound to."""
        return self.scope[int(self.owner[place])].symbols.name(int(self.symbol[place]))

    def place(self, symbols: NDArray[np.uint32], *, call: bool = False) -> NDArray[np.int64]:
        """Where each of ``symbols`` is in ``wanted``, all of which must be, as it is bound for a ``call``."""
        return self.places(call=call)[symbols]

    def places(self, *, call: bool) -> NDArray[np.int64]:
        """Where each symbol of the library is in ``wanted``, as it is bound for a ``call``; 0 if it is not."""
        return self._called if call else self._pointed

    @cached_property
    def _called(self) -> NDArray[np.int64]:
        wanted = self.wanted[: len(self.wanted) - self.pointers]
        table = np.zeros(int(wanted[-1]) + 1 if len(wanted) else 0, np.int64)
        table[wanted] = np.arange(len(wanted))
        return table

    @cached_property
    def _pointed(self) -> NDArray[np.int64]:
        if not self.pointers:
            return self._called
        table, first = self._called.copy(), len(self.wanted) - self.pointers
        table[self.wanted[first:]] = np.arange(first, len(self.wanted))
        return table

    def field(self, name: str) -> NDArray[Any]:
        """A field of each row: of the definition's symbol ``value``, ``size``, ``info`` or ``shndx``."""
        return self.found[name]


def bind(table: SymbolTable, wanted: NDArray[np.int64], scope: Sequence[Definer], own: int) -> Bindings:
    """Bind the symbols ``wanted`` of ``table``, whose library is ``scope[own]``.

    Symbols that are local, hidden or protected bind to the library itself, as does index 0.
    """
    tables = [_of(definer.symbols) for definer in scope]
    found = loops.look_up(_of(table), wanted, tables, [definer.bias for definer in scope], own)
    calls = Bindings(wanted, scope, found)
    # Only what lies where it was linked can have given away the addresses of its PLT's entries.
    program = next((place for place, definer in enumerate(scope) if definer.bias == 0), None)
    return calls if program is None else _with_pointers(table, calls, program)


def find_names(table: SymbolTable, symbols: NDArray[np.int64], other: Definer) -> NDArray[np.int64]:
    """The indices in the table of ``other`` of what has the names of ``symbols``, of any version; -1: none."""
    found = loops.look_up(_of(table), symbols, [_of(other.symbols)], [0], None, versioned=False)
    return np.where(found["owner"] < 0, -1, found["symbol"])


def _of(table: SymbolTable) -> loops.Names:
    names = _names.get(table)
    if names is None:
        names = _names[table] = loops.Names(table)
    return names


def _with_pointers(table: SymbolTable, calls: Bindings, program: int) -> Bindings:
    """The same, and what ``scope[program]`` has PLT entries for, unless an earlier library defines it."""
    rows = table.rows[calls.wanted]
    visibility = rows["other"] & 3
    at_home = (rows["info"] >> 4 == STB_LOCAL) | (visibility == STV_INTERNAL) | (visibility == STV_HIDDEN)
    at_home |= (visibility == STV_PROTECTED) & (rows["shndx"] != SHN_UNDEF)
    later = np.flatnonzero(~at_home & ((calls.owner > program) | (calls.owner < 0)))
    entries = _of(_plt_entries(calls.scope[program].symbols))
    found = loops.look_up(_of(table), calls.wanted[later], [entries], [0], None)
    hits = found["owner"] >= 0
    found, wanted = found[hits], calls.wanted[later[hits]]
    found["owner"] = program
    return Bindings(
        np.concatenate([calls.wanted, wanted]),
        calls.scope,
        np.concatenate([calls.found, found]),
        pointers=len(found),
    )


@lru_cache(maxsize=1)
def _plt_entries(table: SymbolTable) -> SymbolTable:
    """The same with undefined symbols that have a value as defined ones, and no others.

    Such a value is the address of an entry in the PLT (glibc's ``ELF_RTYPE_CLASS_PLT``).
    """
    rows = table.rows.copy()
    entry = (rows["shndx"] == SHN_UNDEF) & (rows["value"] != 0)
    rows["shndx"] = np.where(entry, SHN_ABS, SHN_UNDEF)
    return replace(table, rows=rows)
