"""The end of the process: ld.so finalises ours in their turn among the libraries that it has loaded itself.

When exit(3) has called all that it was told of, ld.so runs the destructors of what it has loaded: of who
needs others first.  So it is given a library that needs what ours need of it, and has their destructors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from miniloader.elf.writer import bare_library
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.tls_carrier import open_bytes
from miniloader.loader.memory import Memory
from miniloader.native import buffer_address, functions

__all__ = ["hand_over", "let_open"]

_ROW: Final = struct.Struct("<QQQ")  # of set_askers in native/inside.c


def hand_over(destructors: Sequence[int], needed: Sequence[HostLibrary]) -> bool:
    """ld.so shall call ``destructors``, in this order, before those of ``needed``; whether it will."""
    names = [library.path for library in needed if library.path]
    try:
        open_bytes("miniloader-end", bare_library(needed=names, destructors=destructors))  # stays
    except (OSError, LoadError):
        return False  # there is no room for it, or one of those needed is gone
    return True


def let_open(directories: Mapping[Memory, Sequence[str]]) -> None:
    """Whose code lies in the keys may call dlopen(3) when Python has ended: for names it searches there."""
    rows, texts = bytearray(), bytearray()
    begin = _ROW.size * len(directories)
    for memory, paths in directories.items():
        rows += _ROW.pack(memory.start, memory.end - memory.start, begin + len(texts))
        texts += b"".join(os.fsencode(path or "./") + b"\0" for path in paths) + b"\0"
    table = rows + texts
    functions().set_askers(buffer_address(table), len(directories), len(table))
