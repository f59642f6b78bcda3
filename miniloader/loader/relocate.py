"""Relocation: from what the file asks for to the words that are written.

In the order of glibc: RELR, then the tables, then what needs the library's own code to run (IRELATIVE and
symbols that are IFUNCs).  Nearly all words are computed and written by :mod:`miniloader.native`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import compress
from typing import NoReturn

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import FUNCTION_ARRAYS
from miniloader.elf.layout import RELA
from miniloader.elf.symbols import STB_WEAK
from miniloader.errors import ElfError, LoadError, SymbolError
from miniloader.loader.beside_glibc.thread_local import Write
from miniloader.loader.memory import Memory
from miniloader.loader.relocation_groups import TLS, Sorted, refuse_kind
from miniloader.loader.relocation_job import RelocationJob, Row, kinds_table
from miniloader.loader.scope import Bindings
from miniloader.loader.spans import open_names, readable, refuse, writable
from miniloader.loader.symbol_lookup import MappedSymbols
from miniloader.machine.relocation import KINDS, Kind
from miniloader.native import ADDRESS_MASK, INDIRECT_FUNCTION, Reason, Stopped, buffer_address, unlocked

__all__ = [
    "Relocation",
    "call_resolver",
    "kinds_of",
    "refuse_overflow",
    "refuse_stopped",
    "refuse_unbound",
]


class Relocation:
    """The relocation of one library that is mapped: first :attr:`wanted` has to be bound.

    ``names`` are its symbols.  Raises :class:`ElfError` or :class:`LoadError` for relocations that cannot be
    applied.
    """

    def __init__(self, image: ElfImage, memory: Memory, relocations: Sorted) -> None:
        self._image, self._memory, self._relocations = image, memory, relocations
        plan, tags, parts = memory.plan, image.dynamic.tags, relocations.parts
        self._job = RelocationJob(
            memory.bias,
            kinds_of(image.header.machine),
            writable=writable(image, plan),
            code=[(load.vaddr, load.end) for load in image.loads if "x" in load.flags],
            pointers=[
                (tags[start], tags[start] + tags.get(length, 0))
                for start, length in FUNCTION_ARRAYS
                if start in tags
            ],
            parts=[*_elsewhere(relocations.unpacked, memory.bias), *parts],
            pages=(plan.start, plan.end),
            page_size=plan.page_size,
        )
        spans = readable(image, plan)
        extents = [(vaddr, count * RELA.size) for vaddr, count in (relocations.head, *parts)]
        start, entries = relocations.relr_part
        for vaddr, length in (*extents, (start, entries * image.header.word)):
            end = vaddr + length
            if length and not any(low <= vaddr and end <= high for low, high in spans):
                found = f"vaddrs {vaddr:#x} to {end:#x}"
                raise ElfError(image.path, "relocations", found, "inside a segment that can be read")
        try:
            counts, highest = self._job.survey(relocations.kinds)
            highest = max(highest, max(relocations.lazy.symbols, default=0))
            self.names = open_names(image, spans, memory.bias, at_least=highest + 1)
            self.wanted = self._job.used(len(self.names))
            self._counts = {relocations.kinds[code]: (code, count) for code, count in counts.items()}
            for kind, rows in self._rows_of("copy"):
                refuse_kind(image, relocations.kinds, self._counts[kind][0], rows[0][2])
        except Stopped as stopped:
            self._refuse(stopped)

    def apply(
        self,
        bindings: Bindings,
        addresses: array[int],
        late: bytearray,
        thread_local: Callable[[Iterable[tuple[Kind, Sequence[Row]]]], list[Write]],
        *,
        may_run: bool,
    ) -> int:
        """Write all words; the number of pages copied.

        ``addresses`` are those of the symbols ``bindings.wanted``; of those that are ``late``, IFUNCs of
        libraries of ours, their resolvers'.  These run only if they ``may_run``; else their words are 0.
        ``thread_local`` computes the thread-local words, once the template they need has been relocated.
        """
        relocations, job = self._relocations, self._job
        called, pointed = bindings.places(call=True), bindings.places(call=False)
        words = called, pointed, addresses, bindings.rows, late
        added = relocations.lazy.offsets
        try:
            job.relocate(relocations.located, relocations.relr_part, added, relocations.head, *words)
            for vaddrs, values, size in thread_local(self._rows_of(*TLS)):
                refuse_overflow(self._image, size, vaddrs, values)
                self._put(vaddrs, values, size)
            own = any(kind.formula == "indirect" for kind in self._counts)
            if own or (bindings.met & INDIRECT_FUNCTION and 1 in late):
                self._put_indirect(bindings, addresses, late, may_run=may_run)
        except Stopped as stopped:
            self._refuse(stopped)
        return job.pages

    def _rows_of(self, *formulas: str) -> Iterator[tuple[Kind, list[Row]]]:
        """The kinds with one of ``formulas``, and their rows."""
        return (
            (kind, self._job.rows(code, count))
            for kind, (code, count) in self._counts.items()
            if kind.formula in formulas
        )

    def _put(self, vaddrs: Sequence[int], values: Sequence[int], size: int) -> None:
        self._memory.put(vaddrs, values, size)
        self._job.note(vaddrs, size)

    def _refuse(self, stopped: Stopped) -> NoReturn:
        refuse_stopped(self._image, stopped)

    def _put_indirect(
        self, bindings: Bindings, addresses: array[int], late: bytearray, *, may_run: bool
    ) -> None:
        """What needs our code to run: others' IFUNCs, which its own resolvers may call, its own, IRELATIVE.

        Each is written before the next is resolved, and each resolver runs once.
        """
        chosen: dict[int, int] = {}
        bias = self._memory.bias % (1 << 64)

        def resolve(resolvers: Sequence[int]) -> list[int]:
            if not may_run:
                return [0] * len(resolvers)
            for resolver in resolvers:
                if resolver not in chosen:
                    chosen[resolver] = call_resolver(resolver)
            return [chosen[resolver] for resolver in resolvers]

        for group in _by_turns(self.names, bindings, late):
            for place, address in zip(group, resolve([addresses[place] for place in group]), strict=True):
                addresses[place] = address
            for kind, rows in self._rows_of("S", "S + A", "S + A - P"):
                places = bindings.places(call=kind.call)
                chosen_rows = [row for row in rows if places[row[2]] in group]
                vaddrs = [offset for offset, *_ in chosen_rows]
                values = [_value(kind, row, addresses[places[row[2]]], bias) for row in chosen_rows]
                refuse_overflow(self._image, kind.size, vaddrs, values, signed=kind.signed)
                self._put(vaddrs, values, kind.size)
        for kind, rows in self._rows_of("indirect"):
            resolvers = [(addend + bias) & ADDRESS_MASK for *_, addend in rows]
            self._put([offset for offset, *_ in rows], resolve(resolvers), kind.size)


def _elsewhere(tables: Sequence[bytearray], bias: int) -> list[tuple[int, int]]:
    """Where ``tables`` are, which do not lie in the library: what would be the vaddr there, and the count."""
    size = RELA.size
    return [((buffer_address(table) - bias) & ADDRESS_MASK, len(table) // size) for table in tables]


@lru_cache(maxsize=1)
def kinds_of(machine: str) -> bytearray:
    """The relocation kinds of ``machine`` as the loops have them."""
    return kinds_table(KINDS[machine])


def refuse_stopped(image: ElfImage, stopped: Stopped) -> NoReturn:
    """Raise what says why the relocation of ``image`` has ``stopped``."""
    if stopped.reason is Reason.NO_KIND:
        refuse_kind(image, KINDS[image.header.machine], stopped.what, 0)
    if stopped.reason is Reason.TOO_FAR:
        raise _too_far(image, stopped.where, stopped.what)
    refuse(image, stopped)


def refuse_unbound(image: ElfImage, bindings: Bindings) -> None:
    """Raise :class:`SymbolError` for the first symbol without a definition that is not weak."""
    for index, owner, info in zip(
        bindings.wanted, bindings.column("owner"), bindings.column("info"), strict=True
    ):
        if owner >= 0 or index == 0 or info >> 4 == STB_WEAK:
            continue
        version = image.symbols.version(index)
        label = f"{image.symbols.name(index)}" + (f" (version {version.name})" if version else "")
        where = f", needed from {version.file}" if version and version.file else ""
        ld_so = f"{image.path}: undefined symbol: {image.symbols.name(index)}"
        ld_so += f", version {version.name}" if version else ""
        raise SymbolError(f"{image.path}: undefined symbol {label}{where}", ld_so=ld_so)


def _value(kind: Kind, row: Row, symbol: int, bias: int) -> int:
    """What a ``row`` of a symbolic kind makes of its word, given the address of its ``symbol``."""
    offset, _, _, addend = row
    if kind.formula == "S":
        return symbol
    return (symbol + addend - (offset + bias if kind.formula == "S + A - P" else 0)) & ADDRESS_MASK


def refuse_overflow(
    image: ElfImage, size: int, vaddrs: Sequence[int], values: Sequence[int], *, signed: bool = True
) -> None:
    """Raise :class:`LoadError` when a value does not fit the ``size`` bytes that are written."""
    if size >= 8:
        return
    bits = 8 * size
    for vaddr, value in zip(vaddrs, values, strict=True):
        extended = value & ((1 << bits) - 1)
        if signed and extended >> (bits - 1):
            extended |= ADDRESS_MASK >> bits << bits
        if extended != value:
            raise _too_far(image, vaddr, value)


def _too_far(image: ElfImage, vaddr: int, value: int) -> LoadError:
    where, found = f"{image.path}: relocation at vaddr {vaddr:#x}", f"{value:#x} does not fit 32 bits"
    return LoadError(f"{where}: {found}", hint="what it refers to is too far away; rebuild it with -fPIC")


def call_resolver(address: int) -> int:
    """The function that the IFUNC resolver at ``address`` chooses; it is told of the processor."""
    return int(unlocked("choose", ctypes.c_uint64, ctypes.c_uint64)(address))


def _by_turns(names: MappedSymbols, bindings: Bindings, late: bytearray) -> list[dict[int, None]]:
    """The places of symbols that are IFUNCs: those of other libraries first, then those of ``names``."""
    groups: list[dict[int, None]] = [{}, {}]
    for place in compress(range(len(late)), late):
        groups[bindings.owner_at(place).names is names][place] = None
    return [group for group in groups if group]
