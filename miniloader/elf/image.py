"""An ELF shared object as its file describes it: :class:`ElfImage`."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from itertools import compress, islice
from mmap import PAGESIZE
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from miniloader.elf.dynamic import (
    DT_AUXILIARY,
    DT_FILTER,
    DT_NEEDED,
    DT_RPATH,
    DT_RUNPATH,
    DT_SONAME,
    DT_STRSZ,
    DT_STRTAB,
    MOST_ENTRIES,
    Dynamic,
    parse_dynamic,
    string_at,
)
from miniloader.elf.header import Header, Section, Segment, read_header, read_sections, read_segments
from miniloader.elf.layout import record
from miniloader.elf.parsing import elffile_of
from miniloader.elf.plan import LoadPlan, plan_segments
from miniloader.elf.relocations import Relocations, read_relocations
from miniloader.elf.source import LARGE, Bytes, Source
from miniloader.elf.symbols import SymbolTable, read_symbols
from miniloader.elf.versions import Version, read_versions
from miniloader.errors import ElfError
from miniloader.forking import cached_property
from miniloader.showing import REPORT, Showing, dataframe
from miniloader.values import dataclass

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile


__all__ = ["ElfImage", "Tls", "notes_in", "numbered_notes", "read_image"]

_NEEDS: Final = {DT_NEEDED: "DT_NEEDED", DT_FILTER: "DT_FILTER", DT_AUXILIARY: "DT_AUXILIARY"}
_PATH: Final = 4096  # PATH_MAX of limits.h
_MOST_NOTES: Final = 4096
_MOST_NOTE_SEGMENTS: Final = 16
_AARCH64_FEATURES: Final = 0xC0000000  # GNU_PROPERTY_AARCH64_FEATURE_1_AND
_FEATURE_BTI: Final = 1
_PART: Final = 1 << 12  # bytes; a name is rarely longer


@dataclass(frozen=True)
class Tls:
    """``PT_TLS``: the template of each thread's block.  Sizes are bytes."""

    vaddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True, eq=False)
