"""Relocation: from what the file asks for to the words that are written.

The words are computed in a copy of the pages they lie in (:class:`Pages`) and written back at once, run
of pages by run of pages: only pages that hold a relocation become private copies.  In the order of glibc:
RELR, then the tables, then what needs the library's own code to run (IRELATIVE and symbols that are
IFUNCs).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.source import LARGE, large_room
from miniloader.elf.symbols import SHN_UNDEF, STB_WEAK, STT_GNU_IFUNC
from miniloader.elf.tables import Table, blocks
from miniloader.errors import LoadError, SymbolError
from miniloader.loader.memory import Memory, put_words
from miniloader.loader.scope import Bindings
from miniloader.loader.sorting import TLS, Sorted
from miniloader.loader.tls import Write
from miniloader.machine.relocation import Kind

__all__ = ["Pages", "apply", "call_resolver", "indirect_functions", "refuse_unbound"]

_SYMBOLIC: Final = ("S + A", "S", "S + A - P", "Z + A")
_WORD: Final = 8


class Pages:
    """A copy of the pages that hold the relocated words, to change and write back.

    ``buffer`` spans from the first to the last such page; pages between that hold none are neither read nor
    written (and cost nothing, as the buffer is never touched there).
    """

    def __init__(self, memory: Memory, targets: Iterator[NDArray[np.uint64]]) -> None:
        size = memory.plan.page_size
        arrays = [array for array in targets if len(array)]
        if not arrays:
            self.start, self.runs = 0, []
            self.buffer = np.empty(0, np.uint8)
        else:
            low = min(int(array.min()) for array in arrays) & -size
            high = max(int(array.max()) for array in arrays) + 1
            length, shift = -(-(high - low) // size) * size, np.uint64(size.bit_length() - 1)
            try:
                touched = np.zeros((high - low) // size + 3, np.int8)  # with a page before and one behind
                for vaddrs in chain.from_iterable(map(blocks, arrays)):
                    touched[1:][((vaddrs - np.uint64(low)) >> shift).view(np.int64)] = 1
                # Huge pages are there as a whole, so most of their small ones should be of use.
                dense = length >= LARGE and 2 * size * np.count_nonzero(touched) >= length
                room = large_room(length) if dense else np.empty(length, np.uint8)
                self.buffer = np.frombuffer(room, np.uint8)
            except (MemoryError, OSError):
                found = f"relocated words from vaddr {low:#x} to {high:#x}"
                raise LoadError(f"{memory.name}: {found}: not enough memory for a copy of them") from None
            edges = np.flatnonzero(np.diff(touched)).reshape(-1, 2)
            self.start = low
            self.runs = [(first * size, last * size) for first, last in edges.tolist()]
            for first, last in self.runs:
                memory.read_into(low + first, self.buffer[first:last])
        self.memory = memory

    @property
    def count(self) -> int:
        """How many pages are copied."""
        return sum(last - first for first, last in self.runs) // self.memory.plan.page_size

    def get(self, vaddrs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The 8-byte words at ``vaddrs``."""
        offsets = (vaddrs - np.uint64(self.start)).astype(np.int64)
        if not (offsets & 7).any():
            return np.asarray(self.buffer.view(np.uint64)[offsets >> 3], np.uint64)
        return np.asarray(self.buffer[offsets[:, None] + np.arange(_WORD)].view(np.uint64).reshape(-1))

    def put(self, vaddrs: NDArray[np.uint64], values: NDArray[np.uint64], size: int = _WORD) -> None:
        """Store the low ``size`` bytes of each value at its vaddr, which need not be aligned."""
        put_words(self.buffer, (vaddrs - np.uint64(self.start)).astype(np.int64), values, size)

    def bytes_at(self, vaddr: int, length: int) -> NDArray[np.uint8]:
        """``length`` bytes as they will be, from here where they are changed, else from memory."""
        data = self.memory.read(vaddr, length)
        for first, last in self.runs:
            low, high = max(vaddr, self.start + first), min(vaddr + length, self.start + last)
            if low < high:
                data[low - vaddr : high - vaddr] = self.buffer[low - self.start : high - self.start]
        return data

    def write(self) -> None:
        """Write all pages back."""
        for first, last in self.runs:
            self.memory.write(self.start + first, self.buffer[first:last])


