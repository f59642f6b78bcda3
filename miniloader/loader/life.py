"""Constructors and destructors: what a library runs when it comes and when it goes.

``DT_INIT`` first, then ``DT_INIT_ARRAY`` in order, each called with argc, argv and envp;
``DT_FINI_ARRAY`` backwards, then ``DT_FINI``.  Source: gABI chapter 5, "Initialization and Termination
Functions"; the order among libraries is that of glibc's ``elf/dl-sort-maps.c``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import (
    DT_FINI,
    DT_FINI_ARRAY,
    DT_FINI_ARRAYSZ,
    DT_INIT,
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
)
from miniloader.loader.memory import Memory

__all__ = ["constructors", "destructors", "in_order", "run_constructor", "run_destructor"]

_CONSTRUCTOR: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_DESTRUCTOR: Final = ctypes.CFUNCTYPE(None)
_libc: Final = ctypes.CDLL(None)
_NO_FUNCTION: Final = (0, 0xFFFFFFFFFFFFFFFF)

T = TypeVar("T")


def constructors(image: ElfImage, memory: Memory) -> list[int]:
    """The addresses to call, in order."""
    first = _single(image, memory, DT_INIT)
    return first + _array(image, memory, DT_INIT_ARRAY, DT_INIT_ARRAYSZ)


def destructors(image: ElfImage, memory: Memory) -> list[int]:
    """The addresses to call, in order."""
    last = _single(image, memory, DT_FINI)
    return _array(image, memory, DT_FINI_ARRAY, DT_FINI_ARRAYSZ)[::-1] + last


def _single(image: ElfImage, memory: Memory, tag: int) -> list[int]:
    value = image.dynamic.tags.get(tag, 0)
    return [memory.bias + value] if value else []


def _array(image: ElfImage, memory: Memory, tag: int, size_tag: int) -> list[int]:
    """The function pointers of an array, as relocation left them in memory."""
    size = image.dynamic.tags.get(size_tag, 0)
    if tag not in image.dynamic.tags or not size:
        return []
    words = memory.read(image.dynamic.tags[tag], size).view(np.uint64)
    return [address for address in words.tolist() if address not in _NO_FUNCTION]


@lru_cache(maxsize=1)
def _arguments() -> tuple[int, ctypes.Array[ctypes.c_char_p]]:
    """argc and a copy of argv that lives as long as the process."""
    with open("/proc/self/cmdline", "rb") as file:
        words = file.read().split(b"\0")[:-1]
    return len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None)


def run_constructor(address: int) -> None:
    """Call one constructor as ld.so does."""
    count, words = _arguments()
    environment = ctypes.c_void_p.in_dll(_libc, "environ").value
    _CONSTRUCTOR(address)(count, ctypes.addressof(words), environment)


def run_destructor(address: int) -> None:
    """Call one destructor."""
    _DESTRUCTOR(address)()


def in_order(items: Sequence[T], needs: Callable[[T], Sequence[T]]) -> list[T]:
    """``items`` (breadth first, the one asked for first) with those that are needed before who needs them.

    In a cycle the one that is reached first comes last, as ``_dl_sort_maps_dfs`` has it; the first item
    always comes last of all.
    """
    done: list[T] = []
    seen: set[int] = set()
    members = {id(item) for item in items}

    for root in reversed(items):
        if id(root) in seen:
            continue
        seen.add(id(root))
        stack = [(root, iter(needs(root)))]
        while stack:
            item, rest = stack[-1]
            following = next((n for n in rest if id(n) in members and id(n) not in seen), None)
            if following is None:
                done.append(item)
                stack.pop()
            else:
                seen.add(id(following))
                stack.append((following, iter(needs(following))))
    done.remove(items[0])
    return [*done, items[0]]
