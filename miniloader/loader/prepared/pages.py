"""Prepared libraries: relocated once, and then mapped by every process from one file.

Relocation writes the same words in every process that has the library at the same address, but for those
that refer to other libraries, which are at addresses of their own.  So the relocated pages are kept in a
file, with an index of the words that differ; :func:`miniloader.loader.prepare.prepare` makes it, and
:mod:`miniloader.loader.prepared.index` reads it.  A process that loads the library maps those pages over the
library's own, and writes only the words that differ: only their pages become private copies.  A main program
that is not position-independent is where it was, and so are its symbols: when it overrides a library's, next
to nothing of that library differs.

What is in the index holds for one scope: the same libraries, told by their build-ids, in the same order.
Then every look-up has the outcome it had, and none is made.  (bionic shares relocated pages between processes
that it starts, ``ANDROID_DLEXT_WRITE_RELRO``, and finds them by comparing.)
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Literal

from miniloader.arrays import NDArray, np
from miniloader.elf import LoadPlan
from miniloader.elf.symbols import STT_TLS
from miniloader.elf.tables import RELOCATION, Table
from miniloader.errors import LoadError
from miniloader.forking import cached_property, importing
from miniloader.kernel import syscalls as sys
from miniloader.loader.memory import Memory, protection_bits
from miniloader.loader.relocation_job import Row
from miniloader.loader.scope import Bindings, Definer
from miniloader.machine.relocation import KINDS, Kind
from miniloader.native import ADDRESS_MASK, Stopped, buffer_address, run
from miniloader.native.gate import processor
from miniloader.values import dataclass

__all__ = [
    "ADDRESS",
    "RESOLVER",
    "TABLES",
    "THREAD_EXIT",
    "UNIQUE",
    "VALUE",
    "Prepared",
    "differing",
    "identities",
    "runs",
    "sums",
]

#: A word that differs: ``offset`` from the bias of the library at position ``definer`` of the scope, and what
#: is added to what it means.  Many slots have the same; how a few are meant is kept apart.
VALUE: Final = [("offset", "<u8"), ("addend", "<u8"), ("definer", "<u8")]
#: Pages that are mapped by one call: where the first one belongs, which of the cached ones it is, how many.
RUN: Final = [("vaddr", "<u8"), ("page", "<u4"), ("count", "<u4")]
ADDRESS, RESOLVER, UNIQUE, THREAD_EXIT = range(4)
_HOW: Final = {"resolver": RESOLVER, "unique": UNIQUE, "thread exit": THREAD_EXIT}

_WORD: Final = 8
_SUMMED: Final = 16 * sys.PAGE_SIZE // _WORD  # words
#: The tables of the index: how numpy is told of a row, and how :mod:`struct`.
TABLES: Final[Mapping[str, tuple[Any, struct.Struct]]] = {
    "runs": (RUN, struct.Struct("<QII")),
    "sums": ("<u8", struct.Struct("<Q")),  # see sums()
    "slots": ("<u4", struct.Struct("<I")),  # of each word that differs: how far from the first cached page
    "numbers": ("<u4", struct.Struct("<I")),  # of its value
    "values": (VALUE, struct.Struct("<QQQ")),
    "tls_rows": (RELOCATION, struct.Struct("<QIIq")),
    "tls_symbols": ("<i8", struct.Struct("<q")),  # rows of four: symbol, owner, the owner's symbol, its value
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the cache has of one library, checked: its pages have yet to be."""

    fd: int
    path: str  # of the library
    build_id: str
    file: tuple[int, ...]  # its state, see file_state()
    address: int  # of its first page
    end: int
    scope: tuple[str, ...]
    special: tuple[tuple[int, int, int], ...]  # values that are no plain addresses: number, how, definer
    names: Mapping[int, str]  # of values that are unique symbols
    tls_kinds: tuple[tuple[int, int], ...]  # of thread-local relocations, in order: code, how many
    tls_names: tuple[str, ...]  # of the symbols of thread-local relocations
    held: tuple[int, ...]  # positions in the scope: who defines what it is bound to
    symbols: int  # how many dynamic ones it has
    words: int  # relocated in all
    filled: int  # how many pages hold words that each process writes itself
    unwind_table: int | None
    at: int  # of the pages in the file
    tables: Mapping[str, memoryview]  # as they lie in the file

    def rows(self, key: str) -> list[Any]:
        """The rows of a table: numbers, or tuples of them."""
        rows = list(TABLES[key][1].iter_unpack(self.tables[key]))
        return rows if isinstance(TABLES[key][0], list) else [row[0] for row in rows]

    def table(self, key: str) -> NDArray[Any]:
        """A table as numpy has it."""
        return np.frombuffer(self.tables[key], TABLES[key][0])

    def rows_of(self, key: str) -> int:
        """How many rows a table has."""
        return self.tables[key].nbytes // TABLES[key][1].size

    def _place(self, key: str) -> tuple[int, int]:
        """Where a table is in memory, and how many rows it has."""
        return buffer_address(self.tables[key]), self.rows_of(key)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """The runs of cached pages, see :data:`RUN`."""
        return self.rows("runs")

    @cached_property
    def pages(self) -> NDArray[np.uint64]:
        """The vaddr of each cached page, ascending."""
        parts = [np.empty(0, np.uint64)]
        for vaddr, _, count in self.runs:
            parts.append(np.uint64(vaddr) + np.arange(count, dtype=np.uint64) * np.uint64(sys.PAGE_SIZE))
        return np.concatenate(parts)

    @cached_property
    def count(self) -> int:
        """How many pages are cached."""
        return sum(count for _, _, count in self.runs)

    @property
    def differing(self) -> NDArray[np.bool_]:
        """Which of them hold words that each process writes itself."""
        slots = self.table("slots") + self.pages[:1]
        return differing(self.pages, slots, self.table("tls_rows"))

    def meant(
        self, how: Literal["resolver", "unique", "thread exit"], scope: Sequence[Definer]
    ) -> list[tuple[int, Definer]]:
        """The numbers of the values that are meant so, and who defines each."""
        return [(number, scope[at]) for number, meant, at in self.special if meant == _HOW[how]]

    def differs(self, scope: Sequence[Definer]) -> str | None:
        """Why it cannot be used in ``scope``; ``None`` when it can."""
        present = identities(scope)
        if present == self.scope:
            return None
        for definer, (identity, prepared) in zip(scope, zip(present, self.scope, strict=False), strict=False):
            if identity != prepared:
                return f"{definer.name} is searched for symbols where another library was"
        return f"{len(present)} libraries are searched for symbols, and were {len(self.scope)}"

    def check_pages(self) -> None:
        """Raise :class:`LoadError` when the cached pages are not what was written.

        They are looked at where they are, in the page cache: nobody else can write or shorten the file.
        """
        length = self.count * sys.PAGE_SIZE
        if not length:
            return
        start = sys.mmap(0, length, sys.PROT_READ, sys.MAP_PRIVATE, self.fd, self.at)
        try:
            run("compare_sums", start, length // _WORD, _SUMMED, *self._place("sums"))
        except Stopped:
            raise LoadError("its pages are damaged") from None
        finally:
            sys.munmap(start, length)

    def lay(self, memory: Memory) -> None:
        """Map the cached pages over those of the file.

        Raises :class:`LoadError`, and maps nothing, where one would lie elsewhere.
        """
        flags, calls = sys.MAP_PRIVATE | sys.MAP_FIXED, []
        for vaddr, first, count in self.runs:
            mapping, length = memory.plan.at(vaddr), count * sys.PAGE_SIZE
            if mapping is None or vaddr + length > mapping.end:
                raise LoadError("its pages are of another library")
            calls.append((vaddr, length, protection_bits(mapping.protection), first * sys.PAGE_SIZE))
        for vaddr, length, bits, offset in calls:
            sys.mmap(memory.bias + vaddr, length, bits, flags, self.fd, self.at + offset)

    def values(self, scope: Sequence[Definer]) -> array[int]:
        """What each value of the index is in this process, without its addend: an address."""
        biases = array("Q", [definer.bias & ADDRESS_MASK for definer in scope])
        place, count = self._place("values")
        values = array("Q", bytes(_WORD * count))
        run("compute_values", place, count, biases, len(biases), values)
        return values

    def fill(self, memory: Memory, values: array[int]) -> None:
        """Store the words that differ, ``values`` being those of the index, in the pages that are laid."""
        if self.tables["slots"]:
            first, (last, _, count) = self.runs[0][0], self.runs[-1]
            room = memory.bias + first, last + count * sys.PAGE_SIZE - first
            numbers, _ = self._place("numbers")
            slots, number = self._place("slots")
            run("fill_slots", *room, slots, numbers, number, self._place("values")[0], values, len(values))

    def thread_local(self, scope: Sequence[Definer]) -> tuple[Bindings, list[tuple[Kind, list[Row]]]]:
        """The thread-local relocations, by kind, and what their symbols are bound to."""
        symbols, definitions = array("q"), array("q")
        numbers = iter(self.rows("tls_symbols"))
        for symbol, owner, number, value in zip(numbers, numbers, numbers, numbers, strict=False):
            info = STT_TLS if symbol > 0 else 0  # as it was seen to be when it was prepared
            symbols.append(symbol)
            definitions.extend((owner, number, 0, value, 0, info, 0))  # a row of DEFINITION
        bindings = _Recorded(symbols, scope, definitions, self.tls_names)
        rows, of_kinds, first = self.rows("tls_rows"), [], 0
        for code, count in self.tls_kinds:
            of_kinds.append((KINDS[processor().upper()][code], rows[first : first + count]))
            first += count
        return bindings, of_kinds

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        os.close(self.fd)


@dataclass(frozen=True, eq=False)
class _Recorded(Bindings):
    """Bindings whose symbols are known without reading the tables they are in."""

    names: Sequence[str]

    def label(self, place: int) -> str:
        return self.names[place]


def differing(pages: NDArray[np.uint64], slots: NDArray[np.uint64], tls_rows: Table) -> NDArray[np.bool_]:
    """Which of ``pages`` hold words that each process writes itself: at ``slots``, or thread-local ones."""
    touched = np.zeros(len(pages), bool)
    for ends in (slots, slots + np.uint64(_WORD - 1), tls_rows["offset"]):
        touched[np.searchsorted(pages, ends & np.uint64(-sys.PAGE_SIZE % (1 << 64)))] = True
    return touched


def identities(scope: Sequence[Definer]) -> tuple[str, ...]:
    """What tells each library of ``scope`` from others: its build-id, or a digest of its symbols."""
    return tuple(_identity(definer) for definer in scope)


def _identity(definer: Definer) -> str:
    if definer.build_id is not None:
        return definer.build_id
    with importing:
        import hashlib  # which takes all of libcrypto to import

    table = definer.symbols
    digest = hashlib.sha256(np.ascontiguousarray(table.rows).tobytes())
    digest.update(bytes(table.strings))
    return digest.hexdigest()


def sums(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A checksum of each 16 pages, at the speed of memory: the sum of their words.

    Against damage, not against malice: nobody else can write the file.
    """
    words = data.view(np.uint64)
    whole = len(words) // _SUMMED * _SUMMED
    return np.append(words[:whole].reshape(-1, _SUMMED).sum(axis=1), words[whole:].sum())


def runs(pages: NDArray[np.uint64], plan: LoadPlan) -> NDArray[np.void]:
    """``pages`` in runs for one call of mmap: they follow one another, within one mapping of ``plan``."""
    starts = np.array([mapping.start for mapping in plan.mappings], np.uint64)
    breaks = (np.diff(pages) != np.uint64(sys.PAGE_SIZE)) | np.isin(pages[1:], starts)
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pages)]
    rows = [(int(pages[first]), first, last - first) for first, last in pairwise(ends) if first < last]
    return np.array(rows, RUN)
