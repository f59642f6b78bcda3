"""What lies where in an image: functions and data, PLT stubs, GOT slots, strings, sections.

:class:`Landmarks` names a vaddr as a reader of disassembly wants it named, and finds where a name is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.elf.header import Section, Segment
from miniloader.elf.relocations import kind_name
from miniloader.elf.symbols import (
    SHN_UNDEF,
    STB_LOCAL,
    STT_COMMON,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_NOTYPE,
    STT_OBJECT,
    SymbolTable,
)
from miniloader.elf.symtab import read_symtab
from miniloader.elf.tables import distinct
from miniloader.elf.unwind_table import unwind_entries
from miniloader.errors import ElfError
from miniloader.forking import cached_property
from miniloader.machine.plt import find_stubs
from miniloader.values import dataclass

__all__ = ["CodeSymbol", "Landmark", "Landmarks", "PltStub", "Slot"]

Kind = Literal["symbol", "plt", "got", "string", "section", "segment", "relocation"]

_NAMING: Final = (STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_COMMON, STT_GNU_IFUNC)
_FUNCTIONS: Final = (STT_FUNC, STT_GNU_IFUNC)
_SHN_LORESERVE: Final = 0xFF00
_MOST_ENCLOSING: Final = 256  # symbols that may begin inside another before it is not found any more
_MOST_STRING: Final = 256
_RELATIVE: Final = re.compile(r"_(PC|PLT|GOTPC)")
_HIGHEST: Final = np.uint64(2**64 - 1)
#: What the names of relocation kinds end in that fill slots of the GOT, whatever the processor.
_GOT_KINDS: Final = ("GLOB_DAT", "JUMP_SLOT", "JMP_SLOT", "IRELATIVE", "TLSDESC", "TLS_DESC")


@dataclass(frozen=True)
class Slot:
    """A word that a relocation fills when the library is loaded.

    ``symbol`` and ``version`` say what with; where there is no symbol, the vaddr ``addend`` does.  In an
    object file ``defined_at`` is the vaddr of a symbol that it defines itself.
    """

    vaddr: int
    relocation: str
    symbol: str | None
    version: str | None
    addend: int
    defined_at: int | None = None


@dataclass(frozen=True)
class PltStub:
    """A stub of the procedure linkage table, and the slot through which it jumps."""

    vaddr: int
    end: int
    slot: Slot


@dataclass(frozen=True)
class CodeSymbol:
    """A named range.  ``size`` is 0 where the file does not say; ``type`` is the gABI's STT number.

    On arm the lowest bit of a function's value, which says that its code is Thumb, is in ``thumb`` instead.
    """

    name: str
    vaddr: int
    size: int
    type: int
    thumb: bool = False


@dataclass(frozen=True)
class Landmark:
    """What lies at ``vaddr``; ``slot`` is the relocated word there, or the one a PLT stub goes through."""

    kind: Kind
    name: str
    vaddr: int
    slot: Slot | None = None


@dataclass(frozen=True, eq=False)
class _Symbols:
    """Every named range of both symbol tables by start; of equal starts the best name comes last."""

    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    reach: NDArray[np.uint64]  # the highest end so far
    table: NDArray[np.intp]  # 0: dynamic, 1: .symtab
    index: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Landmarks:
    """What lies where in ``image``; each part is read when it is first needed.

    Raises :class:`ElfError` where the dynamic tables are malformed.
    """

    image: ElfImage

    # -- symbols ----------------------------------------------------------------------------------

    @cached_property
    def tables(self) -> tuple[SymbolTable, SymbolTable]:
        """The dynamic symbols, and those of ``.symtab``; the latter twice where the file is not linked."""
        symbols = self.image.symbols
        return symbols, symbols if self.image.header.type == "REL" else read_symtab(self.image)

    def symbol(self, name: str, version: str | None = None) -> CodeSymbol | None:
        """The defined symbol ``name``: a dynamic one, else one of ``.symtab``."""
        dynamic, static = self.tables
        index = dynamic.find(name, version)
        if index is not None:
            return self._symbol(dynamic, index)
        if version is not None:
            return None
        return next((self._symbol(static, int(index)) for index in _named(static, name)), None)

    def symbol_at(self, vaddr: int) -> CodeSymbol | None:
        """The symbol that covers ``vaddr``, the innermost if several do."""
        names = self._by_vaddr
        place = int(np.searchsorted(names.starts, np.uint64(vaddr), side="right")) - 1
        for at in range(place, max(place - _MOST_ENCLOSING, -1), -1):
            if int(names.ends[at]) > vaddr:
                return self._symbol(self.tables[int(names.table[at])], int(names.index[at]))
            if int(names.reach[at]) <= vaddr:
                break
        return None

    def next_symbol(self, vaddr: int) -> int | None:
        """The vaddr of the first symbol after ``vaddr``."""
        place = int(np.searchsorted(self._by_vaddr.starts, np.uint64(vaddr), side="right"))
        return int(self._by_vaddr.starts[place]) if place < len(self._by_vaddr.starts) else None

    def covered(self, vaddrs: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of ``vaddrs`` some symbol covers."""
        place = np.searchsorted(self._by_vaddr.starts, vaddrs, side="right")
        return np.asarray(np.concatenate([np.zeros(1, np.uint64), self._by_vaddr.reach])[place] > vaddrs)

    def code_starts(self, start: int, end: int) -> list[int]:
        """Where functions begin from ``start`` to ``end``, by symbols and the unwinder's table: vaddrs."""
        low, high = np.searchsorted(self._code_starts, np.array([start, end], np.uint64)).tolist()
        vaddrs: list[int] = self._code_starts[low:high].tolist()
        return vaddrs

    @cached_property
    def _code_starts(self) -> NDArray[np.uint64]:
        vaddrs = [unwind_entries(self.image)]
        for table in self.tables:
            rows = table.rows[np.isin(table.type, _FUNCTIONS) & (table.rows["shndx"] != SHN_UNDEF)]
            odd = np.uint64(self.image.header.machine == "ARM")  # the lowest bit says that it is Thumb
            vaddrs.append(rows["value"].astype(np.uint64) & ~odd)
        return distinct(np.concatenate(vaddrs))[0]

    def marks(self, start: int, end: int) -> list[tuple[int, Literal["code", "thumb", "data"]]]:
        """Where from ``start`` to ``end`` code and data begin, as mapping symbols say (arm and later)."""
        vaddrs, kinds = self._marks
        low, high = np.searchsorted(vaddrs, np.array([start, end], np.uint64)).tolist()
        if low > 0 and (low == len(vaddrs) or int(vaddrs[low]) != start):
            low -= 1  # what began before goes on
        marks = zip(vaddrs[low:high].tolist(), kinds[low:high].tolist(), strict=True)
        return [(max(vaddr, start), _MARKS[kind]) for vaddr, kind in marks if kind in _MARKS]

    @cached_property
    def _marks(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """The vaddrs of mapping symbols, ascending, and the letter after the ``$`` of each."""
        table = self.tables[1]
        if self.image.header.machine not in ("ARM", "AARCH64", "RISCV"):
            return np.empty(0, np.uint64), np.empty(0, np.uint8)
        index = np.flatnonzero(_mapping(table) & (table.rows["shndx"] != SHN_UNDEF))
        rows = table.rows[index]
        order = np.argsort(rows["value"], kind="stable")
        return rows["value"][order].astype(np.uint64), _octet(table, 1)[index][order]

    def _symbol(self, table: SymbolTable, index: int) -> CodeSymbol:
        row = table.rows[index]
        value, kind = int(row["value"]), int(row["info"]) & 0xF
        thumb = self.image.header.machine == "ARM" and kind in _FUNCTIONS and bool(value & 1)
        return CodeSymbol(table.name(index), value - thumb, int(row["size"]), kind, thumb)

    @cached_property
    def _by_vaddr(self) -> _Symbols:
        parts = [self._ranges(table, which) for which, table in enumerate(self.tables)]
        starts, sizes, rank, which, index = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((rank, starts))
        starts, sizes = starts[order], sizes[order]
        ends = starts + np.maximum(sizes, 1)
        # Code that does not say how long it is goes on to the next symbol.
        following = np.append(starts, _HIGHEST)[np.searchsorted(starts, starts, side="right")]
        bounds = np.array(sorted((load.vaddr, load.end) for load in self._code), np.uint64).reshape(-1, 2)
        inside = np.searchsorted(bounds[:, 0], starts, side="right") - 1
        endless = (sizes == 0) & (inside >= 0)
        endless[endless] = starts[endless] < bounds[inside[endless], 1]
        ends[endless] = np.minimum(following[endless], bounds[inside[endless], 1])
        return _Symbols(starts, ends, np.maximum.accumulate(ends), which[order], index[order])

    def _ranges(self, table: SymbolTable, which: int) -> tuple[NDArray[Any], ...]:
        """Start, size, rank (highest: the best name), table and index of each symbol that names a range."""
        rows, kinds, binds = table.rows, table.type, table.bind
        named = (rows["shndx"] != SHN_UNDEF) & (rows["shndx"] < _SHN_LORESERVE) & (rows["name"] != 0)
        named &= np.isin(kinds, _NAMING) & (rows["value"] < np.uint64(1 << 63))
        named &= rows["size"] < np.uint64(1 << 62)
        named &= ~_mapping(table)
        index = np.flatnonzero(named)
        values = rows["value"][index].astype(np.uint64)
        if self.image.header.machine == "ARM":
            values -= (values & 1) * np.isin(kinds[index], _FUNCTIONS)
        rank = 4 * (which == 0) + 2 * (binds[index] != STB_LOCAL) + (kinds[index] != STT_NOTYPE)
        return values, rows["size"][index].astype(np.uint64), rank, np.full(len(index), which), index

    # -- relocated words and the PLT --------------------------------------------------------------

    @cached_property
    def _slot_index(self) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        vaddrs = self.image.relocations.targets()
        order = np.argsort(vaddrs, kind="stable")
        return vaddrs[order], order

    def slot_at(self, vaddr: int, size: int = 1) -> Slot | None:
        """The first relocated word that begins within the ``size`` bytes at ``vaddr``."""
        vaddrs, order = self._slot_index
        place = int(np.searchsorted(vaddrs, np.uint64(vaddr)))
        if place == len(vaddrs) or int(vaddrs[place]) >= vaddr + size:
            return None
        return self._slot(int(vaddrs[place]), int(order[place]))

    def _slot(self, vaddr: int, position: int) -> Slot:
        relocations = self.image.relocations
        position -= len(relocations.relr)
        if position < 0:
            return Slot(vaddr, "RELR", None, None, self._word(vaddr))
        table = relocations.tables[0]
        for table in relocations.tables:
            if position < len(table.rows):
                break
            position -= len(table.rows)
        row = table.rows[position]
        kind = kind_name(self.image.header.machine, int(row["type"]))
        addend = int(row["addend"]) if table.addends else self._word(vaddr)
        index, symbols = int(row["symbol"]), self.image.symbols
        if not 0 < index < len(symbols):  # none, or one that the table does not have
            return Slot(vaddr, kind, None, None, addend)
        version, name = symbols.version(index), symbols.name(index)
        if self.image.header.type == "REL":
            place = int(symbols.rows["shndx"][index])
            if not name and place < len(self.image.sections):  # of a section
                name = self.image.sections[place].name
            defined_at = int(symbols.rows["value"][index]) if 0 < place < _SHN_LORESERVE else None
            return Slot(vaddr, kind, name, None, addend, defined_at)
        return Slot(
            vaddr, kind, name, version.name if version is not None and not version.base else None, addend
        )

    def linked(self, slot: Slot, end: int, *, address_taken: bool) -> Landmark:
        """What an instruction of an object file, which ends at ``end``, will refer to by ``slot``.

        Addends of what is relative to the program counter allow on x86 for where that will be.
        """
        distance = slot.addend
        if self.image.header.machine in ("X86_64", "386") and _RELATIVE.search(slot.relocation):
            distance += end - slot.vaddr
        if slot.defined_at is not None:
            place = self.at(slot.defined_at + distance, address_taken=address_taken)
            if place is not None:
                return Landmark(place.kind, place.name, place.vaddr, slot)
        name = slot.symbol or self.meaning(slot)
        return Landmark("relocation", f"{name}{distance:+#x}" if distance else name, slot.vaddr, slot)

    def _word(self, vaddr: int) -> int:
        """What the file holds in the word at ``vaddr``; 0 where nothing of it is in the file."""
        header = self.image.header
        try:
            return int.from_bytes(self.image.read(vaddr, header.word), header.byte_order)
        except ElfError:
            return 0

    @cached_property
    def _stub_rows(self) -> NDArray[Any]:
        return find_stubs(self.image, self.covered)

    def stubs(self) -> Iterator[PltStub]:
        """Every PLT stub, ascending."""
        return (self._stub(row) for row in self._stub_rows)

    def stub_at(self, vaddr: int) -> PltStub | None:
        """The PLT stub that covers ``vaddr``."""
        rows = self._stub_rows
        place = int(np.searchsorted(rows["vaddr"], np.uint64(vaddr), side="right")) - 1
        return self._stub(rows[place]) if place >= 0 and int(rows["end"][place]) > vaddr else None

    def _stub(self, row: Any) -> PltStub:
        slot = self.slot_at(int(row["slot"]))
        assert slot is not None, "find_stubs gives stubs of relocated slots only"
        return PltStub(int(row["vaddr"]), int(row["end"]), slot)

    def meaning(self, slot: Slot) -> str:
        """What ``slot`` stands for: a symbol's name, or ``*ABS*+0x…`` as objdump writes what has none."""
        if slot.symbol is not None:
            return slot.symbol
        if "TLS" in slot.relocation or "TPOFF" in slot.relocation or "DTP" in slot.relocation:
            return f"tls+{slot.addend:#x}"
        vaddr = slot.addend & int(_HIGHEST)
        symbol = self.symbol_at(vaddr)
        return symbol.name if symbol is not None and _from(symbol, vaddr) == 0 else f"*ABS*+{vaddr:#x}"

    # -- all of it --------------------------------------------------------------------------------

    @cached_property
    def _code(self) -> tuple[Segment, ...]:
        return tuple(load for load in self.image.loads if "x" in load.flags and load.end < 1 << 63)

    def is_code(self, vaddr: int) -> bool:
        """Whether ``vaddr`` is in a segment that can be executed, in the part that comes from the file."""
        return any(load.vaddr <= vaddr < load.file_end for load in self._code)

    def end_of_code(self, vaddr: int) -> int:
        """Where code that begins at ``vaddr`` ends at the latest: with its section, or with its segment."""
        section = self.image.section_at(vaddr)
        ends = [load.file_end for load in self._code if load.vaddr <= vaddr < load.file_end]
        return min([*ends, section.end]) if section is not None else min(ends)

    def at(self, vaddr: int, *, address_taken: bool = False) -> Landmark | None:
        """What lies at ``vaddr``; ``None`` outside the image.

        A string is told from other constants only where its address is taken (``address_taken``).
        """
        segment = next((load for load in self.image.loads if load.vaddr <= vaddr < load.end), None)
        if segment is None or segment.end >= 1 << 63:
            return None
        stub = self.stub_at(vaddr)
        if stub is not None:
            name = _offset(f"{self.meaning(stub.slot)}@plt", vaddr - stub.vaddr)
            return Landmark("plt", name, vaddr, stub.slot)
        slot, section = self.slot_at(vaddr), self.image.section_at(vaddr)
        if slot is not None and _in_got(slot, section):
            return Landmark("got", f"{self.meaning(slot)}@got", vaddr, slot)
        got = self.image.dynamic.tags.get(DT_PLTGOT)
        if got is not None and 0 <= vaddr - got < 3 * self.image.header.word:
            return Landmark("got", _offset("_GLOBAL_OFFSET_TABLE_", vaddr - got), vaddr, slot)
        symbol = self.symbol_at(vaddr)
        if symbol is not None:
            return Landmark("symbol", _offset(symbol.name, _from(symbol, vaddr)), vaddr, slot)
        text = self._string(vaddr) if address_taken and "w" not in segment.flags else None
        if text is not None:
            return Landmark("string", text, vaddr, slot)
        if section is not None:
            return Landmark("section", _offset(section.name, vaddr - section.vaddr), vaddr, slot)
        return Landmark("segment", _offset(f"PT_LOAD[{segment.index}]", vaddr - segment.vaddr), vaddr, slot)

    def _string(self, vaddr: int) -> str | None:
        """The C string at ``vaddr``, quoted, when all of it is text."""
        load = next(load for load in self.image.loads if load.vaddr <= vaddr < load.end)
        try:
            octets = bytes(self.image.read(vaddr, max(min(_MOST_STRING, load.file_end - vaddr), 0)))
            text = octets[: octets.index(0)].decode()
        except (ElfError, ValueError):
            return None
        plain = text.translate(_ESCAPES)
        return f'"{plain}"' if plain and plain.isprintable() else None


_MARKS: Final[dict[int, Literal["code", "thumb", "data"]]] = {
    ord("a"): "code",
    ord("x"): "code",
    ord("t"): "thumb",
    ord("d"): "data",
}
_ESCAPES: Final = str.maketrans({"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\"})


def _octet(table: SymbolTable, at: int) -> NDArray[np.uint8]:
    """Byte ``at`` of each symbol's name (of another name, where it is shorter)."""
    strings = np.frombuffer(table.strings or b"\0", np.uint8)
    return strings[np.minimum(table.rows["name"].astype(np.int64) + at, len(strings) - 1)]


def _mapping(table: SymbolTable) -> NDArray[np.bool_]:
    """Which symbols only mark code and data: ``$a``, ``$t``, ``$x``, ``$d`` (AAELF32, section 5.5.5)."""
    local = (table.bind == STB_LOCAL) & (table.type == STT_NOTYPE)
    return np.asarray(local & (_octet(table, 0) == ord("$")))


def _offset(name: str, distance: int) -> str:
    return f"{name}+{distance:#x}" if distance else name


def _from(symbol: CodeSymbol, vaddr: int) -> int:
    """How far ``vaddr`` is from the symbol's start; a Thumb function's address has its lowest bit set."""
    return (vaddr - symbol.vaddr) & ~int(symbol.thumb)


def _in_got(slot: Slot, section: Section | None) -> bool:
    return (section is not None and section.name.startswith(".got")) or slot.relocation.endswith(_GOT_KINDS)


def _named(table: SymbolTable, name: str) -> NDArray[np.intp]:
    """The symbols of ``table`` called ``name``: its bytes are looked for, not every string read."""
    wanted = name.encode("utf-8", "surrogateescape") + b"\0"
    offsets, at = [], table.strings.find(wanted)
    while at >= 0:
        offsets.append(at)
        at = table.strings.find(wanted, at + 1)
    rows = table.rows
    return np.flatnonzero(np.isin(rows["name"], offsets) & (rows["shndx"] != SHN_UNDEF) & (rows["name"] != 0))
