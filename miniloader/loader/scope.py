"""Which definition a symbol is bound to: scopes, and lookups for all names of a library at once.

A scope is a sequence of libraries, looked through in order; the first that defines a name (weak or not) wins.
dlopen(3)'s is the process's global scope, then the library and its dependencies, breadth first.  The
rules for versions are those of glibc's ``elf/dl-lookup.c``: a name with a version matches that version,
or an unversioned definition; a name without one matches the base or the oldest version, else the only
visible one.  The look-ups themselves are in :mod:`miniloader.native`.

Where ``LD_DYNAMIC_WEAK`` is set a weak definition gives way to another one that comes later, as it did in
old ld.sos.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any, Final, Protocol

from miniloader.arrays import NDArray, np
from miniloader.elf.symbols import STB_WEAK, SymbolTable
from miniloader.elf.tables import Table
from miniloader.forking import cached_property
from miniloader.loader.symbol_lookup import DEFINITION, MappedSymbols, column, field_at, look_name_up, look_up
from miniloader.native import run
from miniloader.values import dataclass

__all__ = ["WEAK_GIVES_WAY", "Bindings", "Definer", "bind", "find_name", "find_names", "is_weak"]

#: Whether a weak definition gives way to later ones.
WEAK_GIVES_WAY: Final = "LD_DYNAMIC_WEAK" in os.environ

_FEW: Final = 64  # symbols of a library that need more than to be bound; others have as many as they have


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
        """Its dynamic symbols, as arrays."""
        ...

    @property
    def names(self) -> MappedSymbols:
        """Its dynamic symbols where they lie in memory, to be looked up by name."""
        ...


@dataclass(frozen=True, eq=False)
class Noted:
    """The addresses that symbols are bound to, and the places of those that need more.

    ``unique`` are unique symbols, ``asked`` the functions that were asked for, ``resolvers`` the IFUNCs of
    libraries that are not ours.
    """

    addresses: array[int]
    unique: Sequence[int]
    asked: Sequence[int]
    resolvers: Sequence[int]


@dataclass(frozen=True, eq=False)
class Bindings:
    """What the symbols ``wanted`` (indices, ascending) of one library are bound to.

    ``rows`` has a row of :data:`~miniloader.loader.symbol_lookup.DEFINITION` for each; ``indirect``
    says which are IFUNCs (a byte each), whose addresses are what their resolvers return, ``owners`` are the
    positions of the libraries that define any, and ``met`` says what is among them.  Loading looks at each
    :meth:`column`; as arrays of numpy they are :attr:`found` and its fields.

    The last ``pointers`` of them are there a second time, as all but calls are bound: a program that is not
    position-independent takes the entry in its own PLT for a function's address, and so everybody has to.
    """

    wanted: array[int]
    scope: Sequence[Definer]
    rows: array[int]
    indirect: bytearray = field(default_factory=bytearray, kw_only=True)
    owners: Sequence[int] = field(default=(), kw_only=True)
    met: int = field(default=0, kw_only=True)
    pointers: int = field(default=0, kw_only=True)

    def column(self, name: str) -> array[int]:
        """A field of each row."""
        return column(self.rows, name)

    @cached_property
    def found(self) -> Table:
        """The rows as an array."""
        return np.asarray(self.rows).view(DEFINITION)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The position in ``scope`` of the library each is bound to, -1 for none."""
        return self.field("owner")

    @property
    def symbol(self) -> NDArray[np.int64]:
        """Its index in that library's table."""
        return self.field("symbol")

    def addresses(self) -> array[int]:
        """Bias + value of each definition; the plain value of an absolute symbol; 0 for none."""
        return self.noted(bytearray(len(self.scope))).addresses

    def noted(self, ours: bytearray, asked: Iterable[int] = ()) -> Noted:
        """The addresses, and what needs more than to be bound.

        ``ours`` says of each library of the scope whether it is (a byte each); ``asked`` are addresses of
        functions.
        """
        count, wanted, noted = len(self.wanted), array("Q", sorted(asked)), ctypes.c_uint64()
        addresses, notes = array("Q", [0]) * count, array("q", [0]) * _FEW
        while True:
            room = notes, len(notes), ctypes.addressof(noted)
            run("note", self.rows, count, ours, wanted, len(wanted), addresses, *room)
            if noted.value <= len(notes):
                break
            notes = array("q", [0]) * noted.value
        kinds: tuple[list[int], ...] = [], [], []
        for note in notes[: noted.value]:
            kinds[note & 3].append(note >> 2)
        return Noted(addresses, *kinds)

    def at(self, place: int, name: str) -> int:
        """A field of one row, of which a :meth:`column` has every."""
        return field_at(self.rows, place, name)

    def owner_at(self, place: int) -> Definer:
        """The library that ``wanted[place]`` is bound to."""
        return self.scope[self.at(place, "owner")]

    def label(self, place: int) -> str:
        """The name of the symbol that ``wanted[place]`` is bound to."""
        return self.owner_at(place).symbols.name(self.at(place, "symbol"))

    def place(self, symbols: NDArray[np.uint32], *, call: bool = False) -> NDArray[np.int64]:
        """Where each of ``symbols`` is in ``wanted``, all of which must be, as it is bound for a ``call``."""
        return np.asarray(self.places(call=call))[symbols]

    def places(self, *, call: bool) -> array[int]:
        """Where each symbol of the library is in ``wanted``, as it is bound for a ``call``; else 0."""
        return self._called if call else self._pointed

    @cached_property
    def _called(self) -> array[int]:
        wanted = self.wanted[: len(self.wanted) - self.pointers]
        table = array("q", bytes(8 * (wanted[-1] + 1) if wanted else 0))
        run("list_places", wanted, 0, len(wanted), table, len(table))
        return table

    @cached_property
    def _pointed(self) -> array[int]:
        if not self.pointers:
            return self._called
        table, first = self._called[:], len(self.wanted) - self.pointers
        run("list_places", self.wanted, first, len(self.wanted), table, len(table))
        return table

    def field(self, name: str) -> NDArray[Any]:
        """A field of each row: of the definition's symbol ``value``, ``size``, ``info`` or ``shndx``."""
        return self.found[name]


