"""Disassembly, for people and as JSON: instructions, what they refer to, and what GOT slots hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from miniloader.errors import printable
from miniloader.evidence.owner import Owner, owner_of
from miniloader.kernel.maps import read_maps
from miniloader.loader import Library
from miniloader.machine.disassembly import Instruction, disassemble, processor_of
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmark, Landmarks, Slot
from miniloader.machine.relocation import KINDS
from miniloader.report.text import Line, heading, plain
from miniloader.values import dataclass

__all__ = ["Held", "Listing", "as_json", "listing_of", "page"]

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
#: What a relocated word holds when it holds an address (machine.relocation.Formula).
_ADDRESSES: Final = ("B + A", "S + A", "S", "indirect")


@dataclass(frozen=True)
class Held:
    """What a slot holds in memory, and whose that address is (None: it is no address, or nobody's).

    With ``stand_in`` it is that of code of miniloader's, which stands for what ``owner`` has.
    """

    value: int
    owner: Owner | None
    stand_in: bool = False


@dataclass(frozen=True)
class Listing:
    """The code of ``span``.

    Of a loaded library ``base`` is the load bias, and ``held`` says by vaddr what the slots referred to hold.
    """

    path: str
    machine: str
    processor: str
    span: CodeRange
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
        held=_held(landmarks, slots, library) if library else {},
    )


def _held(landmarks: Landmarks, slots: Sequence[Slot], library: Library) -> dict[int, Held]:
    """What each of ``slots`` holds in memory, by vaddr; without those that are no whole word."""
    kinds = {kind.name: kind for kind in KINDS.get(landmarks.image.header.machine, {}).values()}
    word, vmas = landmarks.image.header.word, read_maps()
    base, meant = library.base, {here: there for there, here in library.loaded.stand_ins.items()}
    held = {}
    for slot in slots:
        kind = kinds.get(slot.relocation)
        if (kind is not None and kind.size < word) or landmarks.at(slot.vaddr + word - 1) is None:
            continue
        value = int.from_bytes(ctypes.string_at(base + slot.vaddr, word), "little")
        owner = None
        if kind is None or kind.formula in _ADDRESSES:
            resolver = landmarks.meaning(slot) if kind is not None and kind.formula == "indirect" else None
            owner = owner_of(meant.get(value, value), vmas, slot.symbol or resolver, slot.version)
        held[slot.vaddr] = Held(value, owner, value in meant)
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
        "machine": listing.machine.lower(),  # as inspect has it
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


def _target_json(target: Landmark, held: Mapping[int, Held]) -> dict[str, Any]:
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
        "stand_in": now is not None and now.stand_in,
        "owner": None
        if owner is None
        else {"path": owner.path, "name": owner.name, "vaddr": owner.vaddr, "ifunc": owner.ifunc},
    }


# ------------------------------------------------------------------------------------------ people
def page(listing: Listing, width: int | None) -> Iterator[Line]:
    """The listing, and the slots that it refers to, in lines of about ``width`` columns (None: any)."""
    span = listing.span
    yield heading(printable(span.name), f"{listing.processor}, {span.size} bytes at vaddr {span.vaddr:#x}")
    yield ((f"  in {printable(listing.path)}", "dim"),)
    if span.ifunc:
        yield ("  An IFUNC: this resolver chooses the function when the library is loaded.",)
    if listing.base is not None:
        yield (f"  Loaded: address = {listing.base:#x} + vaddr.",)
    yield ()
    yield from _code(listing.instructions, width)
    if listing.slots:
        yield ()
        yield heading("Slots", "words that relocation fills, which this code refers to")
        yield from _slots(listing, width)


def _code(instructions: Sequence[Instruction], width: int | None) -> Iterator[Line]:
    """One line an instruction; what does not fit beside it goes on the next."""
    digits = max((len(f"{one.vaddr:x}") for one in instructions), default=0)
    octets = min(max((len(one.bytes) for one in instructions), default=0), _OCTETS)
    operands = 2 + digits + 2 + 3 * octets + 1 + 9  # the column where they begin
    most = max((len(one.operands) for one in instructions if one.target is not None), default=0)
    # Notes stand below each other as far to the right as most of them fit.
    notes = operands + min(most, _OPERANDS, (width or _ANY) - operands - 2 - _USUAL_NOTE)
    for one in instructions:
        place = f"  {one.vaddr:{digits}x}  {one.bytes[:octets].hex(' '):{3 * octets}} "
        code: Line = ((place, "dim"), (f"{one.mnemonic:<8}", "bold"), f" {one.operands}")
        yield from _beside(code, _note(one.target), notes, len(place), width)
        for at in range(octets, len(one.bytes), octets):
            yield ((f"  {'':{digits}}  {one.bytes[at : at + octets].hex(' ')}", "dim"),)


def _note(target: Landmark | None) -> Line:
    if target is None:
        return ()
    name = printable(target.name)
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


def _slots(listing: Listing, width: int | None) -> Iterator[Line]:
    digits = max(len(f"{slot.vaddr:#x}") for slot in listing.slots)
    kinds = max(len(slot.relocation) for slot in listing.slots)
    for slot in listing.slots:
        meaning = listing.meanings[slot.vaddr] + ("" if slot.version is None else f"@{slot.version}")
        place = (f"  {slot.vaddr:#{digits}x}  ", "dim")
        line: Line = (place, f"{slot.relocation:{kinds}}  ", (printable(meaning), "yellow"))
        note = () if listing.base is None else _holding(listing.held.get(slot.vaddr))
        yield from _beside(line, note, 0, digits + 4, width)


def _holding(held: Held | None) -> Line:
    if held is None:
        return ("→ not a whole word",)
    value, owner = f"→ {held.value:#x}", held.owner
    if owner is None:
        return (value,)
    path = printable(owner.path).rpartition("/")[2] or "anonymous memory"
    what = "" if owner.name is None else printable(owner.name)
    if owner.ifunc:
        what = f"chosen by IFUNC {what}"
    where = f"{what} in {path}" if what else path
    return (f"{value}  ", (f"miniloader's, for {where}" if held.stand_in else where, "cyan"))
