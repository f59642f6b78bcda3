"""Telling where a process has crashed, from another one that it starts at that moment.

``python -m miniloader.lab.workers.fault_teller PID NUMBERS…`` is what a handler of signals in C (``fault.c``)
runs, while the process that has crashed waits for it.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
from collections.abc import Sequence
from functools import lru_cache

from miniloader.errors import MiniloaderError, printable
from miniloader.kernel.maps import read_maps
from miniloader.lab.workers.fault import Fault
from miniloader.native import functions

__all__ = ["main", "tell_faults"]


def tell_faults() -> None:
    """From now on a fault that ends this process is told on standard error, with its place."""
    command, stack = _command()
    functions().note_faults(0, ctypes.addressof(ctypes.c_char.from_buffer(stack)), len(stack))
    functions().tell_faults(ctypes.addressof(command))


@lru_cache(maxsize=1)
def _command() -> tuple[ctypes.Array[ctypes.c_char_p], mmap.mmap]:
    """The command, and the stack that the handler runs on: both for as long as the process lives."""
    words = [sys.executable, "-P", "-m", "miniloader.lab.workers.fault_teller"]
    array = (ctypes.c_char_p * (len(words) + 1))(*(word.encode() for word in words), None)
    # Private: the process that tells is forked on it, and must not share what its parent goes on with.
    return array, mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def main(words: Sequence[str]) -> int:
    """Tell of the fault in the process ``words[0]``, whose numbers follow, all in hexadecimal."""
    pid, *numbers = (int(word, 16) for word in words)
    numbers[1] = ctypes.c_int64(numbers[1]).value
    fault = Fault(*numbers)
    try:
        where = fault.place(read_maps(pid))
    except MiniloaderError as error:
        where = f" ({error})"
    name = signal.Signals(fault.number).name
    print(printable(f"miniloader: the program was killed by {name}{where}"), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
