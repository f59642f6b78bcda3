"""Linking a library with relocated pages from the cache: they are mapped, and what differs is filled in."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniloader.arrays import NDArray, np
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import gnu_unique, stand_ins, unwinder
from miniloader.loader.graph import Graph
from miniloader.loader.loaded import Loaded
from miniloader.loader.mapping import zero_bss
from miniloader.loader.relocate import call_resolver
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
    values, room = _values(library, ready, order), ready.room(memory)
    ready.fill(room, values)
    if len(ready.arrays["tls_rows"]) or library.image.tls is not None:
        bindings, rows = ready.thread_local(order)
        for vaddrs, words, size in thread_local_words(library, bindings, rows):
            memory.put(vaddrs, words, size)
    resolvers = [of for of in ready.meant("resolver", order) if isinstance(of[1], Loaded)]
    # When all else is there, since the library's own code runs: others' first, which it may call.
    for of_library in (False, True):
        places = [place for place, definer in resolvers if (definer is library) == of_library]
        for place in places:
            values[place] = call_resolver(int(values[place])) if graph.policy.init else 0
        if places:
            ready.fill(room, values)
    for position in ready.held:
        library.hold(order[position])
    text = f"{ready.count} pages from the cache, {ready.filled} of them copied for what differs here"
    numbers = {"words": ready.words, "pages": ready.filled, "prepared": ready.count}
    graph.event("relocate", library.name, text, **numbers)
    return True


def _values(library: Loaded, ready: Prepared, order: Sequence[Definer]) -> NDArray[np.uint64]:
    """What the words that differ are in this process; of an IFUNC of ours, its resolver's address."""
    table = ready.arrays["values"]
    biases = np.array([definer.bias % (1 << 64) for definer in order], np.uint64)
    with np.errstate(over="ignore"):
        values = np.asarray(biases[table["definer"]] + table["offset"], np.uint64)
    for place, definer in ready.meant("resolver", order):
        if not isinstance(definer, Loaded):
            values[place] = call_resolver(int(values[place]))
    for place, _ in ready.meant("thread exit", order):
        values[place] = library.stub_for(int(values[place])).address
    for place, definer in ready.meant("unique", order):
        name = os.fsencode(ready.names[place])
        values[place], owner = gnu_unique.settled(name, int(values[place]), definer)
        if owner is not None:
            library.share(owner)
    answered = array("Q", values.tobytes())
    if places_of(unwinder.walkers(), answered):
        unwinder.bring()
    stand_ins.answer(answered, places_of(stand_ins.asked(), answered))
    return np.asarray(answered)
