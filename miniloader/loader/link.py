"""Mapping, linking and initialising one library: the steps of ``load``, each told as it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan, PlannedCall
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.elf.tables import Table
from miniloader.errors import LoadError, SymbolError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import constructors
from miniloader.loader.beside_glibc import gnu_unique, stand_ins, thread_local, unwinder
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.tls_carrier import Carrier
from miniloader.loader.graph import Graph
from miniloader.loader.lazy_binding import Slots
from miniloader.loader.loaded import Loaded
from miniloader.loader.memory import Memory, OnCall, map_plan
from miniloader.loader.relocate import Relocation, call_resolver, refuse_unbound
from miniloader.loader.relocation_groups import TLS, sort_relocations
from miniloader.loader.relocation_job import resolve
from miniloader.loader.scope import Bindings, Definer, bind, find_name
from miniloader.loader.spans import open_names, readable, refuse
from miniloader.machine.relocation import KINDS, Kind
from miniloader.machine.stub_code import with_third_argument
from miniloader.native import INDIRECT_FUNCTION, UNBOUND, UNIQUE, Stopped

if TYPE_CHECKING:
    from miniloader.loader.prepared.pages import Prepared

__all__ = [
    "initialise_library",
    "link_library",
    "linking_order",
    "map_library",
    "read_life",
    "show_to_libraries",
    "thread_exits",
    "used",
    "zero_library",
]

#: They register a destructor for a thread's object and are told, third, to which library it belongs.
_THREAD_EXIT: Final = (b"__cxa_thread_atexit_impl", b"__cxa_thread_atexit")


def map_library(graph: Graph, library: Loaded) -> None:
    """Reserve address space and map the segments: no page is touched."""
    library.memory = _reserve(graph, library, library.image.plan(PAGE_SIZE))
    library.undo.callback(library.memory.unmap)


def _reserve(graph: Graph, library: Loaded, plan: LoadPlan) -> Memory:
    """Map it where it has been prepared for, where the caller wants it, or where there is room."""
    source, wanted = library.image.source, graph.policy.address if library is graph.new[0] else None
    on_call = _teller(graph, library)
    if library.ready is not None:
        try:
            if wanted in (None, library.ready.address):
                return map_plan(plan, source, address=library.ready.address, on_call=on_call)
            reason = f"it was prepared for {library.ready.address:#x}"
        except LoadError as error:
            reason = str(error)
        graph.go_plain(library, reason)
    return map_plan(plan, source, address=wanted, on_call=on_call)


def zero_library(graph: Graph, library: Loaded) -> None:
    """Zero what of its file pages is bss, unless its pages come from the cache, where that is done."""
    if library.ready is None:
        library.mapped.perform_step("zero", _teller(graph, library))


def _teller(graph: Graph, library: Loaded) -> OnCall | None:
    """Tells each call of the library's plan as an event, if anybody listens."""

    def tell(memory: Memory, call: PlannedCall) -> None:
        numbers = {"bias": memory.bias, "address": memory.bias + call.start, "length": call.length}
        settled = "" if call.is_placed else f"; base is {memory.bias:#x}"
        text = f"{call.text(memory.bias)}: {call.why}{settled}"
        graph.event(call.step, library.image.path, text, **numbers, call=call)

    return tell if graph.tell is not None else None


def linking_order(libraries: Sequence[Loaded], scope: Sequence[Definer]) -> list[Loaded]:
    """``libraries`` in their order, but each after those whose thread-local storage it refers to.

    Where two refer to each other there is no such order: the first to be linked is refused.
    """
    holders = {library for library in libraries if library.image.tls is not None}

    def storage(library: Loaded) -> list[Loaded]:
        return _storage_of_others(library, _lookup_order(library, scope)) if holders - {library} else []

    return constructors.dependents_first(libraries[::-1], storage)[::-1]


