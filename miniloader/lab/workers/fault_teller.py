"""Telling where a process has crashed, from another one that it starts at that moment.

``python -m miniloader.lab.workers.fault_teller PID NUMBERS…`` is what a handler of signals in C (``fault.c``)
runs, while the process that has crashed waits for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Final

from miniloader.errors import MiniloaderError, printable, tell
from miniloader.forking import importing
from miniloader.kernel import syscalls
from miniloader.native import functions

__all__ = ["main", "tell_faults"]


_STACK: Final = 1 << 16  # bytes for the handler


def tell_faults() -> None:
    """From now on a fault that ends this process is told on standard error, with its place.

    Also one in destructors, which exit(3) runs after Python has ended and its objects are gone.
    """
    command = [sys.executable, "-P", "-m", "miniloader.lab.workers.fault_teller"]
    words = [os.fsencode(word) + b"\0" for word in command]
    pointers = ctypes.sizeof(ctypes.c_void_p) * (len(words) + 1)
    # No object of Python's, and private: the process that tells is forked on this stack, and must not share
    # what its parent goes on with.
    place = syscalls.mmap(
        0,
        _STACK + pointers + sum(map(len, words)),
        syscalls.PROT_READ | syscalls.PROT_WRITE,
        syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS,
    )
    starts = accumulate(map(len, words), initial=place + _STACK + pointers)
    addresses = array("Q", [*islice(starts, len(words)), 0])
    ctypes.memmove(place + _STACK, addresses.tobytes() + b"".join(words), pointers + sum(map(len, words)))
    functions().note_faults(0, place, _STACK)
    functions().tell_faults(place + _STACK)


def main(words: Sequence[str]) -> int:
    """Tell of the fault in the process ``words[0]``, whose numbers follow, all in hexadecimal."""
    with importing:  # what the process that may crash has no need of
        from signal import Signals

        from miniloader.kernel.maps import read_maps
        from miniloader.lab.workers.child import TOLD
        from miniloader.lab.workers.fault import Fault
    pid, *numbers = (int(word, 16) for word in words)
    numbers[1] = ctypes.c_int64(numbers[1]).value
    fault = Fault(*numbers)
    try:
        where = fault.place(read_maps(pid))
    except MiniloaderError as error:
        where = f" ({error})"
    name = Signals(fault.number).name
    tell(printable(f"{TOLD}{name}{where}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
