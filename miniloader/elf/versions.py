"""Symbol versions: ``DT_VERNEED`` and ``DT_VERDEF``.  Source: the LSB, "Symbol Versioning"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from elftools.construct import Construct

from miniloader.elf.dynamic import (
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    Reader,
    string_at,
)
from miniloader.elf.parsing import parse, structs
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

    def at(self, vaddr: int, construct: Construct) -> Any:
        """The record at ``vaddr``."""
        size = construct.sizeof()
        if not self._start <= vaddr <= self._start + len(self._block) - size:
            try:
                block = self._read(vaddr, _BLOCK, self._what)
            except ElfError:  # not so many before the segment ends
                block = self._read(vaddr, size, self._what)
            self._start, self._block = vaddr, bytes(block)
        place = vaddr - self._start
        return parse(construct, self._block[place : place + size], self._what, self._name)

    def linked(
        self, construct: Construct, vaddr: int, count: int, following: str
    ) -> Iterator[tuple[int, Any]]:
        """Where each of ``count`` records lies, and the record, from ``vaddr`` on.

        The field ``following`` says how many bytes behind a record the next one is; 0 ends them.
        """
        if count > _MOST:
            raise ElfError(self._name, self._what, f"{count} records", f"at most {_MOST}")
        size = construct.sizeof()
        for _ in range(count):
            found = self.at(vaddr, construct)
            yield vaddr, found
            step = found[following]
            if step == 0:
                return
            if step < size:
                raise ElfError(self._name, self._what, f"a step of {step} bytes", f"0 or at least {size}")
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
    declared = structs(64, order)  # the records are the same in 32-bit files
    records, total = _Records(read, "DT_VERNEED", name), 0
    files = records.linked(declared.Elf_Verneed, tags[DT_VERNEED], tags.get(DT_VERNEEDNUM, 0), "vn_next")
    for vaddr, needed in files:
        total += needed.vn_cnt
        if total > _MOST:
            raise ElfError(name, "DT_VERNEED", f"{total} versions", f"at most {_MOST}")
        library = _text(strings, needed.vn_file, "DT_VERNEED", name)
        versions = records.linked(declared.Elf_Vernaux, vaddr + needed.vn_aux, needed.vn_cnt, "vna_next")
        for _, version in versions:
            label = _text(strings, version.vna_name, "DT_VERNEED", name)
            weak = bool(version.vna_flags & _VER_FLG_WEAK)
            yield version.vna_other & ~VERSION_HIDDEN, Version(label, library, weak=weak)


def _defined(
    read: Reader, tags: Mapping[int, int], strings: Bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    declared, records = structs(64, order), _Records(read, "DT_VERDEF", name)
    versions = records.linked(declared.Elf_Verdef, tags[DT_VERDEF], tags.get(DT_VERDEFNUM, 0), "vd_next")
    for vaddr, defined in versions:
        # The first name is the version's; those behind it are its predecessors'.
        label = _text(
            strings, records.at(vaddr + defined.vd_aux, declared.Elf_Verdaux).vda_name, "DT_VERDEF", name
        )
        base = bool(defined.vd_flags & _VER_FLG_BASE)
        yield defined.vd_ndx & ~VERSION_HIDDEN, Version(label, None, base=base)
