"""dlopen(3) and dlclose(3): by name along the caller's paths, by path, what is there already, counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Final

from miniloader.elf import ElfImage, Source
from miniloader.errors import LoadError, SymbolError
from miniloader.loader import unload
from miniloader.loader.beside_glibc import dynamic_linker, stand_ins
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.from_inside.caller import Caller
from miniloader.loader.graph import Graph, Resolution
from miniloader.loader.loaded import Loaded, move_before
from miniloader.loader.policy import Policy

__all__ = ["Load", "close_library", "library_of", "load_with", "open_library"]

Load = Callable[[Source, ElfImage | None, str, Policy, Graph], Loaded]
"""Loads a file: what is in it if known, the name it was asked for by, what is allowed, and in which graph it
was found."""

_SPROF: Final = 0x40000000  # __RTLD_SPROF: glibc's sprof(1) passes it
#: All flags but those that dlopen(3) knows.
_UNKNOWN: Final = ~(
    os.RTLD_LAZY
    | os.RTLD_NOW
    | os.RTLD_NOLOAD
    | os.RTLD_DEEPBIND
    | os.RTLD_GLOBAL
    | os.RTLD_NODELETE
    | _SPROF
)
_load: Final[list[Load]] = []
#: Whether any handle of ours has been given to the program, or to a library of ld.so's: then True is in it.
handed_out: Final[set[bool]] = set()


def load_with(load: Load) -> None:
    """What is found shall be loaded by ``load``."""
    _load[:] = [load]


def open_library(name: bytes, flags: int, caller: Caller) -> int:
    """The handle of the library ``name`` for ``caller``; 0 where it is not there and ``RTLD_NOLOAD`` says
    that it is not to be loaded.  :class:`LoadError` where it cannot be.
    """
    text = os.fsdecode(name)
    if flags & _UNKNOWN:
        text = "invalid mode parameter"
        raise LoadError(f"{caller.name}: dlopen {text}: flags {flags:#x}", ld_so=text)
    if not flags & (os.RTLD_LAZY | os.RTLD_NOW):
        ld_so = f"{text}: invalid mode for dlopen(): Invalid argument"
        raise LoadError(f"{caller.name}: dlopen with flags {flags:#x}: neither lazy nor now", ld_so=ld_so)
    graph = Graph(caller.policy, caller.tell)
    graph.look_around()
    answer = graph.look(text, caller.asker, caller.name, open_host=not flags & os.RTLD_NOLOAD)
    graph.event("open", caller.name, f"dlopen {text}: {answer.how}: {answer.path}", path=answer.path)
    if isinstance(answer.what, Source):
        if flags & os.RTLD_NOLOAD:
            answer.what.close()
            return 0
        library = _load_new(answer.what, answer.image, text, flags, caller, graph)
    elif isinstance(answer.what, HostLibrary):
        return _open_host(answer, flags)
    else:
        library = answer.what
        library.handles += 1
        if library.settle(graph.listing, partial(move_before, unload.present)):
            for member in library.before[::-1]:
                member.run_waiting()  # who asks is a constructor of the load that has brought it
        if flags & os.RTLD_NODELETE:
            library.will_stay = library.stays = True
        if flags & os.RTLD_GLOBAL:
            unload.make_global(library.scope)
    handle = stand_ins.handle_of(library.mapped)
    handed_out.add(caller.library is None)
    if handle is None:
        unload.let_go(library)
        raise LoadError(f"{library.name}: was loaded without running it, so that it has no handle")
    if handle not in _by_handle:
        _by_handle[handle] = library
        library.undo.callback(_by_handle.pop, handle)
    return handle


_by_handle: Final[dict[int, Loaded]] = {}  # those that have been handed out


def _load_new(
    source: Source, image: ElfImage | None, name: str, flags: int, caller: Caller, asked_in: Graph
) -> Loaded:
    """Load the file for ``caller``: bound at once; lazily where functions are missing, and it may be so."""
    policy, path = _policy_for(caller.policy, flags), source.name
    try:
        return _load[0](source, image, name, policy, asked_in)
    except SymbolError:
        if not flags & os.RTLD_LAZY or os.environ.get("LD_BIND_NOW"):
            raise
        lazily = replace(policy, bind="lazy", prepared=False)
        return _load[0](Source.open(path), None, name, lazily, asked_in)


@lru_cache(maxsize=16)
def _policy_for(policy: Policy, flags: int) -> Policy:
    """What is allowed where ``policy`` is the caller's, with these ``flags``."""
    return replace(
        policy,
        bind="now",
        address=None,
        deep=bool(flags & os.RTLD_DEEPBIND),
        is_global=bool(flags & os.RTLD_GLOBAL),
        stays=bool(flags & os.RTLD_NODELETE),
    )


def _open_host(answer: Resolution, flags: int) -> int:
    """A handle of ld.so's own library, with what ``flags`` ask for."""
    flags &= ~os.RTLD_DEEPBIND
    if answer.handle is None:  # the program
        return dynamic_linker.global_handle()
    if flags & (os.RTLD_GLOBAL | os.RTLD_NODELETE):
        handle = dynamic_linker.open_host(answer.path, load=False, flags=flags)
        if handle is not None:
            dynamic_linker.close_host(answer.handle)
            return handle
    return answer.handle


def library_of(handle: int) -> Loaded | None:
    """The library of ours that ``handle`` is of, whether dlopen(3) has given it or dladdr1(3) has told it."""
    if handle in _by_handle:
        return _by_handle[handle]
    return unload.find_present(lambda library: stand_ins.handle_of(library.mapped) == handle)


def close_library(handle: int, caller: Caller) -> int | None:
    """One caller less holds the library behind ``handle``; None where it is glibc's to close."""
    if not stand_ins.is_handle(handle):
        return None
    library = library_of(handle)
    if library is not None and library.stays:
        return 0  # as in glibc, which does not even count
    if library is None or not library.handles:
        name = f"{library.name}: " if library is not None else ""
        raise LoadError(f"{name}dlclose: is not open", ld_so=f"{name}shared object not open")
    unload.let_go(library, caller.library)
    return 0
