"""Small ELF files made of bytes: 64-bit, little-endian, of this process's processor, for glibc and gdb.

Who makes one says where its parts lie; the ELF header, the section headers and their names are added here.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

from miniloader.elf.dynamic import (
    DT_FINI_ARRAY,
    DT_FINI_ARRAYSZ,
    DT_HASH,
    DT_NEEDED,
    DT_NULL,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMENT,
    DT_SYMTAB,
)
from miniloader.elf.header import PF_R, PF_W, PF_X
from miniloader.elf.layout import DYN, EHDR, PHDR, SHDR, SYM, record
from miniloader.native.gate import processor
from miniloader.values import NamedTuple

__all__ = [
    "NewSection",
    "Strings",
    "bare_library",
    "build_id_note",
    "dynamic_section",
    "elf_header",
    "hash_table",
    "program_header",
    "shared_object",
]

_FLAGS: Final = {"r": PF_R, "w": PF_W, "x": PF_X}


class NewSection(NamedTuple):
    """A section of a file to be made.  One without ``data`` only takes its place in memory.

    ``type`` is a name of the gABI (``SHT_PROGBITS``), ``flags`` are its ``SHF_`` bits, ``locals`` is how many
    symbols of a table come before the first global one.
    """

    name: str
    type: str
    flags: int
    address: int
    size: int
    data: bytes = b""
    link: int = 0
    entry_size: int = 0
    locals: int = 0


class Strings:
    """A string table that grows.

    >>> strings = Strings()
    >>> strings.add("libz.so.1"), strings.add(b"inflate"), bytes(strings)
    (1, 11, b'\\x00libz.so.1\\x00inflate\\x00')
    """

    def __init__(self) -> None:
        self._table = bytearray(1)

    def add(self, text: str | bytes) -> int:
        """Add ``text``; where it is."""
        place = len(self._table)
        self._table += os.fsencode(text) + b"\0"
        return place

    def __len__(self) -> int:
        return len(self._table)

    def __bytes__(self) -> bytes:
        return bytes(self._table)


def hash_table(symbols: int, defined: int) -> bytes:
    """A ``DT_HASH`` for a table of ``symbols`` (the null symbol among them): one bucket, whose chain is the
    ``defined`` symbols behind the null symbol.

    >>> struct.unpack("<7I", hash_table(4, 2))
    (1, 4, 1, 0, 2, 0, 0)
    """
    chain = [0] * symbols
    chain[1:defined] = range(2, defined + 1)
    return struct.pack(f"<{3 + symbols}I", 1, symbols, min(defined, 1), *chain)


def dynamic_section(entries: Sequence[tuple[int, int]]) -> bytes:
    """The dynamic section of these tags and values; its last entry has to be ``DT_NULL``."""
    return b"".join([DYN.packing.pack(*entry) for entry in entries])


def build_id_note(digits: str) -> bytes:
    """An ``NT_GNU_BUILD_ID`` note; ``digits`` are hexadecimal."""
    description = bytes.fromhex(digits)
    header = record(64, "<", "Nhdr").pack(namesz=4, descsz=len(description), type="NT_GNU_BUILD_ID")
    return header + b"GNU\0" + description


def program_header(
    kind: str, protection: str, place: int, filesz: int, memsz: int | None = None, *, align: int
) -> bytes:
    """The program header of a segment that lies in memory as in the file, at ``place``.

    ``kind`` is a name of the gABI (``PT_LOAD``), ``protection`` reads like ``rw-``.
    """
    return PHDR.pack(
        type=kind, flags=sum(_FLAGS[sign] for sign in protection if sign in _FLAGS), align=align,
        offset=place, vaddr=place, paddr=place, filesz=filesz, memsz=filesz if memsz is None else memsz,
    )  # fmt: skip


def elf_header(
    *, segments: int = 0, sections: int = 0, phoff: int = EHDR.size, shoff: int = 0, names: int = 0
) -> bytes:
    """The ELF header of a shared object with so many segments and sections.

    ``names`` is the number of the section that the names of sections are in.
    """
    return EHDR.pack(
        MAG=b"\x7fELF", CLASS="ELFCLASS64", DATA="ELFDATA2LSB", VERSION="EV_CURRENT",
        type="ET_DYN", machine=f"EM_{processor().upper()}", version="EV_CURRENT",
        ehsize=EHDR.size, phentsize=PHDR.size, shentsize=SHDR.size,
        phoff=phoff if segments else 0, phnum=segments,
        shoff=shoff, shnum=sections, shstrndx=names,
    )  # fmt: skip


def shared_object(sections: Sequence[NewSection], segments: Sequence[bytes] = ()) -> bytes:
    """The bytes of a shared object with these ``sections`` and program headers.

    A section that has data and flags lies in the file as in memory, at its ``address``, which has to be
    behind the sections before it; other data lies where there is room.
    """
    names = Strings()
    numbers = [names.add(section.name) for section in sections]
    numbers.append(names.add(".shstrtab"))
    table = NewSection(".shstrtab", "SHT_STRTAB", 0, 0, len(names), bytes(names))
    image = bytearray(EHDR.size) + b"".join(segments)
    headers = [bytes(SHDR.size)]
    for number, section in zip(numbers, [*sections, table], strict=True):
        place = section.address if section.data and section.flags else -(-len(image) // 16) * 16
        if section.data:
            image += bytes(place - len(image)) + section.data
        headers.append(SHDR.pack(
            name=number, type=section.type, flags=section.flags, addr=section.address, offset=place,
            size=section.size, link=section.link, info=section.locals, addralign=1,
            entsize=section.entry_size,
        ))  # fmt: skip
    image += bytes(-len(image) % 16)
    image[: EHDR.size] = elf_header(
        segments=len(segments), sections=len(headers), shoff=len(image), names=len(headers) - 1
    )
    return bytes(image + b"".join(headers))


def bare_library(*, stack: str = "rw-", needed: Sequence[str] = (), destructors: Sequence[int] = ()) -> bytes:
    """The bytes of a shared object without code, that asks ld.so for something: a ``stack`` like that, the
    libraries ``needed``, these ``destructors`` when the process ends, the first one first.

    A destructor is an address in the process.  Of tables there are those that glibc reads.
    """
    strings = Strings()
    names = [(DT_NEEDED, strings.add(name)) for name in needed]
    symbols, hashes = bytes(SYM.size), hash_table(1, 0)
    array = struct.pack(f"<{len(destructors)}Q", *reversed(destructors))  # which is called backwards
    tables = EHDR.size + 3 * PHDR.size
    functions = -(-(tables + len(symbols) + len(hashes) + len(strings)) // 16) * 16
    dynamic = functions + -(-len(array) // 16) * 16
    entries = [
        *names,
        (DT_SYMTAB, tables),
        (DT_SYMENT, SYM.size),
        (DT_HASH, tables + len(symbols)),
        (DT_STRTAB, tables + len(symbols) + len(hashes)),
        (DT_STRSZ, len(strings)),
        *([(DT_FINI_ARRAY, functions), (DT_FINI_ARRAYSZ, len(array))] if destructors else []),
        (DT_NULL, 0),
    ]
    size = len(entries) * DYN.size
    segments = [
        program_header("PT_LOAD", "rw-", 0, dynamic + size, align=mmap.PAGESIZE),
        program_header("PT_DYNAMIC", "rw-", dynamic, size, align=8),
        program_header("PT_GNU_STACK", stack, 0, 0, align=16),
    ]
    content = b"".join([elf_header(segments=3), *segments, symbols, hashes, bytes(strings)])
    return (content.ljust(functions, b"\0") + array).ljust(dynamic, b"\0") + dynamic_section(entries)
