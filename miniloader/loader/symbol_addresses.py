"""What the symbols of a library are bound to, as the addresses that are written.

Mostly the definition's; but a unique symbol is the process's one, the functions that ask about libraries have
stand-ins, and those that register a destructor for a thread's object are told whose it is.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Final

from miniloader.errors import SymbolError
from miniloader.loader import unload
from miniloader.loader.beside_glibc import gnu_unique, host, stand_ins, unwinder
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocate import call_resolver, refuse_unbound
from miniloader.loader.relocation_groups import symbols_of
from miniloader.loader.scope import Bindings, Definer, bind, find_name
from miniloader.loader.spans import refuse
from miniloader.loader.thread_storage import count_for_carrier
from miniloader.native import KINDS, UNBOUND, UNIQUE, Stopped

__all__ = [
    "THREAD_EXIT",
    "addresses_of",
    "check_versions",
    "finder",
    "names_of",
    "thread_exits",
    "used",
]

#: The functions that register a destructor for a thread's object; the third argument says to which library
#: the object belongs.
THREAD_EXIT: Final = (b"__cxa_thread_atexit_impl", b"__cxa_thread_atexit")


def addresses_of(library: Loaded, bindings: Bindings) -> tuple[array[int], Sequence[int]]:
    """The address of each symbol in ``bindings``, and the places of IFUNCs of ld.so's libraries among them.

    Notes what ``library`` is bound to, and so has to stay.
    """
    exits = _thread_exits(bindings) if library.image.tls is not None else []
    ours = bytearray(isinstance(definer, Loaded) for definer in bindings.scope)
    noted = bindings.noted(ours, (*stand_ins.asked(), *unwinder.walkers(), *exits))
    addresses = noted.addresses
    if bindings.met & UNIQUE:
        for definer in gnu_unique.settle(library, bindings, addresses, noted.unique):
            library.share(definer)
    for definer in used(library, bindings):
        library.hold(definer)
    for place in [place for place in noted.asked if addresses[place] in exits]:
        addresses[place] = library.stub_for(addresses[place]).address
    if any(addresses[place] in unwinder.walkers() for place in noted.asked):
        unwinder.bring()
    library.may_open |= stand_ins.answer(addresses, noted.asked)
    return addresses, noted.resolvers


def used(library: Loaded, bindings: Bindings) -> list[Definer]:
    """Who defines what the library is bound to, in the order in which its relocations come to it."""
    owners = list(bindings.owners)
    others = (bindings.scope[owner] for owner in owners)
    if sum(isinstance(other, Loaded) and other is not library for other in others) > 1:
        owner_of = dict(zip(bindings.wanted, bindings.column("owner"), strict=True))
        symbols = (symbols_of(table, range(KINDS)) for table in library.image.relocations.tables)
        met = dict.fromkeys(owner_of.get(symbol) for symbol in dict.fromkeys(chain.from_iterable(symbols)))
        owners = [owner for owner in met if owner in owners]
    return [bindings.scope[owner] for owner in owners]


def thread_exits(bindings: Bindings) -> list[int]:
    """The places in ``bindings.wanted`` of the functions that register a thread's destructors."""
    return list(bindings.noted(bytearray(len(bindings.scope)), _thread_exits(bindings)).asked)


def _thread_exits(bindings: Bindings) -> list[int]:
    """Their addresses."""
    found = [find_name(name, bindings.scope)[:3] for name in THREAD_EXIT]
    return [address for owner, _, address in found if owner >= 0]


def check_versions(library: Loaded) -> None:
    """Raise :class:`SymbolError` when a library that is needed lacks a version that is needed from it.

    As glibc: a library without any versions passes, and so does a version that is needed weakly.
    """
    for needed in dict.fromkeys(library.needs):
        files = map(os.fsencode, names_of(needed))
        found = (library.names.missing_version(file, needed.names) for file in files)
        missing = next(filter(None, found), None)
        if missing is not None:
            version = missing.decode("utf-8", "backslashreplace")
            raise SymbolError(
                f"{library.name}: needs version {version}, which {needed.name} does not define",
                ld_so=f"{needed.name}: version `{version}' not found (required by {library.name})",
            )


def names_of(library: Loaded | HostLibrary) -> Iterable[str]:
    """The names by which whoever needs versions of ``library`` may mean it: those that it was asked for."""
    if isinstance(library, Loaded):
        return library.called
    return [library.soname or os.path.basename(library.name)]


def _is_global(definer: Definer) -> bool:
    return definer.is_global if isinstance(definer, HostLibrary) else definer in unload.global_scope


def finder(library: Loaded, order: Sequence[Definer]) -> Callable[[int], int]:
    """Binds one symbol of the library, as binding all of them at once would have.

    Libraries of ``order`` that have been closed since are passed over; those that have been made global since
    come after those that were global then.
    """

    def bound(index: int, process: Iterable[Definer]) -> Bindings:
        scope = [definer for definer in order if not isinstance(definer, Loaded) or definer.is_mapped]
        place = max((place for place, definer in enumerate(scope, 1) if _is_global(definer)), default=0)
        scope[place:place] = [definer for definer in process if definer not in scope]
        try:
            return bind(array("q", [index]), scope, scope.index(library))
        except Stopped as stopped:
            refuse(library.image, stopped)

    def find(index: int) -> int:
        bindings = bound(index, unload.global_scope)
        if bindings.met & UNBOUND:
            of_host = [theirs for theirs in host.listing().found if theirs.is_global]
            bindings = bound(index, [*of_host, *unload.global_scope])
        refuse_unbound(library.image, bindings)
        address = addresses_of(library, bindings)[0][0]
        count_for_carrier(library)
        return call_resolver(address) if bindings.indirect[0] else address

    return find
