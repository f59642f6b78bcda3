"""Lazy binding: PLT slots that find their function when they are first called.

The slot of each function first points back into the PLT, which tells which it is and goes through ``GOT[2]``
to a few instructions of ours (``lazy.c`` of :mod:`miniloader.native`): they call Python and jump to what it
answers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.errors import MiniloaderError
from miniloader.kernel.cpuinfo import features
from miniloader.loader.memory import Memory
from miniloader.loader.relocation_groups import LazySlots
from miniloader.native import address_of, gate

__all__ = ["Slots"]

_CALLBACK: Final = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)
_errno: Final = ctypes.CDLL(None).__errno_location
_errno.restype = ctypes.POINTER(ctypes.c_int)


def _trampoline() -> str:
    """Which of lazy.c's suits this processor."""
    known = features()
    plain = gate.processor() == "x86_64" and known is not None and "xsave" not in known
    return "bind_lazily_without_xsave" if plain else "bind_lazily"


class Slots:
    """The unbound PLT slots of one library; binding one is ``find(symbol index)``, its function's address.

    They are of use once they are connected, and must be closed when the library goes.
    """

    def __init__(self, image: ElfImage, memory: Memory, slots: LazySlots, find: Callable[[int], int]) -> None:
        self._memory = memory
        self._slots = slots
        self._find = find
        self._name = image.path
        self._got = image.dynamic.tags.get(DT_PLTGOT, 0)
        self._left = set(range(len(slots)))
        self._callback: Any = _CALLBACK(self._bind)

    def connect(self) -> None:
        """Have PLT0 come to us: it jumps through ``GOT[2]``; ``GOT[1]`` is ours to have a function in."""
        # Not ctypes.cast: it has the callback refer to itself, a circle that close() could not break.
        function = ctypes.c_void_p.from_buffer(self._callback).value
        self._memory.write(self._got + 8, array("Q", [function or 0, address_of(_trampoline())]))

    def close(self) -> None:
        """Give back what was made; the slots must not be used any more."""
        self._callback = None  # it refers to this object: a circle

    def bind_all(self) -> None:
        """Bind what is left and can be bound: who calls from now on may find no Python to ask."""
        for index in sorted(self._left):
            with suppress(MiniloaderError):  # no function of that name: who never calls it may end in peace
                self._fill(index)

    def _bind(self, index: int) -> int:
        number = _errno().contents.value
        try:
            address = self._fill(index)
        except (MiniloaderError, IndexError) as error:
            # There is nobody to raise to: the caller is machine code.  ld.so ends the program here, too,
            # and says it like this, wherever the program's own sys.stderr leads.
            text = getattr(error, "ld_so", None) or f"{self._name}: {error}"
            program = next(iter(sys.orig_argv), "<program name unknown>")
            with suppress(OSError):  # nobody hears of it
                os.write(2, os.fsencode(f"{program}: symbol lookup error: {text}\n"))
            os._exit(127)
        _errno().contents.value = number
        return address

    def _fill(self, index: int) -> int:
        address = self._find(self._slots.symbols[index])
        ctypes.c_uint64.from_address(self._memory.bias + self._slots.offsets[index]).value = address
        self._left.discard(index)
        return address
