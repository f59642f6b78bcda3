"""The ELF header, the program headers and the section headers.

pyelftools knows how they are laid out for each class, byte order and machine; this module bounds what
is read, names what is wrong, and turns its containers into frozen values.  Source: gABI chapters 4, 5.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, Final, Literal

from elftools.elf import enums
from elftools.elf.structs import ELFStructs

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
    machine_code: int
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
    """``p_flags`` written like /proc/PID/maps writes a protection."""
    return "".join(sign if flags & bit else "-" for sign, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X)))


@lru_cache(maxsize=64)
def _structs(elf_class: int, little: bool, e_type: Any, e_machine: Any, os_abi: Any) -> ELFStructs:
    structs = ELFStructs(little_endian=little, elfclass=elf_class)
    structs.create_basic_structs()
    structs.create_advanced_structs(e_type, e_machine, os_abi)
    return structs


@lru_cache(maxsize=4)
def _names(table: str, prefix: str) -> dict[int, str]:
    """pyelftools' names of an enumeration, by number, without their prefix; the first of each."""
    entries = reversed(getattr(enums, table).items())
    return {code: name.removeprefix(prefix) for name, code in entries if isinstance(code, int)}


def _container(header: Header) -> ELFStructs:
    return _structs(
        header.elf_class,
        header.byte_order == "little",
        f"ET_{header.type}",
        f"EM_{header.machine}",
        _OS_ABI.get(header.os_abi, header.os_abi),
    )


# In use, though not in pyelftools' tables: binutils' include/elf/common.h and mips.h.
_MACHINES: Final = {0x9026: "ALPHA"}
_SFRAME: Final = {0x6474E554: "PT_GNU_SFRAME"}  # binutils 2.40
_SEGMENT_TYPES: Final = {
    "MIPS": {0x70000000: "PT_MIPS_REGINFO", 0x70000001: "PT_MIPS_RTPROC", 0x70000002: "PT_MIPS_OPTIONS"}
}
_OS_ABI: Final = {code: name for name, code in enums.ENUM_EI_OSABI.items() if isinstance(code, int)}


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
    record = struct.Struct(
        ("<" if ident[5] == 1 else ">") + ("16xHHIIIIIHHHHHH" if elf_class == 32 else "16xHHIQQQIHHHHHH")
    )
    e_type, code, version, *rest = record.unpack(source.read(0, record.size, "ELF header"))
    if version != 1:
        raise ElfError(name, "e_version", f"{version:#x}", "1")
    entry, phoff, shoff, flags, _, phentsize, phnum, shentsize, shnum, shstrndx = rest
    return Header(
        elf_class=elf_class,
        byte_order="little" if ident[5] == 1 else "big",
        os_abi=ident[7],
        abi_version=ident[8],
        type=_names("ENUM_E_TYPE", "ET_").get(e_type, f"{e_type:#x}"),
        machine=_MACHINES.get(code) or _names("ENUM_E_MACHINE", "EM_").get(code, f"{code:#x}"),
        machine_code=code,
        entry=entry,
        flags=flags,
        phoff=phoff,
        phentsize=phentsize,
        phnum=phnum,
        shoff=shoff,
        shentsize=shentsize,
        shnum=shnum,
        shstrndx=shstrndx,
    )


def read_segments(source: Source, header: Header) -> tuple[Segment, ...]:
    """Read the program headers, in table order."""
    record = struct.Struct(header.order + ("IIIIIIII" if header.elf_class == 32 else "IIQQQQQQ"))
    if header.phnum == 0 and header.type == "REL":
        raise ElfError(source.name, "e_type", "ET_REL, an object file", "ET_DYN, a shared object")
    if header.phnum == 0:
        raise ElfError(source.name, "e_phnum", "0", "at least one program header")
    if header.phnum == _PN_XNUM:
        raise ElfError(source.name, "e_phnum", "PN_XNUM", "fewer than 65535 program headers")
    most = _MOST_HEADERS // record.size
    if header.phnum > most:
        expected = f"at most {most}: Linux maps no file with more"
        raise ElfError(source.name, "e_phnum", str(header.phnum), expected)
    if header.phentsize != record.size:
        raise ElfError(source.name, "e_phentsize", str(header.phentsize), str(record.size))
    table = source.read(header.phoff, record.size * header.phnum, "program headers")
    names = _segment_types(header.machine)
    return tuple(
        Segment(index, names.get(kind, f"{kind:#x}"), protection(flags), offset, vaddr, filesz, memsz, align)
        for index, row in enumerate(record.iter_unpack(table))
        for kind, flags, offset, vaddr, filesz, memsz, align in [_in_one_order(row, header.elf_class)]
    )


def _in_one_order(row: tuple[int, ...], elf_class: int) -> tuple[int, ...]:
    """type, flags, offset, vaddr, filesz, memsz, align: ``p_flags`` is second in 64-bit files, late in 32."""
    if elf_class == 64:
        kind, flags, offset, vaddr, _, filesz, memsz, align = row
    else:
        kind, offset, vaddr, _, filesz, memsz, flags, align = row
    return kind, flags, offset, vaddr, filesz, memsz, align


@lru_cache(maxsize=16)
def _segment_types(machine: str) -> dict[int, str]:
    """pyelftools' names of segment types, those of the machine included."""
    table = getattr(enums, f"ENUM_P_TYPE_{machine}", enums.ENUM_P_TYPE_BASE)
    names = {code: name for name, code in reversed(list(table.items())) if isinstance(code, int)}
    return names | _SFRAME | _SEGMENT_TYPES.get(machine, {})


def read_sections(source: Source, header: Header) -> tuple[Section, ...]:
    """Read the section headers; none (``()``) when the file has no usable table of them.

    Sections are a convenience for naming things: nothing that matters to loading is read from them.
    """
    structs = _container(header)
    size = structs.Elf_Shdr.sizeof()
    if header.shoff == 0 or header.shentsize != size:
        return ()
    try:
        first = structs.Elf_Shdr.parse(bytes(source.read(header.shoff, size, "section headers")))
        count = header.shnum or first.sh_size  # gABI: more than SHN_LORESERVE sections
        strings_index = first.sh_link if header.shstrndx == _SHN_XINDEX else header.shstrndx
        if count > _MOST_SECTIONS:
            return ()
        table = source.read(header.shoff, size * count, "section headers")
        rows = [structs.Elf_Shdr.parse(table[at : at + size]) for at in range(0, len(table), size)]
        if not 0 < strings_index < len(rows):
            return ()
        names = source.read(rows[strings_index].sh_offset, rows[strings_index].sh_size, "section names")
    except ElfError:
        return ()
    return tuple(
        Section(
            index=index,
            name=_section_name(names, row.sh_name),
            type=row.sh_type if isinstance(row.sh_type, str) else f"{row.sh_type:#x}",
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
