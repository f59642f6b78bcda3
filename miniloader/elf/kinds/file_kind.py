"""What kind of ELF file an image is: one table, with what to use where a library is asked for."""

from __future__ import annotations

from typing import Final, Literal

from miniloader.elf.dynamic import DF_1_PIE, DT_FLAGS_1
from miniloader.elf.header import LINK_IT, Section
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["KINDS_OF_FILE", "FileKind", "is_debug_only", "kind_of", "refuse_unlinked"]

KindName = Literal[
    "library", "program", "pie", "static-program", "static-pie", "object", "core", "debug-only", "other"
]


@dataclass(frozen=True)
class FileKind:
    """A kind of ELF file: its ``name`` for scripts, what it is in words, what to use in place of ``load``."""

    name: KindName
    words: str
    instead: str | None

    @property
    def is_program(self) -> bool:
        """Whether the kernel starts it."""
        return self.name in ("program", "pie", "static-program", "static-pie")

    @property
    def is_static(self) -> bool:
        """Whether it is a program that no dynamic linker links."""
        return self.name in ("static-program", "static-pie")


_PROGRAM: Final = (
    "`miniloader check` says whether it will start, `tree` what it needs, `inspect` how it is mapped, "
    "`audit PID` what its processes share"
)

KINDS_OF_FILE: Final = {
    kind.name: kind
    for kind in (
        FileKind("library", "a shared object", None),
        FileKind("program", "a program for a fixed address", _PROGRAM),
        FileKind("pie", "a position-independent program", _PROGRAM),
        FileKind("static-program", "a static program for a fixed address", _PROGRAM),
        FileKind("static-pie", "a static position-independent program", _PROGRAM),
        FileKind("object", "an object file, not linked yet", LINK_IT),
        FileKind("core", "a core dump of a process", "`miniloader inspect` shows whose, gdb what it did"),
        FileKind(
            "debug-only",
            "debugging information only: its code and data are in the file that it was split off",
            "give that file; `miniloader disasm` of it finds this one by its build-id or .gnu_debuglink",
        ),
        FileKind("other", "of a type that is not known here", None),
    )
}
"""Every kind, by its name."""


def kind_of(image: ElfImage) -> FileKind:
    """What kind of file ``image`` is.

    >>> from miniloader.elf import Source, read_image
    >>> kind_of(read_image(Source.open("/proc/self/exe"))).is_program
    True
    """
    return KINDS_OF_FILE[_name_of(image)]


def _name_of(image: ElfImage) -> KindName:
    kind = image.header.type
    if kind == "REL":
        return "object"
    if kind == "CORE":
        return "core"
    if kind not in ("EXEC", "DYN"):
        return "other"
    if is_debug_only(image):
        return "debug-only"
    if kind == "EXEC":
        return "program" if image.segment("PT_INTERP") else "static-program"
    try:
        if not image.dynamic.flag(DT_FLAGS_1, DF_1_PIE):
            return "library"
    except ElfError:
        return "library"  # the rules say what is wrong with its dynamic section
    return "pie" if image.segment("PT_INTERP") else "static-pie"


def refuse_unlinked(image: ElfImage) -> None:
    """Raise :class:`ElfError` for what ld.so never links: object files, core dumps, debugging information."""
    kind = kind_of(image)
    if kind.name in ("object", "core", "debug-only"):
        raise ElfError(image.path, "file", kind.words, "a program or a library", hint=kind.instead)


def is_debug_only(image: ElfImage) -> bool:
    """Whether all that would be in memory, but notes, has been left out (``objcopy --only-keep-debug``)."""
    held = [section for section in image.sections if section.allocated and not _is_note(section)]
    return bool(held) and all(section.type == "SHT_NOBITS" for section in held)


def _is_note(section: Section) -> bool:
    return section.type == "SHT_NOTE"
