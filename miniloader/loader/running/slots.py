"""The words through which libraries of ld.so's call dlopen(3) and its like, led elsewhere and put back.

A library that another loader has linked calls by its global offset table.  There the functions of
:data:`~miniloader.native.INSIDE` are replaced by what libraries of ours are bound to.  The pages are made
writable for that moment only.
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from typing import Final

from miniloader.elf.dynamic import (
    DT_JMPREL,
    DT_PLTRELSZ,
    DT_RELA,
    DT_RELACOUNT,
    DT_RELASZ,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMTAB,
)
from miniloader.kernel import syscalls as sys
from miniloader.kernel.maps import read_maps
from miniloader.loader.beside_glibc import stand_ins
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.memory import protection_bits
from miniloader.loader.policy import comes_from_host
from miniloader.machine.relocation import KINDS
from miniloader.native import INSIDE
from miniloader.values import dataclass

__all__ = ["LedWord", "lead", "put_back", "slots_of"]

_ROW: Final = struct.Struct("<QIIq")  # Elf64_Rela: offset, kind, symbol, addend
_NUMBERS, _REFERRED = 6, 3  # of 4 bytes in a row, and which of them is the symbol
_SYMBOL: Final = 6  # words of 4 bytes of an Elf64_Sym, the first of which is its name
_HERE: Final = {"x86_64": "X86_64", "aarch64": "AARCH64"}


@dataclass(frozen=True)
class LedWord:
    """A word at ``address`` of a library: which function's address it holds."""

    library: HostLibrary
    name: bytes
    address: int


def slots_of(library: HostLibrary) -> Iterator[LedWord]:
    """The words of ``library`` that hold addresses of functions of :data:`~miniloader.native.INSIDE`.

    None of glibc's own: what it opens inside itself stays with it.
    """
    tags = library.dynamic.tags
    if comes_from_host(library.soname) or not {DT_STRTAB, DT_STRSZ, DT_SYMTAB} <= tags.keys():
        return
    strings = library.read(tags[DT_STRTAB], tags[DT_STRSZ], "DT_STRTAB")
    names = {place: name for name in INSIDE for place in _places(strings, name + b"\0")}
    if not names:
        return
    head = tags.get(DT_RELACOUNT, 0) * _ROW.size  # bytes of rows that are of no symbol, as ld.so believes
    parts = ((DT_JMPREL, DT_PLTRELSZ, 0), (DT_RELA, DT_RELASZ, head))
    tables = [
        library.read(tags[start] + skipped, tags[size] - skipped, "relocations")
        for start, size, skipped in parts
        if start in tags and tags.get(size, 0) > skipped
    ]
    symbols = array("I", _symbol_table(library))[::_SYMBOL]
    wanted = {symbol: name for place, name in names.items() for symbol in _indices(symbols, place)}
    if not wanted:  # mostly, and of thousands
        return
    kinds = KINDS[_HERE[os.uname().machine]]
    for table in tables:
        numbers = array("I", table)[_REFERRED::_NUMBERS]  # to which symbol each row refers
        for row in sorted(row for symbol in wanted for row in _indices(numbers, symbol)):
            offset, kind, symbol, _ = _ROW.unpack_from(table, row * _ROW.size)
            if kind in kinds and kinds[kind].formula in ("S", "S + A"):
                yield LedWord(library, wanted[symbol], library.bias + offset)


def _symbol_table(library: HostLibrary) -> bytes:
    """The dynamic symbols, and maybe what is behind them: nothing says how many they are.

    Names mostly come next.  To what is no symbol no row refers.
    """
    start, names = (library.dynamic.tags[tag] for tag in (DT_SYMTAB, DT_STRTAB))
    end = next((end for begin, end in library.ranges if begin <= start < end), start)
    size = (names if start < names < end else end) - start
    return library.read(start, size // (4 * _SYMBOL) * 4 * _SYMBOL, "DT_SYMTAB")


def _indices(numbers: array[int], number: int) -> Iterator[int]:
    """Where ``number`` is among ``numbers``, of which there may be a hundred thousand: found as bytes are."""
    size = numbers.itemsize
    for place in _places(numbers.tobytes(), number.to_bytes(size, "little")):
        if place % size == 0:
            yield place // size


def _places(strings: bytes, text: bytes) -> Iterator[int]:
    place = strings.find(text)
    while place >= 0:
        yield place
        place = strings.find(text, place + 1)


def lead(libraries: Iterable[HostLibrary]) -> dict[LedWord, int]:
    """Have what ``libraries`` call of :data:`~miniloader.native.INSIDE` come to us: what each word was."""
    ours = stand_ins.by_name()
    slots = (slot for library in libraries for slot in slots_of(library))
    return _write((slot, ours[slot.name]) for slot in slots if slot.name in ours)


def put_back(words: dict[LedWord, int], names: Iterable[bytes]) -> None:
    """Give the words for functions of these ``names`` their values back."""
    chosen = set(names)
    _write((slot, word) for slot, word in words.items() if slot.name in chosen)


#: What each page with such words was when they were led: at the end of a program that has another root by
#: then, nobody can tell.
_protections: Final[dict[int, str]] = {}


def _write(words: Iterable[tuple[LedWord, int]]) -> dict[LedWord, int]:
    """Store the words, on pages that are writable meanwhile: what they were."""
    words, earlier = list(words), dict[LedWord, int]()
    addresses = [slot.address for slot, _ in words]
    pages = {address & -sys.PAGE_SIZE for address in addresses}
    if not pages <= _protections.keys():
        mappings = read_maps(start=min(addresses), end=max(addresses) + 1)
        _protections.update((page, vma.protection) for page in pages for vma in mappings if page in vma)
    for slot, word in words:
        page = slot.address & -sys.PAGE_SIZE
        protection = _protections[page]
        place = ctypes.c_uint64.from_address(slot.address)
        earlier[slot] = place.value
        if "w" not in protection:
            sys.mprotect(page, sys.PAGE_SIZE, sys.PROT_READ | sys.PROT_WRITE)
        place.value = word
        if "w" not in protection:
            sys.mprotect(page, sys.PAGE_SIZE, protection_bits(protection))
    return earlier
