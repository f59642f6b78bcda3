"""The thread-local storage of a library: its carriers, the words that refer to them, and who is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from miniloader.forking import importing
from miniloader.loader.beside_glibc import thread_local
from miniloader.loader.beside_glibc.tls_carrier import Carrier, open_carrier
from miniloader.loader.graph import Graph
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocation_job import Row
from miniloader.loader.scope import Bindings, Definer
from miniloader.machine.relocation import Kind

__all__ = ["count_for_carrier", "tell_storage", "thread_local_words"]


def thread_local_words(
    library: Loaded, bindings: Bindings, rows: Iterable[tuple[Kind, Sequence[Row]]]
) -> list[thread_local.Write]:
    """Open the carriers of ``library``; the words to write for its thread-local relocations ``rows``."""
    template, rows = library.image.tls, tuple(rows)
    if template is None and not rows:
        return []

    def initial_bytes() -> bytes:
        return bytes(library.mapped.read(template.vaddr, template.filesz)) if template is not None else b""

    library.blocks, writes = thread_local.answer(
        library, template, initial_bytes, bindings, rows, _carrier_of
    )
    count_for_carrier(library)
    return writes


def tell_storage(graph: Graph, library: Loaded) -> None:
    """Tell which module glibc has for the thread-local storage of ``library``, if it has any."""
    carrier, image = library.blocks.own, library.image
    if carrier is not None and image.tls is not None and graph.tell is not None:
        text = f"module {carrier.module}, {image.tls.memsz} bytes a thread"
        graph.event("tls", image.path, text, module=carrier.module, bytes=image.tls.memsz)


def _carrier_of(definer: Definer) -> Carrier | None:
    """Who has the thread-local storage of a library of ours that has been linked."""
    return definer.blocks.own if isinstance(definer, Loaded) else None


def count_for_carrier(library: Loaded) -> None:
    """Have destructors of thread-local objects counted for a carrier of ``library``'s own.

    glibc takes the address it is told for the library's, and does not know ours; told that carrier's, it
    keeps the carrier until every thread has run them, and we keep the library as long: see
    ``Loaded.has_exits``.
    """
    for function, stub in library.stubs.items():
        if not stub.filled:
            library.exits = library.exits or open_carrier(library.name, [])
            with importing:
                from miniloader.machine.stub_code import with_third_argument

            stub.fill(with_third_argument(function, library.exits.inside))