def _storage_of_others(library: Loaded, order: Sequence[Definer]) -> list[Loaded]:
    """The libraries of ours whose thread-local storage the relocations of ``library`` refer to."""
    image = library.image
    codes = [code for code, kind in KINDS.get(image.header.machine, {}).items() if kind.formula in TLS]
    tables = image.relocations.tables
    symbols = [table.rest["symbol"][np.isin(table.rest["type"], codes)] for table in tables]
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *symbols])).astype(np.int64)
    if not len(wanted):
        return []
    spans, highest = readable(image, library.plan), image.relocations.highest_symbol
    library.names = open_names(image, spans, library.bias, at_least=highest + 1)
    try:
        bindings = bind(wanted, order, order.index(library))
    except Stopped as stopped:
        refuse(image, stopped)
    definers = (order[owner] for owner in bindings.owners)
    return [definer for definer in definers if isinstance(definer, Loaded) and definer is not library]


def _lookup_order(library: Loaded, scope: Sequence[Definer]) -> Sequence[Definer]:
    """Where the library's symbols are looked up: with DT_SYMBOLIC first of all in itself."""
    return [library, *scope] if library.image.dynamic.symbolic else scope


def link_library(graph: Graph, library: Loaded, scope: Sequence[Definer]) -> None:
    """Bind its symbols in ``scope``, relocate, protect, and tell the unwinder."""
    image, memory = library.image, library.mapped
    order = _lookup_order(library, scope)
    try:
        if library.ready is None or not _fill(graph, library, library.ready, order):
            _link(graph, library, order)
    except Stopped as stopped:
        refuse(image, stopped)
    memory.perform_step("protect", _teller(graph, library))
    if graph.policy.init:  # or none of its code runs, and whoever throws would have to trust its table
        table = library.ready.unwind_table if library.ready is not None else unwinder.eh_frame(image)
        if table is not None and unwinder.register(memory.bias + table):
            library.undo.callback(unwinder.deregister, memory.bias + table)
            graph.event("register", image.path, ".eh_frame, for exceptions", vaddr=table)


def _fill(graph: Graph, library: Loaded, ready: Prepared, order: Sequence[Definer]) -> bool:
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
        zero_library(graph, library)
        return False
    values, room = _values(library, ready, order), ready.room(memory)
    ready.fill(room, values)
    if len(ready.arrays["tls_rows"]) or library.image.tls is not None:
        bindings, rows = ready.thread_local(order)
        for vaddrs, words, size in _thread_local(library, bindings, rows, memory.read):
            ready.store(room, vaddrs, words, size)
    resolvers = [of for of in ready.meant("resolver", order) if isinstance(of[1], Loaded)]
    # When all else is there, since the library's own code runs: others' first, which it may call.
    for own in (False, True):
        places = [place for place, definer in resolvers if (definer is library) == own]
        for place in places:
            values[place] = call_resolver(int(values[place])) if graph.policy.init else 0
        if places:
            ready.fill(room, values)
    for position in ready.held:
        _hold(library, order[position])
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
            _share(library, owner)
    stand_ins.answer(values, table["definer"] != order.index(library))
    return values


def _thread_local(
    library: Loaded,
    bindings: Bindings,
    rows: Iterable[tuple[Kind, Table]],
    read: Callable[[int, int], NDArray[np.uint8]],
) -> list[thread_local.Write]:
    """Open its carriers; the thread-local words to write."""
    template, rows = library.image.tls, tuple(rows)
    if template is None and not rows:
        return []
    library.blocks, writes = thread_local.answer(
        library,
        template,
        lambda: read(template.vaddr, template.filesz).tobytes() if template is not None else b"",
        bindings,
        rows,
        _carrier_of,
    )
    _count_for_carrier(library)
    return writes


def _carrier_of(definer: Definer) -> Carrier | None:
    """Who has the thread-local storage of a library of ours that has been linked."""
    return definer.blocks.own if isinstance(definer, Loaded) else None


