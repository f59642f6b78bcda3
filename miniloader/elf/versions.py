"""Symbol versions: ``DT_VERNEED`` and ``DT_VERDEF``.  Source: the LSB, "Symbol Versioning"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from miniloader.elf.dynamic import (
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    Reader,
    string_at,
)
from miniloader.elf.layout import Record, record
from miniloader.elf.source import Bytes
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["VERSION_HIDDEN", "Version", "read_versions"]

VERSION_HIDDEN: Final = 0x8000
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

    def __init__(self, read: Reader, field: str, name: str | None) -> None:
        self._read, self._field, self._name = read, field, name
        self._start, self._block = 0, b""

    def at(self, vaddr: int, layout: Record, *names: str) -> Any:
        """The fields ``names`` of the record at ``vaddr``, as :meth:`Record.row` gives them."""
        size = layout.size
        if not self._start <= vaddr <= self._start + len(self._block) - size:
            try:
                block = self._read(vaddr, _BLOCK, self._field)
            except ElfError:  # not so many before the segment ends
                block = self._read(vaddr, size, self._field)
            self._start, self._block = vaddr, bytes(block)
        return layout.row(self._block, *names, at=vaddr - self._start)

    def linked(self, layout: Record, vaddr: int, count: int, *names: str) -> Iterator[tuple[int, list[int]]]:
        """Where each of ``count`` records lies, and its fields ``names``, from ``vaddr`` on.

        The field ``next`` says how many bytes behind a record the next one is; 0 ends them.
        """
        if count > _MOST:
            raise ElfError(self._name, self._field, f"{count} records", f"at most {_MOST}")
        size = layout.size
        for _ in range(count):
            step, *fields = self.at(vaddr, layout, "next", *names)
            yield vaddr, fields
            if step == 0:
                return
            if step < size:
                raise ElfError(self._name, self._field, f"a step of {step} bytes", f"0 or at least {size}")
            vaddr += step


def _text(strings: Bytes, offset: int, field: str, name: str | None) -> str:
    if offset >= len(strings):
        raise ElfError(name, field, f"string offset {offset:#x}", f"inside the {len(strings):#x} bytes")
    if strings.find(b"\0", offset, offset + _LONGEST) < 0 and offset + _LONGEST < len(strings):
        raise ElfError(name, field, f"a name of more than {_LONGEST} bytes", "a shorter one")
    return string_at(strings, offset).decode("utf-8", "backslashreplace")


def _needed(
    read: Reader, tags: Mapping[int, int], strings: Bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    records, total = _Records(read, "DT_VERNEED", name), 0
    start, count = tags[DT_VERNEED], tags.get(DT_VERNEEDNUM, 0)
    files = records.linked(_layout(order, "Verneed"), start, count, "cnt", "file", "aux")
    for vaddr, (length, file, first) in files:
        total += length
        if total > _MOST:
            raise ElfError(name, "DT_VERNEED", f"{total} versions", f"at most {_MOST}")
        library = _text(strings, file, "DT_VERNEED", name)
        versions = records.linked(_layout(order, "Vernaux"), vaddr + first, length, "name", "flags", "other")
        for _, (offset, flags, index) in versions:
            label = _text(strings, offset, "DT_VERNEED", name)
            yield index & ~VERSION_HIDDEN, Version(label, library, weak=bool(flags & _VER_FLG_WEAK))


def _defined(
    read: Reader, tags: Mapping[int, int], strings: Bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    records = _Records(read, "DT_VERDEF", name)
    start, count = tags[DT_VERDEF], tags.get(DT_VERDEFNUM, 0)
    versions = records.linked(_layout(order, "Verdef"), start, count, "aux", "flags", "ndx")
    for vaddr, (first, flags, index) in versions:
        # The first name is the version's; those behind it are its predecessors'.
        offset = records.at(vaddr + first, _layout(order, "Verdaux"), "name")
        label = _text(strings, offset, "DT_VERDEF", name)
        yield index & ~VERSION_HIDDEN, Version(label, None, base=bool(flags & _VER_FLG_BASE))


def _layout(order: str, kind: str) -> Record:
    return record(64, order, kind)  # which are the same in 32-bit files