class ElfImage(Showing):
    """A shared object's file, decoded as far as it is asked for.

    The header and the segments are read at once; the rest (``dynamic``, ``symbols``, ``relocations``, …) is
    read on first use and raises :class:`~miniloader.errors.ElfError` when it is malformed.  What linking
    needs comes from ``PT_DYNAMIC``: section headers only name things.
    """

    path: str
    source: Source
    header: Header
    segments: tuple[Segment, ...]

    def __repr__(self) -> str:
        header = self.header
        return f"<ElfImage {self.path!r}: {header.elf_class}-bit {header.machine.lower()}>"

    def to_json(self, page_size: int | None = None) -> dict[str, Any]:
        """The object that ``inspect --json`` prints; pages have ``page_size`` bytes (default: as here)."""
        told: dict[str, Any] = REPORT.image_json(self, page_size)
        return told

    def to_dataframe(self) -> Any:
        """The dynamic symbols as a pandas ``DataFrame``, a row each; MiniloaderError without pandas."""
        return dataframe(REPORT.symbol_rows(self))

    # -- reading ----------------------------------------------------------------------------------

    @cached_property
    def loads(self) -> tuple[Segment, ...]:
        """The ``PT_LOAD`` segments that take memory."""
        return tuple([s for s in self.segments if s.type == "PT_LOAD" and s.memsz])

    def segment(self, kind: str) -> Segment | None:
        """The first segment of type ``kind`` (``PT_DYNAMIC``, …)."""
        return self._first_of.get(kind)

    def load_at(self, vaddr: int) -> Segment | None:
        """The ``PT_LOAD`` segment that the byte at ``vaddr`` is in; None where it is in none."""
        for load in self.loads:
            if load.vaddr <= vaddr < load.end:
                return load
        return None

    def file_offset(self, vaddr: int) -> int | None:
        """Where in the file the byte at ``vaddr`` is, ``None`` when it does not come from the file."""
        for load in self.loads:
            if load.vaddr <= vaddr < load.file_end:
                return load.file_offset + vaddr - load.vaddr
        return None

    def read(self, vaddr: int, length: int, field: str = "bytes") -> Bytes:
        """The ``length`` bytes of the file that are mapped at ``vaddr``, together."""
        return self.source.read(self.locate(vaddr, length, field), length, field) if length else b""

    def locate(self, vaddr: int, length: int, field: str = "bytes") -> int:
        """Where in the file the ``length`` bytes are that are mapped at ``vaddr``, together."""
        last = vaddr + length
        for start, end, extent_offset in self._extents:
            if start <= vaddr and last <= end:
                file_offset = extent_offset + vaddr - start
                if length >= LARGE:
                    self.source.refuse_hole(file_offset, length, field)
                return file_offset
        raise ElfError(
            self.path,
            field,
            f"vaddrs {vaddr:#x} to {last:#x}",
            "inside the file's part of one PT_LOAD",
        )

    def read_some(self, vaddr: int, least: int, most: int, field: str = "bytes") -> Bytes:
        """As :meth:`read`, ``most`` bytes, or as many as are there together, but ``least`` of them."""
        end = next((end for start, end, _ in self._extents if start <= vaddr < end), vaddr)
        return self.read(vaddr, max(least, min(most, end - vaddr)), field)

    @cached_property
    def elffile(self) -> ELFFile:
        """pyelftools' ``ELFFile`` of this file, for who knows it; it reads as long as ``source`` is open.

        :class:`ElfError` where pyelftools refuses the file; its methods raise pyelftools' own errors.

        >>> read_image(Source.open("/proc/self/exe")).elffile.header.e_ident.EI_CLASS
        'ELFCLASS64'
        """
        return elffile_of(self.source)

    # -- what the file says -----------------------------------------------------------------------

    @cached_property
    def dynamic(self) -> Dynamic:
        """The dynamic section; empty when there is no ``PT_DYNAMIC``."""
        segment = self.segment("PT_DYNAMIC")
        if segment is None:
            return Dynamic()
        size = min(segment.filesz, (MOST_ENTRIES + 1) * 2 * self.header.word)
        data = self.read(segment.vaddr, size, "PT_DYNAMIC")
        return parse_dynamic(data, self.header.elf_class, self.header.order, self.path)

    @cached_property
    def symbols(self) -> SymbolTable:
        """The dynamic symbol table."""
        return read_symbols(
            self.read,
            self.dynamic.tags,
            elf_class=self.header.elf_class,
            order=self.header.order,
            at_least=self.relocations.highest_symbol + 1,
            name=self.path,
            machine=self.header.machine,
            strings=self._string_table,
        )

    @cached_property
    def relocations(self) -> Relocations:
        """Every dynamic relocation."""
        return read_relocations(
            self.read,
            self.locate,
            self.source,
            self.dynamic.tags,
            elf_class=self.header.elf_class,
            order=self.header.order,
            machine=self.header.machine,
            name=self.path,
        )

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers, where the file has a usable table of them."""
        return read_sections(self.source, self.header)

    def section_at(self, vaddr: int) -> Section | None:
        """The allocated section that covers ``vaddr`` (``.tbss`` takes no memory and never does)."""
        for section in self.sections:
            if section.allocated and section.vaddr <= vaddr < section.end and section.name != ".tbss":
                return section
        return None

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """``DT_NEEDED``, in order."""
        return tuple(name for tag, name in self.needs if tag == DT_NEEDED)

    @cached_property
    def needs(self) -> tuple[tuple[int, str], ...]:
        """The tag and the name of each ``DT_NEEDED``, ``DT_FILTER`` and ``DT_AUXILIARY``, in order."""
        needs = []
        entries = self.dynamic.entries
        for tag, value in compress(entries, map(_NEEDS.__contains__, map(itemgetter(0), entries))):
            field = _NEEDS[tag]
            name = self.text(value, field)
            if len(name) >= _PATH:
                raise ElfError(self.path, field, f"a name of {len(name)} bytes", f"less than {_PATH}")
            needs.append((tag, name))
        return tuple(needs)

    @cached_property
    def soname(self) -> str | None:
        """``DT_SONAME``."""
        return self._string(DT_SONAME, "DT_SONAME")

    @cached_property
    def runpath(self) -> tuple[str, ...]:
        """``DT_RUNPATH``, one directory an element, as written (``$ORIGIN`` and all)."""
        text = self._string(DT_RUNPATH, "DT_RUNPATH")
        return () if text is None else tuple(text.split(":"))

    @cached_property
    def rpath(self) -> tuple[str, ...]:
        """``DT_RPATH``, one directory an element, as written."""
        text = self._string(DT_RPATH, "DT_RPATH")
        return () if text is None else tuple(text.split(":"))

    @cached_property
    def versions(self) -> dict[int, Version]:
        """Every symbol version it needs or defines, by its index in ``DT_VERSYM``."""
        return read_versions(
            self.read, self.dynamic.tags, self._string_table, order=self.header.order, name=self.path
        )

    @cached_property
    def interpreter(self) -> str | None:
        """The program that has to load it, ``PT_INTERP``: a path; None where no segment names one."""
        segment = self.segment("PT_INTERP")
        if segment is None:
            return None
        length = min(segment.filesz, _PATH)
        return os.fsdecode(string_at(self.source.read(segment.file_offset, length, "PT_INTERP"), 0))

    @cached_property
    def build_id(self) -> str | None:
        """The ``NT_GNU_BUILD_ID`` note in hexadecimal."""
        for note_name, note_type, description in islice(self._notes(), _MOST_NOTES):
            if note_name == b"GNU\0" and note_type == "NT_GNU_BUILD_ID":
                return description.hex()
        return None

    @cached_property
    def tls(self) -> Tls | None:
        """The thread-local storage template."""
        segment = self.segment("PT_TLS")
        return None if segment is None else Tls(segment.vaddr, segment.filesz, segment.memsz, segment.align)

    @cached_property
    def has_landing_pads(self) -> bool:
        """Whether all of its code is marked as having them (BTI: ``GNU_PROPERTY_AARCH64_FEATURE_1_AND``).

        Source: ELF for the Arm 64-bit architecture, "Program Property".
        """
        if self.header.machine != "AARCH64":
            return False
        return any(
            number == _AARCH64_FEATURES and value & _FEATURE_BTI
            for name, kind, description in islice(self._notes(), _MOST_NOTES)
            if name == b"GNU\0" and kind == "NT_GNU_PROPERTY_TYPE_0"
            for number, value in _properties(description, self.header.order)
        )

    @cached_property
    def executable_stack(self) -> bool:
        """Whether it asks for an executable stack: the last ``PT_GNU_STACK`` says, and without any the ABI.

        glibc's ``stackinfo.h``: DEFAULT_STACK_PERMS is executable on x86; so were stacks before that header.
        """
        for segment in reversed(self.segments):
            if segment.type == "PT_GNU_STACK":
                return "x" in segment.flags
        return self.header.machine in ("X86_64", "386")

    def plan(self, page_size: int = PAGESIZE) -> LoadPlan:
        """The mmap calls that load the image with pages of ``page_size`` bytes, by default this kernel's."""
        if page_size not in self._plans:
            self._plans[page_size] = plan_segments(
                self.segments, page_size, self.path, guarded=self.has_landing_pads
            )
        return self._plans[page_size]

    # -- inside -----------------------------------------------------------------------------------

    @cached_property
    def _first_of(self) -> dict[str, Segment]:
        """The first segment of each type."""
        return {segment.type: segment for segment in reversed(self.segments)}

    @cached_property
    def _extents(self) -> tuple[tuple[int, int, int], ...]:
        """Start and end of what the file gives, in vaddrs, and where it is there.

        Segments that touch, in memory and in the file, are one: a table may lie across both.
        """
        extents: list[tuple[int, int, int]] = []
        start, end, file_offset = 0, -1, 0
        for load in self.loads:
            if end == load.vaddr and file_offset + end - start == load.file_offset:
                end = load.file_end
                extents.pop()
            else:
                start, end, file_offset = load.vaddr, load.file_end, load.file_offset
            extents.append((start, end, file_offset))
        return tuple(extents)

    @cached_property
    def _plans(self) -> dict[int, LoadPlan]:
        """The load plans made so far, by page size."""
        return {}

    @cached_property
    def _string_table(self) -> Bytes:
        tags: Mapping[int, int] = self.dynamic.tags
        if DT_STRTAB not in tags:
            return b""
        table = self.read(tags[DT_STRTAB], tags.get(DT_STRSZ, 0), "DT_STRTAB")
        # What is behind the last NUL is no name: patchelf up to 0.14 leaves the beginning of one there.
        return table if table[-1:] in (b"", b"\0") else table[: table.rfind(b"\0") + 1]

    def text(self, offset: int, field: str) -> str:
        """The text at ``offset`` of the string table ``DT_STRTAB``; ``field`` it is names it in an error."""
        tags = self.dynamic.tags
        size = tags.get(DT_STRSZ, 0) if DT_STRTAB in tags else 0
        if offset >= size:
            raise ElfError(self.path, field, f"string offset {offset:#x}", f"inside the {size:#x} bytes")
        # Of a table of megabytes the part that matters; the names that are asked for lie together.
        start = offset // _PART * _PART
        if start not in self._parts:
            length = min(size - start, 2 * _PART)
            self._parts[start] = self.read(tags[DT_STRTAB] + start, length, "DT_STRTAB")
        part = self._parts[start]
        if part.find(b"\0", offset - start) < 0:
            part, start = self._string_table, 0
            if offset >= len(part):
                found = f"string offset {offset:#x}, where no NUL follows"
                raise ElfError(self.path, field, found, f"a string that ends inside the {size:#x} bytes")
        return os.fsdecode(string_at(part, offset - start))

    @cached_property
    def _parts(self) -> dict[int, Bytes]:
        """Parts of the string table, by where they begin."""
        return {}

    def _string(self, tag: int, field: str) -> str | None:
        """The text that ``tag`` names; None where it is not there."""
        offset = self.dynamic.tags.get(tag)
        return None if offset is None else self.text(offset, field)

    def _notes(self) -> Iterator[tuple[bytes, str, bytes]]:
        """Name, type and description of each note of the ``PT_NOTE`` segments (gABI, "Note Section")."""
        noted = (segment for segment in self.segments if segment.type == "PT_NOTE")
        for segment in islice(noted, _MOST_NOTE_SEGMENTS):
            if segment.filesz > 1 << 20:
                continue
            try:
                data = self.source.read(segment.file_offset, segment.filesz, "PT_NOTE")
            except ElfError:
                continue  # reported by the rule "segments-in-file"
            yield from notes_in(data, self.header.order, 8 if segment.align == 8 else 4)


