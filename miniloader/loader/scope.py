"""Which definition a symbol is bound to: scopes, and lookups for all names of a library at once.

A scope is a sequence of libraries, looked through in order; the first that defines a name (weak or not) wins.
dlopen(3)'s is the process's global scope, then the library and its dependencies, breadth first.  The
rules for versions are those of glibc's ``elf/dl-lookup.c``: a name with a version matches that version,
or an unversioned definition; a name without one matches the base or the oldest version, else the only
visible one.

Most names a large library looks up it defines itself, and its own hash table already holds their hashes (but
for the lowest bit).  So other libraries' Bloom filters reject them all in a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import (
    SHN_ABS,
    SHN_UNDEF,
    STB_GLOBAL,
    STB_GNU_UNIQUE,
    STB_LOCAL,
    STB_WEAK,
    STT_COMMON,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_NOTYPE,
    STT_OBJECT,
    STT_TLS,
    STV_HIDDEN,
    STV_INTERNAL,
    STV_PROTECTED,
    GnuHash,
    SymbolTable,
    gnu_hash,
    gnu_hashes,
)
from miniloader.elf.versions import VERSION_HIDDEN
from miniloader.values import dataclass

__all__ = ["Bindings", "Definer", "bind"]

_BINDS: Final = (STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE)
_TYPES: Final = (STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_COMMON, STT_TLS, STT_GNU_IFUNC)
_INVISIBLE: Final = (STV_INTERNAL, STV_HIDDEN)
_NOWHERE: Final = -1
_LOW: Final = 17  # bits of a hash that are left out where most are told apart by the others
_FEW: Final = 300  # names up to which looking up one by one is faster
_FEW_CHAINS: Final = 100  # chains up to which walking them one by one is


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

    ``owner`` is the position in ``scope``, -1 for none; ``symbol`` the index in that library's table.

    The last ``pointers`` of them are there a second time, as all but calls are bound: a program that is not
    position-independent takes the entry in its own PLT for a function's address, and so everybody has to.
    """

    wanted: NDArray[np.int64]
    scope: Sequence[Definer]
    owner: NDArray[np.int64]
    symbol: NDArray[np.int64]
    pointers: int = field(default=0, kw_only=True)

    def addresses(self) -> NDArray[np.uint64]:
        """Bias + value of each definition; the plain value of an absolute symbol; 0 for none."""
        found = np.zeros(len(self.wanted), np.uint64)
        for position in self._owners():
            definer = self.scope[position]
            here = self.owner == position
            rows, symbol = definer.symbols.rows, self.symbol[here]
            absolute = rows["shndx"][symbol] == SHN_ABS
            found[here] = rows["value"][symbol] + np.where(absolute, np.uint64(0), np.uint64(definer.bias))
        return found

    def label(self, place: int) -> str:
        """The name of the symbol that ``wanted[place]`` is bound to."""
        return self.scope[int(self.owner[place])].symbols.name(int(self.symbol[place]))

    def place(self, symbols: NDArray[np.uint32], *, call: bool = False) -> NDArray[np.int64]:
        """Where each of ``symbols`` is in ``wanted``, all of which must be, as it is bound for a ``call``."""
        return (self._called if call else self._pointed)[symbols]

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

    def _owners(self) -> list[int]:
        return np.flatnonzero(np.bincount(self.owner + 1)[1:]).tolist()

    def field(self, name: str) -> NDArray[Any]:
        """Field ``name`` of each definition's symbol; 0 for none."""
        found = np.zeros(len(self.wanted), np.uint64)
        for position in self._owners():
            here = self.owner == position
            found[here] = self.scope[position].symbols.rows[name][self.symbol[here]]
        return found


