"""The types of a CPython that runs elsewhere: which words point to a type, and what it is called.

Everything is read as bytes that may be anything: what does not look like a type in every respect is none.
Offsets are those of CPython 3.11 to 3.14 on a machine of 64 bits (Include/cpython/object.h,
Include/internal/pycore_dict.h): ``PyTypeObject`` has not changed so far as it is read here.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.pools import Pools
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.values import NamedTuple

__all__ = ["COLLECTED", "MOST_MET", "PRE_HEADER", "Types"]

_HEAP: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_READY: Final = 1 << 12  # Py_TPFLAGS_READY
COLLECTED: Final = 1 << 14
"""Py_TPFLAGS_HAVE_GC: two words of the collector's stand before an object."""
PRE_HEADER: Final = 1 << 3 | 1 << 4
"""Py_TPFLAGS_MANAGED_WEAKREF and _DICT: two words more stand before those."""
_OF_TYPE: Final = 1 << 31  # Py_TPFLAGS_TYPE_SUBCLASS
_OF_TEXT: Final = 1 << 28  # Py_TPFLAGS_UNICODE_SUBCLASS: most are shorter than tp_basicsize says
_HEAD: Final = struct.Struct("<qQqQqq")  # ob_refcnt, ob_type, ob_size, tp_name, tp_basicsize, tp_itemsize
_FLAGS, _DICT, _LENGTH = 168, 264, 272
#: Bytes of objects that are shorter than ``tp_basicsize`` says: without a time zone they end before the
#: pointer to it (Modules/_datetimemodule.c).
_SHORT: Final = {"datetime.time": 32, "datetime.datetime": 40}
_LONGEST_NAME: Final = 256
_LARGEST: Final = 1 << 24  # bytes of an object without its items
_KEYS: Final = 32  # of a dict; also where the index begins, in its keys
_ENTRY: Final = {0: (24, 8), 1: (16, 0)}  # by kind of keys: bytes of an entry, where in it the key is
_MOST_ENTRIES: Final = 64  # __module__ comes first in the body of a class
_MODULE: Final = b"__module__"
_TEXT: Final = (40, 48)  # where the letters of an ASCII str begin: from 3.12 on, and in 3.11
_AT_ONCE: Final = 1024  # pages of a candidate each, read at once
MOST_MET: Final = 1 << 17
"""So many pointers are looked at, about."""
_FILTER: Final = 14  # bits


