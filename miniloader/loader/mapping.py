"""Mapping a library: where its segments go, and the calls of its plan, each told as it is made."""

from __future__ import annotations

from miniloader.elf import LoadPlan, PlannedCall
from miniloader.errors import LoadError
from miniloader.kernel.cpuinfo import features
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.graph import Graph
from miniloader.loader.loaded import Loaded
from miniloader.loader.memory import Memory, OnCall, map_plan

__all__ = ["map_library", "protect_relro", "zero_bss"]


def map_library(graph: Graph, library: Loaded) -> None:
    """Reserve address space and map the segments: no page is touched."""
    library.memory = _reserve(graph, library, library.image.plan(PAGE_SIZE))
    library.undo.callback(library.memory.unmap)
    if library.memory.plan.guarded and "bti" in (features() or ()):
        library.memory.perform_step("guard", _teller(graph, library))
    if graph.brief:
        graph.event("map", library.name, "mapped", bias=library.memory.bias)


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


def zero_bss(graph: Graph, library: Loaded) -> None:
    """Zero what of its file pages is bss, unless its pages come from the cache, where that is done."""
    if library.ready is None:
        library.mapped.perform_step("zero", _teller(graph, library))


def protect_relro(graph: Graph, library: Loaded) -> None:
    """Take the right to write from what only relocation may change."""
    library.mapped.perform_step("protect", _teller(graph, library))


def _teller(graph: Graph, library: Loaded) -> OnCall | None:
    """Tells each call of the library's plan as an event, if anybody listens."""

    def tell(memory: Memory, call: PlannedCall) -> None:
        numbers = {"bias": memory.bias, "address": memory.bias + call.start, "length": call.length}
        settled = "" if call.is_placed else f"; base is {memory.bias:#x}"
        text = f"{call.text(memory.bias)}: {call.why}{settled}"
        graph.event(call.step, library.image.path, text, **numbers, call=call)

    return tell if graph.tell is not None and not graph.brief else None