def apply(
    image: ElfImage,
    memory: Memory,
    relocations: Sorted,
    bindings: Bindings,
    addresses: NDArray[np.uint64],
    late: NDArray[np.bool_],
    thread_local: Callable[[Pages, Iterator[tuple[Kind, Table]]], list[Write]],
    *,
    may_run: bool,
) -> int:
    """Apply ``relocations`` and write the pages; the number of pages copied.

    ``addresses`` are those of the symbols ``bindings.wanted``; of those that are ``late``, IFUNCs of
    libraries of ours, their resolvers'.  These run only if they ``may_run``; else their words are 0.
    ``thread_local`` computes the thread-local words, once the template they need has been relocated in the
    pages.
    """
    pages = Pages(memory, relocations.targets())
    bias = np.uint64(memory.bias)
    with np.errstate(over="ignore"):
        pages.put(relocations.dynamic["offset"], relocations.dynamic["addend"].view(np.uint64) + bias)
        for vaddrs in blocks(relocations.relr):
            pages.put(vaddrs, pages.get(vaddrs) + bias)
        for rows in blocks(relocations.relative):
            pages.put(rows["offset"], rows["addend"].view(np.uint64) + bias)
        if len(relocations.lazy):
            pages.put(relocations.lazy["offset"], pages.get(relocations.lazy["offset"]) + bias)
        for kind, rows in relocations.of(*_SYMBOLIC):
            _put_symbolic(image, pages, kind, rows, bindings, addresses, late)
        for vaddrs, values, size in thread_local(pages, relocations.of(*TLS)):
            _refuse_overflow(image, size, vaddrs, values)
            pages.put(vaddrs, values, size)
        pages.write()
        _put_indirect(image, memory, relocations, bindings, addresses, late, may_run=may_run)
    return pages.count


def refuse_unbound(image: ElfImage, bindings: Bindings) -> None:
    """Raise :class:`SymbolError` for the first symbol without a definition that is not weak."""
    for place in np.flatnonzero(bindings.owner < 0).tolist():
        index = int(bindings.wanted[place])
        if index == 0 or int(image.symbols.rows["info"][index]) >> 4 == STB_WEAK:
            continue
        version = image.symbols.version(index)
        label = f"{image.symbols.name(index)}" + (f" (version {version.name})" if version else "")
        where = f", needed from {version.file}" if version and version.file else ""
        raise SymbolError(f"{image.path}: undefined symbol {label}{where}")


def indirect_functions(bindings: Bindings) -> NDArray[np.bool_]:
    """Which wanted symbols are bound to an IFUNC, whose address is what its resolver returns."""
    info = bindings.field("info")
    defined = (bindings.owner >= 0) & (bindings.field("shndx") != SHN_UNDEF)
    return np.asarray(defined & ((info & np.uint64(0xF)) == STT_GNU_IFUNC))


def _values(
    kind: Kind,
    rows: Table,
    place: NDArray[np.intp],
    addresses: NDArray[np.uint64],
    bindings: Bindings,
    bias: int,
) -> NDArray[np.uint64]:
    symbol, addend = addresses[place], rows["addend"].view(np.uint64)
    if kind.formula == "S":
        values: Any = symbol
    elif kind.formula == "S + A":
        values = symbol + addend
    elif kind.formula == "Z + A":
        values = bindings.field("size")[place] + addend
    else:
        values = symbol + addend - (rows["offset"] + np.uint64(bias))
    return np.asarray(values, np.uint64)


