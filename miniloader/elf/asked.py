"""What a dynamic section asks its loader for, entry by entry, and what becomes of it: one table.

glibc's ld.so is what it is judged by: what that honours is honoured here, or refused by name; all else is
ignored as there, for the reason given.  Source: glibc's ``elf/elf.h``, ``DT_1_SUPPORTED_MASK``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from elftools.elf.enums import ENUM_DT_FLAGS, ENUM_DT_FLAGS_1

from miniloader.elf.dynamic import (
    DT_AUXILIARY,
    DT_FILTER,
    DT_FLAGS,
    DT_FLAGS_1,
    DT_NEEDED,
    DT_RPATH,
    DT_RUNPATH,
    DT_SONAME,
    tag_name,
)
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["OUTCOMES", "TABLE", "Asked", "Outcome", "asked_for"]

Outcome = Literal["honoured", "refused", "ignored"]


@dataclass(frozen=True)
class Asked:
    """An entry of the dynamic section, or a flag of one: ``value`` as it is, ``text`` where it means one."""

    name: str
    value: int
    text: str | None
    outcome: Outcome
    why: str


_TEXTS: Final = (DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH, DT_AUXILIARY, DT_FILTER)
_FLAGS: Final = {DT_FLAGS: ("DF_", ENUM_DT_FLAGS), DT_FLAGS_1: ("DF_1_", ENUM_DT_FLAGS_1)}
#: Why entries are honoured that only locate what others ask for.
TABLE: Final = "says where a table is, how long it is, or of what kind"
_TABLES: Final = """
    DT_PLTRELSZ DT_PLTGOT DT_HASH DT_STRTAB DT_SYMTAB DT_RELA DT_RELASZ DT_RELAENT DT_STRSZ DT_SYMENT
    DT_PLTREL DT_JMPREL DT_RELRSZ DT_RELR DT_RELRENT DT_GNU_HASH DT_VERSYM DT_RELACOUNT DT_VERDEF DT_VERDEFNUM
    DT_VERNEED DT_VERNEEDNUM
"""
_ANDROID: Final = """
    DT_ANDROID_REL DT_ANDROID_RELSZ DT_ANDROID_RELA DT_ANDROID_RELASZ DT_ANDROID_RELR DT_ANDROID_RELRSZ
    DT_ANDROID_RELRENT
"""
_PRELINK: Final = """
    DT_GNU_PRELINKED DT_GNU_CONFLICT DT_GNU_CONFLICTSZ DT_GNU_LIBLIST DT_GNU_LIBLISTSZ DT_CHECKSUM
"""
_SOLARIS: Final = """
    DT_PLTPAD DT_PLTPADSZ DT_MOVETAB DT_MOVEENT DT_MOVESZ DT_SYMINFO DT_SYMINSZ DT_SYMINENT DT_CONFIG
    DF_1_GROUP DF_1_LOADFLTR DF_1_DIRECT DF_1_TRANS DF_1_NODUMP DF_1_CONFALT DF_1_ENDFILTEE DF_1_DISPRELDNE
    DF_1_DISPRELPND DF_1_NODIRECT DF_1_IGNMULDEF DF_1_NOKSYMS DF_1_NOHDR DF_1_EDITED DF_1_NORELOC
    DF_1_SYMINTPOSE DF_1_GLOBAUDIT DF_1_SINGLETON DF_1_STUB
