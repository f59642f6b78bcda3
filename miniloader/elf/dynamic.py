"""The dynamic section: the one table from which everything about linking is found.

Source: gABI chapter 5, "Dynamic Section".  Tags are numbers here; :func:`tag_name` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from itertools import islice, takewhile
from operator import itemgetter
from types import MappingProxyType
from typing import Final, Protocol

from elftools.elf.enums import ENUM_D_TAG_COMMON

from miniloader.elf.layout import record
from miniloader.elf.source import Bytes
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["Dynamic", "Locator", "Reader", "parse_dynamic", "string_at", "tag_name"]

DT_NULL: Final = 0
DT_NEEDED: Final = 1
DT_PLTRELSZ: Final = 2
DT_PLTGOT: Final = 3
DT_HASH: Final = 4
DT_STRTAB: Final = 5
DT_SYMTAB: Final = 6
DT_RELA: Final = 7
DT_RELASZ: Final = 8
DT_RELAENT: Final = 9
DT_STRSZ: Final = 10
DT_SYMENT: Final = 11
DT_INIT: Final = 12
DT_FINI: Final = 13
DT_SONAME: Final = 14
DT_RPATH: Final = 15
DT_SYMBOLIC: Final = 16
DT_REL: Final = 17
DT_RELSZ: Final = 18
DT_RELENT: Final = 19
DT_PLTREL: Final = 20
DT_TEXTREL: Final = 22
DT_JMPREL: Final = 23
DT_BIND_NOW: Final = 24
DT_INIT_ARRAY: Final = 25
DT_FINI_ARRAY: Final = 26
DT_INIT_ARRAYSZ: Final = 27
DT_FINI_ARRAYSZ: Final = 28
DT_RUNPATH: Final = 29
DT_FLAGS: Final = 30
DT_PREINIT_ARRAY: Final = 32
DT_PREINIT_ARRAYSZ: Final = 33
DT_RELRSZ: Final = 35
DT_RELR: Final = 36
DT_RELRENT: Final = 37
DT_ANDROID_REL: Final = 0x6000000F
DT_ANDROID_RELSZ: Final = 0x60000010
DT_ANDROID_RELA: Final = 0x60000011
DT_ANDROID_RELASZ: Final = 0x60000012
DT_ANDROID_RELR: Final = 0x6FFFE000
DT_ANDROID_RELRSZ: Final = 0x6FFFE001
DT_ANDROID_RELRENT: Final = 0x6FFFE003
DT_GNU_HASH: Final = 0x6FFFFEF5
DT_VERSYM: Final = 0x6FFFFFF0
DT_RELACOUNT: Final = 0x6FFFFFF9
DT_FLAGS_1: Final = 0x6FFFFFFB
DT_VERDEF: Final = 0x6FFFFFFC
DT_VERDEFNUM: Final = 0x6FFFFFFD
DT_VERNEED: Final = 0x6FFFFFFE
DT_VERNEEDNUM: Final = 0x6FFFFFFF
DT_AUXILIARY: Final = 0x7FFFFFFD
DT_FILTER: Final = 0x7FFFFFFF

DF_SYMBOLIC: Final = 0x2
DF_TEXTREL: Final = 0x4
DF_BIND_NOW: Final = 0x8
DF_1_NOW: Final = 0x1
DF_1_NODELETE: Final = 0x8
DF_1_INITFIRST: Final = 0x20
DF_1_NOOPEN: Final = 0x40
DF_1_NODEFLIB: Final = 0x800
DF_1_PIE: Final = 0x08000000

MOST_ENTRIES: Final = 4096

#: Where arrays of functions are, and how long: those called before constructors, constructors, destructors.
FUNCTION_ARRAYS: Final = (
    (DT_PREINIT_ARRAY, DT_PREINIT_ARRAYSZ),
    (DT_INIT_ARRAY, DT_INIT_ARRAYSZ),
    (DT_FINI_ARRAY, DT_FINI_ARRAYSZ),
)


class Reader(Protocol):
    """Reads ``length`` bytes at ``vaddr``; :class:`ElfError` naming ``field`` when they are not there."""

    def __call__(self, vaddr: int, length: int, field: str, /) -> Bytes:
        """The bytes that lie at ``vaddr``."""
        ...


class Locator(Protocol):
    """Finds where in the file the ``length`` bytes at ``vaddr`` are, or raises as :class:`Reader` does."""

    def __call__(self, vaddr: int, length: int, field: str, /) -> int:
        """The file offset of the first byte."""
        ...


def string_at(strings: Bytes, offset: int) -> bytes:
    """The NUL-terminated string at ``offset``; empty when ``offset`` is outside the table."""
    end = strings.find(b"\0", offset)
    return strings[offset:end] if end >= 0 else strings[offset:]


@dataclass(frozen=True)
class Dynamic:
    """The entries before ``DT_NULL``, in order, and the last value of each tag (the one ld.so uses)."""

    entries: tuple[tuple[int, int], ...] = ()
    tags: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    def all(self, tag: int) -> tuple[int, ...]:
        """Every value of ``tag``, in order."""
        return tuple([value for entry, value in self.entries if entry == tag])

    def flag(self, tag: int, bit: int) -> bool:
        """Whether ``bit`` is set in the value of ``tag``."""
        return bool(self.tags.get(tag, 0) & bit)

    @property
    def bind_now(self) -> bool:
        """Whether the library asks for every symbol to be bound before it runs."""
        flagged = self.flag(DT_FLAGS, DF_BIND_NOW) or self.flag(DT_FLAGS_1, DF_1_NOW)
        return flagged or DT_BIND_NOW in self.tags

    @property
    def text_relocations(self) -> bool:
        """Whether the library says that relocations write to segments that are not writable."""
        return DT_TEXTREL in self.tags or self.flag(DT_FLAGS, DF_TEXTREL)

    @property
    def symbolic(self) -> bool:
        """Whether the library looks a symbol up in itself before anywhere else."""
        return DT_SYMBOLIC in self.tags or self.flag(DT_FLAGS, DF_SYMBOLIC)


def parse_dynamic(data: Bytes, elf_class: int, order: str, name: str | None = None) -> Dynamic:
    """Read the bytes of ``PT_DYNAMIC`` up to ``DT_NULL`` or the end.

    :class:`ElfError` names the file ``name`` where there are more entries than any file has.

    >>> parse_dynamic(bytes([14, *bytes(7), 7, *bytes(7)]) + bytes(16), 64, "<").entries
    ((14, 7),)
    """
    rows = record(elf_class, order, "Dyn").rows(data, "tag", "val")
    before_null = takewhile(itemgetter(0), rows)  # whose tag is not DT_NULL
    entries = tuple(islice(before_null, MOST_ENTRIES + 1))
    if len(entries) > MOST_ENTRIES:
        raise ElfError(name, "PT_DYNAMIC", "more entries", f"at most {MOST_ENTRIES}")
    return Dynamic(entries, MappingProxyType(dict(entries)))


@lru_cache(maxsize=1)
def _tag_names() -> dict[int, str]:
    names = {code: name for name, code in reversed([*ENUM_D_TAG_COMMON.items()]) if isinstance(code, int)}
    return names | {DT_FILTER: "DT_FILTER"}  # the end of a range has that number, too


def tag_name(tag: int) -> str:
    """``DT_…``, or the number in hexadecimal.

    >>> tag_name(25), tag_name(0x7FFFFFFF), tag_name(0x70000001)
    ('DT_INIT_ARRAY', 'DT_FILTER', '0x70000001')
    """
    return _tag_names().get(tag, f"{tag:#x}")
