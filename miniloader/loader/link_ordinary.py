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
from miniloader.elf.header import Segment
from miniloader.elf.layout import RELA
from miniloader.elf.source import LARGE
from miniloader.loader.beside_glibc import gnu_unique, stand_ins, unwinder
from miniloader.loader.graph import Graph, Needed
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocate import kinds_of, refuse_overflow, refuse_stopped
from miniloader.loader.relocation_job import ROW, resolve
from miniloader.loader.scope import WEAK_GIVES_WAY, Bindings, Definer
from miniloader.loader.symbol_addresses import THREAD_EXIT, names_of
from miniloader.loader.symbol_lookup import DEFINITION, MappedSymbols
from miniloader.loader.thread_storage import tell_storage, thread_local_words
from miniloader.machine.relocation import KINDS
from miniloader.native import ADDRESS_MASK, LinkStructure, Reason, Stopped, buffer_address, run

__all__ = ["link_ordinary"]

_READ: Final = 4
_FLAGS: Final = {"r--": _READ, "rw-": 6, "r-x": 5}  # of segments, as link.c has them
_OF_UNIQUE, _OF_ASKED, _OF_RESOLVER = 0, 1, 2  # why something is noted: notes.c
_EXITS: Final = [bytearray(name + b"\0") for name in THREAD_EXIT]
_DEFINITION: Final = len(DEFINITION)  # words
_NOTED: Final = 2 + _DEFINITION
_ADDRESS: Final = 2 + [name for name, _ in DEFINITION].index("address")


def link_ordinary(graph: Graph, library: Loaded, order: Sequence[Definer]) -> bool:
    """Bind its symbols in ``order`` and relocate; ``False`` where nothing is done, as it is not ordinary."""
    image, policy = library.image, graph.policy
    if (
        graph.keeps_bindings
        or (graph.tell is not None and not graph.brief)
        or policy.bind == "lazy"
        or WEAK_GIVES_WAY
        or not {load.flags for load in image.loads} <= _FLAGS.keys()
    ):
        return False
    link, owners = LinkStructure(), bytearray(len(order))
    try:
        _bind(link, library, order, owners)
    except Stopped as stopped:
        if stopped.reason is not Reason.STRANGE:
            raise
        return False  # what is wrong is told by whoever begins anew
    library.names = MappedSymbols.opened(link)
    graph.event("bind", image.path, "symbols are bound")
    noted = array("Q", ctypes.string_at(link.noted, 8 * _NOTED * link.noted_count))
    notes, addresses = noted[::_NOTED], noted[_ADDRESS::_NOTED]
    places, reasons = array("q", [note >> 2 for note in notes]), [note & 3 for note in notes]
    if len({*places}) < len(places):
        return False
    if _OF_UNIQUE in reasons:
        _settle(library, order, noted, addresses)
    held = compress(range(len(order)), owners)
    for place in sorted(held, key=owners.__getitem__) if max(owners) > 1 else held:
        library.hold(order[place])
    if _OF_ASKED in reasons:
        asked = [place for place, reason in enumerate(reasons) if reason == _OF_ASKED]
        for place in [place for place in asked if addresses[place] in link.exit_addresses[:]]:
            addresses[place] = library.stub_for(addresses[place]).address
        if any(addresses[place] in unwinder.walkers() for place in asked):
            unwinder.bring()
        library.may_open |= stand_ins.answer(addresses, asked)
    if _OF_RESOLVER in reasons:  # of libraries of ld.so's
        resolve(addresses, array("q", [at for at, reason in enumerate(reasons) if reason == _OF_RESOLVER]))
    rows, definitions = bytearray(RELA.size * link.local_count), array("q", [])
    if rows:
        definitions = array("q", [0]) * (_DEFINITION * link.local_count)
    try:
        run("write_ordinary", ctypes.addressof(link), places, addresses, len(places), rows, definitions)
    except Stopped as stopped:
        if stopped.reason is Reason.STRANGE:  # a resolver has loaded another library
            return False
        refuse_stopped(image, Stopped(stopped.reason, link.where, link.what))
    if rows or image.tls is not None:
        _write_thread_local(library, order, rows, definitions)
        tell_storage(graph, library)
    if graph.tell is not None:
        graph.event("relocate", image.path, f"words on {link.pages} pages", pages=link.pages)
    return True


def _bind(link: LinkStructure, library: Loaded, order: Sequence[Definer], owners: bytearray) -> None:
    """Bind its symbols; nothing is written.  :class:`Stopped` where it is not ordinary."""
    image, memory = library.image, library.mapped
    asked, entries = _asked(), image.dynamic.entries
    if image.tls is not None:
        link.exits[:] = [buffer_address(name) for name in _EXITS]
    loads = array("Q")
    for load in image.loads:
        rights = _FLAGS[load.flags] if load.filesz < LARGE else _rights(image, load)
        loads.extend((load.vaddr, load.file_end, load.end, rights))
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
    )


def _rights(image: ElfImage, load: Segment) -> int:
    """The rights of a large segment as link.c has them, which reads no table where the file has holes."""
    rights, whole = _FLAGS[load.flags], (load.file_offset, load.file_offset + load.filesz)
    is_whole = next(image.source.parts(load.file_offset, load.filesz), None) == whole
    return rights if is_whole else rights & ~_READ


def _settle(library: Loaded, order: Sequence[Definer], noted: array[int], addresses: array[int]) -> None:
    """Replace, in ``addresses``, those of unique symbols among what is ``noted`` by the process's ones."""
    unique = [at for at, note in enumerate(noted[::_NOTED]) if note & 3 == _OF_UNIQUE]
    wanted = array("q", [noted[_NOTED * at + 1] for at in unique])
    rows = array("Q", chain.from_iterable(noted[_NOTED * at + 2 : _NOTED * (at + 1)] for at in unique))
    bindings = Bindings(wanted, order, array("q", rows.tobytes()))
    settled = array("Q", [addresses[at] for at in unique])
    for definer in gnu_unique.settle(library, bindings, settled, range(len(unique))):
        library.share(definer)
    for at, address in zip(unique, settled, strict=True):
        addresses[at] = address


def _write_thread_local(
    library: Loaded, order: Sequence[Definer], rows: bytearray, definitions: array[int]
) -> None:
    """Write the words of the thread-local ``rows``, of each of which there is its symbol's definition."""
    image, listed = library.image, list(ROW.iter_unpack(rows))
    first = {symbol: _DEFINITION * at for at, (_, _, symbol, _) in enumerate(listed)}
    wanted = array("q", sorted(first))
    found = [definitions[first[symbol] : first[symbol] + _DEFINITION] for symbol in wanted]
    bindings = Bindings(wanted, order, array("q", chain.from_iterable(found)))
    codes = {code for _, code, *_ in listed}
    kinds = [(kind, code) for code, kind in KINDS[image.header.machine].items() if code in codes]
    of_kinds = [(kind, [row for row in listed if row[1] == code]) for kind, code in kinds]
    try:
        for vaddrs, values, size in thread_local_words(library, bindings, of_kinds):
            refuse_overflow(image, size, vaddrs, values)
            library.mapped.put(vaddrs, values, size)
    except Stopped as stopped:
        refuse_stopped(image, stopped)


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
