"""Object files: their sections laid out in memory as a linker would, so that code can be looked at by vaddr.

An object file has no vaddrs yet.  Here its allocated sections lie one behind the other, code first, in the
order of their headers, each aligned as it asks: :func:`laid_out`.  Relocations then are those of its
sections, and refer to ``.symtab``, as those of a library refer to its dynamic symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from miniloader.arrays import np
from miniloader.elf.dynamic import Dynamic
from miniloader.elf.header import Section, Segment
from miniloader.elf.image import ElfImage
from miniloader.elf.relocations import Relocations, RelocationTable, RelrTable, kind_name
from miniloader.elf.symbols import SymbolTable
from miniloader.elf.symtab import read_symtab
from miniloader.elf.tables import RELOCATION, Table, decode_relocations, distinct, table_dtype
from miniloader.errors import ElfError
from miniloader.forking import cached_property
from miniloader.values import dataclass

__all__ = ["ObjectImage", "SectionRelocations", "laid_out", "section_relocations"]

_WRITE, _EXECUTE = 1, 4  # SHF_
_MOST_ALIGN: Final = 1 << 16
_LAST: Final = 1 << 47
_SHN_LORESERVE: Final = 0xFF00


@dataclass(frozen=True)
class SectionRelocations:
    """The relocations of one section: how many ``rows``, and how many of each kind."""

    section: str
    target: str
    count: int
    kinds: dict[str, int]


@dataclass(frozen=True, eq=False)
class ObjectImage(ElfImage):
    """An object file, laid out: ``placed`` are its sections with their vaddrs."""

    placed: tuple[Section, ...]

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers; allocated sections have the vaddr at which they are laid out here."""
        return self.placed

    @cached_property
    def dynamic(self) -> Dynamic:
        """Empty: there is none before linking."""
        return Dynamic()

    @cached_property
    def symbols(self) -> SymbolTable:
        """``.symtab``, each symbol at its vaddr in the layout."""
        table = read_symtab(self)
        starts = np.array([section.vaddr if section.allocated else 0 for section in self.placed], np.uint64)
        rows = table.rows.copy()
        inside = (rows["shndx"] > 0) & (rows["shndx"] < min(len(starts), _SHN_LORESERVE))
        rows["value"][inside] += starts[rows["shndx"][inside]].astype(rows["value"].dtype)
        return SymbolTable(rows, table.strings, None, table.versym)

    @cached_property
    def relocations(self) -> Relocations:
        """The relocations of all allocated sections, by vaddr."""
        header, count = self.header, len(self.symbols)
        tables = tuple(
            RelocationTable(
                section.name, section.type == "SHT_RELA", target.vaddr, 0, len(rows), 0, 24,
                header.elf_class, header.order, "", self.source, _moved(rows, target.vaddr),
            )
            for section, target, rows in _tables(self)
            if target.allocated
        )  # fmt: skip
        for table in tables:
            highest = int(table.rows["symbol"].max()) if table.count else 0
            if highest >= max(count, 1):
                used = f"symbol {highest}"
                raise ElfError(self.path, f"{table.name}.r_info", used, f"one of the {count} symbols")
        return Relocations(
            header.machine, tables, RelrTable(0, 0, 0, header.elf_class, header.order, self.source)
        )


def _moved(rows: Table, by: int) -> bytearray:
    moved = rows.astype(RELOCATION)
    moved["offset"] += np.uint64(by)
    return bytearray(moved.tobytes())


def laid_out(image: ElfImage) -> ObjectImage:
    """``image``, an object file, with vaddrs for its allocated sections and a PT_LOAD for each of them."""
    sections, segments, vaddr = list(image.sections), list[Segment](), 0
    for section in sorted(image.sections, key=_is_data):
        if section.allocated and section.size and vaddr < _LAST:
            align = section.align if 0 < section.align <= _MOST_ALIGN else 1
            vaddr = -(-vaddr // align) * align
            sections[section.index] = replace(section, vaddr=vaddr)
            rights = (
                "r" + ("w" if section.flags & _WRITE else "-") + ("x" if section.flags & _EXECUTE else "-")
            )
            extent = (section.file_offset, vaddr, section.file_size, section.size, align)
            segments.append(Segment(len(segments), "PT_LOAD", rights, *extent))
            vaddr = min(vaddr + section.size, _LAST)
    return ObjectImage(image.path, image.source, image.header, tuple(segments), tuple(sections))


def _is_data(section: Section) -> bool:
    return not section.flags & _EXECUTE


def _tables(image: ElfImage) -> Iterator[tuple[Section, Section, Table]]:
    """Each section of relocations, the section that it relocates, and its rows (offsets in that section)."""
    header, sections = image.header, image.sections
    for section in sections:
        if section.type not in ("SHT_REL", "SHT_RELA") or not section.info < len(sections):
            continue
        name = "Rela" if section.type == "SHT_RELA" else "Rel"
        size = table_dtype(header.elf_class, header.order, name, header.machine).itemsize
        data = image.source.read(section.file_offset, section.size - section.size % size, section.name)
        rows = decode_relocations(
            data, header.elf_class, header.order, addends=name == "Rela", machine=header.machine
        )
        yield section, sections[section.info], rows


def section_relocations(image: ElfImage) -> tuple[SectionRelocations, ...]:
    """How many relocations each section has, and of which kinds; in the order of the tables.

    :class:`ElfError` where a table is not inside the file.
    """
    machine, answer = image.header.machine, []
    for section, target, rows in _tables(image):
        codes, counts = distinct(rows["type"])
        by_kind = {
            kind_name(machine, code): number
            for code, number in zip(codes.tolist(), counts.tolist(), strict=True)
        }
        kinds = dict(sorted(by_kind.items(), key=lambda item: (-item[1], item[0])))
        answer.append(SectionRelocations(section.name, target.name, len(rows), kinds))
    for section in image.sections:
        if section.type == "SHT_RELR" and image.header.type == "REL":
            table = RelrTable(
                0, section.file_offset, section.size // image.header.word,
                image.header.elf_class, image.header.order, image.source,
            )  # fmt: skip
            answer.append(SectionRelocations(section.name, "", table.total, {"RELR": table.total}))
    return tuple(answer)
