"""Linking a library with relocated pages from the cache: they are mapped, and what differs is filled in."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import gnu_unique, stand_ins, unwinder
from miniloader.loader.graph import Graph
from miniloader.loader.loaded import Loaded
from miniloader.loader.mapping import zero_bss
from miniloader.loader.relocation_job import resolve
from miniloader.loader.scope import Definer
from miniloader.loader.symbol_lookup import places_of
from miniloader.loader.thread_storage import thread_local_words

if TYPE_CHECKING:
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["link_prepared"]


def link_prepared(graph: Graph, library: Loaded, ready: Prepared, order: Sequence[Definer]) -> bool:
    """Relocate it with its cached pages; ``False`` if they do not fit, and the plain way is left."""
    memory = library.mapped
    reason = ready.differs(order)
    try:
        if reason is None:
            ready.check_pages()
            ready.lay(memory)
    except LoadError as error:
        reason = str(error)
    if reason is not None:
        graph.go_plain(library, reason)
        zero_bss(graph, library)
        return False
    values = _values(library, ready, order)
    ready.fill(memory, values)
    if ready.tables["tls_rows"] or library.image.tls is not None:
        bindings, rows = ready.thread_local(order)
        for vaddrs, words, size in thread_local_words(library, bindings, rows):
            memory.put(vaddrs, words, size)
    resolvers = [of for of in ready.meant("resolver", order) if isinstance(of[1], Loaded)]
    # When all else is there, since the library's own code runs: others' first, which it may call.
    for of_library in (False, True):
        places = [place for place, definer in resolvers if (definer is library) == of_library]
        if places and graph.policy.init:
            resolve(values, array("q", places))
        for place in places if not graph.policy.init else ():
            values[place] = 0
        if places:
            ready.fill(memory, values)
    for position in ready.held:
        library.hold(order[position])
    text = f"{ready.count} pages from the cache, {ready.filled} of them copied for what differs here"
    numbers = {"words": ready.words, "pages": ready.filled, "prepared": ready.count}
    graph.event("relocate", library.name, text, **numbers)
    return True


def _values(library: Loaded, ready: Prepared, order: Sequence[Definer]) -> array[int]:
    """What the words that differ are in this process; of an IFUNC of ours, its resolver's address."""
    values = ready.values(order)
    of_host = [place for place, of in ready.meant("resolver", order) if not isinstance(of, Loaded)]
    if of_host:
        resolve(values, array("q", of_host))
    for place, _ in ready.meant("thread exit", order):
        values[place] = library.stub_for(values[place]).address
    for place, definer in ready.meant("unique", order):
        name = os.fsencode(ready.names[place])
        values[place], owner = gnu_unique.settled(name, values[place], definer)
        if owner is not None:
            library.share(owner)
    if places_of(unwinder.walkers(), values):
        unwinder.bring()
    library.may_open |= stand_ins.answer(values, places_of(stand_ins.asked(), values))
    return values
