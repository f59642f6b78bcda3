"""The calls of the process's own dynamic linker, glibc's ld.so: dlopen(3), dlsym(3), dlinfo(3)."""

from __future__ import annotations

import ctypes
import os
from array import array
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

from miniloader.elf.layout import PHDR
from miniloader.errors import LoadError
from miniloader.native import unlocked
from miniloader.native.gate import require_loading

__all__ = [
    "close_host",
    "declared",
    "global_handle",
    "handle_at",
    "in_global_scope",
    "information",
    "load_address",
    "open_host",
    "own_address",
    "read_words",
    "symbol_address",
    "thread_pointer",
    "tls_data",
    "tls_module",
]

RTLD_LAZY: Final = 1
RTLD_NOW: Final = 2
RTLD_NOLOAD: Final = 4
RTLD_GLOBAL: Final = 0x100
RTLD_DL_LINKMAP: Final = 2
RTLD_DI_LINKMAP: Final = 2
RTLD_DI_TLS_MODID: Final = 9
RTLD_DI_TLS_DATA: Final = 10

_libc: Final = ctypes.CDLL(None)


def _with_dlopen() -> ctypes.CDLL:
    """The library that has glibc's own dlopen(3): by default that of a preloaded library may be found."""
    for name in ("libc.so.6", "libdl.so.2"):  # the second one before glibc 2.34
        with suppress(OSError):  # another C library
            library = ctypes.CDLL(name)
            if hasattr(library, "dlopen"):
                return library
    return _libc


_libdl: Final = _with_dlopen()


def declared(name: str, restype: Any, *argtypes: Any, library: ctypes.CDLL = _libc) -> Any:
    """A function of the C library with its types; one that raises LoadError where that is not glibc."""
    function = getattr(library, name, None)
    if function is None:  # another C library: whoever comes to call it has not asked at the gate
        return lambda *_: require_loading()
    function.restype, function.argtypes = restype, argtypes
    return function


_dlopen: Final = declared("dlopen", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, library=_libdl)
_dlclose: Final = declared("dlclose", ctypes.c_int, ctypes.c_void_p, library=_libdl)
_dlsym: Final = declared("dlsym", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, library=_libdl)
_dlvsym: Final = declared("dlvsym", ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_char_p] * 2, library=_libdl)
_dlerror: Final = declared("dlerror", ctypes.c_char_p, library=_libdl)
_dladdr1: Final = declared("dladdr1", ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int)
_dlinfo: Final = declared(
    "dlinfo", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, library=_libdl
)


def thread_pointer() -> int:
    """The calling thread's thread pointer: see the psABIs for where its storage lies from it."""
    return int(unlocked("thread_pointer", ctypes.c_uint64)())


def open_host(name: str, *, load: bool, flags: int = RTLD_NOW) -> int | None:
    """A dlopen(3) handle of ``name``: only if the process has it already, unless ``load``.

    ``None`` when it has not; :class:`LoadError` when loading fails.
    """
    handle = _dlopen(os.fsencode(name), flags if load else flags | RTLD_NOLOAD)
    if handle is None:
        message = _dlerror()  # also clears it
        if load:
            reason = message.decode("utf-8", "backslashreplace") if message else "unknown reason"
            raise LoadError(f"{name}: the system's loader refuses it: {reason}", ld_so=reason)
        return None
    return int(handle)


def close_host(handle: int) -> None:
    """dlclose(3)."""
    _dlclose(handle)


def symbol_address(handle: int, name: bytes, version: str | None = None) -> int | None:
    """dlsym(3), or dlvsym(3) with ``version``; resolves IFUNCs and gives the thread's own TLS address."""
    if version is None:
        address = _dlsym(handle, name)
    else:
        address = _dlvsym(handle, name, version.encode("utf-8", "surrogateescape"))
    if address is None:
        _dlerror()
    return None if address is None else int(address)


def own_address(name: bytes) -> int | None:
    """The address of glibc's own function ``name``, a dlopen(3) or its like, whatever has been preloaded."""
    return symbol_address(_libdl._handle, name)


def information(handle: int, request: int, address: int) -> None:
    """dlinfo(3): the answer is stored at ``address``."""
    if _dlinfo(handle, request, address) != 0:
        message = _dlerror()
        raise LoadError(f"dlinfo: {message.decode('utf-8', 'backslashreplace') if message else 'failed'}")


def load_address(handle: int) -> int:
    """The load bias of the library behind ``handle``: ``l_addr`` of its link map."""
    link_map = ctypes.c_uint64()
    information(handle, RTLD_DI_LINKMAP, ctypes.addressof(link_map))
    return int(ctypes.c_uint64.from_address(link_map.value).value)


def handle_at(address: int) -> int | None:
    """The handle of ld.so's library that has ``address``, None where none has; it is not opened by that.

    >>> handle_at(symbol_address(global_handle(), b"dladdr1")) == open_host("libc.so.6", load=False)
    True
    """
    # A handle is the link map, which dladdr1(3) tells.
    told = array("Q", bytes(40))  # struct Dl_info, which nobody reads, and what is asked for
    place = told.buffer_info()[0]
    return told[4] if _dladdr1(address, place, place + 32, RTLD_DL_LINKMAP) else None


def tls_module(handle: int) -> int:
    """The TLS module id of the library behind ``handle``."""
    module = ctypes.c_size_t()
    information(handle, RTLD_DI_TLS_MODID, ctypes.addressof(module))
    return int(module.value)


def tls_data(handle: int) -> int:
    """Where the calling thread has the thread-local storage of the library behind ``handle``; 0: nowhere."""
    block = ctypes.c_size_t()
    information(handle, RTLD_DI_TLS_DATA, ctypes.addressof(block))
    return int(block.value)


def read_words(address: int, count: int) -> array[int]:
    """``count`` 8-byte words that the system's loader has written at ``address``."""
    return array("Q", ctypes.string_at(address, 8 * count))


_global: list[int] = []
_TYPES: Final = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64)


def global_handle() -> int:
    """The handle of the process's global scope, ``dlopen(NULL)``."""
    if not _global:
        _global.append(int(_dlopen(None, RTLD_LAZY)))
    return _global[0]


@lru_cache(maxsize=1)
def _is_global() -> Any:
    return unlocked("is_global", ctypes.c_int, *_TYPES)


@lru_cache(maxsize=1)
def _look_up() -> int:
    return ctypes.cast(_dlsym, ctypes.c_void_p).value or 0


def in_global_scope(bias: int, headers: bytes) -> bool:
    """Whether the symbols of the library at ``bias`` with these program headers are in the global scope."""
    answer = bool(_is_global()(_look_up(), global_handle(), bias, headers, len(headers) // PHDR.size))
    if not answer:
        _dlerror()  # clears what dlsym(3) has left
    return answer
