"""Relocation: from what the file asks for to the words that are written.

In the order of glibc: RELR, then the tables, then what needs the library's own code to run (IRELATIVE and
symbols that are IFUNCs).  Nearly all words are computed and written by :mod:`miniloader.native`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_FINI_ARRAY, DT_FINI_ARRAYSZ, DT_INIT_ARRAY, DT_INIT_ARRAYSZ
from miniloader.elf.symbols import STB_WEAK
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import ElfError, LoadError, SymbolError
from miniloader.loader.beside_glibc.thread_local import Write
from miniloader.loader.memory import Memory
from miniloader.loader.relocation_groups import TLS, Sorted, refuse_kind
from miniloader.loader.relocation_job import RelocationJob, kinds_table
from miniloader.loader.scope import Bindings
from miniloader.loader.spans import open_names, readable, refuse, writable
from miniloader.loader.symbol_lookup import MappedSymbols
from miniloader.machine.relocation import KINDS, Kind
from miniloader.native import ADDRESS_MASK, INDIRECT_FUNCTION, Reason, Stopped, buffer_address

__all__ = ["Relocation", "call_resolver", "refuse_unbound"]

_ARRAYS: Final = ((DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ))


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
            _kinds(image.header.machine),
            writable=writable(image, plan),
            code=[(load.vaddr, load.end) for load in image.loads if "x" in load.flags],
            pointers=[
                (tags[start], tags[start] + tags.get(length, 0)) for start, length in _ARRAYS if start in tags
            ],
            parts=[*_elsewhere(relocations.unpacked, memory.bias), *parts],
            pages=(plan.start, plan.end),
            page_size=plan.page_size,
        )
        spans = readable(image, plan)
        for vaddr, count in (relocations.head, *parts):
            end = vaddr + count * RELOCATION.itemsize
            if count and not any(low <= vaddr and end <= high for low, high in spans):
                found = f"vaddrs {vaddr:#x} to {end:#x}"
                raise ElfError(image.path, "relocations", found, "inside a segment that can be read")
        try:
            counts, highest = self._job.survey()
            if len(relocations.lazy):
                highest = max(highest, int(relocations.lazy["symbol"].max()))
            self.names = open_names(image, spans, memory.bias, at_least=highest + 1)
            self.wanted = self._job.used(len(self.names))
            self._counts = {relocations.kinds[code]: (code, count) for code, count in counts.items()}
            for kind, rows in self._rows_of("copy"):
                refuse_kind(image, relocations.kinds, self._counts[kind][0], int(rows["symbol"][0]))
        except Stopped as stopped:
            self._refuse(stopped)

    def apply(
        self,
        bindings: Bindings,
        addresses: NDArray[np.uint64],
        late: NDArray[np.bool_],
        thread_local: Callable[[Iterable[tuple[Kind, Table]]], list[Write]],
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
        added = relocations.relr
        if len(relocations.lazy):
            added = np.concatenate([added, relocations.lazy["offset"]])
        words = called, pointed, addresses, bindings.found, late
        try:
            job.relocate(relocations.dynamic, added, relocations.head, *words)
            for vaddrs, values, size in thread_local(self._rows_of(*TLS)):
                _refuse_overflow(self._image, size, vaddrs, values)
                self._put(vaddrs, values, size)
            own = any(kind.formula == "indirect" for kind in self._counts)
            if own or (bindings.met & INDIRECT_FUNCTION and late.any()):
                self._put_indirect(bindings, addresses, late, may_run=may_run)
        except Stopped as stopped:
            self._refuse(stopped)
        return job.pages

    def _rows_of(self, *formulas: str) -> Iterator[tuple[Kind, Table]]:
        """The kinds with one of ``formulas``, and their rows."""
        return (
            (kind, self._job.rows(code, count))
            for kind, (code, count) in self._counts.items()
            if kind.formula in formulas
        )

    def _put(self, vaddrs: NDArray[np.uint64], values: NDArray[np.uint64], size: int) -> None:
        self._memory.put(vaddrs, values, size)
        self._job.note(vaddrs, size)

    def _refuse(self, stopped: Stopped) -> NoReturn:
        if stopped.reason is Reason.NO_KIND:
            refuse_kind(self._image, self._relocations.kinds, stopped.what, 0)
        if stopped.reason is Reason.TOO_FAR:
            raise _too_far(self._image, stopped.where, stopped.what)
        refuse(self._image, stopped)

    def _put_indirect(
        self, bindings: Bindings, addresses: NDArray[np.uint64], late: NDArray[np.bool_], *, may_run: bool
    ) -> None:
        """What needs our code to run: others' IFUNCs, which its own resolvers may call, its own, IRELATIVE.

        Each is written before the next is resolved, and each resolver runs once.
        """
        chosen: dict[int, int] = {}
        bias = self._memory.bias % (1 << 64)

        def resolve(resolvers: NDArray[np.uint64]) -> NDArray[np.uint64]:
            for resolver in resolvers.tolist():
                if resolver not in chosen:
                    chosen[resolver] = call_resolver(resolver)
            return np.array([chosen[resolver] for resolver in resolvers.tolist()], np.uint64)

        for group in _by_turns(self.names, bindings, late):
            places = np.flatnonzero(group)
            addresses[places] = resolve(addresses[places]) if may_run else 0
            for kind, rows in self._rows_of("S", "S + A", "S + A - P"):
                place = bindings.place(rows["symbol"], call=kind.call)
                rows, place = rows[group[place]], place[group[place]]
                values = _values(kind, rows, addresses[place], bias)
                _refuse_overflow(self._image, kind.size, rows["offset"], values, signed=kind.signed)
                self._put(rows["offset"], values, kind.size)
        for kind, rows in self._rows_of("indirect"):
            resolvers = rows["addend"].view(np.uint64) + np.uint64(bias)
            values = resolve(resolvers) if may_run else np.zeros(len(rows), np.uint64)
            self._put(rows["offset"], values, kind.size)


def _elsewhere(tables: Sequence[bytearray], bias: int) -> list[tuple[int, int]]:
    """Where ``tables`` are, which do not lie in the library: what would be the vaddr there, and the count."""
    size = RELOCATION.itemsize
    return [((buffer_address(table) - bias) & ADDRESS_MASK, len(table) // size) for table in tables]


@lru_cache(maxsize=1)
def _kinds(machine: str) -> NDArray[Any]:
    return kinds_table(KINDS[machine])


def refuse_unbound(image: ElfImage, bindings: Bindings) -> None:
    """Raise :class:`SymbolError` for the first symbol without a definition that is not weak."""
    for place in np.flatnonzero(bindings.owner < 0).tolist():
        index = int(bindings.wanted[place])
        if index == 0 or int(bindings.field("info")[place]) >> 4 == STB_WEAK:
            continue
        version = image.symbols.version(index)
        label = f"{image.symbols.name(index)}" + (f" (version {version.name})" if version else "")
        where = f", needed from {version.file}" if version and version.file else ""
        raise SymbolError(f"{image.path}: undefined symbol {label}{where}")


def _values(kind: Kind, rows: Table, symbols: NDArray[np.uint64], bias: int) -> NDArray[np.uint64]:
    """What the ``rows`` of a symbolic kind make of their words, given the addresses of their ``symbols``."""
    if kind.formula == "S":
        return symbols
    with np.errstate(over="ignore"):
        values: NDArray[np.uint64] = symbols + rows["addend"].view(np.uint64)
        if kind.formula == "S + A - P":
            values -= rows["offset"] + np.uint64(bias)
        return values


def _refuse_overflow(
    image: ElfImage, size: int, vaddrs: NDArray[np.uint64], values: NDArray[np.uint64], *, signed: bool = True
) -> None:
    """Raise :class:`LoadError` when a value does not fit the ``size`` bytes that are written."""
    if size >= 8:
        return
    low = values.astype(np.uint32)
    extended = low.astype(np.int32).astype(np.int64).view(np.uint64) if signed else low.astype(np.uint64)
    overflowing = np.flatnonzero(extended != values)
    if len(overflowing):
        first = overflowing[0]
        raise _too_far(image, int(vaddrs[first]), int(values[first]))


def _too_far(image: ElfImage, vaddr: int, value: int) -> LoadError:
    where, found = f"{image.path}: relocation at vaddr {vaddr:#x}", f"{value:#x} does not fit 32 bits"
    return LoadError(f"{where}: {found}", hint="what it refers to is too far away; rebuild it with -fPIC")


_RESOLVER: Final = ctypes.CFUNCTYPE(ctypes.c_uint64)


def call_resolver(address: int) -> int:
    """The function that the IFUNC resolver at ``address`` chooses (on x86-64 it takes no argument)."""
    return int(_RESOLVER(address)())


def _by_turns(names: MappedSymbols, bindings: Bindings, late: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The symbols that are IFUNCs: others' first, then those of the library ``names``; no group is empty."""
    if not late.any():
        return []
    positions = [position for position, definer in enumerate(bindings.scope) if definer.names is names]
    of_library = np.logical_or.reduce([bindings.owner == position for position in positions])
    return [group for group in (late & ~of_library, late & of_library) if group.any()]