def _filtered(pointers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number of :data:`_FILTER` bits for each: who has another one than every type is none."""
    return (pointers >> np.uint64(4)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - _FILTER)


class _Described(NamedTuple):
    """A type: its address, its flags, the least bytes of its objects, its name as ``tp_name`` has it."""

    address: int
    flags: int
    size: int
    name: str


class Types:
    """The types that are met in one process.  ``type_type`` is the address of ``type`` itself.

    A type is larger than what comes from ``pools``, so none is looked for there.  ``addresses`` has a row for
    each type that was found, in the order in which they were, after a first one that is none; ``sizes`` how
    many bytes its objects have at least, with the words that stand ``before`` them.
    """

    def __init__(self, memory: PresentMemory, pools: Pools, type_type: int) -> None:
        self._memory, self._pools, self._type_type = memory, pools, type_type
        self._met: dict[int, _Described | None] = {}
        self._decided = np.zeros(1, np.uint64)
        self._listed = list[_Described]()
        self._rows = {0: 0}
        self.addresses = self._ascending = np.zeros(1, np.uint64)
        self._order = np.zeros(1, np.intp)
        self.sizes = self.before = np.zeros(1, np.int64)
        self._maybe = np.zeros(1 << _FILTER, np.bool_)

    def rows_of(self, pointers: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which of ``pointers`` lead to a type, and to which: rows of :attr:`addresses`."""
        places = _filtered(pointers)
        chosen, rows = self._known(pointers, places)
        strange = np.ones(len(pointers), np.bool_)
        strange[chosen] = False
        fresh = pointers[strange]
        if not self._meet(fresh[~self._pools.holds(fresh)]):
            return chosen, rows
        return self._known(pointers, places)

    def _known(
        self, pointers: NDArray[np.uint64], places: NDArray[np.uint64]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """As :meth:`rows_of`, of the types that have been met; ``places`` are the pointers, filtered."""
        chosen = np.flatnonzero(self._maybe[places])
        at = np.minimum(np.searchsorted(self._ascending, pointers[chosen]), len(self._ascending) - 1)
        real = self._ascending[at] == pointers[chosen]
        return chosen[real], self._order[at[real]]

    def _meet(self, pointers: NDArray[np.uint64]) -> bool:
        """Have a look at those of ``pointers`` that have not been met before; whether there are any."""
        candidates = np.sort(pointers)
        at = np.minimum(np.searchsorted(self._decided, candidates), len(self._decided) - 1)
        candidates = candidates[self._decided[at] != candidates]
        if not len(candidates) or len(self._decided) > MOST_MET:
            return False
        candidates = candidates[np.append(True, np.diff(candidates) != 0)]
        self._decided = np.sort(np.concatenate([self._decided, candidates]))
        self.met(candidates)
        return True

    def met(self, pointers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Which types these ascending pointers lead to, none of which was asked for before: rows of
        :attr:`addresses`, 0 where they lead to none.
        """
        likely = np.flatnonzero(self._may_be_types(pointers))
        rows = np.zeros(len(pointers), np.uint64)
        for address in pointers[likely].tolist():
            self._describe(address)
        self._list()
        rows[likely] = [self._rows.get(address, 0) for address in pointers[likely].tolist()]
        return rows

    def _list(self) -> None:
        """Give a row to each type that has none yet."""
        for described in self._met.values():
            if described is not None and described.address not in self._rows:
                self._rows[described.address] = len(self._rows)
                self._listed.append(described)
        self.addresses = np.array([*self._rows], np.uint64)
        self._order = np.argsort(self.addresses)
        self._ascending = self.addresses[self._order]
        self._maybe[_filtered(self.addresses)] = True
        flags = np.array([0, *(described.flags for described in self._listed)], np.int64)
        self.before = 2 * ((flags & COLLECTED) != 0).astype(np.int64) + 2 * ((flags & PRE_HEADER) != 0)
        self.sizes = 8 * self.before + np.array(
            [0, *(described.size for described in self._listed)], np.int64
        )

    def _may_be_types(self, candidates: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these ascending addresses have the flags of a type, as far as these are on the page."""
        present = self._memory.is_present(candidates & ~np.uint64(PAGE_SIZE - 1))
        there = candidates[present]
        parts = (there[start : start + _AT_ONCE] for start in range(0, len(there), _AT_ONCE))
        present[present] = [may_be for part in parts for may_be in self._some_may_be_types(part).tolist()]
        return present

    def _some_may_be_types(self, candidates: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these addresses have the flags of a type, where all their pages are read at once."""
        pages = candidates & ~np.uint64(PAGE_SIZE - 1)
        first = np.append(True, np.diff(pages) != 0)
        data, read = self._memory.pages(pages[first])
        row = np.cumsum(first) - 1
        place = (candidates - pages + np.uint64(_FLAGS)).astype(np.intp) // 8
        words = data.view(np.uint64)
        flags = words[row, np.minimum(place, words.shape[1] - 1)]
        ready = (flags & np.uint64(_READY) != 0) & (flags < np.uint64(1 << 32)) | (place >= words.shape[1])
        return np.asarray(read[row] & ready)

    def _describe(self, address: int, depth: int = 0) -> _Described | None:
        """The type at ``address``; None where there is none."""
        if address in self._met:
            return self._met[address]
        described = self._met[address] = self._looked_at(address, depth)
        return described

    def _looked_at(self, address: int, depth: int) -> _Described | None:
        data = self._memory.read(address, _LENGTH)
        if len(data) < _LENGTH or address % 8 or depth > 3:
            return None
        _, of_type, _, name, size, item = _HEAD.unpack_from(data)
        (flags,) = struct.unpack_from("<Q", data, _FLAGS)
        if not flags & _READY or not 16 <= size < _LARGEST or not 0 <= item < _LARGEST:
            return None
        if of_type != self._type_type:  # a metaclass, which is a class itself
            metaclass = self._describe(of_type, depth + 1)
            if metaclass is None or not metaclass.flags & _OF_TYPE:
                return None
        text = self._text(name)
        least = _TEXT[0] if flags & _OF_TEXT else _SHORT.get(text, size)
        return _Described(address, flags & 0xFFFFFFFF, min(size, least), text) if text else None

    def _text(self, address: int) -> str:
        """The C string there; "" where it is no name."""
        text, end, _ = self._memory.read(address, _LONGEST_NAME).partition(b"\0")
        try:
            name = text.decode() if end else ""
        except UnicodeDecodeError:
            return ""
        return name if name.isprintable() else ""

    # -- names --------------------------------------------------------------------------------------

    def name(self, address: int) -> str:
        """What the type that was found there is called: ``dict``, ``yourapp.Invoice``."""
        described = self._met[address]
        assert described is not None
        if not described.flags & _HEAP or "." in described.name:
            return described.name
        module = self._module(described.address)
        return f"{module}.{described.name}" if module and module != "builtins" else described.name

    def _module(self, address: int) -> str:
        """``__module__`` in the dict of a class; "" where it is not to be read."""
        for key, value in self._entries(self._word(address + _DICT)):
            for at in _TEXT:
                if self._memory.read(key + at, len(_MODULE) + 1) == _MODULE + b"\0":
                    return self._ascii(value, at)
        return ""

    def _entries(self, mapping: int) -> list[tuple[int, int]]:
        """The first keys and values of a dict."""
        keys = self._word(mapping + _KEYS)
        head = self._memory.read(keys, _KEYS)
        if len(head) < _KEYS:
            return []
        entry, at_key = _ENTRY.get(head[10], (0, 0))
        (number,) = struct.unpack_from("<q", head, 24)
        if not entry or head[9] > 32 or number < 0:
            return []
        data = self._memory.read(keys + _KEYS + (1 << head[9]), entry * min(number, _MOST_ENTRIES))
        return [
            struct.unpack_from("<QQ", data, at + at_key) for at in range(0, len(data) // entry * entry, entry)
        ]

    def _ascii(self, address: int, at: int) -> str:
        """A str of ASCII letters, which begin ``at`` bytes into it; "" for anything else."""
        length = self._word(address + 16)
        if not 0 < length <= _LONGEST_NAME:
            return ""
        text = self._memory.read(address + at, length)
        return text.decode() if len(text) == length and text.isascii() and text.decode().isprintable() else ""

    def _word(self, address: int) -> int:
        data = self._memory.read(address, 8)
        return int.from_bytes(data, "little") if len(data) == 8 else 0
