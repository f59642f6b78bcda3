"""Symbol versions: ``DT_VERNEED`` and ``DT_VERDEF``.  Source: the LSB, "Symbol Versioning"."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from miniloader.elf.dynamic import (
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    Reader,
    string_at,
)
from miniloader.elf.source import Bytes
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["VERSION_HIDDEN", "VER_NDX_GLOBAL", "VER_NDX_LOCAL", "Version", "read_versions"]

VERSION_HIDDEN: Final = 0x8000
VER_NDX_LOCAL: Final = 0
VER_NDX_GLOBAL: Final = 1
_VER_FLG_BASE: Final = 1
_VER_FLG_WEAK: Final = 2
_LONGEST: Final = 4096
_BLOCK: Final = 1024
_MOST: Final = 0x8000  # a version index has 15 bits


@dataclass(frozen=True)
class Version:
    """A symbol version; ``file`` is the library it is needed from, ``None`` when defined here."""

    name: str
    file: str | None
    base: bool = False
    weak: bool = False


def read_versions(
    read: Reader, tags: Mapping[int, int], strings: Bytes, *, order: str, name: str | None
) -> dict[int, Version]:
    """Every version the image needs or defines, by the index ``DT_VERSYM`` uses (without its hidden bit)."""
    needed = dict(_needed(read, tags, strings, order, name)) if DT_VERNEED in tags else {}
    defined = dict(_defined(read, tags, strings, order, name)) if DT_VERDEF in tags else {}
    return needed | defined


class _Records:
    """Records that lie close together, read a block at a time."""

    def __init__(self, read: Reader, what: str, name: str | None) -> None:
        self._read, self._what, self._name = read, what, name
        self._start, self._block = 0, b""

    def unpack(self, record: struct.Struct, vaddr: int) -> tuple[int, ...]:
        """The record at ``vaddr``."""
        if not self._start <= vaddr <= self._start + len(self._block) - record.size:
            try:
                block = self._read(vaddr, _BLOCK, self._what)
            except ElfError:  # not so many before the segment ends
                block = self._read(vaddr, record.size, self._what)
            self._start, self._block = vaddr, bytes(block)
        return record.unpack_from(self._block, vaddr - self._start)

    def linked(self, record: struct.Struct, vaddr: int, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The ``count`` records linked by their last field from ``vaddr`` on; each step goes forward."""
        if count > _MOST:
            raise ElfError(self._name, self._what, f"{count} records", f"at most {_MOST}")
        for _ in range(count):
            fields = self.unpack(record, vaddr)
            yield vaddr, fields
            step = fields[-1]
            if step == 0:
                return
            if step < record.size:
                expected = f"0 or at least {record.size}"
                raise ElfError(self._name, self._what, f"a step of {step} bytes", expected)
            vaddr += step


def _text(strings: Bytes, offset: int, what: str, name: str | None) -> str:
    if offset >= len(strings):
        raise ElfError(name, what, f"string offset {offset:#x}", f"inside the {len(strings):#x} bytes")
    if strings.find(b"\0", offset, offset + _LONGEST) < 0 and offset + _LONGEST < len(strings):
        raise ElfError(name, what, f"a name of more than {_LONGEST} bytes", "a shorter one")
    return string_at(strings, offset).decode("utf-8", "backslashreplace")


def _needed(
    read: Reader, tags: Mapping[int, int], strings: Bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    # Elf*_Verneed: version, count, file, aux, next; Elf*_Vernaux: hash, flags, other, name, next.
    need, auxiliary = struct.Struct(f"{order}HHIII"), struct.Struct(f"{order}IHHII")
    records, total = _Records(read, "DT_VERNEED", name), 0
    number = tags.get(DT_VERNEEDNUM, 0)
    for at, (_, count, file, aux, _) in records.linked(need, tags[DT_VERNEED], number):
        total += count
        if total > _MOST:
            raise ElfError(name, "DT_VERNEED", f"{total} versions", f"at most {_MOST}")
        library = _text(strings, file, "DT_VERNEED", name)
        for _, (_, flags, index, label, _) in records.linked(auxiliary, at + aux, count):
            weak = bool(flags & _VER_FLG_WEAK)
            yield (
                index & ~VERSION_HIDDEN,
                Version(_text(strings, label, "DT_VERNEED", name), library, weak=weak),
            )


def _defined(
    read: Reader, tags: Mapping[int, int], strings: Bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    # Elf*_Verdef: version, flags, index, count, hash, aux, next; Elf*_Verdaux: name, next.
    define, auxiliary = struct.Struct(f"{order}HHHHIII"), struct.Struct(f"{order}II")
    records, number = _Records(read, "DT_VERDEF", name), tags.get(DT_VERDEFNUM, 0)
    for at, (_, flags, index, _, _, aux, _) in records.linked(define, tags[DT_VERDEF], number):
        label, _ = records.unpack(auxiliary, at + aux)
        yield (
            index & ~VERSION_HIDDEN,
            Version(_text(strings, label, "DT_VERDEF", name), None, base=bool(flags & _VER_FLG_BASE)),
        )
