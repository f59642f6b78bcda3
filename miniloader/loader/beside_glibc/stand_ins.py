"""Libraries that ask about themselves: dladdr(3), dl_iterate_phdr(3) and their like know ours, too.

The system's loader does not know what we load, and would say so: then a library linked with
``-static-libgcc`` ends the process with its first exception, since its own unwinder asks ``_dl_find_object``,
and a run-time that looks for its own image gives up.  So what refers to one of these functions is bound to
code of ours (``answers.c`` of :mod:`miniloader.native`), which asks glibc's first and then looks into a table
of our libraries.  It is filled from the first time on that somebody asks.

dlopen(3), dlsym(3) and their like are C (``inside.c`` of :mod:`miniloader.native`), which asks Python: what a
library of ours opens comes through us, too (:mod:`miniloader.loader.from_inside`).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal makes enumerations of it, which takes a millisecond
import ctypes
import os
import struct
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_STRTAB, DT_SYMTAB
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import dynamic_linker, host
from miniloader.loader.memory import Memory
from miniloader.native import (
    ANSWERS,
    FINALISE,
    INNERMOST,
    INSIDE,
    INTERFACE,
    STAND_INS,
    address_of,
    buffer_address,
    functions,
)

__all__ = [
    "add",
    "answer",
    "answer_with",
    "asked",
    "be_asked_at_exit",
    "by_name",
    "fall_silent",
    "handle_of",
    "headers_of",
    "is_handle",
    "remove",
    "stand_ins",
]

#: A library: its struct dl_phdr_info (whose counts are filled in); its first address, the one behind its last
#: (0: this entry is free), .eh_frame_hdr; its symbols, their number and names; its struct link_map.
_ENTRY: Final = struct.Struct("<QQQH6xQQQQ 3Q 3Q 5Q")
_MOST_LIBRARIES: Final = 27000  # that answers.c has room for
_INFO: Final = struct.Struct("<QQQH")  # how an entry begins: bias, name, program headers, their count
_HANDLE: Final = 112  # where its handle is, a struct link_map

_malloc: Final = dynamic_linker.declared("malloc", ctypes.c_void_p, ctypes.c_size_t)
_free: Final = dynamic_linker.declared("free", None, ctypes.c_void_p)

_Listed = tuple[ElfImage, Memory, int, int]
"""What is told of a library: its image, its pages, how many symbols and which thread-local module it has."""

_waiting: Final[dict[Memory, _Listed]] = {}  # not in the table, since nobody has asked yet


class _StandInTable:
    """The table of answers.c: which libraries are in it, and where each is."""

    def __init__(self) -> None:
        self.base = address_of("entries")
        self._listed: dict[Memory, int] = {}  # its entry's number
        self._free: list[int] = []
        self._texts: dict[int, int] = {}  # what an entry points at: of malloc(3), for it outlives Python

    def add(self, image: ElfImage, memory: Memory, symbol_count: int, tls_module: int) -> None:
        """List the library: its entry is valid when all of it is there."""
        number = self._free.pop() if self._free else len(self._listed)
        if number >= _MOST_LIBRARIES:
            raise LoadError(f"{image.path}: {number} libraries are loaded already")
        header, unwind = image.header, image.segment("PT_GNU_EH_FRAME")
        table = image.source.read(header.phoff, header.phentsize * header.phnum, "program headers")
        text = b"\0".join((table, os.fsencode(image.path), b""))
        headers = _malloc(len(text))
        if headers is None:
            raise LoadError(f"{image.path}: no memory for {len(text)} bytes")
        ctypes.memmove(headers, text, len(text))
        name = headers + len(table) + 1
        tags, dynamic = image.dynamic.tags, image.segment("PT_DYNAMIC")
        symbols, names = [memory.bias + tags[tag] if tag in tags else 0 for tag in (DT_SYMTAB, DT_STRTAB)]
        entry = bytearray(_ENTRY.size)
        _ENTRY.pack_into(
            *(entry, 0),
            *(memory.bias, name, headers, header.phnum, 0, 0),
            *(tls_module, 0),
            *(memory.start, 0, memory.bias + unwind.vaddr if unwind is not None else 0),
            *(symbols, symbol_count, names),
            *(memory.bias, name, memory.bias + dynamic.vaddr if dynamic is not None else 0, 0, _map_before()),
        )
        end = image.loads[-1].end  # nothing behind it is in the library
        functions().list_entry(number, buffer_address(entry), memory.bias + end)
        self._texts[number], self._listed[memory] = headers, number

    def remove(self, memory: Memory) -> None:
        """Withdraw the library at ``memory``, unless it is not listed."""
        number = self._listed.pop(memory, None)
        if number is None:
            return
        functions().withdraw_entry(number)
        host.libraries()  # takes glibc's lock: whoever was being told of it has been told
        self._free.append(number)
        _free(self._texts.pop(number))

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
        return self.base, _MOST_LIBRARIES * _ENTRY.size

    def _at(self, number: int) -> int:
        return self.base + number * _ENTRY.size


def add(image: ElfImage, memory: Memory, symbol_count: int, tls_module: int) -> None:
    """Make a library that is linked known to those of ours that ask, now or later.

    ``symbol_count`` is the number of its dynamic symbols, ``tls_module`` 0 without thread-local storage.
    """
    if _table.cache_info().currsize:
        _table().add(image, memory, symbol_count, tls_module)
    else:
        _waiting[memory] = image, memory, symbol_count, tls_module


def remove(memory: Memory) -> None:
    """The library at ``memory`` goes: to be called before it is unmapped."""
    if memory in _waiting:
        del _waiting[memory]
    elif _table.cache_info().currsize:
        _table().remove(memory)


def handle_of(memory: Memory) -> int | None:
    """What dlopen(3) gives for the library at ``memory``; None where nobody can ask for it."""
    return _table().handle_of(memory)


def answer(addresses: array[int], places: Iterable[int]) -> bool:
    """Replace, in ``addresses``, those of glibc's functions, at ``places``, by what stands for them.

    Whether dlopen(3) is one of them.
    """
    opens = False
    for place in places:
        opens = opens or addresses[place] in (_of_host().get(b"dlopen"), _preloaded().get(b"dlopen"))
        addresses[place] = stand_ins().get(addresses[place], addresses[place])
    return opens


def is_handle(handle: int) -> bool:
    """Whether ``handle`` is, or has been, one of a library of ours."""
    first, length = _table().entries
    return first <= handle < first + length


def headers_of(memory: Memory) -> tuple[int, int]:
    """Where the program headers of the library at ``memory`` are kept, which is listed, and how many."""
    return _table().headers_of(memory)


_answerers: Final[list[Callable[[int], int]]] = []


def answer_with(function: Callable[[int], int]) -> None:
    """What is asked from inside shall be answered by ``function``, which gets the address of a question.

    It says whether it has answered; else glibc does.
    """
    _answerers[:] = [function]


def fall_silent() -> None:
    """Python ends: from now on glibc answers what is asked from inside."""
    if stand_ins.cache_info().currsize or be_asked_at_exit.cache_info().currsize:
        functions().set_inside(0, 0, 0, 0, 0, 0)


@lru_cache(maxsize=1)
def stand_ins() -> dict[int, int]:
    """What stands for each of glibc's functions, by that one's address."""
    loops, theirs, table = functions(), _of_host(), _table()
    standing = (ANSWERS | INSIDE).items()
    pairs = {theirs[name]: address_of(c_name) for name, c_name in standing if name in theirs}
    pairs.update((address, pairs[theirs[name]]) for name, address in _preloaded().items() if name in theirs)
    asked_first = array("Q", [theirs.get(name, 0) for name in ANSWERS])
    loops.set_answers(asked_first.buffer_info()[0])
    words = [word for theirs, ours in pairs.items() for word in (ours, theirs)]
    ctypes.memmove(address_of(STAND_INS), array("Q", words).tobytes(), 8 * len(words))
    glibc = array("Q", [theirs.get(name, 0) for name in INSIDE])
    interface = _interface()
    lists = interface.buffer_info()[0], glibc.buffer_info()[0]
    loops.set_inside(_answerer(), *lists, *table.entries, dynamic_linker.global_handle())
    return pairs


def _answerer() -> int:
    """CPython's address of the function that answers; 0 without one."""
    return id(_answerers[0]) if _answerers else 0


