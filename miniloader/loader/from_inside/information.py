"""dlinfo(3) for libraries of ours: what each request stores where the caller wants it."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Final

from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import stand_ins
from miniloader.loader.from_inside.opening import library_of
from miniloader.loader.loaded import Loaded
from miniloader.loader.search import places
from miniloader.loader.surroundings import of_process

__all__ = ["information"]

_HEAD: Final = struct.Struct("<QI4x")  # Dl_serinfo: its size, how many paths follow
_PATH: Final = struct.Struct("<QI4x")  # Dl_serpath: its name, flags
_UNSUPPORTED: Final = "unsupported dlinfo request"


def information(handle: int, request: int, where: int) -> int | None:
    """Store at the address ``where`` what ``request`` asks of the library behind ``handle``; 0, or what it
    returns.  None where it is not ours.  :class:`LoadError` for a request that nobody knows.
    """
    library = library_of(handle)
    if library is None:
        return None
    answer = _ANSWERS.get(request)
    if answer is None:
        raise LoadError(f"{library.name}: dlinfo: {request}: {_UNSUPPORTED}", ld_so=_UNSUPPORTED)
    return answer(library, handle, where)


def _put(where: int, value: int) -> None:
    ctypes.c_uint64.from_address(where).value = value


def _namespace(library: Loaded, handle: int, where: int) -> int:
    _put(where, 0)  # LM_ID_BASE
    return 0


def _link_map(library: Loaded, handle: int, where: int) -> int:
    _put(where, handle)
    return 0


def _origin(library: Loaded, handle: int, where: int) -> int:
    text = os.fsencode(library.asker().origin) + b"\0"
    ctypes.memmove(where, text, len(text))
    return 0


def _module(library: Loaded, handle: int, where: int) -> int:
    _put(where, library.blocks.own.module if library.blocks.own is not None else 0)
    return 0


def _thread_block(library: Loaded, handle: int, where: int) -> int:
    _put(where, library.blocks.own.block if library.blocks.own is not None else 0)
    return 0


def _program_headers(library: Loaded, handle: int, where: int) -> int:
    headers = stand_ins.headers_of(library.mapped)
    _put(where, headers[0])
    return headers[1]


def _directories(library: Loaded) -> list[bytes]:
    """Where what ``library`` needs is searched, in order."""
    searched = places("lib", library.asker(), of_process())
    return [os.fsencode(path.rstrip("/") or path or ".") for place in searched for path in place.directories]


def _search_size(library: Loaded, handle: int, where: int) -> int:
    paths = _directories(library)
    size = _HEAD.size + sum(_PATH.size + len(path) + 1 for path in paths)
    ctypes.memmove(where, _HEAD.pack(size, len(paths)), _HEAD.size)
    return 0


def _search_paths(library: Loaded, handle: int, where: int) -> int:
    paths = _directories(library)
    place = where + _HEAD.size
    name = place + _PATH.size * len(paths)
    for path in paths:
        ctypes.memmove(place, _PATH.pack(name, 0), _PATH.size)
        ctypes.memmove(name, path + b"\0", len(path) + 1)
        place, name = place + _PATH.size, name + len(path) + 1
    return 0


#: By the numbers of ``RTLD_DI_…`` in <dlfcn.h>.
_ANSWERS: Final[dict[int, Callable[[Loaded, int, int], int]]] = {
    1: _namespace,
    2: _link_map,
    4: _search_paths,
    5: _search_size,
    6: _origin,
    9: _module,
    10: _thread_block,
    11: _program_headers,
}
