"""Libraries that ask about themselves: dladdr(3), dl_iterate_phdr(3) and their like know ours, too.

The system's loader does not know what we load, and would say so: then a library linked with
``-static-libgcc`` ends the process with its first exception, since its own unwinder asks ``_dl_find_object``,
and a run-time that looks for its own image gives up.  So what refers to one of these functions is bound to
code of ours, which asks glibc's first and then looks into a table of our libraries.  The table is there from
the first time that somebody asks; see :mod:`miniloader.machine.stand_in_code`.

dlopen(3), dlsym(3) and their like are C (``inside.c`` of :mod:`miniloader.native`), which asks Python: what a
library of ours opens comes through us, too (:mod:`miniloader.loader.from_inside`).
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_STRTAB, DT_SYMTAB
from miniloader.kernel import syscalls as sys
from miniloader.loader.beside_glibc import host
from miniloader.loader.memory import Memory
from miniloader.machine import stand_in_code
from miniloader.machine.stand_in_code import CODE, ENTRY, FUNCTIONS, HEAD, TABLE
from miniloader.native import IMPORT, INSIDE, STAND_INS, functions
from miniloader.native.gate import processor

__all__ = [
    "add",
    "answer",
    "answer_with",
    "asked",
    "by_name",
    "fall_silent",
    "for_imports",
    "handle_of",
    "headers_of",
    "is_handle",
    "make",
    "remove",
    "stand_ins",
]

_LENGTH: Final = TABLE + (4 << 20)  # a mapping of 27,000 libraries would be refused long before
_COUNTS: Final = 8 * len(FUNCTIONS)  # where the table has its three counts
_INFO: Final = struct.Struct("<QQQH")  # how an entry begins: bias, name, program headers, their count
_END: Final = 72  # where an entry has the address that makes it valid
_HANDLE: Final = 112  # where its handle is, a struct link_map
_MOST: Final = 16  # stand-ins that inside.c has room for

_Counts: Final = ctypes.c_uint64 * 3
_Listing: Final = ctypes.c_uint64 * (2 * _MOST)

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

    def handle_of(self, memory: Memory) -> int | None:
        """What dlopen(3) gives for the library at ``memory``; None while it is not listed."""
        number = self._listed.get(memory)
        return None if number is None else self._at(number) + _HANDLE

    def headers_of(self, memory: Memory) -> tuple[int, int]:
        """Where the program headers of a library that is listed are kept, and how many."""
        _, _, headers, count = _INFO.unpack_from(ctypes.string_at(self._at(self._listed[memory]), _INFO.size))
        return headers, count

    @property
    def entries(self) -> tuple[int, int]:
        """Where all entries are that there can be: the first address, and how many bytes."""
        first = self._at(0)
        return first, self.base + _LENGTH - first

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


def handle_of(memory: Memory) -> int | None:
    """What dlopen(3) gives for the library at ``memory``; None where nobody can ask for it."""
    table = _table()
    return None if table is None else table.handle_of(memory)


def answer(addresses: array[int], places: Iterable[int]) -> None:
    """Replace, in ``addresses``, those of glibc's functions, at ``places``, by what stands for them."""
    for place in places:
        addresses[place] = stand_ins().get(addresses[place], addresses[place])


def is_handle(handle: int) -> bool:
    """Whether ``handle`` is, or has been, one of a library of ours."""
    table = _table()
    if table is None:
        return False
    first, length = table.entries
    return first <= handle < first + length


def headers_of(memory: Memory) -> tuple[int, int]:
    """Where the program headers of the library at ``memory`` are kept, which is listed, and how many."""
    table = _table()
    assert table is not None  # or it would have no handle
    return table.headers_of(memory)


_answerers: Final[list[Callable[[], int]]] = []


def answer_with(make: Callable[[], int]) -> None:
    """What is asked from inside shall be answered by the function at the address that ``make`` gives.

    It is called when the first library is bound to a function that asks; until then all that costs nothing.
    """
    _answerers[:] = [make]


def fall_silent() -> None:
    """Python ends: from now on glibc answers what is asked from inside."""
    if stand_ins.cache_info().currsize:
        functions().set_inside(0, 0, 0, 0, 0)


@lru_cache(maxsize=1)
def stand_ins() -> dict[int, int]:
    """What stands for each of glibc's functions, by that one's address; empty where no page may become
    executable."""
    table = _table()
    if table is None:
        return {}
    loops, theirs = functions(), _of_host()
    pairs = stand_in_code.stand_ins(table.base, table.head)
    pairs |= {theirs[name]: _address(loops[c_name]) for name, c_name in INSIDE.items() if name in theirs}
    words = [word for theirs, ours in pairs.items() for word in (ours, theirs)]
    listing = ctypes.addressof(_Listing.in_dll(loops, STAND_INS))
    ctypes.memmove(listing, array("Q", words).tobytes(), 8 * len(words))
    glibc = array("Q", [_of_host().get(name, 0) for name in INSIDE])
    answerer = _answerers[0]() if _answerers else 0
    loops.set_inside(answerer, glibc.buffer_info()[0], *table.entries, host.global_handle())
    return pairs


def by_name() -> dict[bytes, int]:
    """What stands for each function of :data:`~miniloader.native.INSIDE`; empty where nothing can."""
    pairs, theirs = stand_ins(), _of_host()
    return {name: pairs[theirs[name]] for name in INSIDE if theirs.get(name) in pairs}


def for_imports() -> tuple[int, int]:
    """An address in the library whose dlopen(3) imports extension modules, and what stands for it there."""
    python, loops = ctypes.pythonapi, functions()
    names = ("PyThreadState_GetUnchecked", "_PyThreadState_UncheckedGet")  # since 3.13, and until then
    current = next(name for name in names if hasattr(python, name))
    main = _address(python.PyInterpreterState_Main)
    python.PyInterpreterState_Main.restype = ctypes.c_void_p
    loops.set_python(
        _address(python[current]),
        _address(python.PyThreadState_GetInterpreter),
        python.PyInterpreterState_Main(),
    )
    return main, _address(loops[IMPORT])


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


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
    names = dict.fromkeys((*FUNCTIONS, *INSIDE))
    addresses = {name: host.symbol_address(host.global_handle(), name) for name in names}
    return {name: address for name, address in addresses.items() if address is not None}
