"""dlsym(3) and dlvsym(3): in a library and what it needs, in the global scope, or after the caller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NoReturn

from miniloader.elf.symbols import STT_GNU_IFUNC, STT_TLS
from miniloader.errors import SymbolError
from miniloader.loader import unload
from miniloader.loader.beside_glibc import dynamic_linker, host, stand_ins
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.from_inside.caller import Caller
from miniloader.loader.from_inside.opening import library_of
from miniloader.loader.library import find_symbol
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocate import call_resolver
from miniloader.loader.scope import WEAK_GIVES_WAY, find_name

__all__ = ["symbol"]

_DEFAULT: Final = 0  # RTLD_DEFAULT and RTLD_NEXT of <dlfcn.h>
_NEXT: Final = 0xFFFFFFFFFFFFFFFF


def symbol(handle: int, name: bytes, version: str | None, caller: Caller) -> int | None:
    """The address of ``name``, in ``version`` if there is one, by ``handle`` or by who the ``caller`` is.

    None where only glibc can tell; :class:`SymbolError` where nobody has it.
    """
    if handle == dynamic_linker.global_handle():  # what ld.so has there has been asked for
        definition = find_symbol(unload.global_scope, name, version)
        return None if definition is None else _meant(definition[0])
    if handle not in (_DEFAULT, _NEXT):
        library = library_of(handle)
        if library is None:
            return None
        # Nearly always it is the library's own, which comes first but for filtees.
        is_first = not library.filtees and not WEAK_GIVES_WAY
        first = find_symbol([library], name, version) if is_first else None
        definition = first or find_symbol(library.local_scope(), name, version)
        if definition is None:
            _refuse(library.name, name, version)
        return _meant(definition[0])
    if caller.library is None:
        return _for_theirs(handle, name, version, caller.theirs)
    if handle == _NEXT:
        definition = find_symbol(_after(caller.library), name, version)
    else:
        definition = _find_by_default(caller.library, name, version)
    if definition is None:
        _refuse(caller.name, name, version)
    address, definer = definition
    caller.library.hold(definer)
    return _meant(address)


def _for_theirs(handle: int, name: bytes, version: str | None, caller: HostLibrary | None) -> int | None:
    """What ``caller`` finds by default, or after itself: glibc would take us for the caller."""
    if caller is None:
        return None
    if handle == _NEXT:
        found = host.libraries()
        place = next((place for place, theirs in enumerate(found, 1) if theirs.bias == caller.bias), 0)
        address = _first([theirs for theirs in found[place:] if theirs.is_global], name, version)
    else:
        address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), name, version)
        own = dynamic_linker.open_host(caller.path, load=False) if address is None and caller.path else None
        if own is not None:
            address = dynamic_linker.symbol_address(own, name, version)
            dynamic_linker.close_host(own)
    return None if address is None else _meant(address)


def _first(libraries: list[HostLibrary], name: bytes, version: str | None) -> int | None:
    """Function or object ``name`` of the first of ``libraries`` that has it, in ``version`` or the newest.

    dlopen(3) is not asked for handles: it may be the caller, that stands before glibc's.
    """
    if version is None:
        owner, _, address, _, _, info, _ = find_name(name, libraries, newest=True)
        kind = info & 0xF if owner >= 0 else STT_TLS
    else:
        kind, address = next(_versioned(libraries, name, version), (STT_TLS, 0))
    if kind == STT_TLS:
        return None
    return call_resolver(address) if kind == STT_GNU_IFUNC else address


def _versioned(libraries: list[HostLibrary], name: bytes, version: str) -> Iterator[tuple[int, int]]:
    """Type and address of ``name`` in ``version``, in each of ``libraries`` that has it."""
    for theirs in libraries:
        symbols = replace(theirs.symbols, versions=theirs.versions)
        index = symbols.find(name, version)
        if index is not None:
            row = symbols.rows[index]
            yield int(row["info"]) & 0xF, theirs.bias + int(row["value"])


def _find_globally(name: bytes, version: str | None) -> tuple[int, Loaded | HostLibrary] | None:
    """``name`` in the process's global scope: ld.so's, then those of ours that have been made global."""
    address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), name, version)
    if address is not None:
        return address, host.libraries()[0]
    return find_symbol(unload.global_scope, name, version)


def _find_by_default(
    library: Loaded, name: bytes, version: str | None
) -> tuple[int, Loaded | HostLibrary] | None:
    """``name`` as ``library`` is bound to it: what is global comes first, but for ``RTLD_DEEPBIND``.

    Then what it has been loaded with comes before that, and what has asked for it since comes last.
    """
    around = _around(library)
    with_it = (library.roots or [library])[0].local_scope() if library.policy.deep else []
    return (
        find_symbol(with_it, name, version)
        or _find_globally(name, version)
        or find_symbol(around, name, version)
    )


def _around(library: Loaded) -> list[Loaded | HostLibrary]:
    """Where ``library`` finds what is not global: along with what has been asked for, and needs it."""
    roots = [root for root in library.roots if root.is_mapped] or [library]
    return list(dict.fromkeys(member for root in roots for member in root.local_scope()))


def _after(library: Loaded) -> list[Loaded | HostLibrary]:
    """What comes after ``library`` in the scope that it was loaded with."""
    scope = _around(library)
    return scope[scope.index(library) + 1 :]


def _meant(address: int) -> int:
    """What a library of ours calls for the function at ``address``."""
    return stand_ins.stand_ins().get(address, address)


def _refuse(where: str, name: bytes, version: str | None) -> NoReturn:
    text = name.decode("utf-8", "backslashreplace")
    label = text if version is None else f"{text}, version {version}"
    raise SymbolError(f"{where}: no symbol {label}", ld_so=f"{where}: undefined symbol: {label}")
