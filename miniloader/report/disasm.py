"""Disassembly, for people and as JSON: instructions, what they refer to, and what GOT slots hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.text import Text

from miniloader.errors import printable
from miniloader.evidence.owner import Owner, owner_of
from miniloader.kernel.maps import read_maps
from miniloader.loader import Library
from miniloader.machine.disassembly import Instruction, disassemble, processor_of
from miniloader.machine.landmarks import Landmarks, Slot, Target
from miniloader.machine.relocation import KINDS
from miniloader.machine.spans import Span, locate
from miniloader.report.terminal import console, heading, safe

__all__ = ["Held", "Listing", "as_json", "listing_of", "show"]

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
_OPERANDS: Final = 28  # columns before what they refer to
_USUAL_NOTE: Final = 20
_MOST_STRING: Final = 48
#: What a relocated word holds when it holds an address (machine.relocation.Formula).
_ADDRESSES: Final = ("B + A", "S + A", "S", "indirect")


@dataclass(frozen=True, slots=True)
class Held:
    """What a slot holds in memory, and whose that address is (None: it is no address, or nobody's)."""

    value: int
    owner: Owner | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The code of ``span``.

    Of a loaded library ``base`` is the load bias, and ``held`` says by vaddr what the slots referred to hold.
    """

    path: str
    machine: str
    processor: str
    span: Span
    instructions: tuple[Instruction, ...]
    meanings: Mapping[int, str]  # of its slots
    base: int | None
    held: Mapping[int, Held]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every relocated word that the code refers to, in order of mention."""
        return _slots_of(self.instructions)


def _slots_of(instructions: Sequence[Instruction]) -> tuple[Slot, ...]:
    found = (one.target.slot for one in instructions if one.target is not None)
    return tuple({slot.vaddr: slot for slot in found if slot is not None}.values())


def listing_of(landmarks: Landmarks, name: str, library: Library | None = None) -> Listing:
    """Disassemble what ``name`` says: from the file, or from memory when it is loaded as ``library``."""
    image = landmarks.image
    processor = processor_of(image)
    span = locate(landmarks, name)
    readable = any(
        "r" in load.flags and load.vaddr <= span.vaddr and span.end <= load.file_end for load in image.loads
    )
    code = ctypes.string_at(library.base + span.vaddr, span.size) if library and readable else None
    instructions = disassemble(landmarks, span, code)
    slots = _slots_of(instructions)
    return Listing(
        path=image.path,
        machine=image.header.machine,
        processor=processor.label,
        span=span,
        instructions=instructions,
        meanings={slot.vaddr: landmarks.meaning(slot) for slot in slots},
        base=library.base if library else None,
        held=_held(landmarks, slots, library.base) if library else {},
    )


def _held(landmarks: Landmarks, slots: Sequence[Slot], base: int) -> dict[int, Held]:
    """What each of ``slots`` holds in memory, by vaddr; without those that are no whole word."""
    kinds = {kind.name: kind for kind in KINDS.get(landmarks.image.header.machine, {}).values()}
    word, vmas = landmarks.image.header.word, read_maps()
    held = {}
    for slot in slots:
        kind = kinds.get(slot.relocation)
        if (kind is not None and kind.size < word) or landmarks.at(slot.vaddr + word - 1) is None:
            continue
        value = int.from_bytes(ctypes.string_at(base + slot.vaddr, word), "little")
        owner = None
        if kind is None or kind.formula in _ADDRESSES:
            resolver = landmarks.meaning(slot) if kind is not None and kind.formula == "indirect" else None
            owner = owner_of(value, vmas, slot.symbol or resolver, slot.version)
        held[slot.vaddr] = Held(value, owner)
    return held


# -------------------------------------------------------------------------------------------- JSON
def as_json(listing: Listing) -> dict[str, Any]:
    """The object that ``--json`` prints; ``base`` is null for a file that was not loaded."""
    span = listing.span
    return {
        "path": listing.path,
        "symbol": span.name,
        "vaddr": span.vaddr,
        "size": span.size,
        "machine": listing.machine,
        "ifunc": span.ifunc,
        "base": listing.base,
        "instructions": [
            {
                "vaddr": one.vaddr,
                "bytes": one.bytes.hex(),
                "mnemonic": one.mnemonic,
                "operands": one.operands,
                "target": None if one.target is None else _target_json(one.target, listing.held),
            }
            for one in listing.instructions
        ],
    }


def _target_json(target: Target, held: Mapping[int, Held]) -> dict[str, Any]:
    slot = target.slot
    now = None if slot is None else held.get(slot.vaddr)
    owner = None if now is None else now.owner
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
        "holds": None if now is None else now.value,
        "owner": None
        if owner is None
        else {"path": owner.path, "name": owner.name, "vaddr": owner.vaddr, "ifunc": owner.ifunc},
    }


