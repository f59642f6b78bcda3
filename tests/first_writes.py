"""What those that write to inherited memory are made of: the memory, and a function that writes there."""

from __future__ import annotations

from collections import Counter
from typing import Final

from miniloader.kernel.syscalls import PAGE_SIZE

__all__ = ["INHERITED", "STATIC", "dense"]

#: The beginning of a Python program: objects, and an array of 64 pages, all written once.
INHERITED: Final = """
import ctypes, gc, mmap
class Item:
    def __init__(self, number): self.number = number
DATA = [Item(number) for number in range(1_000, 31_000)]
SIZE = 64 * 4096
array = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
array.write(bytes([1]) * SIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(array))
gc.collect()
def read():
    for item in DATA: pass
"""

#: In C: a function that writes to each page of that array by one that has a name in no dynamic symbol table.
STATIC: Final = """
static __attribute__((noinline)) void mark(volatile char *place) { *place = 2; }
void mark_all(char *array) { for (int page = 0; page < 64; page++) mark(array + page * 4096); }
"""


def dense(places: list[int]) -> set[int]:
    """The pages where hardly anything but objects at ``places`` is: what else is there is written, too."""
    counts = Counter(place & -PAGE_SIZE for place in places)
    return {page for page, number in counts.items() if number >= 0.9 * max(counts.values())}
