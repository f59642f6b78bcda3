"""Separate debug files: what was stripped from a library, ``.symtab`` above all, where the system keeps it.

A file says by its build-id, or by ``.gnu_debuglink``, which debug file is its own; gdb looks in the same
places ("Debugging Information in Separate Files").  What another file says is believed only where it has the
same sections at the same places, so nobody's symbols are mixed with a library's.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from typing import Final

from miniloader.elf.image import ElfImage, read_image
from miniloader.elf.source import Source
from miniloader.elf.symbols import SymbolTable
from miniloader.elf.symtab import read_symtab
from miniloader.errors import ElfError, MiniloaderError

__all__ = ["DEBUG_DIRECTORY", "debug_files", "read_all_symbols"]

DEBUG_DIRECTORY: Final = "/usr/lib/debug"
_MOST_SUMMED: Final = 256 << 20  # bytes of a debug file whose checksum is made
_LONGEST_LINK: Final = 4096 + 8  # bytes of a .gnu_debuglink: a name, and the checksum
_CHUNK: Final = 1 << 20


def read_all_symbols(image: ElfImage) -> SymbolTable:
    """The symbols of ``.symtab``, or of that of the separate debug file; none where there is neither."""
    table = read_symtab(image)
    if len(table):
        return table
    return next((symbols for symbols in map(read_symtab, debug_files(image)) if len(symbols)), table)


def debug_files(image: ElfImage) -> Iterator[ElfImage]:
    """The files that were split off ``image``: those of its build-id, or of the checksum in its link."""
    for path, checksum in _candidates(image):
        try:
            debug = read_image(Source.open(path))
            belongs = _belongs(debug, image, checksum)
        except MiniloaderError:  # there is none, or it makes no sense
            continue
        if belongs:
            yield debug


def _candidates(image: ElfImage) -> Iterator[tuple[str, int | None]]:
    """Where a debug file may be, and the checksum that it must have; None: the build-id says enough."""
    # Nothing is looked for beside what a server gives, who may not answer.
    path = os.path.realpath(image.path) if image.path and image.source.calls is os else ""
    root = re.match(r"/proc/(\d+|self)/root(?=/)", path)
    roots = ["", *([root[0]] if root else [])]
    build_id = image.build_id
    if build_id and len(build_id) > 2:
        for prefix in roots:
            yield f"{prefix}{DEBUG_DIRECTORY}/.build-id/{build_id[:2]}/{build_id[2:]}.debug", None
    link = _link(image)
    if link is None or not path or path.startswith("/proc/") != bool(root):
        return
    name, checksum = link
    directory = os.path.dirname(path)
    prefix = root[0] if root else ""
    apart = f"{prefix}{DEBUG_DIRECTORY}{directory.removeprefix(prefix)}"
    for place in (directory, f"{directory}/.debug", apart):
        yield f"{place}/{name}", None if build_id else checksum


def _link(image: ElfImage) -> tuple[str, int] | None:
    """The file's name and the checksum in ``.gnu_debuglink``; None where there is none, or it is no name."""
    section = next((section for section in image.sections if section.name == ".gnu_debuglink"), None)
    if section is None or not 8 <= section.size <= _LONGEST_LINK:
        return None
    try:
        data = bytes(image.source.read(section.file_offset, section.size, ".gnu_debuglink"))
    except ElfError:
        return None
    name = os.fsdecode(data.partition(b"\0")[0])
    if not name or "/" in name or name in (".", ".."):
        return None
    return name, int.from_bytes(data[-4:], "little" if image.header.order == "<" else "big")


def _belongs(debug: ElfImage, image: ElfImage, checksum: int | None) -> bool:
    """Whether ``debug`` was split off ``image``: the same sections in memory, and build-id or checksum."""
    if _in_memory(debug) != _in_memory(image) or not _in_memory(image):
        return False
    if checksum is None:
        return debug.build_id == image.build_id
    size = debug.source.size
    if size > _MOST_SUMMED:
        return False
    found = 0
    for start in range(0, size, _CHUNK):
        found = zlib.crc32(debug.source.read(start, min(_CHUNK, size - start), "debug file"), found)
    return found == checksum


def _in_memory(image: ElfImage) -> list[tuple[str, int, int]]:
    return [(section.name, section.vaddr, section.size) for section in image.sections if section.allocated]
