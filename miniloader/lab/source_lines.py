"""Which line of source code machine code comes from: DWARF, in the file or in one that was split off it.

The tables are read by pyelftools, in a child with a bound of time and of memory: what a file claims in them
may take any.
"""

from __future__ import annotations

import math
import os
import resource
import signal
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn

from miniloader.elf import ElfImage
from miniloader.elf.debug_file import debug_files
from miniloader.forking import cached_property
from miniloader.lab.line_program import LineRow, line_rows
from miniloader.lab.workers.child import ForkedProcess, crash_quietly
from miniloader.values import dataclass

__all__ = ["SourceLines", "debug_image", "source_lines"]

_SECONDS: Final = 1.2  # of a processor
_MEMORY: Final = 1 << 27  # bytes more than this process has, and
_OF_FILE: Final = 4  # as often what the file holds: so far real tables are compressed
_MOST_ROWS: Final = 1 << 18
_MOST_BYTES: Final = 1 << 26
_MOST_UNITS: Final = 1 << 16
_LINES: Final = (".debug_line", ".zdebug_line")
_EXECUTABLE: Final = 4  # SHF_EXECINSTR


@dataclass(frozen=True)
class SourceLines:
    """The lines of some code: ``rows`` are vaddr, file and line (0: of no line), by ascending vaddr.

    ``path`` is the file that says so; ``fault`` what kept some of it from being read.
    """

    path: str
    rows: tuple[tuple[int, str, int], ...]
    fault: str | None = None

    def at(self, vaddr: int) -> tuple[str, int] | None:
        """File and line of the instruction at ``vaddr``; None where that is not known."""
        place = bisect_right(self._vaddrs, vaddr) - 1
        if place < 0 or self.rows[place][2] == 0:
            return None
        return self.rows[place][1], self.rows[place][2]

    @cached_property
    def _vaddrs(self) -> list[int]:
        return [row[0] for row in self.rows]


def source_lines(image: ElfImage, start: int, end: int) -> SourceLines | None:
    """The lines of the code from ``start`` to ``end``, vaddrs; None where no file says them."""
    described = debug_image(image)
    if described is None or not _has_vaddrs(image, start):
        return None
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        try:
            process = ForkedProcess(lambda: _tell(described, start, end, writing))
        finally:
            os.close(writing)
        with process:
            data = pipe.read(_MOST_BYTES)
            if len(data) == _MOST_BYTES:
                process.kill()
            code = process.wait()
    rows = tuple(_rows_of(data))
    fault = None
    if code != 0:
        last = os.fsdecode(data.rpartition(b"\n")[2])[:200]
        limits = f"it takes more than {_SECONDS} s, or {_most(described) >> 20} MiB"
        fault = last if code == 1 and last else limits
    return SourceLines(described.path, rows, fault)


def _has_vaddrs(image: ElfImage, vaddr: int) -> bool:
    """Whether DWARF's addresses are the image's: in an object file only those of one section of code are."""
    if image.header.type != "REL":
        return True
    code = [section for section in image.sections if section.flags & _EXECUTABLE and section.size]
    return len(code) == 1 and code[0].vaddr == 0 and vaddr < code[0].end


# ------------------------------------------------------------------------------------ where the tables are
def debug_image(image: ElfImage) -> ElfImage | None:
    """The image that has the tables of lines: ``image`` itself, or a file that was split off it."""
    if any(section.name in _LINES and section.type != "SHT_NOBITS" for section in image.sections):
        return image
    split_off = (
        debug for debug in debug_files(image) if any(section.name in _LINES for section in debug.sections)
    )
    return next(split_off, None)


def _most(image: ElfImage) -> int:
    """How many bytes of memory its tables may take."""
    source = image.source
    return _MEMORY + _OF_FILE * sum(end - start for start, end in source.parts(0, source.size))


