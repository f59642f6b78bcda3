"""A line program of DWARF, run: the state machine of DWARF 5, 6.2.5, whose header pyelftools has read.

Its own reader of programs keeps an object for each operation, and takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from miniloader.values import NamedTuple

__all__ = ["LineRow", "line_rows"]

_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE, _CONST_ADD_PC, _FIXED_ADVANCE_PC = 1, 2, 3, 4, 8, 9
_END_SEQUENCE, _SET_ADDRESS, _DEFINE_FILE = 1, 2, 3


class LineRow(NamedTuple):
    """A row of the table that a program makes: ``file`` by number; ``ends``: a sequence ends at ``vaddr``."""

    vaddr: int
    file: int
    line: int
    ends: bool


def line_rows(program: Any) -> Iterator[LineRow]:
    """The rows that ``program``, pyelftools' LineProgram, makes; ValueError where it is cut short."""
    start, end = program.program_start_offset, program.program_end_offset
    program.stream.seek(start)
    data = program.stream.read(end - start)
    try:
        yield from _run(program, data)
    except IndexError:
        raise ValueError("a line program is cut short") from None


def _run(program: Any, data: bytes) -> Iterator[LineRow]:
    header = program.header
    base, line_base, line_range = header.opcode_base, header.line_base, header.line_range
    shortest, bundle = header.minimum_instruction_length, header.maximum_operations_per_instruction
    order: Literal["little", "big"] = "little" if program.structs.little_endian else "big"
    place, vaddr, operation, file, line = 0, 0, 0, 1, 1
    while place < len(data):
        code, advance = data[place], 0
        place += 1
        if code >= base:
            advance, step = divmod(code - base, line_range)
            line += line_base + step
        elif code == 0:
            length, place = _number(data, place)
            extended, following = data[place], place + length
            if extended == _END_SEQUENCE:
                yield LineRow(vaddr, file, line, ends=True)
                vaddr, operation, file, line = 0, 0, 1, 1
            elif extended == _SET_ADDRESS:
                vaddr, operation = int.from_bytes(data[place + 1 : following], order), 0
            elif extended == _DEFINE_FILE:
                raise ValueError("a line program defines files, as nothing has done since DWARF 2")
            place = following
        elif code == _ADVANCE_PC:
            advance, place = _number(data, place)
        elif code == _ADVANCE_LINE:
            step, following = _number(data, place)
            line += step - (1 << 7 * (following - place) if data[following - 1] & 0x40 else 0)
            place = following
        elif code == _SET_FILE:
            file, place = _number(data, place)
        elif code == _CONST_ADD_PC:
            advance = (255 - base) // line_range
        elif code == _FIXED_ADVANCE_PC:
            vaddr, operation = vaddr + int.from_bytes(data[place : place + 2], order), 0
            place += 2
        elif code != _COPY:
            for _ in range(header.standard_opcode_lengths[code - 1]):  # no row comes of it
                _, place = _number(data, place)
        if advance:
            vaddr += shortest * ((operation + advance) // bundle)
            operation = (operation + advance) % bundle
        if code >= base or code == _COPY:
            yield LineRow(vaddr, file, line, ends=False)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """The unsigned LEB128 number at ``place``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
