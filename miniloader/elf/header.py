"""The ELF header, the program headers and the section headers.

pyelftools parses them, for each class, byte order and machine; this module bounds what is read, names what is
wrong, and turns what pyelftools gives into frozen values.  Source: gABI chapters 4, 5.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal

from miniloader.elf.parsing import parse, parse_rows, structs
from miniloader.elf.source import Bytes, Source
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["Header", "Section", "Segment", "protection", "read_header", "read_sections", "read_segments"]

PF_X: Final = 1
PF_W: Final = 2
PF_R: Final = 4
_MOST_HEADERS: Final = 1 << 16  # bytes: load_elf_phdrs of the kernel's fs/binfmt_elf.c
_MOST_SECTIONS: Final = 4096
_SECTION_NAME: Final = 256
_TYPES: Final = {
    "DYN": "a shared object",
    "EXEC": "an executable",
    "REL": "an object file",
    "CORE": "a core dump",
}
_PN_XNUM: Final = 0xFFFF
_SHN_XINDEX: Final = 0xFFFF


@dataclass(frozen=True)
class Header:
    """The ELF header.  ``machine`` and ``type`` are named as the gABI names them, without ``EM_``."""

    elf_class: Literal[32, 64]
    byte_order: Literal["little", "big"]
    os_abi: int
    abi_version: int
    type: str
    machine: str
    entry: int
    flags: int
    phoff: int
    phentsize: int
    phnum: int
    shoff: int
    shentsize: int
    shnum: int
    shstrndx: int

    @property
    def described_type(self) -> str:
        """The type with what it means: ``ET_EXEC, an executable``."""
        return f"ET_{self.type}, {_TYPES.get(self.type, 'of unknown kind')}"

    @property
    def word(self) -> int:
        """Bytes of an address."""
        return self.elf_class // 8

    @property
    def order(self) -> Literal["<", ">"]:
        """The byte order as numpy writes it."""
        return "<" if self.byte_order == "little" else ">"


@dataclass(frozen=True)
class Segment:
    """A program header.  ``flags`` reads like ``r-x``; sizes are bytes."""

    index: int
    type: str
    flags: str
    file_offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int

    @property
    def end(self) -> int:
        """The vaddr after its last byte in memory."""
        return self.vaddr + self.memsz

    @property
    def file_end(self) -> int:
        """The vaddr after its last byte that comes from the file."""
        return self.vaddr + self.filesz


@dataclass(frozen=True)
class Section:
    """A section header.  ``allocated`` sections are in memory at ``vaddr``."""

    index: int
    name: str
    type: str
    vaddr: int
    file_offset: int
    size: int
    entry_size: int
    allocated: bool

    @property
    def end(self) -> int:
        """The vaddr after its last byte."""
        return self.vaddr + self.size


@lru_cache(maxsize=8)
def protection(flags: int) -> str:
    """``p_flags`` written like /proc/PID/maps writes a protection.

    >>> protection(PF_R | PF_X)
    'r-x'
    """
    return "".join(sign if flags & bit else "-" for sign, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X)))


# In use, though not in pyelftools' tables: binutils' include/elf/common.h and mips.h.
_MACHINES: Final = {0x9026: "ALPHA"}
_SEGMENT_TYPES: Final = {0x6474E554: "PT_GNU_SFRAME"}  # binutils 2.40
_MIPS_SEGMENT_TYPES: Final = {
    0x70000000: "PT_MIPS_REGINFO",
    0x70000001: "PT_MIPS_RTPROC",
    0x70000002: "PT_MIPS_OPTIONS",
}


def read_header(source: Source) -> Header:
    """Read and check ``e_ident`` and the ELF header."""
    name = source.name
    ident = source.read(0, min(16, source.size), "e_ident")
    if ident[:4] != b"\x7fELF":
        raise ElfError(name, "magic", repr(ident[:4])[1:], r"'\x7fELF' (this is not an ELF file)")
    if len(ident) < 16:
        raise ElfError(name, "e_ident", f"{len(ident)} bytes", "16 bytes")
    if ident[4] not in (1, 2):
        raise ElfError(name, "EI_CLASS", str(ident[4]), "1 (32-bit) or 2 (64-bit)")
    if ident[5] not in (1, 2):
        raise ElfError(name, "EI_DATA", str(ident[5]), "1 (little endian) or 2 (big endian)")
    if ident[6] != 1:
        raise ElfError(name, "EI_VERSION", str(ident[6]), "1")
    elf_class: Literal[32, 64] = 32 if ident[4] == 1 else 64
    byte_order: Literal["little", "big"] = "little" if ident[5] == 1 else "big"
    declared = structs(elf_class, "<" if byte_order == "little" else ">").Elf_Ehdr
    row = parse(declared, source.read(0, declared.sizeof(), "ELF header"), "ELF header", name)
    if row.e_version != "EV_CURRENT":
        raise ElfError(name, "e_version", _named(row.e_version, "EV_"), "1")
    return Header(
        elf_class=elf_class,
        byte_order=byte_order,
        os_abi=ident[7],
        abi_version=ident[8],
        type=_named(row.e_type, "ET_"),
        machine=_MACHINES.get(row.e_machine) or _named(row.e_machine, "EM_"),
        entry=row.e_entry,
        flags=row.e_flags,
        phoff=row.e_phoff,
        phentsize=row.e_phentsize,
        phnum=row.e_phnum,
        shoff=row.e_shoff,
        shentsize=row.e_shentsize,
        shnum=row.e_shnum,
        shstrndx=row.e_shstrndx,
    )


def _named(value: str | int, prefix: str = "") -> str:
    """pyelftools' name of a value without its prefix, or the number in hexadecimal."""
    return f"{value:#x}" if isinstance(value, int) else value.removeprefix(prefix)