def _interface() -> array[int]:
    """The addresses of what inside.c takes to ask Python: the same ever after, once all are known."""
    if _interfaces:
        return _interfaces[0]
    _tell_of_forks()
    handler = _signal_handler()
    numbers = [id(_signal.getsignal), _of_python(b"PyCallable_Check"), handler, INNERMOST]
    interface = array("Q", [*map(_of_python, INTERFACE), *numbers])
    if handler:
        _interfaces.append(interface)
    return interface


_interfaces: Final[list[array[int]]] = []


@lru_cache(maxsize=1)
def _tell_of_forks() -> None:
    """From now on inside.c knows which processes Python has forked, and so sees to its lock there."""
    os.register_at_fork(after_in_child=functions().set_process)


def _signal_handler() -> int:
    """The address of what CPython has the kernel call at signals that it handles; 0 where nobody can tell."""
    handled = [number for number in range(1, _signal.NSIG) if callable(_signal.getsignal(number))]
    if handled:
        return _called_at(handled[0])
    number = _signal.SIGWINCH  # by default it is ignored
    if _signal.getsignal(number) != _signal.SIG_DFL:
        return 0
    try:
        _signal.signal(number, _signal.default_int_handler)
    except ValueError:  # only Python's main thread may
        return 0
    address = _called_at(number)
    _signal.signal(number, _signal.SIG_DFL)
    return address


