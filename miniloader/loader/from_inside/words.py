"""What dlerror(3) says of a library that is refused: ld.so's words, which programs look for.

Where ld.so does not refuse it, or has no words of its own, they are ours.  Source: glibc's ``elf/dl-load.c``.
"""

from __future__ import annotations

from typing import Final

from miniloader.errors import ElfError, MiniloaderError

__all__ = ["words_of"]

_NO_SEGMENTS: Final = "object file has no loadable segments"
#: Of a file at fault, by the field and how what was found in it begins.
_OF_FAULTS: Final = {
    ("e_phnum", "0"): _NO_SEGMENTS,
    ("program headers", "no PT_LOAD"): _NO_SEGMENTS,
    ("p_offset", ""): "ELF load command address/offset not page-aligned",
    ("e_type", "ET_EXEC"): "cannot dynamically load executable",
    ("DT_FLAGS_1", "DF_1_PIE"): "cannot dynamically load position-independent executable",
    ("DT_FLAGS_1", "DF_1_NOOPEN"): "shared object cannot be dlopen()ed",
    ("PT_DYNAMIC", "none"): "object file has no dynamic section",
    ("sections", "debugging information"): "object file has no dynamic section",
    ("DT_VERNEED", "no need of GLIBC_ABI_DT_RELR"): "DT_RELR without GLIBC_ABI_DT_RELR dependency",
}


def words_of(error: MiniloaderError) -> str:
    """What dlerror(3) says where ``error`` was raised.

    >>> words_of(ElfError("./a.so", "PT_LOAD[1].p_offset", "0x10 for p_vaddr 0x20", "the same remainder"))
    './a.so: ELF load command address/offset not page-aligned'
    """
    if error.ld_so is not None or not isinstance(error, ElfError):
        return error.ld_so or str(error)
    for (field, found), words in _OF_FAULTS.items():
        if error.field.rpartition(".")[2] == field and error.found.startswith(found):
            return f"{error.path}: {words}"
    return str(error)