def read_segments(source: Source, header: Header) -> tuple[Segment, ...]:
    """Read the program headers, in table order."""
    declared = structs(header.elf_class, header.order, header.machine).Elf_Phdr
    size = declared.sizeof()
    if header.phnum == 0 and header.type == "REL":
        raise ElfError(source.name, "e_type", header.described_type, "ET_DYN, a shared object")
    if header.phnum == 0:
        raise ElfError(source.name, "e_phnum", "0", "at least one program header")
    if header.phnum == _PN_XNUM:
        raise ElfError(source.name, "e_phnum", "PN_XNUM", "fewer than 65535 program headers")
    most = _MOST_HEADERS // size
    if header.phnum > most:
        expected = f"at most {most}: Linux maps no file with more"
        raise ElfError(source.name, "e_phnum", str(header.phnum), expected)
    if header.phentsize != size:
        raise ElfError(source.name, "e_phentsize", str(header.phentsize), str(size))
    table = source.read(header.phoff, size * header.phnum, "program headers")
    names = _SEGMENT_TYPES | (_MIPS_SEGMENT_TYPES if header.machine == "MIPS" else {})
    return tuple(
        Segment(
            index=index,
            type=names.get(row.p_type) or _named(row.p_type),
            flags=protection(row.p_flags),
            file_offset=row.p_offset,
            vaddr=row.p_vaddr,
            filesz=row.p_filesz,
            memsz=row.p_memsz,
            align=row.p_align,
        )
        for index, row in enumerate(parse_rows(declared, table, "program headers", source.name))
    )


def read_sections(source: Source, header: Header) -> tuple[Section, ...]:
    """Read the section headers; none (``()``) when the file has no usable table of them.

    Sections are a convenience for naming things: nothing that matters to loading is read from them.
    """
    declared = structs(header.elf_class, header.order, header.machine).Elf_Shdr
    size, what = declared.sizeof(), "section headers"
    if header.shoff == 0 or header.shentsize != size:
        return ()
    try:
        first = parse(declared, source.read(header.shoff, size, what), what, source.name)
        count = header.shnum or first.sh_size  # gABI: more than SHN_LORESERVE sections
        strings_index = first.sh_link if header.shstrndx == _SHN_XINDEX else header.shstrndx
        if count > _MOST_SECTIONS:
            return ()
        table = source.read(header.shoff, size * count, what)
        rows = list(parse_rows(declared, table, what, source.name))
        if not 0 < strings_index < len(rows):
            return ()
        names = source.read(rows[strings_index].sh_offset, rows[strings_index].sh_size, "section names")
    except ElfError:
        return ()
    return tuple(
        Section(
            index=index,
            name=_section_name(names, row.sh_name),
            type=_named(row.sh_type),
            vaddr=row.sh_addr,
            file_offset=row.sh_offset,
            size=row.sh_size,
            entry_size=row.sh_entsize,
            allocated=bool(row.sh_flags & 2),  # SHF_ALLOC
        )
        for index, row in enumerate(rows)
    )


def _section_name(names: Bytes, offset: int) -> str:
    end = names.find(b"\0", offset, offset + _SECTION_NAME)
    return names[offset : end if end >= 0 else offset + _SECTION_NAME].decode("utf-8", "backslashreplace")
