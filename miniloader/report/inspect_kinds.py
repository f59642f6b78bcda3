"""What ``inspect`` says of files that are not linked: object files, core dumps, archives, linker scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.elf.header import Section
from miniloader.elf.kinds.archive import Archive
from miniloader.elf.kinds.core_dump import CoreDump, read_core, signal_name
from miniloader.elf.kinds.file_kind import FileKind
from miniloader.elf.kinds.linker_script import LinkerScript
from miniloader.elf.kinds.object_file import SectionRelocations, section_relocations
from miniloader.errors import ElfError, printable
from miniloader.json_schema import BOOL, COUNT, TEXT, array, by_name, keys, nullable, record, words
from miniloader.report.numbers import count, size
from miniloader.report.text import Cell, Part, Table, heading, more, pairs

__all__ = [
    "ARCHIVE_SCHEMA",
    "KEYS",
    "SCRIPT_SCHEMA",
    "core",
    "of_kind",
    "other",
    "other_json",
    "section_flags",
    "sections",
]

_MOST_ROWS: Final = 1000  # of a list for people; --json has all
#: The letters of section flags by their bits, as readelf writes them (gABI 4, sh_flags; GNU: retain, mbind).
_FLAGS: Final = dict(enumerate("WAX_MSILOGTC")) | {21: "R", 24: "D", 31: "E"}
_OF_MACHINE: Final = {"X86_64": {28: "l"}, "ARM": {29: "y"}, "PPC": {28: "v"}}  # large, pure code, VLE


def section_flags(section: Section, machine: str) -> str:
    """``AX``: the letters of its flags, as readelf writes them of a file for that machine.

    >>> section_flags(Section(1, ".text", "SHT_PROGBITS", 0, 64, 3, 0, True, 6), "X86_64")
    'AX'
    """
    letters = _FLAGS | _OF_MACHINE.get(machine, {})
    return "".join(
        letters[bit] for bit in sorted(letters) if section.flags >> bit & 1 and letters[bit] != "_"
    )


# ----------------------------------------------------------------------------------------------- JSON
def of_kind(image: ElfImage, kind: FileKind) -> dict[str, Any]:
    """The keys that ``inspect --json`` has for files of this kind alone."""
    if kind.name in ("object", "debug-only"):
        return {"sections": _sections_json(image)}
    if kind.name == "core":
        return {"core": _core_json(read_core(image))}
    return {}


def _sections_json(image: ElfImage) -> list[dict[str, Any]]:
    relocated: dict[str, Counter[str]] = {}
    for row in _relocations_of(image):
        relocated.setdefault(row.target, Counter()).update(row.kinds)
    return [
        {
            "name": section.name,
            "type": section.type,
            "flags": section_flags(section, image.header.machine),
            "file_offset": section.file_offset,
            "size": section.size,
            "in_file": section.type != "SHT_NOBITS",
            "relocations": dict(relocated.get(section.name, {})),
        }
        for section in image.sections[1:]
    ]


def _relocations_of(image: ElfImage) -> tuple[SectionRelocations, ...]:
    try:
        return section_relocations(image) if image.header.type == "REL" else ()
    except ElfError:
        return ()


def _core_json(dump: CoreDump) -> dict[str, Any]:
    return {
        "pid": dump.pid,
        "program": dump.program,
        "command": dump.command,
        "signal": dump.signal,
        "fault": dump.fault,
        "threads": [asdict(thread) for thread in dump.threads],
        "files": [asdict(file) for file in dump.files],
    }


def other_json(held: Archive | LinkerScript) -> dict[str, Any]:
    """The object that ``inspect --json`` prints for what is no ELF file."""
    if isinstance(held, Archive):
        members = [asdict(member) for member in held.members]
        return {"path": held.path, "kind": "thin-archive" if held.thin else "archive", "members": members}
    inputs = [asdict(item) for item in held.inputs]
    return {
        "path": held.path, "kind": "linker-script", "output_format": held.output_format, "inputs": inputs,
    }  # fmt: skip


KEYS: Final = {
    "sections": array(record(
        keys(TEXT, "name type flags"), keys(COUNT, "file_offset size"), {"in_file": BOOL},
        {"relocations": by_name(COUNT)},
    )),
    "core": record(
        keys(nullable(COUNT), "pid signal fault"), keys(nullable(TEXT), "program command"),
        {"threads": array(record(keys(COUNT, "tid signal")))},
        {"files": array(record(keys(COUNT, "start end file_offset"), {"path": TEXT}))},
    ),
}  # fmt: skip
"""What :func:`of_kind` gives."""
ARCHIVE_SCHEMA: Final = record(
    {"path": TEXT, "kind": words("archive thin-archive")},
    {"members": array(record({"name": TEXT, "path": nullable(TEXT)}, keys(COUNT, "file_offset size")))},
)
SCRIPT_SCHEMA: Final = record(
    {"path": TEXT, "kind": words("linker-script"), "output_format": nullable(TEXT)},
    {"inputs": array(record(
        {"name": TEXT, "command": words("GROUP INPUT"), "as_needed": BOOL, "path": nullable(TEXT)}
    ))},
)  # fmt: skip


# --------------------------------------------------------------------------------------------- people
def sections(image: ElfImage) -> Iterator[Part]:
    """The sections of an object file, or of a file of debugging information, and their relocations."""
    table = image.sections[1:]
    if not table:
        yield heading("Sections", "none that can be read")
        return
    left_out = sum(section.type == "SHT_NOBITS" for section in table)
    about = f"{len(table):,}"
    if image.header.type != "REL":
        about += f", {left_out:,} of which only say how large they are (NOBITS): their bytes are elsewhere"
    yield heading("Sections", about)
    rows: list[tuple[Cell, ...]] = []
    for section in table[:_MOST_ROWS]:
        kind = section.type.removeprefix("SHT_")
        style = "dim" if kind == "NOBITS" else ""
        place = "not in the file" if kind == "NOBITS" else f"{section.file_offset:#x}"
        flags = section_flags(section, image.header.machine)
        rows.append((
            f"{section.index}", printable(section.name), (kind, style), flags,
            (place, style), f"{section.size:#x}",
        ))  # fmt: skip
    yield Table((">", "section", "type", "flags", "offset", ">size"), rows, 2)
    if len(table) > _MOST_ROWS:
        yield (f"  {more(len(table) - _MOST_ROWS, 'sections')} (--json lists all)",)
    if image.header.type == "REL":
        yield ()
        yield from _relocations(image)


def _relocations(image: ElfImage) -> Iterator[Part]:
    """Of each section, how many relocations the linker will apply to it, by kind."""
    listed = section_relocations(image)
    total = sum(row.count for row in listed)
    yield heading("Relocations", f"{total:,}, for the linker, by the section that they are of")
    rows: list[tuple[Cell, ...]] = []
    for row in listed[:_MOST_ROWS]:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in row.kinds.items())
        rows.append((f"{row.count:,}", printable(row.target), (kinds, "dim")))
    yield Table((">count", "section", "kinds"), rows, 2)
    if len(listed) > _MOST_ROWS:
        yield (f"  {more(len(listed) - _MOST_ROWS, 'sections')} (--json lists all)",)


def core(image: ElfImage) -> Iterator[Part]:
    """Whose memory it was, how the process ended, its threads, and the files that it had mapped."""
    dump = read_core(image)
    yield heading("Process", "as the notes of the core dump say")
    facts = [
        ("process", None if dump.pid is None else f"{dump.pid}"),
        ("program", dump.program),
        ("command", dump.command),
        ("ended by", None if not dump.signal else signal_name(dump.signal)),
        ("fault at", None if dump.fault is None else f"{dump.fault:#x}"),
        ("threads", f"{len(dump.threads):,}"),
        ("memory", _memory(image)),
    ]
    yield pairs(((name, printable(said)) for name, said in facts if said is not None), indent=2)
    for fault in dump.faults[:3]:
        yield ((printable(f"  {fault.field}: found {fault.found}, expected {fault.expected}"), "red"),)
    if len(dump.threads) > 1:
        yield ()
        yield heading("Threads", "the one that the signal was for comes first")
        threads = [
            (f"{thread.tid}", signal_name(thread.signal) if thread.signal else "") for thread in dump.threads
        ]
        yield Table((">thread", "signal"), threads[:_MOST_ROWS], 2)
        if len(threads) > _MOST_ROWS:
            yield (f"  {more(len(threads) - _MOST_ROWS, 'threads')} (--json lists all)",)
    yield ()
    paths = {file.path for file in dump.files}
    yield heading("Mapped files", f"{count(len(dump.files), 'mapping')} of {count(len(paths), 'file')}")
    rows = [
        (f"{file.start:#x}", f"{file.end:#x}", f"{file.file_offset:#x}", printable(file.path))
        for file in dump.files[:_MOST_ROWS]
    ]
    yield Table((">from", ">to", ">offset", "file"), rows, 2)
    if len(dump.files) > _MOST_ROWS:
        yield (f"  {more(len(dump.files) - _MOST_ROWS, 'mappings')} (--json lists all)",)


def _memory(image: ElfImage) -> str:
    """How many mappings the process had, and how much of them the file holds."""
    loads = image.loads
    held, mapped = sum(load.filesz for load in loads), sum(load.memsz for load in loads)
    return f"{count(len(loads), 'mapping')}, {size(mapped)}; {size(held)} of that in the file"


def other(held: Archive | LinkerScript) -> Iterator[Part]:
    """What people see of what is no ELF file."""
    return _archive(held) if isinstance(held, Archive) else _script(held)


def _archive(held: Archive) -> Iterator[Part]:
    """The members of an archive."""
    yield ((printable(held.path), "bold"),)
    where = "a thin archive: its members lie in files of their own" if held.thin else "an archive"
    yield pairs([("kind", where)], indent=2)
    yield ()
    yield heading("Members", f"{len(held.members):,}; one of them: '{printable(held.path)}(MEMBER)'")
    rows = [
        (
            "" if held.thin else f"{member.file_offset:#x}",
            f"{member.size:,}",
            printable(member.path or member.name),
        )
        for member in held.members[:_MOST_ROWS]
    ]
    yield Table((">offset", ">bytes", "member"), rows, 2)
    if len(held.members) > _MOST_ROWS:
        yield (f"  {more(len(held.members) - _MOST_ROWS, 'members')} (--json lists all)",)


def _script(held: LinkerScript) -> Iterator[Part]:
    """The files that ld reads in place of a linker script."""
    yield ((printable(held.path), "bold"),)
    library = held.library
    see = f": see {printable(library.path or library.name)}" if library is not None else ""
    kind = f"a linker script{see}"
    facts = [("kind", kind), ("format", printable(held.output_format or ""))]
    yield pairs([(name, said) for name, said in facts if said], indent=2)
    yield ()
    yield heading("Inputs", "the files that ld reads in its place")
    rows: list[tuple[Cell, ...]] = [
        (
            item.command,
            printable(item.name),
            ("only if needed" if item.as_needed else "", "dim"),
            ("" if item.path == item.name else printable(item.path or "not found"), "dim"),
        )
        for item in held.inputs
    ]
    yield Table((), rows, 2)
