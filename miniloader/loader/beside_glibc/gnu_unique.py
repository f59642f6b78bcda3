"""``STB_GNU_UNIQUE``: symbols of which a process has one, whoever defines them.

C++ puts into every library a copy of an inline variable; the first one found is everybody's.  glibc keeps a
table of them that it does not show, but dlsym(3) answers from it.  For names that none of ld.so's libraries
define the table is ours.  Source: glibc's ``do_lookup_unique``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from miniloader.elf.symbols import STB_GNU_UNIQUE
from miniloader.loader.beside_glibc import dynamic_linker, host
from miniloader.loader.scope import Bindings, Definer, find_name, find_names
from miniloader.loader.symbol_lookup import column

__all__ = ["forget", "settle", "settled"]

_ours: Final[dict[bytes, tuple[int, Definer]]] = {}


def settle(
    library: Definer, bindings: Bindings, addresses: array[int], places: Sequence[int]
) -> list[Definer]:
    """Replace, in ``addresses``, those of unique symbols by the process's one; who of ours defines them.

    ``library`` is the one that is being bound, ``places`` are those of unique symbols.
    """
    symbols = [bindings.wanted[place] for place in places]
    answers = _of_host(library, symbols)
    used: dict[int, Definer] = {}
    for place, symbol, answer in zip(places, symbols, answers, strict=True):
        if answer is not None:
            addresses[place] = answer
            continue
        name = library.names.name(symbol)
        addresses[place], owner = _ours.setdefault(name, (addresses[place], bindings.owner_at(place)))
        used[id(owner)] = owner
    return list(used.values())


def settled(name: bytes, address: int, definer: Definer) -> tuple[int, Definer | None]:
    """The process's one ``name``, where a look-up found ``definer``'s at ``address``; who of ours has it."""
    for library in host.libraries():
        if _unique(find_name(name, [library])):
            return dynamic_linker.symbol_address(library.handle, name) or 0, None
    return _ours.setdefault(name, (address, definer))


def forget(definer: Definer) -> None:
    """``definer`` goes: its symbols are nobody's any more."""
    for name in [name for name, (_, owner) in _ours.items() if owner is definer]:
        del _ours[name]


def _of_host(library: Definer, symbols: Sequence[int]) -> list[int | None]:
    """The address of each of ``symbols`` of ``library`` whose name a library of ld.so's defines as unique."""
    addresses: list[int | None] = [None] * len(symbols)
    remaining = list(range(len(symbols)))
    for host_library in host.libraries() if symbols else ():
        unique = _unique(find_names(library, [symbols[place] for place in remaining], host_library))
        for place in [remaining[found] for found in unique]:
            name = library.names.name(symbols[place])
            addresses[place] = dynamic_linker.symbol_address(host_library.handle, name)
            remaining.remove(place)
    return addresses


def _unique(definitions: array[int]) -> list[int]:
    """Which of the rows of :data:`~miniloader.loader.symbol_lookup.DEFINITION` are of unique symbols."""
    pairs = zip(column(definitions, "owner"), column(definitions, "info"), strict=True)
    return [place for place, (owner, info) in enumerate(pairs) if owner >= 0 and info >> 4 == STB_GNU_UNIQUE]