# ------------------------------------------------------------------------------------------- in the child
def _tell(image: ElfImage, start: int, end: int, writing: int) -> int:
    """In the child: write the rows of ``start`` to ``end``, or a last line that says what is wrong."""
    crash_quietly()
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(_SECONDS), math.ceil(_SECONDS)))
    signal.signal(signal.SIGPROF, _too_late)  # between two operations: what is known by then is told
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + _most(image),) * 2)
    with os.fdopen(os.dup(writing), "wb") as pipe:
        rows, said = set[tuple[int, bytes, int]](), ""
        try:
            for row in _read(image, start, end):
                rows.add(row)
                if len(rows) == _MOST_ROWS:
                    said = f"these are the first {_MOST_ROWS:,} lines that were found"
                    break
        except MemoryError:
            said = f"it takes more than {_most(image) >> 20} MiB; lines not found by then are left out"
        except Exception as error:  # noqa: BLE001 - whatever pyelftools raises for a malformed table
            said = " ".join(str(error).split()) or type(error).__name__
        signal.setitimer(signal.ITIMER_PROF, 0)
        for vaddr, path, line in sorted(rows):
            if b"\n" not in path:
                pipe.write(b"%d %d %s\n" % (vaddr, line, path))
        pipe.write(said.encode("utf-8", "backslashreplace")[:200])
    return 1 if said else 0


def _too_late(number: int, frame: object) -> NoReturn:
    raise TimeoutError(f"it takes more than {_SECONDS} s; lines not found by then are left out")


def _read(image: ElfImage, start: int, end: int) -> Iterator[tuple[int, bytes, int]]:
    """Vaddr, file and line where lines begin from ``start`` to ``end``, and line 0 where a sequence ends."""
    dwarf = image.elffile.get_dwarf_info(follow_links=False)
    for unit in _units(dwarf, start, end):
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        names: dict[int, bytes] = {}
        for vaddr, file, line in _within(line_rows(program), start, end):
            if file not in names:
                names[file] = _file_name(program, unit, file)
            yield vaddr, names[file], line


def _within(rows: Iterable[LineRow], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Vaddr, file and line of those ``rows`` that are of the code from ``start`` to ``end``."""
    last: LineRow | None = None
    for row in rows:
        # Of several rows at one place the last one says it best.
        if last is not None and start < row.vaddr != last.vaddr < end:
            yield max(last.vaddr, start), last.file, last.line
        if row.ends and last is not None and start < row.vaddr < end:
            yield row.vaddr, row.file, 0
        last = None if row.ends else row


def _file_name(program: Any, unit: Any, number: int) -> bytes:
    """The path of a file of a line program; relative where the compiler was not told more."""
    header = program.header
    first = 0 if header.version >= 5 else 1
    entry = header.file_entry[number - first]
    name, place = bytes(entry.name), entry.dir_index
    directories = header.include_directory
    if header.version >= 5:
        directory = bytes(directories[place]) if place < len(directories) else b""
        if place and not directory.startswith(b"/") and directories:
            directory = os.path.join(bytes(directories[0]), directory)
    else:
        made_in = unit.get_top_DIE().attributes.get("DW_AT_comp_dir")
        base = bytes(made_in.value) if made_in is not None and isinstance(made_in.value, bytes) else b""
        directory = os.path.join(base, bytes(directories[place - 1])) if place else base
    return os.path.normpath(os.path.join(directory, name))


def _units(dwarf: Any, start: int, end: int) -> Iterator[Any]:
    """The compilation units that may have code from ``start`` to ``end``."""
    ranges = dwarf.get_aranges()
    offsets = (
        {
            entry.info_offset
            for entry in ranges.entries
            if entry.begin_addr < end and entry.begin_addr + entry.length > start
        }
        if ranges is not None
        else set()
    )
    if offsets:
        yield from (dwarf.get_CU_at(offset) for offset in sorted(offsets))
        return
    for number, unit in enumerate(dwarf.iter_CUs()):
        if number > _MOST_UNITS:
            return
        if _covers(dwarf, unit, start, end):
            yield unit


def _covers(dwarf: Any, unit: Any, start: int, end: int) -> bool:
    attributes = unit.get_top_DIE().attributes
    if "DW_AT_ranges" in attributes:
        return True  # its line program says it as well
    low, high = attributes.get("DW_AT_low_pc"), attributes.get("DW_AT_high_pc")
    if low is None or high is None:
        return False
    last = high.value if high.form == "DW_FORM_addr" else low.value + high.value
    return bool(low.value < end and last > start)


def _rows_of(data: bytes) -> Iterator[tuple[int, str, int]]:
    for row in data.split(b"\n")[:-1]:
        vaddr, line, path = row.split(b" ", 2)
        yield int(vaddr), os.fsdecode(path), int(line)
