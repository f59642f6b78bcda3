"""Disassembly, for people and as JSON: instructions, what they refer to, and what GOT slots hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from miniloader.elf.demangling import demangled
from miniloader.errors import printable
from miniloader.files import read_regular
from miniloader.json_schema import BOOL, COUNT, HEX, INT, TEXT, array, keys, nullable, record
from miniloader.lab.disassembly import Disassembly, SlotContents
from miniloader.lab.source_lines import SourceLines
from miniloader.machine.decoding import UNKNOWN
from miniloader.machine.disassembly import Instruction
from miniloader.machine.names_at import Landmark, Slot
from miniloader.report.json import Rows
from miniloader.report.numbers import count
from miniloader.report.text import Line, heading, plain, wrapped

__all__ = ["SCHEMA", "as_json", "page"]

_STYLES: Final = {
    "symbol": "cyan",
    "plt": "green",
    "got": "yellow",
    "string": "magenta",
    "section": "blue",
    "segment": "blue",
    "relocation": "yellow",
}
_OCTETS: Final = 8  # bytes in a line
_OPERANDS: Final = 30  # columns before what they refer to
_USUAL_NOTE: Final = 20
_ANY: Final = 10_000
_MOST_STRING: Final = 48
_LONG: Final = 120  # characters of a name that is shown whole only once
_SUFFIX: Final = re.compile(r"(.*?)((?:@plt|@got)?(?:\+0x[0-9a-f]+)?)", re.DOTALL)
_MOST_TEXT: Final = 200  # characters of a line of source code
_MOST_SOURCE: Final = 1 << 22  # bytes of a source file
_MEASURED: Final = 4096  # instructions by which columns are measured


# -------------------------------------------------------------------------------------------- JSON
def as_json(listing: Disassembly) -> dict[str, Any]:
    """The object that ``--json`` prints; ``base`` is null for a file that was not loaded.

    What is not ``known`` has no operands: its bytes are all that is said of it.
    """
    span = listing.span
    return {
        "path": listing.path,
        "symbol": span.name,
        "vaddr": span.vaddr,
        "size": span.size,
        "machine": listing.machine.lower(),  # as inspect has it
        "ifunc": span.ifunc,
        "base": listing.base,
        "lines_from": None if listing.lines is None else listing.lines.path,
        "instructions": Rows(lambda: (_row(instruction, listing) for instruction in listing.instructions)),
    }


def _row(instruction: Instruction, listing: Disassembly) -> dict[str, Any]:
    target = instruction.target
    source = None if listing.lines is None else listing.lines.at(instruction.vaddr)
    return {
        "vaddr": instruction.vaddr,
        "bytes": instruction.bytes.hex(),
        "mnemonic": instruction.mnemonic,
        "operands": instruction.operands,
        "known": instruction.known,
        "source": None if source is None else {"file": source[0], "line": source[1]},
        "target": None if target is None else _target_json(target, listing.held),
    }


def _target_json(target: Landmark, held: Mapping[int, SlotContents]) -> dict[str, Any]:
    slot = target.slot
    content = None if slot is None else held.get(slot.vaddr)
    owner = None if content is None else content.owner
    return {
        "kind": target.kind,
        "name": target.name,
        "vaddr": target.vaddr,
        "slot": None
        if slot is None
        else {
            "vaddr": slot.vaddr,
            "relocation": slot.relocation,
            "symbol": slot.symbol,
            "version": slot.version,
            "addend": slot.addend,
        },
        "holds": None if content is None else content.value,
        "stand_in": content is not None and content.stand_in,
        "owner": None
        if owner is None
        else {"path": owner.path, "name": owner.name, "vaddr": owner.vaddr, "ifunc": owner.ifunc},
    }


_TARGET_SCHEMA: Final = record(
    {"kind": TEXT, "name": TEXT, "vaddr": COUNT, "holds": nullable(COUNT), "stand_in": BOOL},
    {"slot": nullable(record(
        {"vaddr": COUNT, "relocation": TEXT, "addend": INT}, keys(nullable(TEXT), "symbol version")
    ))},
    {"owner": nullable(record(
        {"path": TEXT, "name": nullable(TEXT), "vaddr": nullable(INT), "ifunc": BOOL}
    ))},
)  # fmt: skip

SCHEMA: Final = record(
    keys(TEXT, "path symbol machine"),
    {"vaddr": COUNT, "size": COUNT, "ifunc": BOOL, "base": nullable(INT), "lines_from": nullable(TEXT)},
    {"instructions": array(record(
        {"vaddr": COUNT, "bytes": HEX, "known": BOOL, "target": nullable(_TARGET_SCHEMA)},
        {"source": nullable(record({"file": TEXT, "line": COUNT}))},
        keys(TEXT, "mnemonic operands"),
    ))},
)  # fmt: skip
"""What :func:`as_json` gives."""


# ------------------------------------------------------------------------------------------ people
def page(listing: Disassembly, width: int | None, *, raw: bool = False) -> Iterator[Line]:
    """The listing, and the slots that it refers to, in lines of about ``width`` columns (None: any).

    Names are demangled unless ``raw``.
    """
    span, names = listing.span, _Names(raw=raw)
    yield heading(names.shown(span.name), f"{listing.processor}, {span.size} bytes at vaddr {span.vaddr:#x}")
    yield ((f"  in {printable(listing.path)}", "dim"),)
    if span.ifunc:
        yield ("  An IFUNC: this resolver chooses the function when the library is loaded.",)
    if listing.base is not None:
        yield (f"  Loaded: address = {listing.base:#x} + vaddr.",)
    if listing.lines is not None and listing.lines.path != listing.path:
        yield ((f"  Source lines from {printable(listing.lines.path)}", "dim"),)
    if listing.lines is not None and listing.lines.fault is not None:
        yield ((f"  Source lines cannot be read: {printable(listing.lines.fault)}", "red"),)
    yield ()
    slots: dict[int, Slot] = {}
    unknown: list[int] = []
    yield from _code(
        _noted(listing.instructions, slots, unknown), f"{span.end:x}", names, listing.lines, width
    )
    if unknown:
        places = count(len(unknown), "place")
        about = f"{places}, {count(sum(unknown), 'byte')} in all, that the disassembler does not know"
        yield ((f"  {UNKNOWN}: {about}; it goes on where an instruction is known to begin", "red"),)
    if slots:
        yield ()
        yield heading("Slots", "words that relocation fills, which this code refers to")
        yield from _slots(listing, [*slots.values()], names, width)


class _Names:
    """Names of symbols as a listing shows them: demangled, and long ones whole only once."""

    def __init__(self, *, raw: bool) -> None:
        self._raw, self._shown = raw, set[str]()

    def shown(self, name: str) -> str:
        """``name``, which may end in ``@plt``, ``@got`` or ``+0x…``."""
        parts = _SUFFIX.fullmatch(name)
        symbol, suffix = (parts[1], parts[2]) if parts is not None else (name, "")
        text = printable(symbol if self._raw else demangled(symbol) or symbol)
        if len(text) > _LONG:
            if text in self._shown:
                text = f"{text[: _LONG // 2]}…{text[-_LONG // 4 :]}"
            else:
                self._shown.add(text)
        return text + suffix


def _noted(
    instructions: Iterable[Instruction], slots: dict[int, Slot], unknown: list[int]
) -> Iterator[Instruction]:
    """``instructions``; noted are the slots that they refer to, and the lengths of what is unknown."""
    for instruction in instructions:
        if instruction.target is not None and instruction.target.slot is not None:
            slots.setdefault(instruction.target.slot.vaddr, instruction.target.slot)
        if not instruction.known:
            unknown.append(len(instruction.bytes))
        yield instruction


def _code(
    instructions: Iterator[Instruction], end: str, names: _Names, lines: SourceLines | None, width: int | None
) -> Iterator[Line]:
    """One line an instruction, below ``end``; what does not fit beside it goes on the next."""
    first = [*islice(instructions, _MEASURED)]
    digits = max((len(f"{instruction.vaddr:x}") for instruction in first), default=0)
    digits = digits if len(first) < _MEASURED else max(digits, len(end))
    octets = min(max((len(instruction.bytes) for instruction in first), default=0), _OCTETS)
    operands = 2 + digits + 2 + 3 * octets + 1 + 9  # the column where they begin
    annotated = [instruction for instruction in first if instruction.target is not None]
    most = max((len(instruction.operands) for instruction in annotated), default=0)
    # Notes stand below each other as far to the right as most of them fit.
    notes = operands + min(most, _OPERANDS, (width or _ANY) - operands - 2 - _USUAL_NOTE)
    texts, last = _Texts(), None
    for instruction in chain(first, instructions):
        source = None if lines is None else lines.at(instruction.vaddr)
        if source is not None and source != last:
            yield from wrapped(texts.line(*source), width, 4)
        last = source or last
        place = f"  {instruction.vaddr:{digits}x}  {instruction.bytes[:octets].hex(' '):{3 * octets}} "
        code: Line = ((place, "dim"), (f"{instruction.mnemonic:<8}", "bold"), f" {instruction.operands}")
        yield from _beside(code, _note(instruction.target, names), notes, len(place), width)
        for at in range(octets, len(instruction.bytes), octets):
            yield ((f"  {'':{digits}}  {instruction.bytes[at : at + octets].hex(' ')}", "dim"),)


class _Texts:
    """The source files that can be read here."""

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}

    def line(self, path: str, number: int) -> Line:
        """``FILE:LINE``, and the text of the line where the file is there."""
        if path not in self._files:
            self._files[path] = self._read(path)
        texts = self._files[path]
        text = texts[number - 1].strip()[:_MOST_TEXT] if number <= len(texts) else ""
        place = (f"  {printable(os.path.basename(path))}:{number}", "blue")
        return (place, f"  {printable(text)}") if text else (place,)

    def _read(self, path: str) -> list[str]:
        """The lines of the file; none where it is not there, is none, or is too large to be source code."""
        try:
            data = read_regular(path, _MOST_SOURCE)
        except (OSError, ValueError):
            return []
        return [] if data is None else data.decode(errors="backslashreplace").split("\n")


def _note(target: Landmark | None, names: _Names) -> Line:
    if target is None:
        return ()
    name = printable(target.name) if target.kind == "string" else names.shown(target.name)
    if target.kind == "string" and len(name) > _MOST_STRING:
        name = f'{name[: _MOST_STRING - 2]}…"'
    return ("; ", (name, _STYLES[target.kind]))


def _beside(line: Line, note: Line, column: int, below: int, width: int | None) -> Iterator[Line]:
    """``line`` and, from ``column`` on, ``note``: nearer where that is too far, else in a line of its own."""
    used, wanted, most = len(plain(line).rstrip()), len(plain(note)), width or _ANY
    spare = len(plain(line)) - used
    gap = max(column - used, 0) + 2
    if not note:
        yield line
    elif used + 2 + wanted <= most:
        gap = gap if used + gap + wanted <= most else 2
        yield (*line, " " * (gap - spare), *note)
    else:
        yield line
        yield (" " * below, *note)


def _slots(listing: Disassembly, slots: Sequence[Slot], names: _Names, width: int | None) -> Iterator[Line]:
    digits = max(len(f"{slot.vaddr:#x}") for slot in slots)
    kinds = max(len(slot.relocation) for slot in slots)
    for slot in slots:
        meaning = names.shown(listing.landmarks.meaning(slot)) + (
            "" if slot.version is None else f"@{slot.version}"
        )
        place = (f"  {slot.vaddr:#{digits}x}  ", "dim")
        line: Line = (place, f"{slot.relocation:{kinds}}  ", (meaning, "yellow"))
        note = () if listing.base is None else _holding(listing.held.get(slot.vaddr))
        yield from _beside(line, note, 0, digits + 4, width)


def _holding(held: SlotContents | None) -> Line:
    if held is None:
        return ("→ not a whole word",)
    value, owner = f"→ {held.value:#x}", held.owner
    if owner is None:
        return (value,)
    path = printable(owner.path).rpartition("/")[2] or "anonymous memory"
    symbol = "" if owner.name is None else printable(owner.name)
    if owner.ifunc:
        symbol = f"chosen by IFUNC {symbol}"
    where = f"{symbol} in {path}" if symbol else path
    return (f"{value}  ", (f"miniloader's, for {where}" if held.stand_in else where, "cyan"))