def bind(table: SymbolTable, wanted: NDArray[np.int64], scope: Sequence[Definer], own: int) -> Bindings:
    """Bind the symbols ``wanted`` of ``table``, whose library is ``scope[own]``.

    Symbols that are local, hidden or protected bind to the library itself, as does index 0.
    """
    owner = np.full(len(wanted), _NOWHERE, np.int64)
    symbol = np.zeros(len(wanted), np.int64)
    binding, visibility = table.rows["info"][wanted] >> 4, table.rows["other"][wanted] & 3
    known = table.rows["shndx"][wanted] != SHN_UNDEF
    at_home = (binding == STB_LOCAL) | (visibility == STV_INTERNAL) | (visibility == STV_HIDDEN)
    at_home |= (visibility == STV_PROTECTED) & known
    owner[at_home], symbol[at_home] = own, wanted[at_home]

    defined = known & ~at_home
    undefined = np.flatnonzero(~known & ~at_home)
    tables = tuple(definer.symbols for definer in scope)
    _search(table, wanted, undefined, tables, owner, symbol)
    suspects = _suspects(table, wanted, np.flatnonzero(defined), tables[:own])
    _search(table, wanted, suspects, tables[:own], owner, symbol)
    rest = defined & (owner == _NOWHERE)
    owner[rest], symbol[rest] = own, wanted[rest]
    calls = Bindings(wanted, scope, owner, symbol)
    # Only what lies where it was linked can have given away the addresses of its PLT's entries.
    program = next((place for place, definer in enumerate(scope) if definer.bias == 0), None)
    return calls if program is None else _with_pointers(table, calls, program, ~at_home)


