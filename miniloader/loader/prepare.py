"""``prepare``: load a library once, and keep its relocated pages for every process to come.

See :mod:`miniloader.loader.prepared.pages` for how they are used.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan
from miniloader.elf.checks import refuse_other_types
from miniloader.elf.symbols import SHN_ABS, STB_GNU_UNIQUE, STT_GNU_IFUNC
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import LoadError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.beside_glibc import unwinder
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.events import OnEvent
from miniloader.loader.loaded import Loaded
from miniloader.loader.loading import Loading
from miniloader.loader.prepared import store
from miniloader.loader.prepared.index import check_file, file_name, file_state, open_prepared, pack
from miniloader.loader.prepared.pages import (
    ADDRESS,
    RESOLVER,
    THREAD_EXIT,
    UNIQUE,
    VALUE,
    differing,
    identities,
    runs,
    sums,
)
from miniloader.loader.relocation_groups import TLS, Sorted, sort_relocations
from miniloader.loader.scope import Bindings, Definer
from miniloader.loader.surroundings import find_path, inspect
from miniloader.loader.symbol_addresses import thread_exits, used
from miniloader.native import gate
from miniloader.values import dataclass

__all__ = ["Entry", "entries", "prepare", "verify"]

# Far from where the kernel puts programs, heaps, stacks and its own choices; 16 to 64 TiB.
_LOWEST: Final = 0x1000_0000_0000
_HIGHEST: Final = 0x4000_0000_0000
_ALIGNMENT: Final = 1 << 21

#: A word that differs: where it is, the place among the bindings of the symbol it refers to, what is added.
_WORD: Final = np.dtype([("vaddr", "<u8"), ("place", "<i8"), ("addend", "<u8")])
_ITS_OWN: Final = -1  # the place of the resolver of the library itself that is at vaddr ``addend``


@dataclass(frozen=True)
class Entry:
    """A prepared library: where every process has it, and how much of it they share.

    ``pages`` are relocated and cached; ``filled`` of them hold words that each process writes itself, and are
    private.  ``fault`` says why it cannot be used any more.
    """

    name: str
    path: str
    build_id: str
    address: int
    length: int
    words: int
    pages: int
    filled: int
    size: int
    fault: str | None = None


def prepare(
    path: str | os.PathLike[str], *, address: int | None = None, on_event: OnEvent | None = None
) -> Entry:
    """Relocate the library ``path`` at an address chosen for it (or at ``address``), and keep its pages.

    None of its code runs.  The address stays the same until the machine boots again, and is another for every
    user.  Raises what :func:`miniloader.load` raises, and :class:`LoadError` for what cannot be prepared.
    """
    gate.require_loading()
    store.sweep()
    name = find_path(path)
    image = inspect(name)
    refuse_other_types(image)
    build_id = image.build_id
    if build_id is None:
        raise LoadError(f"{name}: has no build-id to know it by", hint="link it with -Wl,--build-id")
    if image.dynamic.text_relocations:
        raise LoadError(f"{name}: relocates its code, and so cannot be prepared")
    if address is None:
        address = _choose(build_id, image.plan(PAGE_SIZE))
    with Loading(image.source, init=False, on_event=on_event, address=address) as steps:
        if not steps.map():
            raise LoadError(
                f"{name}: this process has it at {address:#x} already", hint="prepare it in another process"
            )
        library = steps.mapped[0]
        return _keep(library, steps.link()[library])


def entries() -> tuple[Entry, ...]:
    """What is in the cache, whether it can be used or not."""
    return tuple(_entry(name, pages=False) for name in store.names())


def verify() -> tuple[Entry, ...]:
    """What is in the cache, with every page read and checked, and every library's file looked at."""
    return tuple(_entry(name, pages=True) for name in store.names())


def _entry(name: str, *, pages: bool) -> Entry:
    try:
        ready = open_prepared(name)
    except LoadError as error:
        return Entry(name, "", name.removesuffix(store.SUFFIX), 0, 0, 0, 0, 0, 0, fault=str(error))
    fault = None
    try:
        size = os.fstat(ready.fd).st_size
        if pages:
            ready.check_pages()
            check_file(ready)
    except LoadError as error:
        fault = str(error)
    finally:
        ready.close()
    length = ready.end - ready.address
    return Entry(
        name,
        ready.path,
        ready.build_id,
        ready.address,
        length,
        ready.words,
        ready.count,
        ready.filled,
        size,
        fault,
    )


