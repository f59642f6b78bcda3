"""The relocations an image asks for, decoded once into arrays and counted.

Source: gABI chapter 4, "Relocation"; the kinds are each processor's psABI's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from itertools import dropwhile
from typing import Final

from elftools.elf import enums

from miniloader.arrays import NDArray, np
from miniloader.elf.dynamic import (
    DT_ANDROID_REL,
    DT_ANDROID_RELA,
    DT_ANDROID_RELASZ,
    DT_ANDROID_RELR,
    DT_ANDROID_RELRENT,
    DT_ANDROID_RELRSZ,
    DT_ANDROID_RELSZ,
    DT_JMPREL,
    DT_PLTREL,
    DT_PLTRELSZ,
    DT_REL,
    DT_RELA,
    DT_RELACOUNT,
    DT_RELAENT,
    DT_RELASZ,
    DT_RELENT,
    DT_RELR,
    DT_RELRENT,
    DT_RELRSZ,
    DT_RELSZ,
    Locator,
    Reader,
    tag_name,
)
from miniloader.elf.source import Bytes, Source
from miniloader.elf.tables import Table, decode_relocations, decode_relr, distinct
from miniloader.errors import ElfError
from miniloader.forking import cached_property, importing
from miniloader.values import dataclass

__all__ = ["RelocationTable", "Relocations", "kind_name", "read_relocations"]

_RELA: Final = 24  # bytes of an Elf64_Rela
_ENUMS: Final = {
    "X86_64": "ENUM_RELOC_TYPE_x64",
    "386": "ENUM_RELOC_TYPE_i386",
    "ARM": "ENUM_RELOC_TYPE_ARM",
    "AARCH64": "ENUM_RELOC_TYPE_AARCH64",
    "MIPS": "ENUM_RELOC_TYPE_MIPS",
    "PPC": "ENUM_RELOC_TYPE_PPC",
    "PPC64": "ENUM_RELOC_TYPE_PPC64",
    "S390": "ENUM_RELOC_TYPE_S390X",
    "LOONGARCH": "ENUM_RELOC_TYPE_LOONGARCH",
}
# pyelftools has no table for RISC-V; these are the kinds of its psABI, table 3: dynamic ones, and from 16 on
# those of object files.
_RISCV: Final = dict(
    enumerate(
        "NONE 32 64 RELATIVE COPY JUMP_SLOT TLS_DTPMOD32 TLS_DTPMOD64 TLS_DTPREL32 TLS_DTPREL64 "
        "TLS_TPREL32 TLS_TPREL64 TLSDESC".split()
    )
) | dict(
    enumerate(
        "BRANCH JAL CALL CALL_PLT GOT_HI20 TLS_GOT_HI20 TLS_GD_HI20 PCREL_HI20 PCREL_LO12_I PCREL_LO12_S "
        "HI20 LO12_I LO12_S TPREL_HI20 TPREL_LO12_I TPREL_LO12_S TPREL_ADD ADD8 ADD16 ADD32 ADD64 SUB8 SUB16 "
        "SUB32 SUB64 GNU_VTINHERIT GNU_VTENTRY ALIGN RVC_BRANCH RVC_JUMP RVC_LUI GPREL_I GPREL_S TPREL_I "
        "TPREL_S RELAX SUB6 SET6 SET8 SET16 SET32 32_PCREL IRELATIVE".split(),
        16,
    )
)
# Dynamic kinds that pyelftools lacks or calls something else; the names are the psABIs' and binutils'.
_AMENDED: Final[Mapping[str, Mapping[int, str]]] = {
    "X86_64": {38: "R_X86_64_RELATIVE64"},
    "ARM": {13: "R_ARM_TLS_DESC", 160: "R_ARM_IRELATIVE"},
    "AARCH64": {
        1028: "R_AARCH64_TLS_DTPMOD64",
        1029: "R_AARCH64_TLS_DTPREL64",
        1031: "R_AARCH64_TLSDESC",
        1032: "R_AARCH64_IRELATIVE",
    },
    "PPC": {68: "R_PPC_DTPMOD32", 73: "R_PPC_TPREL32", 78: "R_PPC_DTPREL32", 248: "R_PPC_IRELATIVE"}
    | {249: "R_PPC_REL16", 250: "R_PPC_REL16_LO", 251: "R_PPC_REL16_HI", 252: "R_PPC_REL16_HA"},
    "PPC64": {247: "R_PPC64_JMP_IREL"},
    "LOONGARCH": {13: "R_LARCH_TLS_DESC32", 14: "R_LARCH_TLS_DESC64"},
    "RISCV": {code: f"R_RISCV_{name}" for code, name in _RISCV.items()},
    "ALPHA": {
        1: "R_ALPHA_REFLONG",
        2: "R_ALPHA_REFQUAD",
        24: "R_ALPHA_COPY",
        25: "R_ALPHA_GLOB_DAT",
        26: "R_ALPHA_JMP_SLOT",
        27: "R_ALPHA_RELATIVE",
        31: "R_ALPHA_DTPMOD64",
        33: "R_ALPHA_DTPREL64",
        38: "R_ALPHA_TPREL64",
    },
    "SPARCV9": {
        19: "R_SPARC_COPY",
        20: "R_SPARC_GLOB_DAT",
        21: "R_SPARC_JMP_SLOT",
        22: "R_SPARC_RELATIVE",
        32: "R_SPARC_64",
        54: "R_SPARC_UA64",
        75: "R_SPARC_TLS_DTPMOD64",
        77: "R_SPARC_TLS_DTPOFF64",
        79: "R_SPARC_TLS_TPOFF64",
        248: "R_SPARC_JMP_IREL",
        249: "R_SPARC_IRELATIVE",
    },
}


@lru_cache(maxsize=16)
def _kinds(machine: str) -> Mapping[int, str]:
    amended = dict(_AMENDED.get(machine, {}))
    if machine not in _ENUMS:
        return amended
    table = getattr(enums, _ENUMS[machine])
    return {code: name for name, code in reversed(table.items()) if isinstance(code, int)} | amended


def kind_name(machine: str, code: int) -> str:
    """The psABI's name of relocation kind ``code``, or the number in hexadecimal.

    >>> kind_name("X86_64", 8), kind_name("RISCV", 3), kind_name("X86_64", 99)
    ('R_X86_64_RELATIVE', 'R_RISCV_RELATIVE', '0x63')
    """
    return _kinds(machine).get(code, f"{code:#x}")


@dataclass(frozen=True, eq=False)
class RelocationTable:
    """One table of the dynamic section: ``count`` rows from ``vaddr`` on.

    Without ``addends`` (REL) they lie in the words relocated.  The first ``head`` rows only add the load
    bias, as ``DT_RELACOUNT`` says; in a large library they are nearly all.  Of a table that is packed in the
    file, ``unpacked`` holds the rows.
    """

    name: str
    addends: bool
    vaddr: int
    file_offset: int
    count: int
    head: int
    entry_size: int
    elf_class: int
    order: str
    machine: str
    source: Source
    unpacked: bytearray = field(default_factory=bytearray)

    @cached_property
    def rows(self) -> Table:
        """All rows of the table."""
        return self._from(0)

    @cached_property
    def behind_head(self) -> Table:
        """The rows behind the ``head``, which is not read for them."""
        return self._from(self.head)

    def bytes_behind(self, first: int) -> Bytes:
        """The rows from the row ``first`` on, as they lie in the file, or as they are unpacked."""
        if self.unpacked:
            return bytes(self.unpacked[first * self.entry_size :])
        offset, length = self.file_offset + first * self.entry_size, (self.count - first) * self.entry_size
        return self.source.read(offset, length, self.name)

    def _from(self, first: int) -> Table:
        data = self.bytes_behind(first)
        if self.unpacked:
            return decode_relocations(data, 64, "<", addends=True, machine="")
        return decode_relocations(
            data, self.elf_class, self.order, addends=self.addends, machine=self.machine
        )


@dataclass(frozen=True, eq=False)
class RelrTable:
    """``DT_RELR``: ``count`` entries from ``vaddr`` on, vaddrs and bitmaps of words that get the bias."""

    vaddr: int
    file_offset: int
    count: int
    elf_class: int
    order: str
    source: Source

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        """The vaddrs of the words that it relocates."""
        return decode_relr(self._data, self.elf_class, self.order)

    @property
    def total(self) -> int:
        """How many words it relocates: one for each address, and for each bit of the bitmaps behind."""
        entries = struct.unpack(f"{self.order}{self.count}{'Q' if self.elf_class == 64 else 'I'}", self._data)
        behind = dropwhile(lambda entry: entry & 1, entries)
        return sum((entry >> 1).bit_count() if entry & 1 else 1 for entry in behind)

    @property
    def _data(self) -> Bytes:
        length = self.count * self.elf_class // 8
        return self.source.read(self.file_offset, length, "DT_RELR") if length else b""


@dataclass(frozen=True, eq=False)
class Relocations:
    """Every relocation of an image: ``tables`` in the order they are applied, after ``relr``.

    ``relr_table`` says which words get the load bias alone.
    """

    machine: str
    tables: tuple[RelocationTable, ...]
    relr_table: RelrTable

    @property
    def relr(self) -> NDArray[np.uint64]:
        """The vaddrs of the words that ``relr_table`` relocates."""
        return self.relr_table.words

    def __len__(self) -> int:
        return self.relr_table.total + sum(table.count for table in self.tables)

    def by_kind(self) -> dict[str, int]:
        """How many relocations of each kind, most frequent first; ``RELR`` counts the words it relocates."""
        counted: dict[str, int] = {"RELR": len(self.relr)} if len(self.relr) else {}
        for table in self.tables:
            codes, counts = distinct(table.rows["type"])
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
                name = kind_name(self.machine, code)
                counted[name] = counted.get(name, 0) + count
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    def targets(self) -> NDArray[np.uint64]:
        """The vaddr of every word that is relocated, in table order."""
        return np.concatenate([self.relr, *(table.rows["offset"] for table in self.tables)])

    def by_page(self, page_size: int) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """The vaddr of every page that relocation writes to, ascending, and how many of its words.

        Rows of type 0, ``R_*_NONE`` on every machine, write nothing.
        """
        mask = np.uint64(~(page_size - 1) & 0xFFFF_FFFF_FFFF_FFFF)
        written = [table.rows["offset"][table.rows["type"] != 0] for table in self.tables]
        return distinct(np.concatenate([self.relr, *written]) & mask)

    @property
    def highest_symbol(self) -> int:
        """The highest symbol index in use; -1 when there is no relocation."""
        highest = (
            int(table.behind_head["symbol"].max()) for table in self.tables if table.head < table.count
        )
        return max(highest, default=0 if self.tables else -1)


def read_relocations(
    read: Reader,
    locate: Locator,
    source: Source,
    tags: Mapping[int, int],
    *,
    elf_class: int,
    order: str,
    machine: str,
    name: str | None,
) -> Relocations:
    """Read ``DT_RELR``, ``DT_REL``, ``DT_RELA`` and ``DT_JMPREL``; :class:`ElfError` where they are wrong."""
    word, tags = elf_class // 8, _with_plain_relr(tags, name)
    relr_table = RelrTable(0, 0, 0, elf_class, order, source)
    if DT_RELR in tags:
        _entry_size(tags, DT_RELRENT, word, name)
        length = tags.get(DT_RELRSZ, 0)
        if length % word:
            raise ElfError(name, tag_name(DT_RELRSZ), f"{length} bytes", f"a multiple of {word}")
        file_offset = locate(tags[DT_RELR], length, "DT_RELR") if length else 0
        relr_table = RelrTable(tags[DT_RELR], file_offset, length // word, elf_class, order, source)
    sizes = {False: 2 * word, True: 3 * word}
    plt_addends = tags.get(DT_PLTREL, DT_RELA) == DT_RELA
    if DT_PLTREL in tags and tags[DT_PLTREL] not in (DT_REL, DT_RELA):
        raise ElfError(name, "DT_PLTREL", str(tags[DT_PLTREL]), f"{DT_RELA} (RELA) or {DT_REL} (REL)")
    plt_start, plt_size = tags.get(DT_JMPREL, 0), tags.get(DT_PLTRELSZ, 0)
    tables = _packed(read, source, tags, elf_class, name)
    for tag, label, size_tag, addends in (
        (DT_REL, "DT_REL", DT_RELSZ, False),
        (DT_RELA, "DT_RELA", DT_RELASZ, True),
        (DT_JMPREL, "DT_JMPREL", DT_PLTRELSZ, plt_addends),
    ):
        start, length, size = tags.get(tag, 0), tags.get(size_tag, 0), sizes[addends]
        if tag not in tags or not length:
            continue
        if tag != DT_JMPREL and addends == plt_addends and start <= plt_start < start + length:
            # Some linkers count the PLT's relocations in DT_RELASZ, too: apply them once.
            length = min(length, plt_start - start) if plt_start + plt_size >= start + length else length
        _entry_size(tags, DT_RELAENT if addends else DT_RELENT, size, name)
        if length % size:
            raise ElfError(name, tag_name(size_tag), f"{length} bytes", f"a multiple of {size}")
        file_offset, count = locate(start, length, label), length // size
        head = min(tags.get(DT_RELACOUNT, 0), count) if tag == DT_RELA else 0
        described = label, addends, start, file_offset, count, head, size
        tables.append(RelocationTable(*described, elf_class, order, machine, source, bytearray()))
    return Relocations(machine, tuple(tables), relr_table)


#: Android's tags for DT_RELR, before the gABI had any.
_ANDROID_RELR: Final = {
    DT_ANDROID_RELR: DT_RELR,
    DT_ANDROID_RELRSZ: DT_RELRSZ,
    DT_ANDROID_RELRENT: DT_RELRENT,
}


def _with_plain_relr(tags: Mapping[int, int], name: str | None) -> Mapping[int, int]:
    """``tags`` with the RELR table under the gABI's tags, where it is under Android's."""
    if DT_ANDROID_RELR not in tags:
        return tags
    if DT_RELR in tags:
        raise ElfError(name, "DT_ANDROID_RELR", "one beside DT_RELR", "one of the two")
    return {_ANDROID_RELR.get(tag, tag): value for tag, value in tags.items()}


def _packed(
    read: Reader, source: Source, tags: Mapping[int, int], elf_class: int, name: str | None
) -> list[RelocationTable]:
    """The tables that are packed as Android's linker unpacks them, before all others."""
    tables = []
    for tag, label, size_tag, addends in (
        (DT_ANDROID_REL, "DT_ANDROID_REL", DT_ANDROID_RELSZ, False),
        (DT_ANDROID_RELA, "DT_ANDROID_RELA", DT_ANDROID_RELASZ, True),
    ):
        if tag in tags:
            with importing:
                from miniloader.elf.packed_relocations import unpack

            data = read(tags[tag], tags.get(size_tag, 0), label)
            held = sum(end - start for start, end in source.parts(0, source.size))  # without holes
            rows = unpack(data, elf_class, held // 4, label, name)
            described = label, addends, tags[tag], 0, len(rows) // _RELA, 0, _RELA
            tables.append(RelocationTable(*described, elf_class, "<", "", source, rows))
    return tables


def _entry_size(tags: Mapping[int, int], tag: int, size: int, name: str | None) -> None:
    if tags.get(tag, size) != size:
        raise ElfError(name, tag_name(tag), str(tags[tag]), str(size))
