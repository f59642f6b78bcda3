"""Where machine code has crashed: noted by a signal's handler there, told by the process that is left."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Sequence
from typing import Final

from miniloader.forking import importing
from miniloader.kernel.maps import Vma
from miniloader.native import functions
from miniloader.native.gate import lacks_for_loading
from miniloader.values import dataclass

__all__ = ["Fault", "FaultRecord"]

_WORDS: Final = struct.Struct("<qqQQQQ")  # as native/fault.c has them
_WRITE, _FETCH = 2, 16  # bits of a page fault's error code
_STACK: Final = 1 << 16  # bytes for the handler: a stack that has overflown is of no use to it


class FaultRecord:
    """Memory that a child, forked later, shares with this process: which fault has ended it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def be_noted(self) -> None:
        """In the child: have the first fault noted, in whatever code of this thread it happens.

        It ends the process as it would have done.  Where nothing can be loaded, nothing is noted.
        """
        if lacks_for_loading() is not None:
            return
        record = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._stack = mmap.mmap(-1, _STACK)
        stack = ctypes.addressof(ctypes.c_char.from_buffer(self._stack))
        functions().note_faults(record, stack, _STACK)

    def told(self, code: int | None, mappings: Sequence[Vma]) -> str:
        """What follows "was killed by SIGSEGV": the address, the function and the library; "" for nothing.

        ``code`` is the process's exit code, ``mappings`` those it had.
        """
        fault = Fault(*_WORDS.unpack_from(self._memory))
        return fault.place(mappings) if fault.number and code == -fault.number else ""


@dataclass(frozen=True)
class Fault:
    """What a signal's handler is told: the signal's ``number``, its ``cause`` and ``address``; the
    ``instruction``, how the page fault came about, and where a jump would have returned to (0: unknown)."""

    number: int
    cause: int
    address: int
    instruction: int
    how: int
    back: int

    def place(self, mappings: Sequence[Vma]) -> str:
        """What follows "was killed by SIGSEGV", in a process with these ``mappings``; "" for nothing."""
        if self.cause <= 0:  # sent by a process, not by a fault
            return ""
        if self.number == signal.SIGSEGV and self.how & _FETCH and self.instruction == self.address:
            caller = f", called from {_place(self.back, mappings)}" if self.back else ""
            return f" jumping to address {self.address:#x}{caller}"
        place = _place(self.instruction, mappings)
        if self.number in (signal.SIGSEGV, signal.SIGBUS):
            how = "writing" if self.how & _WRITE else "reading"
            known = self.cause != _SI_KERNEL
            at = f"address {self.address:#x}" if known else "an address that no process has"
            return f" {how} {at}, in {place}"
        return f" in {place}"


_SI_KERNEL: Final = 0x80  # a general protection fault, which has no address


def _place(address: int, mappings: Sequence[Vma]) -> str:
    """The function and the library of an instruction."""
    with importing:
        from miniloader.evidence.owner import owner_of  # with numpy, which few that load need

    owner = owner_of(address, mappings)
    if owner is None or not owner.path:
        return f"code of no library at {address:#x}"
    vaddr = "" if owner.vaddr is None else f" (vaddr {owner.vaddr:#x})"
    name = "" if owner.name is None else f"{owner.name} of "
    return f"{name}{os.path.basename(owner.path)}{vaddr}"