def _choose(build_id: str, plan: LoadPlan) -> int:
    """An address that nobody can tell who does not know this user's secret of this boot.

    Nothing is there now, neither in this process nor for another prepared library.
    """
    taken = [
        (entry.address, entry.address + entry.length) for entry in entries() if entry.build_id != build_id
    ]
    taken += ((vma.start, vma.end) for vma in read_maps())
    alignment = max(_ALIGNMENT, plan.alignment)
    room = (_HIGHEST - _LOWEST - plan.length) // alignment
    key = store.secret(store.boot_id())
    for turn in count():
        digest = hmac.digest(key, f"{build_id} {turn}".encode(), "sha256")
        start = _LOWEST + int.from_bytes(digest[:8], "little") % room * alignment + plan.start
        if all(start + plan.length <= low or high <= start for low, high in taken):
            return start
    raise AssertionError("there are more places than libraries")


def _keep(library: Loaded, bindings: Bindings) -> Entry:
    """Write the file of ``library``, which is relocated and otherwise as it was mapped."""
    image, memory = library.image, library.mapped
    relocations = sort_relocations(image)
    pages = _pages(library, relocations)
    index, special, names = _index(library, relocations, bindings)
    tls = [rows for _, rows in relocations.of(*TLS)]
    tls_rows = np.concatenate([np.empty(0, RELOCATION), *tls])
    cached = bytearray().join([memory.read(vaddr, PAGE_SIZE) for vaddr in pages.tolist()])
    data = np.frombuffer(cached, np.uint8)
    for vaddrs in (index["slots"], *_thread_local(relocations)):  # the same bytes whoever prepares it
        data[_places(pages, vaddrs).astype(np.int64)[:, None] + np.arange(8)] = 0
    facts = {
        "path": os.path.abspath(image.path),
        "build_id": image.build_id,
        "file": [image.source.start, *file_state(os.fstat(image.source.fd))],
        "address": memory.start,
        "end": memory.end,
        "scope": identities(bindings.scope),
        "special": special,
        "names": names,
        "tls_kinds": [(int(rows["type"][0]), len(rows)) for rows in tls],
        "tls_names": [
            bindings.label(place) for place in bindings.place(np.unique(tls_rows["symbol"])).tolist()
        ],
        "held": [bindings.scope.index(definer) for definer in used(library, bindings)],
        "symbols": library.symbol_count,
        "words": len(image.relocations),
        "filled": int(differing(pages, index["slots"], tls_rows).sum()),
        "unwind_table": unwinder.eh_frame(image),
    }
    away = index["slots"] - pages[:1]
    if len(away) and int(away.max()) >> 32:
        raise LoadError(f"{image.path}: its relocated words are too far apart, and so it cannot be prepared")
    arrays = {
        "runs": runs(pages, memory.plan),
        "sums": sums(data),
        **index,
        "slots": away,
        "tls_rows": tls_rows,
        "tls_symbols": _thread_local_symbols(tls_rows, bindings).reshape(-1),
    }
    name = file_name(str(image.build_id))
    store.write_file(name, pack(facts, arrays, data))
    return _entry(name, pages=True)


def _pages(library: Loaded, relocations: Sorted) -> NDArray[np.uint64]:
    """The pages that loading changes: those relocated, and the ends of data that bss begins in."""
    vaddrs = [array & np.uint64(-PAGE_SIZE % (1 << 64)) for array in relocations.targets()]
    tails = [span.start & -PAGE_SIZE for span in library.plan.zeroed if span]
    return np.unique(np.concatenate([np.array(tails, np.uint64), *vaddrs]))


