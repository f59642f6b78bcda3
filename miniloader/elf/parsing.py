"""pyelftools at work: its declarations of records, its object for a file, and where its errors become ours.

pyelftools declares each record of an ELF file (``Elf_Ehdr``, ``Elf_Phdr``, ``Elf_Dyn``, …) for each class and
byte order, with the names of the values its fields may have; :mod:`miniloader.elf.layout` parses by them.
"""

from __future__ import annotations

import io
import os
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.structs import ELFStructs

from miniloader.elf.source import Source
from miniloader.errors import ElfError
from miniloader.forking import importing

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

__all__ = ["elffile_of", "structs"]

#: What making an ELFFile raises for a malformed file; not all errors are pyelftools' own.
_FAULTS: Final = (
    ELFError,
    ConstructError,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


@lru_cache(maxsize=64)
def structs(elf_class: int, order: str, machine: str = "") -> ELFStructs:
    """The declarations for 32 or 64 bits, ``order`` ``<`` or ``>``, and a machine (``X86_64``).

    >>> structs(64, "<").Elf_Phdr.sizeof(), structs(32, "<").Elf_Phdr.sizeof()
    (56, 32)
    """
    declared = ELFStructs(little_endian=order == "<", elfclass=elf_class)
    declared.create_basic_structs()
    declared.create_advanced_structs(None, f"EM_{machine}", None)
    return declared


def elffile_of(source: Source) -> ELFFile:
    """pyelftools' own object for ``source``, which it reads from as long as that is open.

    :class:`ElfError` when pyelftools cannot make one.  Its methods raise pyelftools' errors.
    """
    with importing:
        from elftools.elf.elffile import ELFFile

    try:
        return ELFFile(io.BufferedReader(_Stream(source)))
    except _FAULTS as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        found = f"what pyelftools cannot parse ({said})"
        raise ElfError(source.name, "ELF file", found, "a well-formed one") from None


class _Stream(io.RawIOBase):
    """A source as the kind of file that pyelftools reads: one that knows where it is."""

    def __init__(self, source: Source) -> None:
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to byte {start + offset}, before the start of the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        length = max(0, min(len(buffer), self._source.size - self._position))
        buffer[:length] = self._source.read(self._position, length, "file") if length else b""
        self._position += length
        return length