"""
_NOW: Final = ("DT_BIND_NOW", "DF_BIND_NOW", "DF_1_NOW")

#: What becomes of each tag and each flag, and why or how; what is not named is ignored.
OUTCOMES: Final[dict[str, tuple[Outcome, str]]] = {
    **dict.fromkeys(_TABLES.split(), ("honoured", TABLE)),
    **dict.fromkeys(_ANDROID.split(), ("honoured", "packed relocations, which glibc does not know")),
    **dict.fromkeys(_PRELINK.split(), ("ignored", "prelink is no more")),
    **dict.fromkeys(_SOLARIS.split(), ("ignored", "no ld.so for Linux knows it")),
    **dict.fromkeys(_NOW, ("honoured", "all symbols are bound at once")),
    **dict.fromkeys(("DT_REL", "DT_RELSZ", "DT_RELENT"), ("refused", "on x86-64, whose tables have addends")),
    "DT_NEEDED": ("honoured", "is loaded with it, and searched behind it"),
    "DT_SONAME": ("honoured", "what it is called by those that need it"),
    "DT_RPATH": ("honoured", "where its needs are looked for, if it has no DT_RUNPATH"),
    "DT_RUNPATH": ("honoured", "where its needs are looked for"),
    "DT_FILTER": ("honoured", "whose symbols come before its own"),
    "DT_AUXILIARY": ("honoured", "whose symbols come before its own; may be missing"),
    "DT_INIT": ("honoured", "called first"),
    "DT_FINI": ("honoured", "called last"),
    **dict.fromkeys(("DT_INIT_ARRAY", "DT_INIT_ARRAYSZ"), ("honoured", "constructors")),
    **dict.fromkeys(("DT_FINI_ARRAY", "DT_FINI_ARRAYSZ"), ("honoured", "destructors")),
    **dict.fromkeys(
        ("DT_PREINIT_ARRAY", "DT_PREINIT_ARRAYSZ"),
        ("honoured", "called before any constructor, when it is what is asked for"),
    ),
    **dict.fromkeys(("DT_SYMBOLIC", "DF_SYMBOLIC"), ("honoured", "its own symbols come first")),
    **dict.fromkeys(("DT_TEXTREL", "DF_TEXTREL"), ("refused", "unless --allow-text-relocations")),
    **dict.fromkeys(
        ("DT_BIND_NOW", "DF_BIND_NOW", "DF_1_NOW"), ("honoured", "all symbols are bound at once")
    ),
    **dict.fromkeys(("DT_FLAGS", "DT_FLAGS_1"), ("honoured", "flag by flag, as follows")),
    "DF_ORIGIN": ("honoured", "$ORIGIN is known for every library"),
    "DF_1_ORIGIN": ("honoured", "$ORIGIN is known for every library"),
    "DF_STATIC_TLS": ("ignored", "the relocations say so, too"),
    "DF_1_NODELETE": ("honoured", "stays until the process ends"),
    "DF_1_INITFIRST": ("honoured", "initialised before all that is loaded with it"),
    "DF_1_NOOPEN": ("refused", "must not be opened while a program runs"),
    "DF_1_NODEFLIB": ("honoured", "its needs are not looked for in the default directories"),
    "DF_1_PIE": ("refused", "a program"),
    "DF_1_GLOBAL": ("ignored", "who loads a library decides, says glibc"),
    "DF_1_INTERPOSE": ("ignored", "glibc knows it not; LD_PRELOAD does that"),
    "DT_DEBUG": ("ignored", "where a debugger finds what a program has loaded; of a program only"),
    "DT_AUDIT": ("ignored", "only a program's counts"),
    "DT_DEPAUDIT": ("ignored", "only a program's counts"),
    **dict.fromkeys(("DT_TLSDESC_PLT", "DT_TLSDESC_GOT"), ("ignored", "for binding TLS descriptors late")),
    "DT_SYMTAB_SHNDX": ("ignored", "sections are not used"),
    "DT_RELCOUNT": ("ignored", "belongs to DT_REL"),
    "DT_ANDROID_RELRCOUNT": ("ignored", "the table says it itself"),
}
_LONGEST: Final = 4096  # PATH_MAX of limits.h
_UNKNOWN: Final[tuple[Outcome, str]] = ("ignored", "ld.so does not know it, or not for this processor")


def asked_for(image: ElfImage) -> Iterator[Asked]:
    """Every entry of the dynamic section of ``image``, in order; the flags of one behind it."""
    for tag, value in image.dynamic.entries:
        text = None
        if tag in _TEXTS:
            try:
                text = image.text(value, tag_name(tag))
            except ElfError:
                text = None  # the rule "strings" says so
            if text is not None and len(text) > _LONGEST:
                text = None  # no path; thousands of entries may name one text of a megabyte
        yield Asked(tag_name(tag), value, text, *OUTCOMES.get(tag_name(tag), _UNKNOWN))
        prefix, names = _FLAGS.get(tag, ("", {}))
        known = {bit: name for name, bit in names.items() if isinstance(bit, int)}
        for bit in (1 << place for place in range(64) if value >> place & 1) if prefix else ():
            name = known.get(bit, f"{prefix}{bit:#x}")
            yield Asked(name, bit, None, *OUTCOMES.get(name, _UNKNOWN))