def _link(graph: Graph, library: Loaded, order: Sequence[Definer]) -> None:
    """Bind its symbols in ``order`` and relocate."""
    image, memory = library.image, library.mapped
    lazy = graph.policy.bind == "lazy" and not image.dynamic.bind_now and DT_PLTGOT in image.dynamic.tags
    relocations = sort_relocations(image, lazy=lazy)
    work = Relocation(image, memory, relocations)
    library.names = work.names
    _check_versions(library)
    graph.bindings[library] = bindings = bind(work.wanted, order, order.index(library))
    if bindings.met & UNBOUND:
        refuse_unbound(image, bindings)
    addresses = _addresses(library, bindings)
    graph.event("bind", image.path, f"{len(bindings.wanted)} symbols", bindings=bindings)

    def thread_local_words(rows: Iterable[tuple[Kind, Table]]) -> list[thread_local.Write]:
        return _thread_local(library, bindings, rows, memory.read)

    read_only = [m for m in memory.plan.mappings if m.kind == "file" and "w" not in m.protection]
    restore = read_only if image.dynamic.text_relocations else []
    for mapping in restore:
        memory.protect(mapping.start, mapping.end, "rw" + mapping.protection[2])
    if len(relocations.lazy):  # before an IFUNC's resolver calls through them
        slots = Slots(image, memory, relocations.lazy, _finder(library, order))
        library.undo.callback(slots.close)
        slots.connect()
    late = _resolved(bindings, addresses)
    copied = work.apply(bindings, addresses, late, thread_local_words, may_run=graph.policy.init)
    for mapping in restore:
        memory.protect(mapping.start, mapping.end, mapping.protection)
    own = library.blocks.own
    if own is not None and image.tls is not None:
        text = f"module {own.module}, {image.tls.memsz} bytes a thread"
        graph.event("tls", image.path, text, module=own.module, bytes=image.tls.memsz)
    if len(relocations.lazy):
        graph.event("bind", image.path, f"{len(relocations.lazy)} PLT slots left for their first call")
    total = len(image.relocations)
    where = ", in read-only segments too" if restore else ""
    graph.event("relocate", image.path, f"{total} words on {copied} pages{where}", words=total, pages=copied)


