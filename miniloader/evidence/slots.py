"""The places of a file that a loader writes, as one table: relocated words, the dynamic section, the GOT.

A word is as long as an address of the file's machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT, MOST_ENTRIES
from miniloader.elf.static_relocations import static_tables
from miniloader.elf.tables import Table
from miniloader.kernel.frames import distinct
from miniloader.machine.relocation import KINDS, RESERVED_SLOTS, Formula, Kind

__all__ = [
    "ARGUMENT",
    "COPY",
    "DESCRIPTOR",
    "INDIRECT",
    "LOADER",
    "MODULE",
    "MODULE_OFFSET",
    "OTHER",
    "RELATIVE",
    "RELR",
    "SLOT_DTYPE",
    "SYMBOL",
    "THREAD_OFFSET",
    "slots_of",
]

SLOT_DTYPE: Final = np.dtype(
    [
        ("vaddr", np.uint64),
        ("size", np.uint8),  # bytes
        ("what", np.uint8),  # one of RELATIVE … LOADER
        ("addend", np.int64),
        ("symbol", np.uint32),  # index into the dynamic symbol table
        ("kind", np.int64),  # ELF64_R_TYPE; -1: RELR; -2: no relocation
    ]
)
"""A place that the loader writes; see the comments at each field."""

(
    RELATIVE,
    SYMBOL,
    INDIRECT,
    THREAD_OFFSET,
    MODULE,
    MODULE_OFFSET,
    DESCRIPTOR,
    ARGUMENT,
    COPY,
    OTHER,
    LOADER,
) = range(1, 12)
_OF_FORMULA: Final[dict[Formula, int]] = {
    "B + A": RELATIVE,
    "S + A": SYMBOL,
    "S": SYMBOL,
    "indirect": INDIRECT,
    "thread offset": THREAD_OFFSET,
    "module": MODULE,
    "module offset": MODULE_OFFSET,
    "descriptor": DESCRIPTOR,
    "copy": COPY,
    "S + A - P": OTHER,
    "Z + A": OTHER,
}
RELR, _NO_KIND = -1, -2
_NOWHERE: Final = 2**64 - 1
_MOST_COPIED: Final = 1 << 22  # bytes of all COPY relocations; each may claim any number


def slots_of(image: ElfImage) -> Table:
    """Every place that the loader writes of an image whose machine is known, as SLOT_DTYPE by vaddr.

    Raises ElfError where its relocations cannot be read.
    """
    slots = np.concatenate([*_relocated(image), _relr(image), *_copied(image), _loader(image)])
    vaddrs = slots["vaddr"].copy()  # in one piece: there may be millions, and each copy of all records counts
    order = np.argsort(vaddrs, kind="stable")
    vaddrs = vaddrs[order]
    last = np.append(vaddrs[1:] != vaddrs[:-1], True)[: len(order)]
    return np.asarray(slots[order[last]])


def _slots(vaddrs: NDArray[np.uint64], meaning: int, size: int, **fields: object) -> Table:
    slots = np.zeros(len(vaddrs), SLOT_DTYPE)
    slots["vaddr"], slots["what"], slots["size"], slots["kind"] = vaddrs, meaning, size, _NO_KIND
    for name, value in fields.items():
        slots[name] = value
    return slots


def _relocated(image: ElfImage) -> Iterable[Table]:
    """The slots of the relocation tables; of a TLS descriptor its two words; without COPY."""
    kinds, word = KINDS[image.header.machine], image.header.word
    tables = [(table.rows, table.addends) for table in image.relocations.tables]
    for rows, has_addends in (*tables, *static_tables(image)):
        for code in distinct(rows["type"]).tolist():
            kind = kinds.get(code)
            if kind is not None and kind.formula in ("none", "copy"):
                continue
            whole = kind is not None and kind.size in (word, 2 * word)
            meaning = _OF_FORMULA[kind.formula] if kind is not None and whole else OTHER
            chosen = rows[rows["type"] == code]
            addends = chosen["addend"] if has_addends else _words_at(image, chosen["offset"])
            size = word if kind is None else min(kind.size, word)
            fields = {"kind": code, "symbol": chosen["symbol"], "addend": _added(kind, addends)}
            yield _slots(chosen["offset"], meaning, size, **fields)
            if meaning == DESCRIPTOR:
                yield _slots(chosen["offset"] + np.uint64(word), ARGUMENT, word, **fields)


def _added(kind: Kind | None, addends: NDArray[np.int64]) -> NDArray[np.int64] | int:
    """What is added to the symbol's value: nothing where the psABI says so, whatever the file says."""
    if kind is None:
        return addends
    return 0 if kind.formula == "S" else addends - kind.less


def _words_at(image: ElfImage, vaddrs: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The words that the file has at these vaddrs; 0 where it has none.

    They are the addends of relocations that come without (REL, RELR).
    """
    word = image.header.word
    addends = np.zeros(len(vaddrs), np.int64)
    for load in image.loads:
        inside = np.flatnonzero((vaddrs >= load.vaddr) & (vaddrs + np.uint64(word) <= load.file_end))
        if len(inside):
            first, last = int(vaddrs[inside].min()), int(vaddrs[inside].max()) + word
            data = np.frombuffer(image.read(first, last - first, "words that are relocated"), np.uint8)
            at = (vaddrs[inside] - np.uint64(first)).astype(np.intp)
            addends[inside] = data[at[:, np.newaxis] + np.arange(word)].view(f"i{word}")[:, 0]
    return addends


def _relr(image: ElfImage) -> Table:
    """The words of DT_RELR."""
    vaddrs = image.relocations.relr
    return _slots(vaddrs, RELATIVE, image.header.word, kind=RELR, addend=_words_at(image, vaddrs))


def _copied(image: ElfImage) -> Iterable[Table]:
    """The words of the variables that COPY relocations bring into an executable."""
    kinds, word = KINDS[image.header.machine], image.header.word
    codes = [code for code, kind in kinds.items() if kind.formula == "copy"]
    left = _MOST_COPIED
    for table in image.relocations.tables:
        for row in table.rows[np.isin(table.rows["type"], codes)]:
            start, symbol, sizes = int(row["offset"]), int(row["symbol"]), image.symbols.rows["size"]
            size = min(int(sizes[symbol]), left) if symbol < len(sizes) else 0
            left -= size
            end = min(start + max(size, 1), _NOWHERE)
            words = np.arange(start & -word, end, word, dtype=np.uint64)
            yield _slots(words, COPY, word, kind=row["type"], symbol=symbol)


def _loader(image: ElfImage) -> Table:
    """The dynamic section, whose addresses ld.so adjusts, and what of the GOT is its own (psABI)."""
    dynamic, word = image.segment("PT_DYNAMIC"), image.header.word
    words: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    if dynamic is not None:
        end = dynamic.vaddr + min(dynamic.filesz, MOST_ENTRIES * 2 * word)
        words.append(np.arange(dynamic.vaddr, end, word, dtype=np.uint64))
    tags: Mapping[int, int] = image.dynamic.tags
    if DT_PLTGOT in tags:
        reserved = np.arange(RESERVED_SLOTS.get(image.header.machine, 3), dtype=np.uint64)
        words.append(np.uint64(tags[DT_PLTGOT]) + reserved * np.uint64(word))
    return _slots(np.concatenate(words), LOADER, word)
