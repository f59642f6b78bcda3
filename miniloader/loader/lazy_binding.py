"""Lazy binding: PLT slots that find their function when they are first called.

The slot of each function first points back into its PLT entry, which pushes its relocation's index and
jumps to PLT0; that goes through ``GOT[2]`` to a few instructions of ours, which call Python and jump to what
it answers.  Source: the AMD64 psABI, section 5.2.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.elf.tables import Table
from miniloader.errors import MiniloaderError
from miniloader.kernel.cpuinfo import features
from miniloader.loader.beside_glibc.code_page import CodePage
from miniloader.loader.memory import Memory
from miniloader.machine.stub_code import lazy_trampoline

__all__ = ["Slots"]

_CALLBACK: Final = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)
_errno: Final = ctypes.CDLL(None).__errno_location
_errno.restype = ctypes.POINTER(ctypes.c_int)


class Slots:
    """The unbound PLT slots of one library; binding one is ``find(symbol index)``, its function's address.

    They are of use once they are connected, and must be closed when the library goes.
    """

    def __init__(self, image: ElfImage, memory: Memory, slots: Table, find: Callable[[int], int]) -> None:
        self._memory = memory
        self._slots = slots
        self._find = find
        self._name = image.path
        self._got = image.dynamic.tags.get(DT_PLTGOT, 0)
        self._callback: Any = _CALLBACK(self._bind)
        self._stub = CodePage()

    def connect(self) -> None:
        """Have PLT0 come to us: it jumps through ``GOT[2]``; ``GOT[1]`` is the dynamic linker's own."""
        # Not ctypes.cast: it has the callback refer to itself, a circle that close() could not break.
        function = ctypes.c_void_p.from_buffer(self._callback).value
        processor = features()
        self._stub.fill(lazy_trampoline(function or 0, xsave=processor is None or "xsave" in processor))
        address = self._stub.address
        self._memory.write(self._got + 8, array("Q", [address, address]))

    def close(self) -> None:
        """Give back what was made; the slots must not be used any more."""
        self._stub.unmap()
        self._callback = None  # it refers to this object: a circle

    def _bind(self, index: int) -> int:
        number = _errno().contents.value
        try:
            row: Any = self._slots[index]
            address = self._find(int(row["symbol"]))
        except (MiniloaderError, IndexError) as error:
            # There is nobody to raise to: the caller is machine code.  ld.so ends the program here, too.
            print(f"miniloader: {self._name}: binding a PLT slot: {error}", file=sys.stderr, flush=True)
            os._exit(127)
        ctypes.c_uint64.from_address(self._memory.bias + int(row["offset"])).value = address
        _errno().contents.value = number
        return address
