"""Linking one library: its symbols are bound, its words relocated, its code made known to the unwinder."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Final

from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.forking import importing
from miniloader.loader.beside_glibc import unwinder
from miniloader.loader.constructors import dependents_first
from miniloader.loader.graph import Graph
from miniloader.loader.link_ordinary import link_ordinary
from miniloader.loader.loaded import Loaded
from miniloader.loader.mapping import protect_relro
from miniloader.loader.relocate import Relocation, refuse_unbound
from miniloader.loader.relocation_groups import TLS, sort_relocations, symbols_of
from miniloader.loader.relocation_job import resolve
from miniloader.loader.scope import Definer, bind
from miniloader.loader.spans import open_names, readable, refuse
from miniloader.loader.symbol_addresses import addresses_of, check_versions, finder
from miniloader.loader.thread_storage import tell_storage, thread_local_words
from miniloader.machine.relocation import KINDS
from miniloader.native import UNBOUND, Stopped, functions

__all__ = ["link_library", "linking_order"]

#: Functions whose calls keep more registers than lazy binding does are among those in the PLT.
DT_AARCH64_VARIANT_PCS: Final = 0x70000005


def linking_order(libraries: Sequence[Loaded], scope: Sequence[Definer]) -> list[Loaded]:
    """``libraries`` in their order, but each after those whose thread-local storage it refers to.

    Where two refer to each other there is no such order: the first to be linked is refused.
    """
    holders = {library for library in libraries if library.image.tls is not None}
    if len(libraries) == 1 or not holders:
        return list(libraries)

    def storage(library: Loaded) -> list[Loaded]:
        return _storage_of_others(library, _lookup_order(library, scope)) if holders - {library} else []

    return dependents_first(libraries[::-1], storage)[::-1]


def _storage_of_others(library: Loaded, order: Sequence[Definer]) -> list[Loaded]:
    """The libraries of ours whose thread-local storage the relocations of ``library`` refer to."""
    image = library.image
    codes = {code for code, kind in KINDS.get(image.header.machine, {}).items() if kind.formula in TLS}
    symbols = (symbols_of(table, codes) for table in image.relocations.tables)
    wanted = array("q", sorted({*chain.from_iterable(symbols)}))
    if not wanted:
        return []
    spans = readable(image, library.plan)
    library.names = open_names(image, spans, library.bias, at_least=wanted[-1] + 1)
    try:
        bindings = bind(wanted, order, order.index(library))
    except Stopped as stopped:
        refuse(image, stopped)
    definers = (order[owner] for owner in bindings.owners)
    return [definer for definer in definers if isinstance(definer, Loaded) and definer is not library]


def _lookup_order(library: Loaded, scope: Sequence[Definer]) -> Sequence[Definer]:
    """Where the library's symbols are looked up: with DT_SYMBOLIC first of all in itself.

    But not where ``RTLD_DEEPBIND`` has put what was asked for first: glibc's ``elf/dl-load.c``.
    """
    symbolic = library.image.dynamic.symbolic and not library.policy.deep
    return [library, *scope] if symbolic else scope


def link_library(graph: Graph, library: Loaded, scope: Sequence[Definer]) -> None:
    """Bind its symbols in ``scope``, relocate, protect, and tell the unwinder."""
    image, memory = library.image, library.mapped
    order = _lookup_order(library, scope)
    try:
        if not _link_prepared(graph, library, order) and not link_ordinary(graph, library, order):
            _link_plain(graph, library, order)
    except Stopped as stopped:
        refuse(image, stopped)
    protect_relro(graph, library)
    if graph.policy.init:  # or none of its code runs, and whoever throws would have to trust its table
        table = library.ready.unwind_table if library.ready is not None else unwinder.eh_frame(image)
        if table is not None:
            library.undo.callback(unwinder.deregister, memory.bias + table)
            if unwinder.register(memory.bias + table, graph.listing):
                graph.event("register", image.path, ".eh_frame, for exceptions", vaddr=table)


def _link_prepared(graph: Graph, library: Loaded, order: Sequence[Definer]) -> bool:
    """Link it with its relocated pages from the cache; ``False`` where it has none that fit."""
    if library.ready is None:
        return False
    with importing:
        from miniloader.loader.link_prepared import link_prepared

    return link_prepared(graph, library, library.ready, order)


def _link_plain(graph: Graph, library: Loaded, order: Sequence[Definer]) -> None:
    """Bind its symbols in ``order`` and relocate."""
    image, memory = library.image, library.mapped
    at_once = image.dynamic.bind_now or DT_AARCH64_VARIANT_PCS in image.dynamic.tags
    lazy = graph.policy.bind == "lazy" and not at_once and DT_PLTGOT in image.dynamic.tags
    relocations = sort_relocations(image, lazy=lazy)
    work = Relocation(image, memory, relocations)
    library.names = work.names
    check_versions(library)
    graph.bindings[library] = bindings = bind(work.wanted, order, order.index(library))
    if bindings.met & UNBOUND:
        refuse_unbound(image, bindings)
    addresses, resolvers = addresses_of(library, bindings)
    number = len(bindings.wanted)
    graph.event("bind", image.path, f"{number} symbol{'s' * (number != 1)}", bindings=bindings)

    read_only = [m for m in memory.plan.mappings if m.kind == "file" and "w" not in m.protection]
    restore = read_only if image.dynamic.text_relocations else []
    for mapping in restore:
        memory.protect(mapping.start, mapping.end, "rw" + mapping.protection[2])
    if left := len(relocations.lazy):  # before an IFUNC's resolver calls through them
        with importing:
            from miniloader.loader.lazy_binding import Slots

        slots = Slots(image, memory, relocations.lazy, finder(library, order))
        library.undo.callback(slots.close)
        library.undo.callback(setattr, library, "bind_left", None)
        library.bind_left = slots.bind_all
        slots.connect()
    words_of = partial(thread_local_words, library, bindings)
    late = bindings.indirect[:]
    if resolvers:  # which are relocated already, so that they can run before anything of the library is
        resolve(addresses, array("q", resolvers))
        for place in resolvers:
            late[place] = 0
    copied = work.apply(bindings, addresses, late, words_of, may_run=graph.policy.init)
    for mapping in restore:
        memory.protect(mapping.start, mapping.end, mapping.protection)
        if "x" in mapping.protection:
            functions().flush_code(memory.bias + mapping.start, memory.bias + mapping.end)
    tell_storage(graph, library)
    if left:
        graph.event("bind", image.path, f"{left} PLT slots left for their first call")
    if graph.tell is not None:
        total, where = len(image.relocations), ", in read-only segments too" if restore else ""
        graph.event(
            "relocate", image.path, f"{total} words on {copied} pages{where}", words=total, pages=copied
        )