def _with_pointers(table: SymbolTable, calls: Bindings, program: int, visible: NDArray[np.bool_]) -> Bindings:
    """The same, and what ``scope[program]`` has PLT entries for, unless an earlier library defines it."""
    entries = (_plt_entries(calls.scope[program].symbols),)
    later = np.flatnonzero(visible & ((calls.owner > program) | (calls.owner == _NOWHERE)))
    defined = table.rows["shndx"][calls.wanted[later]] != SHN_UNDEF
    open_ = np.concatenate([later[~defined], _suspects(table, calls.wanted, later[defined], entries)])
    owner, symbol = np.full_like(calls.owner, _NOWHERE), np.zeros_like(calls.symbol)
    _search(table, calls.wanted, open_, entries, owner, symbol)
    found = np.flatnonzero(owner != _NOWHERE)
    return Bindings(
        np.concatenate([calls.wanted, calls.wanted[found]]),
        calls.scope,
        np.concatenate([calls.owner, np.full_like(found, program)]),
        np.concatenate([calls.symbol, symbol[found]]),
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


def _suspects(
    table: SymbolTable, wanted: NDArray[np.int64], defined: NDArray[np.intp], earlier: Sequence[SymbolTable]
) -> NDArray[np.intp]:
    """Which symbols that are ``defined`` by their own library an ``earlier`` one may define, too.

    Their hashes are known but for the lowest bit, and most pass no Bloom filter.
    """
    known = None
    if len(defined) and isinstance(table.hash, GnuHash):
        known = _known_hashes(table.hash, wanted[defined])
    if known is None:
        return defined
    if len(known) < _FEW_CHAINS:
        return defined[_occurring(known.tolist(), earlier)]
    if any(not isinstance(other.hash, GnuHash) for other in earlier):
        return defined
    theirs, high = _all_hashes(tuple(earlier))
    maybe = np.flatnonzero(high[known >> _LOW])
    known, defined = known[maybe], defined[maybe]
    place = np.minimum(np.searchsorted(theirs, known), len(theirs) - 1)
    return defined[theirs[place] == known] if len(theirs) else defined


def _occurring(hashes: Sequence[int], tables: Sequence[SymbolTable]) -> list[int]:
    """Which hashes (by position) a table has, with their lowest bit set or not; most pass no Bloom filter."""
    filters = [(table.hash, *_filter(table)) for table in tables]

    def occurs(hashed: int) -> bool:
        for gnu, bloom, mask, shift in filters:
            word = bloom[(hashed >> 6) & mask]
            if not (word >> (hashed & 63)) & 3 or (shift and not (word >> ((hashed >> shift) & 63)) & 1):
                continue
            if not isinstance(gnu, GnuHash) or gnu.chain(hashed) or gnu.chain(hashed | 1):
                return True
        return False

    return [position for position, hashed in enumerate(hashes) if occurs(hashed)]


@lru_cache(maxsize=4)
def _all_hashes(tables: tuple[SymbolTable, ...]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """The hashes of all symbols of ``tables`` without their lowest bit, ascending; which upper bits occur.

    Kept, because the tables of the process's global scope are the same from load to load.
    """
    hashes = (table.hash.chains for table in tables if isinstance(table.hash, GnuHash))
    found = np.concatenate([np.empty(0, np.uint32), *hashes]) & np.uint32(0xFFFFFFFE)
    found.sort()
    high = np.zeros(1 << (32 - _LOW), bool)
    high[found >> _LOW] = True
    return found, high


def _known_hashes(table: GnuHash, symbols: NDArray[np.int64]) -> NDArray[np.uint32] | None:
    """The hashes of hashed ``symbols`` without their lowest bit; ``None`` when one is not hashed."""
    places = symbols - table.first
    if int(places.min()) < 0 or int(places.max()) >= len(table.chains):
        return None
    return np.asarray(table.chains[places] & np.uint32(0xFFFFFFFE), np.uint32)


def _bloom(gnu: GnuHash, hashes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which ``hashes`` the table may hold."""
    bits = np.uint32(gnu.bloom.itemsize * 8)
    words = gnu.bloom[(hashes // bits) & np.uint32(len(gnu.bloom) - 1)]
    first, second = hashes % bits, (hashes >> np.uint32(gnu.shift)) % bits
    return np.asarray((words >> first) & (words >> second) & np.uint64(1), bool)


def _search(
    table: SymbolTable,
    wanted: NDArray[np.int64],
    open_: NDArray[np.intp],
    tables: Sequence[SymbolTable],
    owner: NDArray[np.int64],
    symbol: NDArray[np.int64],
) -> None:
    """Look the symbols at positions ``open_`` up in ``tables`` and note which defines them."""
    if len(open_) < _FEW:
        _search_few(table, wanted, open_, tables, owner, symbol)
        return
    positions = open_.tolist()
    names = table.names(wanted[open_])
    labels = table.version_names(wanted[open_])
    hashes = gnu_hashes(names)
    left = np.arange(len(positions))
    for place, other in enumerate(tables):
        if not len(left):
            return
        found = find_all(other, left, names, labels, hashes)
        for item, index in found.items():
            owner[positions[item]], symbol[positions[item]] = place, index
        if found:
            left = np.array([item for item in left.tolist() if item not in found], np.intp)


def _search_few(
    table: SymbolTable,
    wanted: NDArray[np.int64],
    open_: NDArray[np.intp],
    tables: Sequence[SymbolTable],
    owner: NDArray[np.int64],
    symbol: NDArray[np.int64],
) -> None:
    """The same a name at a time, which is faster as long as there are few.

    The Bloom filters (see ``GnuHash.candidates``) are read here, since nearly every look-up ends there.
    """
    filters = [(place, other, *_filter(other)) for place, other in enumerate(tables)]
    names, labels = table.names(wanted[open_]), table.version_names(wanted[open_])
    for position, name, label in zip(open_.tolist(), names, labels, strict=True):
        hashed = gnu_hash(name)
        for place, other, bloom, mask, shift in filters:
            word = bloom[(hashed >> 6) & mask]
            if (word >> (hashed & 63)) & (word >> ((hashed >> shift) & 63)) & 1:
                gnu = other.hash
                candidates = gnu.chain(hashed) if isinstance(gnu, GnuHash) else _slow(other, name)
                found = _match(other, candidates, name, label)
                if found is not None:
                    owner[position], symbol[position] = place, found
                    break


def _filter(table: SymbolTable) -> tuple[list[int], int, int]:
    """A Bloom filter's words, the mask of their number, and its shift; one that lets all pass for none."""
    gnu = table.hash
    if isinstance(gnu, GnuHash):
        return gnu.bloom_list, len(gnu.bloom_list) - 1, gnu.shift
    return [0xFFFFFFFFFFFFFFFF], 0, 0


def find_all(
    table: SymbolTable,
    items: NDArray[np.intp],
    names: Sequence[bytes],
    versions: Sequence[str | None],
    hashes: NDArray[np.uint32],
) -> dict[int, int]:
    """Which of ``items`` (positions in names, versions and hashes) the table defines: item → symbol index."""
    if not isinstance(table.hash, GnuHash):
        plain = (
            (item, _match(table, _slow(table, names[item]), names[item], versions[item]))
            for item in items.tolist()
        )
        return {item: index for item, index in plain if index is not None}
    candidates: dict[int, list[int]] = {}
    for item, index in _chains(table.hash, items, hashes):
        candidates.setdefault(item, []).append(index)
    matches = (
        (item, _match(table, indices, names[item], versions[item])) for item, indices in candidates.items()
    )
    return {item: index for item, index in matches if index is not None}


def _slow(table: SymbolTable, name: bytes) -> list[int]:
    if table.hash is not None:
        return table.hash.candidates(name)
    return [int(index) for index in np.flatnonzero(table.defined)]


def _chains(gnu: GnuHash, items: NDArray[np.intp], hashes: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Walk the hash chains of all ``items`` together, a step at a time: (item, symbol with its hash)."""
    alive = items[_bloom(gnu, hashes[items])]
    if len(alive) < _FEW_CHAINS:
        pairs = (
            (item, gnu.chain(hashed))
            for item, hashed in zip(alive.tolist(), hashes[alive].tolist(), strict=True)
        )
        return [(item, index) for item, indices in pairs for index in indices]
    wanted = hashes[alive]
    at = gnu.buckets[wanted % np.uint32(len(gnu.buckets))].astype(np.int64) - gnu.first
    found: list[tuple[int, int]] = []
    while True:
        inside = (at >= 0) & (at < len(gnu.chains))
        alive, wanted, at = alive[inside], wanted[inside], at[inside]
        if not len(alive):
            return found
        values = gnu.chains[at]
        same = (values | np.uint32(1)) == (wanted | np.uint32(1))
        found += zip(alive[same].tolist(), (at[same] + gnu.first).tolist(), strict=True)
        on = (values & np.uint32(1)) == 0
        alive, wanted, at = alive[on], wanted[on], at[on] + 1


def _match(table: SymbolTable, candidates: list[int], name: bytes, version: str | None) -> int | None:
    """The candidate that ``name`` in ``version`` is bound to (``do_lookup_x`` and ``check_match`` of
    glibc).
    """
    versioned: list[int] = []
    for index in candidates:
        if index >= len(table.rows):
            continue
        at, info, other, shndx, value, _ = table.rows[index].item()
        if table.strings[at : at + len(name) + 1] != name + b"\0":
            continue
        if shndx == SHN_UNDEF or info >> 4 not in _BINDS or other & 3 in _INVISIBLE:
            continue
        kind = info & 0xF
        if kind not in _TYPES or (value == 0 and shndx != SHN_ABS and kind != STT_TLS):
            continue
        if not len(table.versym):
            return index
        raw = int(table.versym[index])
        if version is None:
            if raw & ~VERSION_HIDDEN < 3:  # local, base, or the oldest version
                return index
            if not raw & VERSION_HIDDEN:
                versioned.append(index)
            continue
        label = table.versions.get(raw & ~VERSION_HIDDEN)
        if label is not None and not label.base:
            if label.name == version:
                return index
        elif not raw & VERSION_HIDDEN:
            return index
    return versioned[0] if len(versioned) == 1 else None
