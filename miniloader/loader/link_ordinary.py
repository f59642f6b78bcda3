"""Linking an ordinary library: in two calls of ``link.c``, which bind its symbols and relocate it.

Most libraries are ordinary, and what :mod:`~miniloader.loader.link` does step by step with values that can be
looked at takes ten times as long.  Where somebody looks, or anything is out of the ordinary, that does it.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, compress
from typing import Final

from miniloader.elf import ElfImage
from miniloader.loader.beside_glibc import stand_ins, unwinder
from miniloader.loader.graph import Graph, Needed
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocate import kinds_of, refuse_stopped
from miniloader.loader.relocation_job import resolve
from miniloader.loader.scope import WEAK_GIVES_WAY, Definer
from miniloader.loader.symbol_addresses import names_of
from miniloader.loader.symbol_lookup import MappedSymbols
from miniloader.native import ADDRESS_MASK, LinkStructure, Reason, Stopped, buffer_address, run

__all__ = ["link_ordinary"]

_FLAGS: Final = {"r--": 4, "rw-": 6, "r-x": 5}  # of segments, as link.c has them
_MOST_NOTES: Final = 64
_OF_ASKED, _OF_RESOLVER = 1, 2  # why something is noted: notes.c


def link_ordinary(graph: Graph, library: Loaded, order: Sequence[Definer]) -> bool:
    """Bind its symbols in ``order`` and relocate; ``False`` where nothing is done, as it is not ordinary."""
    image, policy = library.image, graph.policy
    if (
        graph.keeps_bindings
        or (graph.tell is not None and not graph.brief)
        or policy.bind == "lazy"
        or image.tls is not None
        or WEAK_GIVES_WAY
        or not all(load.flags in _FLAGS for load in image.loads)
    ):
        return False
    link, owners, notes = LinkStructure(), bytearray(len(order)), array("Q", bytes(16 * _MOST_NOTES))
    try:
        _bind(link, library, order, owners, notes)
    except Stopped as stopped:
        if stopped.reason is not Reason.STRANGE:
            raise
        return False  # what is wrong is told by whoever begins anew
    graph.event("bind", image.path, "symbols are bound")
    noted = notes[: 2 * link.noted]
    places, addresses = array("q", [note >> 2 for note in noted[::2]]), noted[1::2]
    reasons = [note & 3 for note in noted[::2]]
    if _OF_ASKED in reasons:
        asked = [place for place, reason in enumerate(reasons) if reason == _OF_ASKED]
        if any(addresses[place] in unwinder.walkers() for place in asked):
            unwinder.bring()
        library.may_open |= stand_ins.answer(addresses, asked)
    if _OF_RESOLVER in reasons:  # of libraries of ld.so's
        resolve(addresses, array("q", [at for at, reason in enumerate(reasons) if reason == _OF_RESOLVER]))
    try:
        run("write_ordinary", ctypes.addressof(link), places, addresses, len(places))
    except Stopped as stopped:
        if stopped.reason is Reason.STRANGE:  # a resolver has loaded another library
            return False
        refuse_stopped(image, Stopped(stopped.reason, link.where, link.what))
    library.names = MappedSymbols.opened(link)
    for definer in compress(order, owners):
        library.hold(definer)
    if graph.tell is not None:
        graph.event("relocate", image.path, f"words on {link.pages} pages", pages=link.pages)
    return True


def _bind(
    link: LinkStructure, library: Loaded, order: Sequence[Definer], owners: bytearray, notes: array[int]
) -> None:
    """Bind its symbols; nothing is written.  :class:`Stopped` where it is not ordinary."""
    image, memory = library.image, library.mapped
    asked, entries = _asked(), image.dynamic.entries
    loads = array(
        "Q", chain.from_iterable([(s.vaddr, s.file_end, s.end, _FLAGS[s.flags]) for s in image.loads])
    )
    own = ctypes.addressof(link)
    tables = [own if definer is library else definer.names.place for definer in order]
    needed = [(text, needs.names.place) for needs in dict.fromkeys(library.needs) for text in _texts(needs)]
    dynamic = _writable_dynamic(image)
    (link.bias, link.page_size, link.load_count, link.tag_count) = (
        *(memory.bias & ADDRESS_MASK, memory.plan.page_size),
        *(len(image.loads), len(entries)),
    )
    link.dynamic, link.dynamic_size, link.scope_count = *dynamic, len(order)
    link.own, link.needed_count, link.asked_count = order.index(library), len(needed), len(asked)
    run(
        "bind_ordinary",
        *(own, kinds_of(image.header.machine), loads),
        array("Q", map(ADDRESS_MASK.__and__, chain.from_iterable(entries))),
        array("Q", tables),
        array("Q", [definer.bias & ADDRESS_MASK for definer in order]),
        bytearray([isinstance(definer, Loaded) for definer in order]),
        owners,
        array("Q", [buffer_address(text) for text, _ in needed]),
        array("Q", [place for _, place in needed]),
        asked,
        notes,
    )


def _writable_dynamic(image: ElfImage) -> tuple[int, int]:
    """Vaddr and size of the dynamic section, where ld.so would write to it; else zeros."""
    segment = image.segment("PT_DYNAMIC")
    return (segment.vaddr, segment.filesz) if segment is not None and "w" in segment.flags else (0, 0)


def _texts(needed: Needed) -> list[bytearray]:
    """The names by which whoever needs versions of ``needed`` may mean it, as C has them."""
    return [bytearray(os.fsencode(name) + b"\0") for name in names_of(needed)]


@lru_cache(maxsize=1)
def _asked() -> array[int]:
    """The addresses of the functions that are answered in another way, ascending."""
    return array("Q", sorted({*stand_ins.asked(), *unwinder.walkers()}))
