"""The ELF header, the program headers and the section headers.

pyelftools declares them, for each class, byte order and machine, and names their values; this module bounds
what is read, names what is wrong, and makes frozen values of it.  Source: gABI chapters 4, 5.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal

from miniloader.elf.layout import Record, record
from miniloader.elf.source import Bytes, Source
from miniloader.errors import ElfError
from miniloader.forking import cached_property, importing
from miniloader.values import dataclass

__all__ = ["Header", "Section", "Segment", "protection", "read_header", "read_sections", "read_segments"]

PF_X: Final = 1
PF_W: Final = 2
PF_R: Final = 4
_MOST_HEADERS: Final = 1 << 16  # bytes: load_elf_phdrs of the kernel's fs/binfmt_elf.c
_MOST_CORE_HEADERS: Final = 1 << 18
_MOST_SECTIONS: Final = 1 << 16
LINK_IT: Final = "link it first: gcc -shared -o libNAME.so FILE.o; `miniloader inspect` shows what is in it"
_SECTION_NAME: Final = 256
_TYPES: Final = {
    "DYN": "a shared object",
    "EXEC": "an executable",
    "REL": "an object file",
    "CORE": "a core dump",
}
_PN_XNUM: Final = 0xFFFF
_SHN_XINDEX: Final = 0xFFFF
_ALLOC: Final = 2  # SHF_ALLOC
#: The fields of :class:`Header` behind ``machine``, which are as the file has them.
_NUMBERS: Final = tuple("entry flags phoff phentsize phnum shoff shentsize shnum shstrndx".split())


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

    @cached_property
    def end(self) -> int:
        """The vaddr after its last byte in memory."""
        return self.vaddr + self.memsz

    @cached_property
    def file_end(self) -> int:
        """The vaddr after its last byte that comes from the file."""
        return self.vaddr + self.filesz


@dataclass(frozen=True)
class Section:
    """A section header.  ``allocated`` sections are in memory at ``vaddr``; ``flags`` are the SHF bits.

    ``link`` and ``info`` are indices of other sections, by the type: a table's strings, what it relocates.
    """

    index: int
    name: str
    type: str
    vaddr: int
    file_offset: int
    size: int
    entry_size: int
    allocated: bool
    flags: int = 0
    link: int = 0
    info: int = 0
    align: int = 0

    @property
    def end(self) -> int:
        """The vaddr after its last byte."""
        return self.vaddr + self.size

    @property
    def file_size(self) -> int:
        """Bytes of the file that it takes."""
        return 0 if self.type == "SHT_NOBITS" else self.size


@lru_cache(maxsize=8)
def protection(flags: int) -> str:
    """``p_flags`` written like /proc/PID/maps writes a protection.

    >>> protection(PF_R | PF_X)
    'r-x'
    """
    return "".join(sign if flags & bit else "-" for sign, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X)))


# In use, though not in pyelftools' tables: binutils' include/elf/common.h and mips.h.
_MACHINES: Final = {0x9026: "ALPHA"}
#: Machines with types of segments of their own in pyelftools' tables: of all others it is asked but once.
WITH_SEGMENT_TYPES: Final = frozenset(("ARM", "AARCH64", "MIPS", "RISCV"))
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
        with importing:
            from miniloader.elf.kinds.signature import not_elf

        raise not_elf(source)
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
    layout = record(elf_class, "<" if byte_order == "little" else ">", "Ehdr")
    data = source.read(0, layout.size, "ELF header")
    kind, machine, version, *numbers = layout.row(data, "type", "machine", "version", *_NUMBERS)
    if version != 1:
        raise ElfError(name, "e_version", str(version), "1")
    return Header(elf_class, byte_order, ident[7], ident[8], *_names(layout, kind, machine), *numbers)


@lru_cache(maxsize=16)
def _names(layout: Record, kind: int, machine: int) -> tuple[str, str]:
    """What the type and the machine of these numbers are called."""
    name = _MACHINES.get(machine) or layout.label("machine", machine).removeprefix("EM_")
    return layout.label("type", kind).removeprefix("ET_"), name


def read_segments(source: Source, header: Header) -> tuple[Segment, ...]:
    """Read the program headers, in table order."""
    machine = header.machine if header.machine in WITH_SEGMENT_TYPES else ""
    layout = record(header.elf_class, header.order, "Phdr", machine)
    size = layout.size
    if header.phnum == 0 and header.type == "REL":
        raise ElfError(source.name, "e_type", header.described_type, "ET_DYN, a shared object", hint=LINK_IT)
    if header.phnum == 0:
        raise ElfError(source.name, "e_phnum", "0", "at least one program header")
    number, most = header.phnum, _MOST_HEADERS // size
    if header.type == "CORE":  # one header for each mapping of a process
        number, most = _core_headers(source, header), _MOST_CORE_HEADERS
    elif number == _PN_XNUM:
        raise ElfError(source.name, "e_phnum", "PN_XNUM", "fewer than 65535 program headers")
    if number > most:
        expected = f"at most {most}: Linux maps no file with more"
        raise ElfError(source.name, "e_phnum", str(number), expected)
    if header.phentsize != size:
        raise ElfError(source.name, "e_phentsize", str(header.phentsize), str(size))
    table = source.read(header.phoff, size * number, "program headers")
    names = _segment_types(layout, header.machine)
    rows = layout.rows(table, "type", "flags", "offset", "vaddr", "filesz", "memsz", "align")
    return tuple(
        [
            Segment(
                index, names.get(kind) or f"{kind:#x}", protection(flags), offset, vaddr, filesz, memsz, align
            )
            for index, (kind, flags, offset, vaddr, filesz, memsz, align) in enumerate(rows)
        ]
    )


@lru_cache(maxsize=8)
def _segment_types(layout: Record, machine: str) -> dict[int, str]:
    """What the types of segments are called on ``machine``, by number."""
    return {**layout.labels("type"), **_SEGMENT_TYPES, **(_MIPS_SEGMENT_TYPES if machine == "MIPS" else {})}


def _core_headers(source: Source, header: Header) -> int:
    """How many program headers a core dump has: more than 65534 are counted in the first section header."""
    if header.phnum != _PN_XNUM:
        return header.phnum
    layout = record(header.elf_class, header.order, "Shdr", header.machine)
    return int(layout.row(source.read(header.shoff, layout.size, "section headers"), "info"))


def read_sections(source: Source, header: Header) -> tuple[Section, ...]:
    """Read the section headers; none (``()``) when the file has no usable table of them.

    Sections are a convenience for naming things: nothing that matters to loading is read from them.
    """
    layout = record(header.elf_class, header.order, "Shdr", header.machine)
    size, field = layout.size, "section headers"
    if header.shoff == 0 or header.shentsize != size:
        return ()
    try:
        length, link = layout.row(source.read(header.shoff, size, field), "size", "link")
        count = header.shnum or length  # gABI: more than SHN_LORESERVE sections
        strings_index = link if header.shstrndx == _SHN_XINDEX else header.shstrndx
        if count > _MOST_SECTIONS:
            return ()
        table = source.read(header.shoff, size * count, field)
        if not 0 < strings_index < count:
            return ()
        offset, length = layout.row(table, "offset", "size", at=strings_index * size)
        names = source.read(offset, length, "section names")
    except ElfError:
        return ()
    rows = layout.rows(
        table, "name", "type", "addr", "offset", "size", "entsize", "flags", "link", "info", "addralign"
    )
    return tuple(
        Section(
            index=index,
            name=_section_name(names, name),
            type=layout.label("type", kind),
            vaddr=vaddr,
            file_offset=offset,
            size=size,
            entry_size=entry_size,
            allocated=bool(flags & _ALLOC),
            flags=flags,
            link=link,
            info=info,
            align=align,
        )
        for index, (name, kind, vaddr, offset, size, entry_size, flags, *others) in enumerate(rows)
        for link, info, align in [others]
    )


def _section_name(names: Bytes, offset: int) -> str:
    end = names.find(b"\0", offset, offset + _SECTION_NAME)
    return names[offset : end if end >= 0 else offset + _SECTION_NAME].decode("utf-8", "backslashreplace")
