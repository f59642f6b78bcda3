"""The bulk tables of an ELF file, as numpy structured arrays over the file's own bytes.

A dtype describes a table as it lies in the file, for a class and byte order, so that decoding is
:func:`numpy.frombuffer` and nothing is copied.  Field names are the gABI's without prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, TypeVar

from miniloader.arrays import NDArray, np
from miniloader.elf.layout import record
from miniloader.elf.source import Bytes

__all__ = [
    "RELOCATION",
    "Table",
    "blocks",
    "decode_relocations",
    "decode_relr",
    "distinct",
    "symbol_dtype",
    "table_dtype",
]

Table = NDArray[Any]
"""A numpy array whose dtype is given by the function that made it."""

_Row = TypeVar("_Row", bound="np.generic")

RELOCATION: Final = [("offset", "u8"), ("type", "u4"), ("symbol", "u4"), ("addend", "i8")]
"""A relocation of any class: on a little-endian machine this is ``Elf64_Rela`` as it lies in the file."""


_BLOCK: Final = 1 << 13  # rows


def blocks(rows: NDArray[_Row]) -> Iterator[NDArray[_Row]]:
    """``rows`` in parts that are worked on one after the other.

    What is computed for a part takes memory that is there already; for millions of rows the kernel would have
    to find and clear it page by page, which takes longer than the computing.
    """
    return (rows[first : first + _BLOCK] for first in range(0, len(rows), _BLOCK))


def distinct(numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The different ``numbers``, ascending, and how often each is there.

    :func:`numpy.unique` imports numpy's masked arrays, which takes a tenth of ``miniloader inspect``.

    >>> distinct(np.array([8, 1, 8]))
    (array([1, 8]), array([1, 2]))
    """
    ordered = np.sort(numbers)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    return ordered[first], np.diff(first, append=len(ordered))


@lru_cache(maxsize=16)
def table_dtype(elf_class: int, order: str, name: str, machine: str = "") -> np.dtype[Any]:
    """A table of the records ``Elf_`` + ``name``, as pyelftools declares them.

    >>> table_dtype(64, "<", "Rel")
    dtype([('offset', '<u8'), ('info', '<u8')])
    """
    kinds = (
        (field.name, f"{order}{'i' if field.format.islower() else 'u'}{field.size}")
        for field in record(elf_class, order, name, machine).fields
    )
    return np.dtype(list(kinds))


def symbol_dtype(elf_class: int, order: str) -> np.dtype[Any]:
    """A symbol table: name, info, other, shndx, value, size, in the order of the class."""
    return table_dtype(elf_class, order, "Sym")


def decode_relocations(
    data: Bytes | bytearray, elf_class: int, order: str, *, addends: bool, machine: str
) -> Table:
    """The rows of a REL or RELA table as :data:`RELOCATION`.

    REL rows (``addends=False``) get addend 0: theirs lies in the word they relocate.

    >>> data = bytes([0x10, 0, 0, 0, 8, 3, 0, 0])
    >>> rows = decode_relocations(data, 32, "<", addends=False, machine="386")
    >>> rows.tolist()  # offset, type, symbol, addend
    [(16, 8, 3, 0)]
    """
    native = elf_class == 64 and order == "<" and addends and machine != "MIPS"
    if native and np.little_endian:
        return np.frombuffer(data, RELOCATION)
    raw = np.frombuffer(data, table_dtype(elf_class, order, "Rela" if addends else "Rel", machine))
    rows = np.zeros(len(raw), RELOCATION)
    rows["offset"] = raw["offset"]
    if "info" in (raw.dtype.names or ()):
        info, bits = raw["info"].astype(np.uint64), 32 if elf_class == 64 else 8
        rows["type"], rows["symbol"] = info & ((1 << bits) - 1), info >> bits
    else:  # MIPS n64 has the symbol and up to three types, whatever the byte order; this is the first
        rows["type"], rows["symbol"] = raw["type"], raw["sym"]
    if addends:
        rows["addend"] = raw["addend"]
    return rows


def decode_relr(data: Bytes, elf_class: int, order: str) -> NDArray[np.uint64]:
    """The vaddrs that a RELR table relocates, in table order (gABI, section "Relocation").

    An even entry is an address; the odd ones after it are bitmaps of the words that follow, 63 (or 31)
    at a time.  A bitmap before any address is of no address and gives none.

    >>> decode_relr(bytes([0, 16, 0, 0, 0b101, 0, 0, 0]), 32, "<").tolist()
    [4096, 4104]
    """
    word = elf_class // 8
    entries = np.frombuffer(data, f"{order}u{word}").astype(np.uint64)
    if not len(entries):
        return np.empty(0, np.uint64)
    bitmap = (entries & 1).astype(bool)
    position = np.arange(len(entries))
    address_at = np.maximum.accumulate(np.where(bitmap, -1, position))
    width = elf_class - 1
    # Row i of `named`: entry i's own address, or the words its bitmap names, counted from `base`.
    behind = (position - address_at - 1) * (width * word) + word
    base = np.where(bitmap, entries[address_at] + behind.astype(np.uint64), entries)
    octets = entries.astype("<u8").view(np.uint8).reshape(-1, 8)
    named = np.unpackbits(octets, axis=1, bitorder="little")[:, 1 : width + 1]
    named[~bitmap] = 0
    named[~bitmap, 0] = 1
    named[address_at < 0] = 0
    positions = np.flatnonzero(named)
    row, column = np.divmod(positions, width)
    return np.asarray(base[row] + column.astype(np.uint64) * np.uint64(word), np.uint64)