def _called_at(number: int) -> int:
    """The address of the function that the kernel calls at a signal of this number."""
    found = (ctypes.c_uint64 * 32)()  # sigaction(2)'s structure, which begins with it
    dynamic_linker.declared("sigaction", ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 2)(
        number, None, found
    )
    return found[0]


@lru_cache(maxsize=1)
def be_asked_at_exit() -> None:
    """From now on exit(3) asks which destructors are left, and calls them: at the first library of ours."""
    if not stand_ins.cache_info().currsize:
        interface = _interface()
        functions().set_inside(_answerer(), interface.buffer_info()[0], 0, 0, 0, 0)
    dynamic_linker.declared("__cxa_atexit", ctypes.c_int, *[ctypes.c_void_p] * 3)(
        address_of(FINALISE), None, None
    )


def _of_python(name: bytes) -> int:
    """The address of a function of CPython, which every process that imports ctypes has."""
    address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), name)
    if address is None:
        raise LoadError(f"this Python does not export {name.decode()}, by which libraries of ours ask it")
    return address


def by_name() -> dict[bytes, int]:
    """What stands for each function of :data:`~miniloader.native.INSIDE`; empty where nothing can."""
    pairs, theirs = stand_ins(), _of_host()
    return {name: pairs[theirs[name]] for name in INSIDE if theirs.get(name) in pairs}


@lru_cache(maxsize=1)
def _map_before() -> int:
    """The ``link_map`` of ld.so: who goes back from one of ours comes to all that the program began with.

    Ours are not in glibc's list, and what is loaded later may go; ld.so stays.
    """
    address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), b"__tls_get_addr")
    return dynamic_linker.handle_at(address or 0) or dynamic_linker.global_handle()


@lru_cache(maxsize=1)
def _table() -> _StandInTable:
    """The table, in use from now on."""
    table = _StandInTable()
    while _waiting:
        table.add(*_waiting.popitem()[1])
    return table


@lru_cache(maxsize=1)
def asked() -> tuple[int, ...]:
    """The addresses of glibc's functions that something stands for, ascending."""
    return tuple(sorted({*_of_host().values(), *_preloaded().values()}))


@lru_cache(maxsize=1)
def _of_host() -> dict[bytes, int]:
    """The addresses of glibc's functions, by name."""
    addresses = {name: _found(name) for name in ANSWERS}
    addresses |= {name: dynamic_linker.own_address(name) for name in INSIDE}
    return {name: address for name, address in addresses.items() if address is not None}


@lru_cache(maxsize=1)
def _preloaded() -> dict[bytes, int]:
    """The addresses of what comes before glibc's own dlopen(3) and its like: functions that wrap them.

    They are passed by: they would call glibc's, which knows of no library of ours.
    """
    addresses = {name: _found(name) for name in INSIDE}
    own = _of_host()
    return {name: address for name, address in addresses.items() if address and address != own.get(name)}


def _found(name: bytes) -> int | None:
    return dynamic_linker.symbol_address(dynamic_linker.global_handle(), name)