def notes_in(data: Bytes, order: str, align: int) -> Iterator[tuple[bytes, str, bytes]]:
    """Name, type and description of each note in the bytes of a ``PT_NOTE`` (gABI, "Note Section").

    The type is pyelftools' name for it, or the number in hexadecimal.

    >>> from miniloader.elf.writer import build_id_note
    >>> list(notes_in(build_id_note("0123"), "<", 4))
    [(b'GNU\\x00', 'NT_GNU_BUILD_ID', b'\\x01#')]
    """
    layout = record(64, order, "Nhdr")  # which is the same in 32-bit files
    for name, kind, description in numbered_notes(data, order, align):
        yield name, layout.label("type", kind), description


def numbered_notes(data: Bytes, order: str, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, number of the type and description of each note, as :func:`notes_in`."""
    layout = record(64, order, "Nhdr")
    size, place = layout.size, 0
    while place + size <= len(data):
        name_size, length, kind = layout.row(data, "namesz", "descsz", "type", at=place)
        name_end = place + size + name_size
        start = -(-name_end // align) * align
        yield data[place + size : name_end], kind, data[start : start + length]
        place = -(-(start + length) // align) * align


def _properties(description: bytes, order: str) -> Iterator[tuple[int, int]]:
    """Number and first word of each property of a note of a 64-bit file (Linux gABI extensions, 2.1.7)."""
    place = 0
    while place + 12 <= len(description):
        number, size, value = struct.unpack_from(f"{order}3I", description, place)
        if size >= 4:
            yield number, value
        place += 8 + -(-size // 8) * 8


def read_image(source: Source) -> ElfImage:
    """The image in ``source``, of whatever type; the header and segments are read and checked now."""
    header = read_header(source)
    return ElfImage(source.name, source, header, read_segments(source, header))
