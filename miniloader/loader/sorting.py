"""A library's relocations, sorted by what it takes to apply them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import (
    DT_GNU_HASH,
    DT_HASH,
    DT_JMPREL,
    DT_PLTGOT,
    DT_REL,
    DT_RELA,
    DT_RELACOUNT,
    DT_STRTAB,
    DT_SYMTAB,
    DT_VERSYM,
)
from miniloader.elf.header import Segment
from miniloader.elf.relocations import kind_name
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import LoadError
from miniloader.machine.relocation import KINDS, Kind
from miniloader.values import dataclass

__all__ = ["TLS", "Sorted", "sort_relocations"]

#: Formulas of thread-local storage.
TLS: Final = ("module", "module offset", "thread offset", "descriptor")
_RELATIVE: Final = "B + A"
#: The addresses in the dynamic section that glibc adds the load bias to, for whoever reads them in memory.
_LOCATED: Final = frozenset(
    (DT_HASH, DT_PLTGOT, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_REL, DT_JMPREL, DT_VERSYM, DT_GNU_HASH)
)
_WORD: Final = 8
_SMALL: Final = 256


@dataclass(frozen=True, eq=False)
class Sorted:
    """A library's relocations by what they need: ``rows`` of each formula, in table order.

    ``dynamic`` are the offsets and addends of B + A in the dynamic section, which no relocation asks for,
    ``relative`` all others of B + A, ``lazy`` the PLT slots left for their first call; ``wanted`` the symbols
    (ascending) that the others use.
    """

    dynamic: Table
    relr: NDArray[np.uint64]
    relative: Table
    lazy: Table
    others: tuple[tuple[Kind, Table], ...]
    wanted: NDArray[np.int64]

    def of(self, *formulas: str) -> Iterator[tuple[Kind, Table]]:
        """The kinds with one of ``formulas``, and their rows."""
        return ((kind, rows) for kind, rows in self.others if kind.formula in formulas)

    def targets(self) -> Iterator[NDArray[np.uint64]]:
        """The vaddrs written, an array for each kind; and the last byte of those that are longer."""
        yield self.dynamic["offset"]
        yield self.relr
        relative = self.relative["offset"]
        yield relative
        yield self.lazy["offset"]
        if len(relative) and int(np.bitwise_or.reduce(relative)) & 7:
            yield relative + np.uint64(_WORD - 1)
        for kind, rows in self.others:
            yield rows["offset"]
            yield rows["offset"] + np.uint64(kind.size - 1)


def sort_relocations(image: ElfImage, *, lazy: bool = False) -> Sorted:
    """Sort the relocations of ``image`` by kind; :class:`LoadError` for a kind that is not known here.

    With ``lazy`` the PLT's slots (``S`` in ``DT_JMPREL``) are kept apart.
    """
    kinds = KINDS.get(image.header.machine)
    if kinds is None:
        raise LoadError(f"{image.path}: relocations of {image.header.machine} cannot be applied")
    code_of_relative = next(code for code, kind in kinds.items() if kind.formula == _RELATIVE)
    code_of_slot = next(code for code, kind in kinds.items() if kind.call)
    relative, rest, later = [], [], []
    for table in image.relocations.tables:
        if not table.addends:
            raise LoadError(f"{image.path}: {table.name}: found REL, expected RELA on this machine")
        rows = table.rows
        head = min(image.dynamic.tags.get(DT_RELACOUNT, 0), len(rows)) if table.name == "DT_RELA" else 0
        if head and bool((rows["type"][:head] == code_of_relative).all()):
            relative.append(rows[:head])
            rows = rows[head:]
        if lazy and table.name == "DT_JMPREL":
            slots = rows["type"] == code_of_slot  # the PLT counts them, so none may be left out between them
            count = len(rows) if slots.all() else int(np.argmin(slots))
            later.append(rows[:count])
            rows = rows[count:]
        others = rows["type"] != code_of_relative
        if not others.all():
            relative.append(rows[~others])
            rows = rows[others]
        rest.append(rows)
    left = np.concatenate(rest) if rest else np.empty(0, RELOCATION)
    grouped = []
    for code in _distinct(left["type"]):
        kind = kinds.get(code)
        if kind is None:
            raise LoadError(
                f"{image.path}: relocation kind {kind_name(image.header.machine, code)}: not supported here"
            )
        if kind.formula == "copy":
            first = image.symbols.name(int(left["symbol"][left["type"] == code][0]))
            raise LoadError(
                f"{image.path}: {kind.name} of {first}: a library cannot ask for one",
                hint="only a program that is not position-independent can; link it with -shared -fPIC",
            )
        if kind.formula != "none":
            grouped.append((kind, left[left["type"] == code]))
    filled = [rows for rows in relative if len(rows)]
    head_rows = filled[0] if len(filled) == 1 else np.concatenate(filled or [left[:0]])
    used = [rows["symbol"] for kind, rows in grouped if kind.formula != "indirect"]
    marked = np.zeros(len(image.symbols), bool)
    for symbols in used:
        marked[symbols] = True
    wanted = np.flatnonzero(marked)
    slots_left = np.concatenate(later) if later else left[:0]
    return Sorted(_located(image), image.relocations.relr, head_rows, slots_left, tuple(grouped), wanted)


def _writable(image: ElfImage, part: Segment) -> bool:
    writable = (load for load in image.loads if "w" in load.flags)
    return any(load.vaddr <= part.vaddr and part.file_end <= load.file_end for load in writable)


def _located(image: ElfImage) -> Table:
    """The addresses in the dynamic section, unless it is read-only (glibc's ``dl_relocate_ld``)."""
    segment = image.segment("PT_DYNAMIC")
    if segment is None or "w" not in segment.flags or not _writable(image, segment):
        return np.empty(0, RELOCATION)
    places = {tag: place for place, (tag, _) in enumerate(image.dynamic.entries) if tag in _LOCATED}
    rows = np.zeros(len(places), RELOCATION)
    rows["offset"] = [segment.vaddr + 2 * _WORD * place + _WORD for place in places.values()]
    rows["addend"] = np.array([image.dynamic.tags[tag] for tag in places], np.uint64).view(np.int64)
    return rows


def _distinct(codes: NDArray[np.uint32]) -> list[int]:
    """The different values among ``codes``: most are small, and numpy's ``unique`` would sort all of them."""
    small = codes[codes < _SMALL]
    distinct = np.flatnonzero(np.bincount(small)).tolist()
    return distinct if len(small) == len(codes) else [*distinct, *set(codes[codes >= _SMALL].tolist())]
