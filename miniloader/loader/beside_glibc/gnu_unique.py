"""``STB_GNU_UNIQUE``: symbols of which a process has one, whoever defines them.

C++ puts into every library a copy of an inline variable; the first one found is everybody's.  glibc keeps a
table of them that it does not show, but dlsym(3) answers from it.  For names that none of ld.so's libraries
define the table is ours.  Source: glibc's ``do_lookup_unique``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import STB_GNU_UNIQUE
from miniloader.elf.tables import Table
from miniloader.loader.beside_glibc import host
from miniloader.loader.scope import Bindings, Definer, find_name, find_names

__all__ = ["forget", "settle", "settled"]

_ours: Final[dict[bytes, tuple[int, Definer]]] = {}


def settle(library: Definer, bindings: Bindings, addresses: NDArray[np.uint64]) -> list[Definer]:
    """Replace, in ``addresses``, those of unique symbols by the process's one; who of ours defines them.

    ``library`` is the one that is being bound.
    """
    places = np.flatnonzero(
        (bindings.owner >= 0) & (bindings.field("info") >> np.uint64(4) == STB_GNU_UNIQUE)
    )
    if not len(places):
        return []
    symbols = bindings.wanted[places]
    answers = _of_host(library, symbols)
    used: dict[int, Definer] = {}
    for place, symbol, answer in zip(places.tolist(), symbols.tolist(), answers, strict=True):
        if answer is not None:
            addresses[place] = answer
            continue
        definer = bindings.scope[int(bindings.owner[place])]
        name = library.names.name(symbol)
        addresses[place], owner = _ours.setdefault(name, (int(addresses[place]), definer))
        used[id(owner)] = owner
    return list(used.values())


def settled(name: bytes, address: int, definer: Definer) -> tuple[int, Definer | None]:
    """The process's one ``name``, where a look-up found ``definer``'s at ``address``; who of ours has it."""
    for library in host.libraries():
        if _is_unique(find_name(name, [library]))[0]:
            return host.symbol_address(library.handle, name) or 0, None
    return _ours.setdefault(name, (address, definer))


def forget(definer: Definer) -> None:
    """``definer`` goes: its symbols are nobody's any more."""
    for name in [name for name, (_, owner) in _ours.items() if owner is definer]:
        del _ours[name]


def _of_host(library: Definer, symbols: NDArray[np.int64]) -> list[int | None]:
    """The address of each of ``symbols`` of ``library`` whose name a library of ld.so's defines as unique."""
    addresses: list[int | None] = [None] * len(symbols)
    remaining = np.arange(len(symbols))
    for host_library in host.libraries():
        unique = _is_unique(find_names(library, symbols[remaining], host_library))
        for place in remaining[unique].tolist():
            addresses[place] = host.symbol_address(
                host_library.handle, library.names.name(int(symbols[place]))
            )
        remaining = remaining[~unique]
    return addresses


def _is_unique(definitions: Table) -> NDArray[np.bool_]:
    return np.asarray((definitions["owner"] >= 0) & (definitions["info"] >> np.uint64(4) == STB_GNU_UNIQUE))