def _put_symbolic(
    image: ElfImage,
    pages: Pages,
    kind: Kind,
    rows: Table,
    bindings: Bindings,
    addresses: NDArray[np.uint64],
    late: NDArray[np.bool_],
) -> None:
    place = bindings.place(rows["symbol"], call=kind.call)
    if kind.formula != "Z + A" and late.any():
        now = ~late[place]
        rows, place = rows[now], place[now]
    if not len(rows):
        return
    values = _values(kind, rows, place, addresses, bindings, pages.memory.bias)
    _refuse_overflow(image, kind.size, rows["offset"], values, signed=kind.signed)
    pages.put(rows["offset"], values, kind.size)


def _refuse_overflow(
    image: ElfImage, size: int, vaddrs: NDArray[np.uint64], values: NDArray[np.uint64], *, signed: bool = True
) -> None:
    """Raise :class:`LoadError` when a value does not fit the ``size`` bytes that are written."""
    if size == _WORD:
        return
    low = values.astype(np.uint32)
    again = low.astype(np.int32).astype(np.int64).view(np.uint64) if signed else low.astype(np.uint64)
    bad = np.flatnonzero(again != values)
    if len(bad):
        where = f"{image.path}: relocation at vaddr {int(vaddrs[bad[0]]):#x}"
        found = f"{int(values[bad[0]]):#x} does not fit 32 bits"
        raise LoadError(f"{where}: {found}", hint="what it refers to is too far away; rebuild it with -fPIC")


_RESOLVER: Final = ctypes.CFUNCTYPE(ctypes.c_uint64)


def call_resolver(address: int) -> int:
    """The function that the IFUNC resolver at ``address`` chooses (on x86-64 it takes no argument)."""
    return int(_RESOLVER(address)())


def _put_indirect(
    image: ElfImage,
    memory: Memory,
    relocations: Sorted,
    bindings: Bindings,
    addresses: NDArray[np.uint64],
    late: NDArray[np.bool_],
    *,
    may_run: bool,
) -> None:
    """What needs our code to run: others' IFUNCs, which its own resolvers may call, its own, then IRELATIVE.

    Each is written before the next is resolved, and each resolver runs once.
    """
    chosen: dict[int, int] = {}

    def resolve(resolvers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        for resolver in resolvers.tolist():
            if resolver not in chosen:
                chosen[resolver] = call_resolver(resolver)
        return np.array([chosen[resolver] for resolver in resolvers.tolist()], np.uint64)

    for group in _by_turns(image, bindings, late):
        places = np.flatnonzero(group)
        addresses[places] = resolve(addresses[places]) if may_run else 0
        words: list[Write] = []
        for kind, rows in relocations.of("S", "S + A", "S + A - P"):
            place = bindings.place(rows["symbol"], call=kind.call)
            rows, place = rows[group[place]], place[group[place]]
            values = _values(kind, rows, place, addresses, bindings, memory.bias)
            words.append((rows["offset"], values, kind.size))
        _write(memory, words)
    writes: list[Write] = []
    for kind, rows in relocations.of("indirect"):
        resolvers = rows["addend"].view(np.uint64) + np.uint64(memory.bias)
        values = resolve(resolvers) if may_run else np.zeros(len(rows), np.uint64)
        writes.append((rows["offset"], values, kind.size))
    _write(memory, writes)


def _by_turns(image: ElfImage, bindings: Bindings, late: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The symbols that are IFUNCs: others' first, then those of ``image`` itself; no group is empty."""
    if not late.any():
        return []
    ours = [place for place, definer in enumerate(bindings.scope) if definer.symbols is image.symbols]
    own = np.logical_or.reduce([bindings.owner == place for place in ours])
    return [group for group in (late & ~own, late & own) if group.any()]


def _write(memory: Memory, writes: list[Write]) -> None:
    """Store words, which need not be in any order."""
    writes = [write for write in writes if len(write[0])]
    if writes:
        lasts = (vaddrs + np.uint64(size - 1) for vaddrs, _, size in writes)  # may be on the page after
        pages = Pages(memory, chain((vaddrs for vaddrs, _, _ in writes), lasts))
        for vaddrs, values, size in writes:
            pages.put(vaddrs, values, size)
        pages.write()