def _resolved(bindings: Bindings, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which symbols are IFUNCs of libraries of ours; ``addresses`` gets what those of the system's choose.

    These are relocated already, so that their resolvers can run before anything of the library is.
    """
    late = bindings.indirect
    if bindings.met & INDIRECT_FUNCTION:
        host = np.array([isinstance(definer, HostLibrary) for definer in bindings.scope], np.bool_)
        theirs = (late & host[bindings.owner]).nonzero()[0]
        resolve(addresses, theirs)
        late = late.copy()
        late[theirs] = False
    return late


def show_to_libraries(library: Loaded) -> None:
    """Have dladdr(3) and its like, which libraries of ours call, know the library."""
    memory, own = library.mapped, library.blocks.own
    stand_ins.add(library.image, memory, len(library.names), own.module if own is not None else 0)
    library.undo.callback(stand_ins.remove, memory)


def read_life(library: Loaded) -> list[int]:
    """Note its destructors; the addresses of its constructors."""
    addresses, library.destructors = constructors.read_life(library.image, library.mapped)
    return addresses


def initialise_library(graph: Graph, library: Loaded, addresses: Sequence[int]) -> None:
    """Run its constructors.  Its destructors run even if that does not come to its end, as with ld.so."""

    def tell(address: int) -> None:
        graph.event("initialise", library.name, f"call {address:#x}", address=address)

    library.initialised = True
    constructors.run_constructors(addresses, tell if graph.tell is not None else None)


def _check_versions(library: Loaded) -> None:
    """Raise :class:`SymbolError` when a library that is needed lacks a version that is needed from it.

    As glibc: a library without any versions passes, and so does a version that is needed weakly.
    """
    for other in dict.fromkeys(library.needs):
        soname = other.soname if isinstance(other, HostLibrary) else other.image.soname
        file = os.fsencode(soname or os.path.basename(other.name))
        missing = library.names.missing_version(file, other.names)
        if missing is not None:
            version = missing.decode("utf-8", "backslashreplace")
            raise SymbolError(f"{library.name}: needs version {version}, which {other.name} does not define")


def _addresses(library: Loaded, bindings: Bindings) -> NDArray[np.uint64]:
    """What each symbol is bound to: unique symbols to the process's, a thread's destructors to our own."""
    addresses = bindings.addresses()
    if bindings.met & UNIQUE:
        for definer in gnu_unique.settle(library, bindings, addresses):
            _share(library, definer)
    for definer in used(library, bindings):
        _hold(library, definer)
    for place in thread_exits(library, bindings) if library.image.tls is not None else ():
        function = int(addresses[place])
        addresses[place] = library.stub_for(function).address
    stand_ins.answer(addresses, bindings.owner != bindings.scope.index(library))
    return addresses


def used(library: Loaded, bindings: Bindings) -> list[Definer]:
    """Who defines what the library is bound to, in the order in which its relocations come to it."""
    owners = list(bindings.owners)
    if sum(isinstance(bindings.scope[owner], Loaded) for owner in owners) > 2:
        used = np.concatenate([table.rest["symbol"] for table in library.image.relocations.tables])
        used = used[np.isin(used, bindings.wanted)]
        owner_of = bindings.owner[bindings.place(used, call=True)]
        first = {int(owner): int(np.argmax(owner_of == owner)) for owner in owners}
        owners.sort(key=lambda owner: first[owner])
    return [bindings.scope[owner] for owner in owners]


def _share(library: Loaded, definer: Definer) -> None:
    """Note that ``library`` is bound to a unique symbol of ``definer``, which others will be bound to."""
    _hold(library, definer)
    if isinstance(definer, Loaded):
        definer.share()


def _hold(library: Loaded, definer: Definer) -> None:
    """Note that ``library`` is bound to ``definer``, which must not go before it: ld.so's add_dependency."""
    if isinstance(definer, Loaded) and definer not in (library, *library.before, *library.holds):
        library.holds.append(definer)


def thread_exits(library: Loaded, bindings: Bindings) -> list[int]:
    """The places in ``bindings.wanted`` of the functions that register a thread's destructors."""
    functions = [find_name(name, bindings.scope) for name in _THREAD_EXIT]
    same = [
        (bindings.owner == function["owner"]) & (bindings.symbol == function["symbol"])
        for function in functions
        if function["owner"][0] >= 0
    ]
    return [place for places in same for place in np.flatnonzero(places).tolist()]


def _count_for_carrier(library: Loaded) -> None:
    """Have destructors of thread-local objects counted for the library's carrier.

    glibc takes the address it is told for the library's, and does not know ours; told the carrier's, it keeps
    the carrier until every thread has run them, and we keep the library as long (see ``Loaded.discard``).
    """
    own = library.blocks.own
    if own is not None:
        for function, stub in library.stubs.items():
            if not stub.filled:
                stub.fill(with_third_argument(function, own.inside))


def _finder(library: Loaded, order: Sequence[Definer]) -> Callable[[int], int]:
    """Binds one symbol of the library, as binding all of them at once would have.

    Of those in ``order`` some may have been closed since.
    """

    def find(index: int) -> int:
        there = [definer for definer in order if not isinstance(definer, Loaded) or definer.is_mapped]
        try:
            bindings = bind(np.array([index], np.int64), there, there.index(library))
        except Stopped as stopped:
            refuse(library.image, stopped)
        refuse_unbound(library.image, bindings)
        address = int(_addresses(library, bindings)[0])
        _count_for_carrier(library)
        return call_resolver(address) if bindings.indirect[0] else address

    return find
