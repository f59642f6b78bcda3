"""What a file says about the words of its pages: which are relocated and how, whose symbol they belong to.

:class:`FileFacts` is made once a file, however many processes have it mapped, so that
:mod:`miniloader.evidence.cause` only compares arrays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan, Source
from miniloader.elf.debug_file import read_all_symbols
from miniloader.elf.relocations import kind_name
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
from miniloader.evidence.slots import RELR, SLOT_DTYPE, slots_of
from miniloader.forking import cached_property
from miniloader.kernel.frames import distinct
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.machine.relocation import KINDS, word_of

__all__ = ["FileFacts"]

_NOWHERE: Final = np.uint64(2**64 - 1)
_NAME_BITS: Final = 24  # of a key; the rest is the vaddr


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
        if image.header.word != word_of(image.header.machine):
            machine = f"{image.header.machine}, {image.header.elf_class} bits"
            self.trouble = f"the relocation kinds of {machine} are not known"

    @property
    def word(self) -> int:
        """Bytes of a word: of an address on its machine; 8 for what is no image."""
        return self.image.header.word if self.image is not None else 8

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
            return slots_of(self.image)
        except ElfError as error:
            self.trouble = f"its relocations cannot be read: {error}"
            return np.empty(0, SLOT_DTYPE)

    @cached_property
    def slot_vaddrs(self) -> NDArray[np.uint64]:
        """The vaddr of every slot, ascending, in one piece: to search a column of records copies it."""
        return np.ascontiguousarray(self.slots["vaddr"])

    def kind_name(self, kind: int) -> str:
        """The name of a slot's kind: ``R_X86_64_RELATIVE``, ``RELR``, or "" for none."""
        if kind < 0 or self.image is None:
            return "RELR" if kind == RELR else ""
        return kind_name(self.image.header.machine, kind)

    @cached_property
    def call_kinds(self) -> list[int]:
        """The kinds of slots that only calls use: those of the PLT."""
        kinds = KINDS.get(self.image.header.machine, {}) if self.image is not None else {}
        return [code for code, kind in kinds.items() if kind.call]

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
        """Objects and functions by vaddr, of several at one place the largest.

        For each its start, its end, and where its name is: in which table's strings, and where in them.
        """
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
            places.append(np.stack([np.full(len(chosen), number), table.rows["name"][chosen]], axis=1))
        start, end = np.concatenate(starts), np.concatenate(ends)
        order = np.lexsort((np.arange(len(start)), end, start))
        last = np.ones(len(order), np.bool_)
        last[:-1] = start[order][1:] != start[order][:-1]
        order = order[last]
        return start[order], end[order], np.concatenate(places)[order]

    def symbols_at(self, vaddrs: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each vaddr the number of the symbol that covers it (for :meth:`symbol_name`), -1: none."""
        return self.symbols_of(vaddrs, 1)[0]

    def symbols_over(self, vaddrs: NDArray[np.uint64]) -> tuple[list[int], list[int], list[int]]:
        """The numbers of the symbols that cover any of the ``vaddrs``, which ascend, and which each covers.

        It covers those from the first index (inclusive) to the second (exclusive).
        """
        starts, ends, _ = self._named
        first = np.searchsorted(vaddrs, starts)
        end = np.searchsorted(vaddrs, np.minimum(ends, self._following[1:]))
        numbers = np.flatnonzero(first < end)
        return numbers.tolist(), first[numbers].tolist(), end[numbers].tolist()

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
        table, place = self._named[2][number].tolist()
        return shown_name(self._tables[table].string(place))

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
