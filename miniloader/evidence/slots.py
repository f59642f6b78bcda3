"""What a file says about the words of its pages: which are relocated and how, whose symbol they belong to.

:class:`FileFacts` is made once a file, however many processes have it mapped, so that
:mod:`miniloader.evidence.cause` only compares arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan, Source
from miniloader.elf.debug_file import read_all_symbols
from miniloader.elf.dynamic import DT_PLTGOT, MOST_ENTRIES
from miniloader.elf.relocations import kind_name
from miniloader.elf.static_relocations import static_tables
from miniloader.elf.symbols import (
    SHN_ABS,
    SHN_UNDEF,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_OBJECT,
    STT_TLS,
    SymbolTable,
    shown_name,
)
from miniloader.elf.tables import Table
from miniloader.errors import ElfError, MiniloaderError
from miniloader.evidence.address_ranges import AddressRanges
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.forking import cached_property
from miniloader.kernel.frames import distinct
from miniloader.kernel.syscalls import PAGE_SIZE
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
    "SLOT_DTYPE",
    "SYMBOL",
    "THREAD_OFFSET",
    "FileFacts",
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
_RELR, _NO_KIND = -1, -2
_WORD: Final = 8
_NOWHERE: Final = np.uint64(2**64 - 1)
_NAME_BITS: Final = 24  # of a key; the rest is the vaddr
_MOST_COPIED: Final = 1 << 22  # bytes of all COPY relocations; each may claim any number


class FileFacts:
    """One file: its bytes, and, when it is an ELF image, its slots and its symbols.

    ``image`` is None for any other file; then vaddrs are file offsets.  ``trouble`` says why nothing can be
    said about its words ("" when it can).  What is malformed is left out, not raised.
    """

    def __init__(self, source: Source, image: ElfImage | None, names: NameNumbers) -> None:
        self.source, self.image, self._names = source, image, names
        self.plan: LoadPlan | None = None
        self.trouble = ""
        if image is None:
            return
        try:
            self.plan = image.plan(PAGE_SIZE)
        except MiniloaderError:
            self.image = None  # the kernel maps it, yet not as an image
            return
        if image.header.machine not in KINDS or image.header.elf_class != 64:
            machine = f"{image.header.machine}, {image.header.elf_class} bits"
            self.trouble = f"the relocation kinds of {machine} are not known"

    @cached_property
    def zeros(self) -> AddressRanges:
        """The vaddrs of its anonymous pages: bss, but for what the file's last page holds."""
        mappings = self.plan.mappings if self.plan is not None else ()
        return AddressRanges((mapping.start, mapping.end) for mapping in mappings if mapping.kind == "zero")

    @cached_property
    def writable(self) -> AddressRanges:
        """The vaddrs of the segments that may be written to."""
        loads = self.image.loads if self.image is not None else ()
        return AddressRanges((load.vaddr, load.end) for load in loads if "w" in load.flags)

    # -- bytes ------------------------------------------------------------------------------------

    def pages(self, file_offsets: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """The file's pages at these offsets, shape (pages, PAGE_SIZE), a copy; zeroes past its end."""
        rows = self._rows
        missing = [offset for offset in file_offsets.tolist() if offset not in rows]
        if missing:
            self._read(missing)
        return self._store[[rows[offset] for offset in file_offsets.tolist()]]

    @cached_property
    def _rows(self) -> dict[int, int]:
        self._store = np.zeros((0, PAGE_SIZE), np.uint8)
        return {}

    def _read(self, offsets: list[int]) -> None:
        new = np.zeros((len(offsets), PAGE_SIZE), np.uint8)
        for row, offset in enumerate(offsets):
            length = min(PAGE_SIZE, self.source.size - offset)
            if length > 0:
                new[row, :length] = np.frombuffer(self.source.read(offset, length, "page"), np.uint8)
            self._rows[offset] = len(self._store) + row
        self._store = np.concatenate([self._store, new])

    # -- places that the loader writes --------------------------------------------------------------

    @cached_property
    def slots(self) -> Table:
        """Every place that the loader writes, as SLOT_DTYPE by vaddr; none for what is no image."""
        if self.image is None or self.trouble:
            return np.empty(0, SLOT_DTYPE)
        try:
            slots = np.concatenate(
                [_relocated(self.image), _relr(self.image), _copied(self.image), _loader(self.image)]
            )
        except ElfError as error:
            self.trouble = f"its relocations cannot be read: {error}"
            return np.empty(0, SLOT_DTYPE)
        ordered = slots[np.argsort(slots["vaddr"], kind="stable")]
        last = np.ones(len(ordered), np.bool_)
        last[:-1] = ordered["vaddr"][1:] != ordered["vaddr"][:-1]
        return ordered[last]

    @cached_property
    def slot_vaddrs(self) -> NDArray[np.uint64]:
        """The vaddr of every slot, ascending, in one piece: to search a column of records copies it."""
        return np.ascontiguousarray(self.slots["vaddr"])

    def kind_name(self, kind: int) -> str:
        """The name of a slot's kind: ``R_X86_64_RELATIVE``, ``RELR``, or "" for none."""
        if kind < 0 or self.image is None:
            return "RELR" if kind == _RELR else ""
        return kind_name(self.image.header.machine, kind)

    @cached_property
    def is_dynamic_loader(self) -> bool:
        """Whether it is ld.so: what it writes to its own pages is bookkeeping, not the program's doing."""
        try:
            soname = self.image.soname if self.image is not None else None
        except ElfError:
            return False
        return (soname or "").startswith(("ld-linux", "ld-musl", "ld64.so", "ld.so", "ld-"))

    @cached_property
    def has_text_relocations(self) -> bool:
        """Whether its code is relocated, too; that may be so where its dynamic section cannot be read."""
        try:
            return self.image is not None and self.image.dynamic.text_relocations
        except ElfError:
            return True

    # -- symbols ----------------------------------------------------------------------------------

    @cached_property
    def symbols(self) -> SymbolTable | None:
        """The dynamic symbols, None where there are none that can be read."""
        try:
            return self.image.symbols if self.image is not None else None
        except ElfError:
            return None

    @cached_property
    def name_numbers(self) -> NDArray[np.uint64]:
        """The number of each dynamic symbol's name."""
        return np.empty(0, np.uint64) if self.symbols is None else self._names.numbers(self.symbols)

    def keys(self, vaddrs: NDArray[np.uint64], names: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What :attr:`definitions` holds for a name at a vaddr."""
        return vaddrs << np.uint64(_NAME_BITS) | names

    @cached_property
    def definitions(self) -> NDArray[np.uint64]:
        """The keys of what other files may bind to, sorted.

        With them, a function that an executable gives its address of its own PLT entry: undefined, yet
        with a value (psABI, "Function Addresses").
        """
        table = self.symbols
        if table is None:
            return np.empty(0, np.uint64)
        rows = table.rows
        usable = (rows["shndx"] != SHN_UNDEF) | ((table.type == STT_FUNC) & (rows["value"] != 0))
        usable &= (table.type != STT_TLS) & (rows["shndx"] != SHN_ABS)
        return np.sort(self.keys(rows["value"][usable].astype(np.uint64), self.name_numbers[usable]))

    @cached_property
    def thread_local(self) -> NDArray[np.uint64]:
        """The keys of its thread-local symbols, sorted; offsets in the module's block stand for vaddrs."""
        table = self.symbols
        if table is None:
            return np.empty(0, np.uint64)
        usable = (table.rows["shndx"] != SHN_UNDEF) & (table.type == STT_TLS)
        offsets = table.rows["value"][usable].astype(np.uint64)
        return np.sort(self.keys(offsets, self.name_numbers[usable]))

    def defined(self, name: int) -> tuple[int, ...]:
        """The vaddrs at which it defines the name of this number, other than by an IFUNC."""
        if name in self.indirect_names:
            return ()
        so_called = self.definitions & np.uint64((1 << _NAME_BITS) - 1) == np.uint64(name)
        return tuple((self.definitions[so_called] >> np.uint64(_NAME_BITS)).tolist())

    @cached_property
    def indirect_names(self) -> NDArray[np.uint64]:
        """The names of its IFUNC symbols: their address is what a resolver returned."""
        if self.symbols is None:
            return np.empty(0, np.uint64)
        rows = self.symbols.rows
        return distinct(
            self.name_numbers[(self.symbols.type == STT_GNU_IFUNC) & (rows["shndx"] != SHN_UNDEF)]
        )

    @cached_property
    def code(self) -> NDArray[np.uint64]:
        """The vaddrs [start, end) of executable segments, shape (segments, 2)."""
        loads = self.image.loads if self.image is not None else ()
        spans = [(load.vaddr, load.end) for load in loads if "x" in load.flags]
        return np.array(spans, dtype=np.uint64).reshape(-1, 2)

    @cached_property
    def _tables(self) -> tuple[SymbolTable, ...]:
        """Where names are looked up: in .symtab, its own or a debug file's, then in the dynamic symbols."""
        tables = () if self.image is None else (read_all_symbols(self.image), self.symbols)
        return tuple(table for table in tables if table is not None and len(table))

    @cached_property
    def _named(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
        """Objects and functions by vaddr: start, end, (table, row); of several at one place the largest."""
        starts, ends, places = (
            [np.empty(0, np.uint64)],
            [np.empty(0, np.uint64)],
            [np.empty((0, 2), np.int64)],
        )
        for number, table in enumerate(self._tables):
            usable = np.isin(table.type, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC)) & (table.rows["size"] > 0)
            usable &= (table.rows["shndx"] != SHN_UNDEF) & (table.rows["shndx"] != SHN_ABS)
            chosen = np.flatnonzero(usable)
            starts.append(table.rows["value"][chosen].astype(np.uint64))
            ends.append(starts[-1] + table.rows["size"][chosen].astype(np.uint64))
            places.append(np.stack([np.full(len(chosen), number), chosen], axis=1))
        start, end = np.concatenate(starts), np.concatenate(ends)
        order = np.lexsort((np.arange(len(start)), end, start))
        last = np.ones(len(order), np.bool_)
        last[:-1] = start[order][1:] != start[order][:-1]
        order = order[last]
        return start[order], end[order], np.concatenate(places)[order]

    def symbols_at(self, vaddrs: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each vaddr the number of the symbol that covers it (for :meth:`symbol_name`), -1: none."""
        return self.symbols_of(vaddrs, 1)[0]

    def symbols_of(
        self, vaddrs: NDArray[np.uint64], size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """For each vaddr the number of the symbol that covers it (-1: none), and whether it is the only one.

        It is where every byte of [vaddr, vaddr + ``size``) is that symbol's, or no symbol's.
        """
        starts, ends, _ = self._named
        if not len(starts):
            return np.full(len(vaddrs), -1, np.int64), np.ones(len(vaddrs), np.bool_)
        at = np.searchsorted(starts, vaddrs, side="right") - 1
        last, end = vaddrs + np.uint64(size), ends[at]
        covered = (at >= 0) & (vaddrs < end)
        alone = self._following[at + 1] >= last
        return np.where(covered, at, -1), alone & (~covered | (end >= last))

    @cached_property
    def _following(self) -> NDArray[np.uint64]:
        """Where each symbol starts, and where none does."""
        return np.append(self._named[0], _NOWHERE)

    def symbol_name(self, number: int) -> str:
        """The name of a symbol; "" where there is no such number: the file was rewritten meanwhile."""
        if number >= len(self._named[2]):
            return ""
        table, row = self._named[2][number]
        name: bytes = self._tables[table].names(np.array([row]))[0]
        return shown_name(name)

    def symbols_between(self, start: int, end: int) -> tuple[int, ...]:
        """The numbers of the symbols with a byte in the vaddrs [start, end), in order."""
        starts, ends, _ = self._named
        return tuple(np.flatnonzero((starts < end) & (ends > start)).tolist())

    @cached_property
    def section_spans(self) -> tuple[tuple[int, int, str], ...]:
        """Start, end and name of the sections that take memory, but for what lld fills a page with."""
        sections = self.image.sections if self.image is not None else ()
        return tuple(
            (section.vaddr, section.end, section.name)
            for section in sections
            if section.allocated and section.size and section.name not in (".tbss", ".relro_padding")
        )

    def section_on(self, vaddr: int) -> str:
        """The section that takes most of the page at ``vaddr``; "" for none."""
        shares = [
            (min(end, vaddr + PAGE_SIZE) - max(start, vaddr), name)
            for start, end, name in self.section_spans
            if start < vaddr + PAGE_SIZE and vaddr < end
        ]
        return max(shares, default=(0, ""))[1]


# ------------------------------------------------------------------------------------------ the slots
def _slots(vaddrs: NDArray[np.uint64], meaning: int, **fields: object) -> Table:
    slots = np.zeros(len(vaddrs), SLOT_DTYPE)
    slots["vaddr"], slots["what"], slots["size"], slots["kind"] = vaddrs, meaning, _WORD, _NO_KIND
    for name, value in fields.items():
        slots[name] = value
    return slots


def _relocated(image: ElfImage) -> Table:
    """The slots of the relocation tables; of a TLS descriptor its two words; without COPY."""
    kinds = KINDS[image.header.machine]
    slots = [np.empty(0, SLOT_DTYPE)]
    for rows in (*(table.rows for table in image.relocations.tables), *static_tables(image)):
        for code in distinct(rows["type"]).tolist():
            kind = kinds.get(code)
            if kind is not None and kind.formula in ("none", "copy"):
                continue
            meaning = OTHER if kind is None or kind.size not in (8, 16) else _OF_FORMULA[kind.formula]
            chosen = rows[rows["type"] == code]
            fields = {
                "kind": code,
                "symbol": chosen["symbol"],
                "addend": _addends(kind, chosen["addend"]),
                "size": _WORD if kind is None else min(kind.size, _WORD),
            }
            slots.append(_slots(chosen["offset"], meaning, **fields))
            if meaning == DESCRIPTOR:
                slots.append(_slots(chosen["offset"] + np.uint64(_WORD), ARGUMENT, **fields))
    return np.concatenate(slots)


def _addends(kind: Kind | None, addends: NDArray[np.int64]) -> NDArray[np.int64] | int:
    """What is added to the symbol's value: nothing where the psABI says so, whatever the file says."""
    if kind is None:
        return addends
    return 0 if kind.formula == "S" else addends - kind.less


def _relr(image: ElfImage) -> Table:
    """The words of DT_RELR: their addend is what the file holds there."""
    vaddrs = image.relocations.relr
    slots = _slots(vaddrs, RELATIVE, kind=_RELR)
    for load in image.loads:
        inside = np.flatnonzero((vaddrs >= load.vaddr) & (vaddrs + _WORD <= load.file_end))
        if len(inside):
            first, last = int(vaddrs[inside].min()), int(vaddrs[inside].max()) + _WORD
            data = np.frombuffer(image.read(first, last - first, "DT_RELR's words"), np.uint8)
            at = (vaddrs[inside] - np.uint64(first)).astype(np.intp)
            slots["addend"][inside] = data[at[:, np.newaxis] + np.arange(_WORD)].view(np.int64)[:, 0]
    return slots


def _copied(image: ElfImage) -> Table:
    """The words of the variables that COPY relocations bring into an executable."""
    kinds = KINDS[image.header.machine]
    codes = [code for code, kind in kinds.items() if kind.formula == "copy"]
    slots = [np.empty(0, SLOT_DTYPE)]
    left = _MOST_COPIED
    for table in image.relocations.tables:
        for row in table.rows[np.isin(table.rows["type"], codes)]:
            start, symbol, sizes = int(row["offset"]), int(row["symbol"]), image.symbols.rows["size"]
            size = min(int(sizes[symbol]), left) if symbol < len(sizes) else 0
            left -= size
            end = min(start + max(size, 1), int(_NOWHERE))
            words = np.arange(start & -_WORD, end, _WORD, dtype=np.uint64)
            slots.append(_slots(words, COPY, kind=row["type"], symbol=symbol))
    return np.concatenate(slots)


def _loader(image: ElfImage) -> Table:
    """The dynamic section, whose addresses ld.so adjusts, and what of the GOT is its own (psABI)."""
    dynamic = image.segment("PT_DYNAMIC")
    words: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    if dynamic is not None:
        end = dynamic.vaddr + min(dynamic.filesz, MOST_ENTRIES * 2 * _WORD)
        words.append(np.arange(dynamic.vaddr, end, _WORD, dtype=np.uint64))
    tags: Mapping[int, int] = image.dynamic.tags
    if DT_PLTGOT in tags:
        reserved = np.arange(RESERVED_SLOTS.get(image.header.machine, 3), dtype=np.uint64)
        words.append(np.uint64(tags[DT_PLTGOT]) + reserved * np.uint64(_WORD))
    return _slots(np.concatenate(words), LOADER)
