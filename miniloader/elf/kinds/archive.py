"""Archives: what ``ar`` puts object files into.

GNU's, thin ones (whose members lie beside them) and BSD's.  Source: ar(5), binutils' ``bfd/archive.c``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

from miniloader.elf.kinds.signature import ARCHIVE, THIN_ARCHIVE
from miniloader.elf.source import Source
from miniloader.errors import ElfError
from miniloader.suggestions import did_you_mean
from miniloader.values import dataclass

__all__ = ["Archive", "Member", "member_named", "read_archive", "split_member"]

_HEADER: Final = 60  # bytes
_END: Final = b"`\n"
_TABLES: Final = (b"/", b"/SYM64/", b"//", b"__.SYMDEF", b"__.SYMDEF SORTED")  # of symbols, of long names
_BSD_LONG: Final = b"#1/"
_LONGEST_NAME: Final = 4096
_MOST_NAMES: Final = 1 << 26  # bytes of the table of long names
_MEMBER: Final = re.compile(r"(.+)\(([^()]+)\)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A member: ``size`` bytes at ``file_offset`` of the archive.

    Of a thin archive's, ``path`` is the file that it stands for, from the directory of the archive on.
    """

    name: str
    file_offset: int
    size: int
    path: str | None = None


@dataclass(frozen=True)
class Archive:
    """An archive and its members, in order; tables of symbols and names are none."""

    path: str
    thin: bool
    members: tuple[Member, ...]


def split_member(text: str) -> tuple[str, str] | None:
    """The archive and the member that ``text`` names, as ld and nm write it; None where it names none.

    >>> split_member("libm.a(s_sin.o)"), split_member("libm.a")
    (('libm.a', 's_sin.o'), None)
    """
    match = _MEMBER.fullmatch(text)
    return None if match is None else (match[1], match[2])


def read_archive(source: Source) -> Archive:
    """The archive in ``source``; :class:`ElfError` where the header of a member is malformed."""
    start = bytes(source.read(0, len(ARCHIVE), "archive"))
    if start not in (ARCHIVE, THIN_ARCHIVE):
        raise ElfError(source.name, "magic", repr(start)[1:], f"{ARCHIVE!r} (this is no archive)")
    thin = start == THIN_ARCHIVE
    return Archive(source.name, thin, tuple(_members(source, thin)))


def _members(source: Source, thin: bool) -> Iterator[Member]:
    directory, names = os.path.dirname(source.name), b""
    offset = len(ARCHIVE)
    while offset < source.size:
        header = bytes(source.read(offset, min(_HEADER, source.size - offset), "archive member"))
        title = f"header of the member at {offset:#x}"
        if len(header) < _HEADER or header[58:] != _END:
            found = f"{len(header)} bytes" if len(header) < _HEADER else repr(header[58:])[1:]
            raise ElfError(source.name, title, found, "60 bytes, the last two '`\\n'")
        label, size = header[:16].rstrip(b" "), _number(source, title, header[48:58])
        start = offset + _HEADER
        is_table = label in _TABLES
        held = size if is_table or not thin else 0
        if start + held > source.size:
            found = f"{size} bytes at {start:#x}"
            raise ElfError(source.name, title, found, f"an end within the file of {source.size:#x} bytes")
        if label == b"//" and not names:  # there is one
            names = bytes(source.read(start, min(size, _MOST_NAMES), "names of members"))
        elif not is_table:
            member = _member(source, title, label, names, start, size)
            if member.name not in ("__.SYMDEF", "__.SYMDEF SORTED"):
                place = os.path.join(directory, member.name) if thin else None
                yield Member(member.name, member.file_offset, member.size, place)
        offset = start + held + (held & 1)


def _number(source: Source, title: str, digits: bytes) -> int:
    text = digits.rstrip(b" ")
    if not text.isdigit():
        raise ElfError(source.name, f"size in the {title}", repr(digits)[1:], "a decimal number")
    return int(text)


def _member(source: Source, title: str, label: bytes, names: bytes, start: int, size: int) -> Member:
    """The member with its name: in the header, in the table of long names, or before its bytes (BSD)."""
    if label.startswith(_BSD_LONG):
        length = _number(source, title, label[3:])
        if length > min(size, _LONGEST_NAME):
            raise ElfError(source.name, title, f"a name of {length} bytes", f"at most {_LONGEST_NAME}")
        name = bytes(source.read(start, length, "name of a member")).rstrip(b"\0")
        return Member(os.fsdecode(name), start + length, size - length)
    if label[:1] == b"/" and label[1:2].isdigit():
        place = label[1:].partition(b":")[0]
        begin = _number(source, title, place)
        end = names.find(b"\n", begin, begin + _LONGEST_NAME)
        if not 0 <= begin < len(names) or end < 0:
            raise ElfError(source.name, title, f"name {os.fsdecode(label)}", "one within the table of names")
        return Member(os.fsdecode(names[begin:end].removesuffix(b"/")), start, size)
    return Member(os.fsdecode(label.removesuffix(b"/")), start, size)


def member_named(archive: Archive, source: Source, name: str) -> Source:
    """The file that the member ``name`` is; of several of that name the first.  ``source`` is closed."""
    members = [member for member in archive.members if member.name == name]
    if not members:
        source.close()
        names = [member.name for member in archive.members]
        hint = did_you_mean(name, names) or f"miniloader inspect {archive.path} lists them"
        raise ElfError(archive.path, "member", f"none called {name}", "one of its members", hint=hint)
    member, title = members[0], f"{archive.path}({name})"
    try:
        if member.path is not None:
            return Source.open(member.path)
        return Source.from_fd(source.fd, name=title, start=member.file_offset, size=member.size)
    finally:
        source.close()
