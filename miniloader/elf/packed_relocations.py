"""Android's packed relocations: REL or RELA tables as differences, in numbers of as many bytes as they need.

Behind the mark ``APS2`` come SLEB128 numbers: how many relocations there are, where the first begins, then
groups, each of which says what its members have in common.  glibc does not know them.  Source: bionic's
``linker/linker_reloc_iterators.h``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.source import Bytes
from miniloader.errors import ElfError

__all__ = ["unpack"]

_MARK: Final = b"APS2"
_BY_INFO, _BY_DIFFERENCE, _BY_ADDEND, _HAS_ADDEND = 1, 2, 4, 8
_LONGEST: Final = 10  # bytes of a number of 64 bits


def unpack(data: Bytes, elf_class: int, most: int, field: str, name: str | None) -> bytearray:
    """The relocations packed in ``data`` as ``Elf64_Rela`` records of a little-endian machine.

    The table ``field`` of the file ``name`` may have at most ``most``; :class:`ElfError` for more, and for
    what is not packed so.

    >>> import struct
    >>> packed = b"APS2" + bytes([2, 0x80, 0x20, 2, 3, 8, 8])  # two, from 0x1000 on, 8 apart, of type 8
    >>> list(struct.iter_unpack("<QQq", unpack(packed, 64, 100, "DT_ANDROID_RELA", None)))
    [(4104, 8, 0), (4112, 8, 0)]
    """
    if bytes(data[:4]) != _MARK:
        raise ElfError(name, field, f"{bytes(data[:4])!r}", f"{_MARK!r}, Android's packed relocations")
    numbers = _Numbers(_sleb128(bytes(data[4:]), field, name), field, name)
    count, offset = numbers.next(), numbers.next()
    if not 0 <= count <= most:
        raise ElfError(name, field, f"{count} relocations", f"at most {most}, one for 4 bytes of the file")
    rows = np.zeros((count, 3), np.int64)
    done, addend = 0, 0
    while done < count:
        size, flags = numbers.next(), numbers.next()
        if not 0 < size <= count - done:
            raise ElfError(name, field, f"a group of {size}", f"1 to {count - done}, which are left")
        group = rows[done : done + size]
        difference = numbers.next() if flags & _BY_DIFFERENCE else None
        info = numbers.next() if flags & _BY_INFO else None
        by_addend = flags & _HAS_ADDEND and flags & _BY_ADDEND
        if by_addend:
            addend = _wrap(addend + numbers.next())
        varying = numbers.table(size, (difference is None) + (info is None) + (flags & 12 == _HAS_ADDEND))
        columns = iter(varying.T)
        with np.errstate(over="ignore"):
            steps = next(columns) if difference is None else np.full(size, difference)
            group[:, 0] = np.cumsum(steps) + np.int64(offset)
            group[:, 1] = next(columns) if info is None else info
            if flags & 12 == _HAS_ADDEND:
                group[:, 2] = np.cumsum(next(columns)) + np.int64(addend)
            elif by_addend:
                group[:, 2] = addend
        offset, addend = int(group[-1, 0]), int(group[-1, 2])
        done += size
    if elf_class == 32:  # Elf32_Rela: 24 bits of symbol, 8 of type
        mask = (1 << 32) - 1
        info32 = rows[:, 1] & mask
        rows[:, 0] &= mask
        rows[:, 1] = (info32 >> 8) << 32 | (info32 & 0xFF)
    return bytearray(rows.astype("<i8").tobytes())


def _wrap(number: int) -> int:
    """``number`` as 64 bits with sign hold it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class _Numbers:
    """Numbers that are taken one after the other; :class:`ElfError` when there are no more."""

    def __init__(self, numbers: NDArray[np.int64], field: str, name: str | None) -> None:
        self._numbers, self._field, self._name = numbers, field, name
        self._at = 0

    def next(self) -> int:
        """One number."""
        return int(self.table(1, 1)[0, 0])

    def table(self, rows: int, columns: int) -> NDArray[np.int64]:
        """So many rows of them."""
        end = self._at + rows * columns
        if end > len(self._numbers):
            raise ElfError(self._name, self._field, f"{len(self._numbers)} numbers", f"{end} or more")
        taken, self._at = self._numbers[self._at : end], end
        return taken.reshape(rows, columns)


def _sleb128(data: bytes, field: str, name: str | None) -> NDArray[np.int64]:
    """All numbers in ``data``, in DWARF's signed LEB128; bytes behind the last whole number are padding."""
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    starts = np.concatenate([np.zeros(1, np.intp), ends[:-1] + 1])[: len(ends)]
    lengths = ends - starts + 1
    if len(lengths) and int(lengths.max()) > _LONGEST:
        raise ElfError(name, field, f"a number of {int(lengths.max())} bytes", f"at most {_LONGEST}")
    values = np.zeros(len(ends), np.uint64)
    for place in range(_LONGEST):
        longer = np.flatnonzero(lengths > place)
        if not len(longer):
            break
        part = (octets[starts[longer] + place] & 0x7F).astype(np.uint64)
        values[longer] |= part << np.uint64(7 * place)
    negative = np.flatnonzero((octets[ends] & 0x40 > 0) & (lengths < _LONGEST))
    values[negative] |= np.uint64((1 << 64) - 1) << (np.uint64(7) * lengths[negative].astype(np.uint64))
    return values.view(np.int64)
