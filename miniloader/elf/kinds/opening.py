"""Files of whatever kind: what is in them, by what they are."""

from __future__ import annotations

import os

from miniloader.elf.header import Segment, read_header, read_segments
from miniloader.elf.image import ElfImage, read_image
from miniloader.elf.kinds.archive import Archive, member_named, read_archive, split_member
from miniloader.elf.kinds.linker_script import LinkerScript, is_linker_script, read_linker_script
from miniloader.elf.kinds.object_file import laid_out
from miniloader.elf.kinds.signature import ARCHIVE, HEAD, THIN_ARCHIVE
from miniloader.elf.source import Source
from miniloader.errors import ElfError

__all__ = ["open_file", "open_image"]


def open_file(path: str | os.PathLike[str] | Source) -> ElfImage | Archive | LinkerScript:
    """What is in the file ``path``: an ELF file of any kind, an archive, or a linker script.

    ``libx.a(member.o)`` is that member.  Raises :class:`ElfError` for anything else, which is named for what
    it is.  Nothing is mapped, nothing is run.

    >>> open_file("/proc/self/exe").header.type in ("EXEC", "DYN")
    True
    """
    source = path if isinstance(path, Source) else _source(os.fspath(path))
    try:
        head = bytes(source.read(0, min(HEAD, source.size), "file"))
        if head.startswith((ARCHIVE, THIN_ARCHIVE)):
            return read_archive(source)
        if head[:4] != b"\x7fELF" and is_linker_script(head):
            return read_linker_script(source)
        return _image(source)
    except ElfError:
        source.close()
        raise


def open_image(path: str | os.PathLike[str] | Source) -> ElfImage:
    """The ELF file ``path``, of any kind; an object file is laid out (:class:`ObjectImage`).

    Raises :class:`ElfError` for what is no ELF file.
    """
    source = path if isinstance(path, Source) else _source(os.fspath(path))
    try:
        return _image(source)
    except ElfError:
        source.close()
        raise


def _source(path: str) -> Source:
    """The file, or the member of an archive, that ``path`` names."""
    named = None if os.path.exists(path) else split_member(path)
    if named is None:
        return Source.open(path)
    source = Source.open(named[0])
    try:
        archive = read_archive(source)
    except ElfError:
        source.close()
        raise
    return member_named(archive, source, named[1])


def _image(source: Source) -> ElfImage:
    header = read_header(source)
    if header.type == "REL" and header.phnum == 0:
        return laid_out(ElfImage(source.name, source, header, ()))
    if header.type == "CORE":
        segments: tuple[Segment, ...] = read_segments(source, header) if header.phnum else ()
        return ElfImage(source.name, source, header, segments)
    return read_image(source)