# ------------------------------------------------------------------------------------------ people
def show(listing: Listing) -> None:
    """Print the listing, and the slots that it refers to."""
    out = console()
    span = listing.span
    about = f"{listing.processor}, {span.size} bytes at vaddr {span.vaddr:#x}"
    lines = [heading(printable(span.name), about), safe(f"  in {listing.path}", "dim")]
    if span.ifunc:
        lines.append(Text("  An IFUNC: this resolver chooses the function when the library is loaded."))
    if listing.base is not None:
        lines.append(Text(f"  Loaded: address = {listing.base:#x} + vaddr."))
    lines += [Text(), *_lines(listing.instructions, out.width)]
    if listing.slots:
        lines += [Text(), heading("Slots", "words that relocation fills, which this code refers to")]
        lines += _slots(listing, out.width)
    for line in lines:
        out.print(line, soft_wrap=True)


def _lines(instructions: Sequence[Instruction], width: int) -> Iterator[Text]:
    """One line an instruction; what does not fit beside it goes on the next."""
    digits = max((len(f"{one.vaddr:x}") for one in instructions), default=0)
    octets = min(max((len(one.bytes) for one in instructions), default=0), _OCTETS)
    most = max((len(one.operands) for one in instructions if one.target is not None), default=0)
    # Notes stand below each other as far to the right as most of them fit.
    room = max(min(most, _OPERANDS, width - (4 + digits + 3 * octets + 1 + 9 + 2) - _USUAL_NOTE), 0)
    for one in instructions:
        line = Text(f"  {one.vaddr:{digits}x}  ", "dim")
        line.append(f"{one.bytes[:octets].hex(' '):{3 * octets}} ", "dim")
        column = len(line)
        line.append(f"{one.mnemonic:<8}", "bold").append(f" {one.operands}")
        note = _note(one.target)
        yield from _beside(line, note, column + 9 + room, column, width)
        for at in range(octets, len(one.bytes), octets):
            yield Text(f"  {'':{digits}}  {one.bytes[at : at + octets].hex(' ')}", "dim")


def _note(target: Target | None) -> Text:
    if target is None:
        return Text()
    name = target.name
    if target.kind == "string" and len(name) > _MOST_STRING:
        name = f'{name[: _MOST_STRING - 2]}…"'
    return Text("; ").append_text(safe(name, _STYLES[target.kind]))


def _beside(line: Text, note: Text, column: int, below: int, width: int) -> Iterator[Text]:
    """``line`` and, from ``column`` on, ``note``: nearer where that is too far, else in a line of its own."""
    line.rstrip()
    if not note:
        yield line
    elif (gap := max(column - len(line), 0) + 2) + len(line) + len(note) <= width:
        yield line.append(" " * gap).append_text(note)
    elif len(line) + 2 + len(note) <= width:
        yield line.append("  ").append_text(note)
    else:
        yield line
        yield Text(" " * below).append_text(note)


def _slots(listing: Listing, width: int) -> Iterator[Text]:
    digits = max(len(f"{slot.vaddr:#x}") for slot in listing.slots)
    kinds = max(len(slot.relocation) for slot in listing.slots)
    for slot in listing.slots:
        line = Text(f"  {slot.vaddr:#{digits}x}  ", "dim").append(f"{slot.relocation:{kinds}}  ")
        meaning = listing.meanings[slot.vaddr]
        line.append_text(safe(meaning if slot.version is None else f"{meaning}@{slot.version}", "yellow"))
        note = Text() if listing.base is None else _holding(listing.held.get(slot.vaddr))
        yield from _beside(line, note, 0, digits + 4, width)


def _holding(held: Held | None) -> Text:
    if held is None:
        return Text("→ not a whole word", "dim")
    text = Text(f"→ {held.value:#x}")
    owner = held.owner
    if owner is None:
        return text
    path = printable(owner.path).rpartition("/")[2] or "anonymous memory"
    what = "" if owner.name is None else printable(owner.name)
    if owner.ifunc:
        what = f"chosen by IFUNC {what}"
    return text.append("  ").append(f"{what} in {path}" if what else path, "cyan")
