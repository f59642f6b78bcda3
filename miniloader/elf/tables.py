"""The bulk tables of an ELF file, as numpy structured arrays over the file's own bytes.

Each function gives the dtype that describes a table as it lies in the file, for a class and byte order, so
that decoding is :func:`numpy.frombuffer` and nothing is copied.  Field names are the gABI's without prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.source import Bytes

__all__ = [
    "RELOCATION",
    "Table",
    "blocks",
    "decode_relocations",
    "decode_relr",
    "rel_dtype",
    "rela_dtype",
    "symbol_dtype",
]

Table = NDArray[Any]
"""A numpy array whose dtype is given by the function that made it."""

_Row = TypeVar("_Row", bound=np.generic)

RELOCATION: Final = np.dtype([("offset", "u8"), ("type", "u4"), ("symbol", "u4"), ("addend", "i8")])
"""A relocation of any class: on a little-endian machine this is ``Elf64_Rela`` as it lies in the file."""


_BLOCK: Final = 1 << 13  # rows


def blocks(rows: NDArray[_Row]) -> Iterator[NDArray[_Row]]:
    """``rows`` in parts that are worked on one after the other.

    What is computed for a part takes memory that is there already; for millions of rows the kernel would have
    to find and clear it page by page, which takes longer than the computing.
    """
    return (rows[first : first + _BLOCK] for first in range(0, len(rows), _BLOCK))


@lru_cache(maxsize=4)
def symbol_dtype(elf_class: int, order: str) -> np.dtype[Any]:
    """``Elf*_Sym``: name, info, other, shndx, value, size."""
    name, info, other, shndx = (
        ("name", f"{order}u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", f"{order}u2"),
    )
    value, size = ("value", f"{order}u{elf_class // 8}"), ("size", f"{order}u{elf_class // 8}")
    if elf_class == 64:
        return np.dtype([name, info, other, shndx, value, size])
    return np.dtype([name, value, size, info, other, shndx])


@lru_cache(maxsize=4)
def rel_dtype(elf_class: int, order: str) -> np.dtype[Any]:
    """``Elf*_Rel``: offset, info."""
    word = elf_class // 8
    return np.dtype([("offset", f"{order}u{word}"), ("info", f"{order}u{word}")])


@lru_cache(maxsize=4)
def rela_dtype(elf_class: int, order: str) -> np.dtype[Any]:
    """``Elf*_Rela``: offset, info, addend."""
    word = elf_class // 8
    return np.dtype([*_fields(rel_dtype(elf_class, order)), ("addend", f"{order}i{word}")])


def _fields(dtype: np.dtype[Any]) -> list[tuple[str, Any]]:
    return [(name, dtype[name]) for name in dtype.names or ()]


def decode_relocations(data: Bytes, elf_class: int, order: str, *, addends: bool, machine: str) -> Table:
    """The rows of a REL or RELA table as :data:`RELOCATION`.

    REL rows (``addends=False``) get addend 0: theirs lies in the word they relocate.
    """
    native = elf_class == 64 and order == "<" and addends and machine != "MIPS"
    if native and np.little_endian:
        return np.frombuffer(data, RELOCATION)
    dtype = (rela_dtype if addends else rel_dtype)(elf_class, order)
    raw = np.frombuffer(data, dtype)
    rows = np.zeros(len(raw), RELOCATION)
    rows["offset"] = raw["offset"]
    info = raw["info"].astype(np.uint64)
    if elf_class == 32:
        rows["type"], rows["symbol"] = info & 0xFF, info >> 8
    elif machine == "MIPS" and order == "<":
        # MIPS n64 keeps r_sym first and up to three types after it, whatever the byte order (the MIPS
        # 64-bit object file specification): the first type is the last byte.
        rows["type"], rows["symbol"] = info >> 56, info & 0xFFFFFFFF
    elif machine == "MIPS":
        rows["type"], rows["symbol"] = info & 0xFF, info >> 32
    else:
        rows["type"], rows["symbol"] = info & 0xFFFFFFFF, info >> 32
    if addends:
        rows["addend"] = raw["addend"]
    return rows


def decode_relr(data: Bytes, elf_class: int, order: str) -> NDArray[np.uint64]:
    """The vaddrs that a RELR table relocates, in table order (gABI, section "Relocation").

    An even entry is an address; the odd ones after it are bitmaps of the words that follow, 63 (or 31)
    at a time.  A bitmap before any address is of no address and gives none.
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
    found = np.flatnonzero(named)
    row, column = np.divmod(found, width)
    return np.asarray(base[row] + column.astype(np.uint64) * np.uint64(word), np.uint64)
