"""gdb's JIT interface: a debugger that is attached, or comes later, sees what ld.so does not know.

gdb looks for two symbols in every library of the process: a list of symbol files in memory, and a function
that it stops at when the list changes.  The loader's own compiled code has them (``debugger.c``).

The symbol file of a library has no contents: its sections, where they are in memory, its symbols, and a link
to the library's file (or, by its build id, to separate debug information), from which gdb takes the lines.
Source: the gdb manual, "JIT Compilation Interface" and "Debugging Information in Separate Files".
"""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from miniloader.arrays import np
from miniloader.elf import ElfImage, Source
from miniloader.elf.header import Segment
from miniloader.elf.layout import SYM
from miniloader.elf.symbols import SHN_ABS, SHN_UNDEF, STB_LOCAL, STT_FUNC, STT_GNU_IFUNC, STT_OBJECT
from miniloader.elf.symtab import read_symtab
from miniloader.elf.tables import Table
from miniloader.elf.writer import (
    NewSection,
    build_id_note,
    shared_object,
)
from miniloader.native import address_of

__all__ = ["Registered", "file_of", "register", "symbol_file"]

_REGISTER, _UNREGISTER = 1, 2
_ALLOC: Final = {"r": 2, "rw": 3, "rx": 6, "rwx": 7}  # SHF_ALLOC, SHF_WRITE, SHF_EXECINSTR


class _Entry(ctypes.Structure):
    """``struct jit_code_entry``."""

    _fields_ = (
        ("following", ctypes.c_void_p),
        ("previous", ctypes.c_void_p),
        ("symfile", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
    )


class _Descriptor(ctypes.Structure):
    """``struct jit_descriptor``."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("action", ctypes.c_uint32),
        ("relevant", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
    )


class Registered:
    """One symbol file that gdb is told of; it stays in memory until it is withdrawn."""

    def __init__(self, data: bytes) -> None:
        self._file = ctypes.create_string_buffer(data, len(data))
        self._entry = _Entry(None, None, ctypes.addressof(self._file), len(data))
        descriptor, _ = _interface()
        self._entry.following = descriptor.first
        if descriptor.first:
            _Entry.from_address(descriptor.first).previous = ctypes.addressof(self._entry)
        descriptor.first = ctypes.addressof(self._entry)
        self._tell(_REGISTER)

    def withdraw(self) -> None:
        """Take it back; to be called once."""
        entry, (descriptor, _) = self._entry, _interface()
        if entry.previous:
            _Entry.from_address(entry.previous).following = entry.following
        else:
            descriptor.first = entry.following
        if entry.following:
            _Entry.from_address(entry.following).previous = entry.previous
        self._tell(_UNREGISTER)

    def _tell(self, action: int) -> None:
        descriptor, function = _interface()
        descriptor.action, descriptor.relevant = action, ctypes.addressof(self._entry)
        ctypes.CFUNCTYPE(None)(function)()  # where gdb has a breakpoint
        descriptor.action = 0


def register(image: ElfImage, bias: int) -> Registered:
    """Show gdb the library ``image``, mapped with ``bias``.

    Raises :class:`LoadError` where the system's loader opens no library from memory.
    """
    return Registered(symbol_file(image, bias))


def file_of(source: Source) -> str | None:
    """A path by which another process reads ``source``; ``None`` when it is not the whole of a file."""
    if source.start:
        return None
    try:
        status = os.stat(source.name)
    except (OSError, ValueError):
        status = None
    if status is not None and (status.st_dev, status.st_ino) == source.identity:
        return os.path.abspath(source.name)
    return f"/proc/{os.getpid()}/fd/{source.fd}"


# ------------------------------------------------------------------------------------- the symbol file
def symbol_file(image: ElfImage, bias: int) -> bytes:
    """An ELF file that tells where the sections and symbols of ``image`` are when mapped with ``bias``."""
    sections = _places(image, bias)
    strings, rows = _symbols(image, bias, sections)
    symbols = bytes(SYM.size) + rows.tobytes()
    local = 1 + int((rows["info"] >> 4 == STB_LOCAL).sum())
    notes = [_build_id(image.build_id)] if image.build_id else []
    path = file_of(image.source)
    if path is not None and image.sections:  # without them gdb has nothing to find there, and 16 and 17 end
        checksum = zlib.crc32(image.source.read(0, image.source.size, "file"))
        name = os.fsencode(path) + b"\0"
        link = name.ljust(-(-len(name) // 4) * 4, b"\0") + struct.pack("<I", checksum)
        notes.append(NewSection(".gnu_debuglink", "SHT_PROGBITS", 0, 0, len(link), link))
    at = len(sections) + len(notes) + 2  # of .strtab
    tables = [
        NewSection(".symtab", "SHT_SYMTAB", 0, 0, len(symbols), symbols, at, SYM.size, local),
        NewSection(".strtab", "SHT_STRTAB", 0, 0, len(strings), strings),
    ]
    return shared_object([*sections, *notes, *tables])


def _places(image: ElfImage, bias: int) -> list[NewSection]:
    """Where the library's sections are; for a file without section headers, its segments."""

    def place(name: str, load: Segment, vaddr: int, size: int) -> NewSection:
        rights = "r" + "".join(sign for sign in "wx" if sign in load.flags)
        return NewSection(name, "SHT_NOBITS", _ALLOC[rights], bias + vaddr, size)

    sections = [
        place(section.name, load, section.vaddr, section.size)
        for section in image.sections
        for load in image.loads
        if section.allocated
        and section.name != ".tbss"  # which takes no memory
        and load.vaddr <= section.vaddr <= section.end <= load.vaddr + load.memsz
    ]
    return sections or [place(f"load{load.index}", load, load.vaddr, load.memsz) for load in image.loads]


def _symbols(image: ElfImage, bias: int, sections: Sequence[NewSection]) -> tuple[bytes, Table]:
    """A string table and the symbols: the static ones too, where the file still has them."""
    table = read_symtab(image)
    if not len(table.rows):
        table = image.symbols
    rows = table.rows
    usable = np.isin(table.type, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC))
    usable &= (rows["shndx"] != SHN_UNDEF) & (rows["shndx"] != SHN_ABS)
    rows = rows[usable].copy()
    rows["value"] += np.uint64(bias)
    order = sorted(range(len(sections)), key=lambda place: sections[place].address)
    starts = np.array([sections[place].address for place in order], np.uint64)
    numbers = np.array([place + 1 for place in order], np.uint16)  # the first section header is nobody's
    rows["shndx"] = numbers[np.maximum(np.searchsorted(starts, rows["value"], "right") - 1, 0)]
    return bytes(table.strings), rows


def _build_id(digits: str) -> NewSection:
    note = build_id_note(digits)
    return NewSection(".note.gnu.build-id", "SHT_NOTE", 0, 0, len(note), note)


# -------------------------------------------------------------------------------------- what gdb finds
@lru_cache(maxsize=1)
def _interface() -> tuple[_Descriptor, int]:
    """The list, and the address of the function that gdb stops at; both stay as long as the process."""
    function, descriptor = map(address_of, ("__jit_debug_register_code", "__jit_debug_descriptor"))
    return _Descriptor.from_address(descriptor), function