def bind(wanted: array[int], scope: Sequence[Definer], own: int) -> Bindings:
    """Bind the symbols ``wanted`` of the library ``scope[own]``.

    Symbols that are local, hidden or protected bind to the library itself, as does index 0.
    """
    names, biases = _in_memory(scope)
    rows, indirect, owners, met = look_up(names[own], wanted, names, biases, own)
    calls = Bindings(wanted, scope, rows, indirect=indirect, owners=owners, met=met)
    if WEAK_GIVES_WAY:
        calls = _with_others_than_weak(calls, own)
    # Only what lies where it was linked can have given away the addresses of its PLT's entries.
    program = next((place for place, bias in enumerate(biases) if bias == 0), None)
    return calls if program is None else _with_pointers(calls, program, own)


def _with_pointers(calls: Bindings, program: int, own: int) -> Bindings:
    """``calls``, and once more those that ``scope[program]`` has PLT entries for, as all but calls bind them.

    Not those that an earlier library defines.
    """
    pairs = zip(calls.wanted, calls.column("owner"), strict=True)
    later = array("q", [symbol for symbol, owner in pairs if owner > program or owner < 0])
    library, definer = (calls.scope[place].names for place in (own, program))
    found = look_up(library, later, [definer], [0], None, plt_entries=True).rows
    hits = [place for place, owner in enumerate(column(found, "owner")) if owner >= 0]
    wanted, rows, width = calls.wanted[:], calls.rows[:], len(DEFINITION)
    for place in hits:
        wanted.append(later[place])
        rows.append(program)
        rows += found[place * width + 1 : (place + 1) * width]
    return Bindings(
        wanted,
        calls.scope,
        rows,
        indirect=calls.indirect + bytes(len(hits)),
        owners=sorted({*calls.owners, program}) if hits else calls.owners,
        met=calls.met,
        pointers=len(hits),
    )


def _with_others_than_weak(calls: Bindings, own: int) -> Bindings:
    """``calls``, but where one is bound to a weak definition, to the first that is not weak, if any is."""
    rows, indirect, owners = calls.rows[:], calls.indirect[:], set(calls.owners)
    width, of_own = len(DEFINITION), calls.scope[own].symbols.rows
    pairs = zip(calls.column("owner"), calls.column("info"), strict=True)
    for place, (owner, info) in enumerate(pairs):
        symbol = calls.wanted[place]
        if owner < 0 or info >> 4 != STB_WEAK or (owner == own and of_own["other"][symbol] & 3):
            continue
        for number in range(owner + 1, len(calls.scope)):
            definer = calls.scope[number]
            found = look_up(
                calls.scope[own].names, array("q", [symbol]), [definer.names], [definer.bias], None
            )
            row = found.rows
            if row[0] >= 0 and column(row, "info")[0] >> 4 != STB_WEAK:
                rows[place * width : (place + 1) * width] = array("q", [number, *row[1:]])
                indirect[place] = found.indirect[0]
                owners.add(number)
                break
    return Bindings(calls.wanted, calls.scope, rows, indirect=indirect, owners=sorted(owners), met=calls.met)


def is_weak(name: bytes, definer: Definer) -> bool:
    """Whether ``definer`` defines ``name`` weakly."""
    row = find_name(name, [definer], newest=True)
    return row[0] >= 0 and column(row, "info")[0] >> 4 == STB_WEAK


def find_names(library: Definer, symbols: Sequence[int], definer: Definer) -> array[int]:
    """What of ``definer`` has the names of ``symbols`` of ``library``, in any version: a row for each."""
    names, wanted = definer.names, array("q", symbols)
    return look_up(library.names, wanted, [names], [definer.bias], None, versioned=False).rows


def find_name(name: bytes, scope: Sequence[Definer], *, newest: bool = False) -> array[int]:
    """What ``name``, in any version, is bound to in ``scope``: one row; the ``newest`` as dlsym(3) has it."""
    return look_name_up(name, *_in_memory(scope), newest=newest)


def _in_memory(scope: Sequence[Definer]) -> tuple[list[MappedSymbols], list[int]]:
    return [definer.names for definer in scope], [definer.bias for definer in scope]