def _places(pages: NDArray[np.uint64], vaddrs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where each vaddr is in the cached pages."""
    page = np.uint64(PAGE_SIZE)
    return np.asarray(np.searchsorted(pages, vaddrs // page * page).astype(np.uint64) * page + vaddrs % page)


def _index(
    library: Loaded, relocations: Sorted, bindings: Bindings
) -> tuple[dict[str, NDArray[Any]], list[tuple[int, int, int]], dict[int, str]]:
    """The words that differ from process to process and their values; of these, by number, which are not just
    addresses (how they are meant, and the definer), and the names of unique symbols.

    A symbol of what is at the same address in every process is where it is, and an absolute one too; so is
    none (weak and undefined).
    """
    info, owner = bindings.field("info"), bindings.owner
    defined = owner >= 0
    how = np.full(len(owner), ADDRESS, np.uint32)
    how[defined & (info & np.uint64(0xF) == STT_GNU_IFUNC)] = RESOLVER
    how[defined & (info >> np.uint64(4) == STB_GNU_UNIQUE)] = UNIQUE
    if library.image.tls is not None:
        how[thread_exits(bindings)] = THREAD_EXIT
    wanders = np.array([not _stays(definer, library) for definer in bindings.scope], bool)
    elsewhere = defined & wanders[owner] & (bindings.field("shndx") != SHN_ABS)
    differs = elsewhere | (how != ADDRESS)
    words = [np.empty(0, _WORD)]
    for kind, rows in relocations.of("S", "S + A", "S + A - P"):
        place = bindings.place(rows["symbol"], call=kind.call)
        rows, place = rows[differs[place]], place[differs[place]]
        if len(rows) and kind.size != 8:
            raise LoadError(
                f"{library.name}: {kind.name} refers to other libraries, and so cannot be prepared"
            )
        addends = rows["addend"].view(np.uint64) if kind.formula != "S" else np.zeros(len(rows), np.uint64)
        if kind.formula == "S + A - P":
            with np.errstate(over="ignore"):
                addends = addends - (rows["offset"] + np.uint64(library.bias))
        words.append(_words(rows["offset"], place, addends))
    for _, rows in relocations.of("indirect"):
        words.append(_words(rows["offset"], _ITS_OWN, rows["addend"].view(np.uint64)))
    differing_words = np.concatenate(words)
    differing_words = differing_words[
        np.argsort(differing_words["vaddr"], kind="stable")
    ]  # page by page, as they will be filled
    meanings, numbers = np.unique(differing_words[["place", "addend"]], return_inverse=True)
    values = np.zeros(len(meanings), VALUE)
    values["offset"], values["definer"] = meanings["addend"], bindings.scope.index(library)
    meant = np.full(len(meanings), RESOLVER, np.uint32)
    symbolic = meanings["place"] != _ITS_OWN
    place = meanings["place"][symbolic]
    for column, of in (
        (values["offset"], bindings.field("value")),
        (values["definer"], owner),
        (meant, how),
    ):
        column[symbolic] = of[place]
    values["addend"][symbolic] = meanings["addend"][symbolic]
    names = {
        number: library.symbols.name(bindings.wanted[meanings["place"][number]])
        for number in np.flatnonzero(meant == UNIQUE).tolist()
    }
    special = [
        (number, int(meant[number]), int(values["definer"][number]))
        for number in np.flatnonzero(meant != ADDRESS).tolist()
    ]
    return {"slots": differing_words["vaddr"], "numbers": numbers, "values": values}, special, names


def _stays(definer: Definer, library: Loaded) -> bool:
    """Whether ``definer`` is at the same address in every process that uses the prepared ``library``.

    So is the library itself, and a main program that is not position-independent.
    """
    program = isinstance(definer, HostLibrary) and not definer.path
    return definer is library or (program and definer.bias == 0)


def _words(vaddrs: NDArray[np.uint64], place: NDArray[np.int64] | int, addends: NDArray[np.uint64]) -> Table:
    words = np.zeros(len(vaddrs), _WORD)
    words["vaddr"], words["place"], words["addend"] = vaddrs, place, addends
    return words


def _thread_local(relocations: Sorted) -> Iterator[NDArray[np.uint64]]:
    """The vaddrs of thread-local words."""
    for kind, rows in relocations.of(*TLS):
        yield rows["offset"]
        if kind.formula == "descriptor":
            yield rows["offset"] + np.uint64(8)


def _thread_local_symbols(rows: Table, bindings: Bindings) -> NDArray[np.int64]:
    """For each symbol of thread-local relocations: itself, its owner, its number there, its value."""
    symbols = np.unique(rows["symbol"])
    place = bindings.place(symbols)
    value = bindings.field("value")[place].view(np.int64)
    return np.stack([symbols.astype(np.int64), bindings.owner[place], bindings.symbol[place], value], axis=1)
