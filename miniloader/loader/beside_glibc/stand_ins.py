"""Libraries that ask about themselves: dladdr(3), dl_iterate_phdr(3) and their like know ours, too.

The system's loader does not know what we load, and would say so: then a library linked with
``-static-libgcc`` ends the process with its first exception, since its own unwinder asks ``_dl_find_object``,
and a run-time that looks for its own image gives up.  So what refers to one of these functions is bound to
code of ours, which asks glibc's first and then looks into a table of our libraries.  The table is there from
the first time that somebody asks; see :mod:`miniloader.machine.stand_in_code`.

dlsym(3) and dlvsym(3) are among them for ``RTLD_NEXT``, which glibc refuses to callers that it does not know:
what comes after a library of ours is the process's global scope.  dlopen(3) is, for libraries that hold
themselves or others (``RTLD_NOLOAD``, ``RTLD_NODELETE``): these are kept until they are let go.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_STRTAB, DT_SYMTAB
from miniloader.kernel import syscalls as sys
from miniloader.loader.beside_glibc import host
from miniloader.loader.memory import Memory
from miniloader.machine import stand_in_code
from miniloader.machine.stand_in_code import CODE, ENTRY, FUNCTIONS, HEAD, TABLE
from miniloader.native.gate import processor

__all__ = ["add", "answer", "asked", "is_held", "make", "remove", "stand_ins"]

_LENGTH: Final = TABLE + (4 << 20)  # a mapping of 27,000 libraries would be refused long before
_COUNTS: Final = 8 * len(FUNCTIONS)  # where the table has its three counts
_END: Final = 72  # where an entry has the address that makes it valid
_HOLDS: Final = 152  # where it says how often it is held

_Counts: Final = ctypes.c_uint64 * 3

_Listed = tuple[ElfImage, Memory, int, int]
"""What is told of a library: its image, its pages, how many symbols and which thread-local module it has."""

_waiting: Final[dict[Memory, _Listed]] = {}  # not in the table, since nobody has asked yet


class _StandInTable:
    """The code, and behind it the table; both stay as long as the process."""

    def __init__(self) -> None:
        anonymous = sys.MAP_PRIVATE | sys.MAP_ANONYMOUS
        self.base = sys.mmap(0, _LENGTH, sys.PROT_READ | sys.PROT_WRITE, anonymous)
        try:
            ctypes.memmove(self.base, CODE, len(CODE))
            sys.mprotect(self.base, TABLE, sys.PROT_READ | sys.PROT_EXEC)
        except OSError:
            sys.munmap(self.base, _LENGTH)
            raise
        self.head = HEAD.pack(*(_of_host().get(name, 0) for name in FUNCTIONS), 0, 0, 0)
        ctypes.memmove(self.base + TABLE, self.head, HEAD.size)
        self._counts = _Counts.from_address(self.base + TABLE + _COUNTS)
        self._listed: dict[Memory, int] = {}  # its entry's number
        self._free: list[int] = []
        self._texts: dict[int, bytearray] = {}  # what an entry points at

    def add(self, image: ElfImage, memory: Memory, symbol_count: int, tls_module: int) -> None:
        """List the library: its entry is valid when all of it is there."""
        number = self._free.pop() if self._free else len(self._listed)
        header, unwind = image.header, image.segment("PT_GNU_EH_FRAME")
        table = image.source.read(header.phoff, header.phentsize * header.phnum, "program headers")
        path, soname = os.fsencode(image.path), os.fsencode(image.soname or image.path)
        text = bytearray(b"\0".join((table, path, soname, b"")))
        headers = ctypes.addressof(ctypes.c_char.from_buffer(text))
        name = headers + len(table) + 1
        tags, dynamic = image.dynamic.tags, image.segment("PT_DYNAMIC")
        symbols, names = (memory.bias + tags[tag] if tag in tags else 0 for tag in (DT_SYMTAB, DT_STRTAB))
        entry = ENTRY.pack(
            *(memory.bias, name, headers, header.phnum, 0, 0),
            *(tls_module, 0),
            *(memory.start, 0, memory.bias + unwind.vaddr if unwind is not None else 0),
            *(symbols, symbol_count, names),
            *(memory.bias, name, memory.bias + dynamic.vaddr if dynamic is not None else 0, 0, 0),
            *(0, name + len(path) + 1),
        )
        at = self._at(number)
        ctypes.memmove(at, entry, ENTRY.size)
        ctypes.c_uint64.from_address(at + _END).value = memory.end
        self._texts[number], self._listed[memory] = text, number
        self._counts[0] = max(self._counts[0], number + 1)
        self._counts[1] += 1

    def remove(self, memory: Memory) -> None:
        """Withdraw the library at ``memory``, unless it is not listed."""
        number = self._listed.pop(memory, None)
        if number is None:
            return
        ctypes.c_uint64.from_address(self._at(number) + _END).value = 0
        self._counts[2] += 1
        host.libraries()  # takes glibc's lock: whoever was being told of it has been told
        self._free.append(number)
        del self._texts[number]

    def holds(self, memory: Memory) -> bool:
        """Whether somebody has asked for the library at ``memory`` to stay."""
        number = self._listed.get(memory)
        return number is not None and bool(ctypes.c_uint64.from_address(self._at(number) + _HOLDS).value)

    def _at(self, number: int) -> int:
        return self.base + TABLE + HEAD.size + number * ENTRY.size


def add(image: ElfImage, memory: Memory, symbol_count: int, tls_module: int) -> None:
    """Make a library that is linked known to those of ours that ask, now or later.

    ``symbol_count`` is the number of its dynamic symbols, ``tls_module`` 0 without thread-local storage.
    """
    if _table.cache_info().currsize and (table := _table()) is not None:
        table.add(image, memory, symbol_count, tls_module)
    else:
        _waiting[memory] = image, memory, symbol_count, tls_module


def remove(memory: Memory) -> None:
    """The library at ``memory`` goes: to be called before it is unmapped."""
    if memory in _waiting:
        del _waiting[memory]
    elif _table.cache_info().currsize and (table := _table()) is not None:
        table.remove(memory)


def is_held(memory: Memory) -> bool:
    """Whether a library has asked, by dlopen(3), for the one at ``memory`` to stay."""
    if not _table.cache_info().currsize or (table := _table()) is None:
        return False
    return table.holds(memory)


def answer(addresses: array[int], places: Iterable[int]) -> None:
    """Replace, in ``addresses``, those of glibc's functions, at ``places``, by what stands for them."""
    for place in places:
        addresses[place] = stand_ins().get(addresses[place], addresses[place])


@lru_cache(maxsize=1)
def stand_ins() -> dict[int, int]:
    """What stands for each of glibc's functions, by that one's address; empty where no page may become
    executable."""
    table = _table()
    return {} if table is None else stand_in_code.stand_ins(table.base, table.head)


@lru_cache(maxsize=1)
def _table() -> _StandInTable | None:
    """The table, in use from now on."""
    table = make()
    while _waiting and table is not None:
        table.add(*_waiting.popitem()[1])
    return table


@lru_cache(maxsize=1)
def make() -> _StandInTable | None:
    """The table, which nobody has asked for yet; ``None`` where no page may become executable."""
    if processor() != "x86_64":  # what the code is for
        return None
    try:
        return _StandInTable()
    except OSError:
        return None


@lru_cache(maxsize=1)
def asked() -> tuple[int, ...]:
    """The addresses of glibc's functions that something stands for, ascending."""
    return tuple(sorted(set(_of_host().values())))


@lru_cache(maxsize=1)
def _of_host() -> dict[bytes, int]:
    """The addresses of glibc's functions, by name."""
    addresses = {name: host.symbol_address(host.global_handle(), name) for name in FUNCTIONS}
    return {name: address for name, address in addresses.items() if address is not None}
