"""Constructors and destructors: what a library runs when it comes and when it goes.

``DT_INIT`` first, then ``DT_INIT_ARRAY`` in order, each called with argc, argv and envp;
``DT_FINI_ARRAY`` backwards, then ``DT_FINI``.  Source: gABI chapter 5, "Initialization and Termination
Functions"; the order among libraries is that of glibc's ``elf/dl-sort-maps.c``.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeVar

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import (
    DT_FINI,
    DT_FINI_ARRAY,
    DT_FINI_ARRAYSZ,
    DT_INIT,
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
    DT_PREINIT_ARRAY,
    DT_PREINIT_ARRAYSZ,
)
from miniloader.loader.memory import Memory
from miniloader.native import unlocked
from miniloader.native.gate import glibc_version

__all__ = [
    "constructor_order",
    "destructor_order",
    "read_constructors",
    "read_preinitialisers",
    "run_constructors",
    "run_destructor",
]

_CONSTRUCTOR: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_DESTRUCTOR: Final = ctypes.CFUNCTYPE(None)
#: Nothing comes back; the functions, how many, and what each is called with.
_CALL_EACH: Final = None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
_libc: Final = ctypes.CDLL(None)
_WORD: Final = 8
_NO_FUNCTION: Final = frozenset((0, 0xFFFFFFFFFFFFFFFF))
_MANY: Final = 100  # constructors from which on C calls them: ctypes takes half a microsecond for each
#: From glibc 2.39 on (its bug 30981) what is closed is finalised before all that it needs, in a cycle too.
_CLOSED_FIRST: Final = glibc_version() >= (2, 39)

T = TypeVar("T")


def read_constructors(image: ElfImage, memory: Memory) -> tuple[list[int], list[int]]:
    """The addresses of the constructors, and of the destructors, in the order in which they are called."""
    tags = image.dynamic.tags
    first, last = [[memory.bias + tags[tag]] if tags.get(tag) else [] for tag in (DT_INIT, DT_FINI)]
    arrays = [
        (tags[start], tags[start] + tags[size]) if start in tags and tags.get(size) else None
        for start, size in ((DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ))
    ]
    init, fini = arrays
    if init and fini and init[1] == fini[0]:  # linkers put one after the other
        words = _functions(memory, init[0], fini[1])
        size = (init[1] - init[0]) // _WORD
        begins, ends = words[:size], words[size:]
    else:
        begins, ends = (_functions(memory, *array) if array else [] for array in arrays)
    return first + _to_be_called(begins), _to_be_called(ends[::-1]) + last


def read_preinitialisers(image: ElfImage, memory: Memory) -> list[int]:
    """The addresses in ``DT_PREINIT_ARRAY``, which are called before any constructor.

    glibc does so for a program, and for what a caller of dlopen(3) asks for (``elf/dl-init.c``).
    """
    tags = image.dynamic.tags
    start, size = tags.get(DT_PREINIT_ARRAY), tags.get(DT_PREINIT_ARRAYSZ)
    return _to_be_called(_functions(memory, start, start + size)) if start and size else []


def _to_be_called(functions: list[int]) -> list[int]:
    """Those of them that are functions: some have thousands, and next to none has one that is not."""
    if _NO_FUNCTION.isdisjoint(functions):
        return functions
    return [address for address in functions if address not in _NO_FUNCTION]


def _functions(memory: Memory, start: int, end: int) -> list[int]:
    """The function pointers between two vaddrs, as relocation left them in memory."""
    return array("Q", memory.read(start, end - start)).tolist()


@lru_cache(maxsize=1)
def _arguments() -> tuple[int, int]:
    """argc, and the address of the process's own argv, as dlopen(3) gives them to constructors.

    The block on the stack on which the kernel has put argv goes on with the environment and the auxiliary
    vector: who walks there, as Go's runtime does, has to find them (System V ABI, "Process
    Initialization").  glibc's ld.so exports where it is; so has it where the stack began, at argc.
    """
    try:
        argv = ctypes.c_size_t.in_dll(_libc, "_dl_argv").value
    except ValueError:
        argv = ctypes.c_size_t.in_dll(_libc, "__libc_stack_end").value + _WORD
    count = 0
    while ctypes.c_size_t.from_address(argv + count * _WORD).value:
        count += 1
    return count, argv


@lru_cache(maxsize=1)
def _environment() -> ctypes.c_void_p:
    """The process's own ``environ``, as it is whenever it is looked at."""
    return ctypes.c_void_p.in_dll(_libc, "environ")


def run_constructors(addresses: Sequence[int], tell: Callable[[int], None] | None = None) -> None:
    """Call the constructors of one library as ld.so does: all of them get the same argc, argv and envp.

    ``tell`` hears of each before it is called.
    """
    count, argv = _arguments()
    arguments = ctypes.c_int(count), ctypes.c_void_p(argv), _environment()
    if tell is None and len(addresses) > _MANY:
        call_each = unlocked("call_each", *_CALL_EACH)
        call_each((ctypes.c_uint64 * len(addresses))(*addresses), len(addresses), *arguments)
        return
    for address in addresses:
        if tell is not None:
            tell(address)
        _CONSTRUCTOR(address)(*arguments)


def run_destructor(address: int) -> None:
    """Call one destructor."""
    _DESTRUCTOR(address)()


def constructor_order(items: Sequence[T], before: Callable[[T], Sequence[T]]) -> list[T]:
    """``items`` (breadth first, the one asked for first) in the order they are initialised.

    ``before`` gives what each needs; of the one asked for nothing is known yet.  It comes last of all, even
    where others need it.

    >>> needs = {"app": ["gui", "core"], "gui": ["core"], "core": []}
    >>> constructor_order(list(needs), needs.__getitem__)
    ['core', 'gui', 'app']
    """
    order = dependents_first(items, before)[::-1]
    order.remove(items[0])
    return [*order, items[0]]


def destructor_order(
    items: Sequence[T],
    before: Callable[[T], Sequence[T]],
    holds: Callable[[T], Sequence[T]],
    closed: T | None = None,
) -> list[T]:
    """``items`` (as they were loaded) in the order they are finalised.

    ``holds`` gives what each is bound to without needing it.  It counts only where needs leave it open.
    ``closed`` is the item whose closing ends them; None at the end of the process.
    """
    if len(items) == 1:  # mostly, where there is no order to be found
        return list(items)
    first = [item for item in items if item is closed and _CLOSED_FIRST]
    items = [*first, *(item for item in items if item not in first)]
    order = dependents_first(items, lambda item: [*before(item), *reversed(holds(item))])
    if any(holds(item) for item in items):
        order = dependents_first(order, before)
    return [*first, *(item for item in order if item not in first)]


def dependents_first(items: Sequence[T], before: Callable[[T], Sequence[T]]) -> list[T]:
    """The reverse postorder of a depth-first walk from the last item to the first: ``_dl_sort_maps_dfs``."""
    done: list[T] = []
    members = {id(item) for item in items}
    for item in reversed(items):
        stack = [(item, iter(before(item)))] if id(item) in members else []
        members.discard(id(item))
        while stack:
            top, needs = stack[-1]
            following = next((needed for needed in needs if id(needed) in members), None)
            if following is None:
                done.append(top)
                stack.pop()
            else:
                members.remove(id(following))
                stack.append((following, iter(before(following))))
    return done[::-1]
