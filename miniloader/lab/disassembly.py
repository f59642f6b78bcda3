"""The code of a function, from a file or from the memory of this process, and what the slots it uses hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from miniloader.elf import kind_of
from miniloader.errors import ElfError
from miniloader.evidence.owner import Owner, owner_of
from miniloader.kernel.maps import read_maps
from miniloader.lab.source_lines import SourceLines, source_lines
from miniloader.loader import Library
from miniloader.machine.disassembly import STREAMED, Instruction, processor_of, streamed
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmarks, Slot
from miniloader.machine.relocation import KINDS
from miniloader.values import dataclass

__all__ = ["Disassembly", "SlotContents", "disassembly_of"]

#: What a relocated word holds when it holds an address (machine.relocation.Formula).
_ADDRESSES: Final = ("B + A", "S + A", "S", "indirect")


@dataclass(frozen=True)
class SlotContents:
    """What a slot holds in memory, and whose that address is (None: it is no address, or nobody's).

    With ``stand_in`` it is that of code of miniloader's, which stands for what ``owner`` has.
    """

    value: int
    owner: Owner | None
    stand_in: bool = False


@dataclass(frozen=True, eq=False)
class Disassembly:
    """The code of ``span``.

    ``instructions`` are made one by one as they are asked for where they are megabytes, again each time.  Of
    a loaded library ``base`` is the load bias, and ``held`` says by vaddr what the slots referred to hold.
    ``lines`` says which line of source code an instruction comes from, where that was asked for and is known.
    """

    landmarks: Landmarks
    processor: str
    span: CodeRange
    instructions: Iterable[Instruction]
    base: int | None
    held: Mapping[int, SlotContents]
    lines: SourceLines | None = None

    @property
    def path(self) -> str:
        """The file's."""
        return self.landmarks.image.path

    @property
    def machine(self) -> str:
        """The gABI's name of it, without ``EM_``."""
        return self.landmarks.image.header.machine


@dataclass(frozen=True, eq=False)
class _StreamedCode:
    """The instructions of ``span``, decoded each time they are asked for."""

    landmarks: Landmarks
    span: CodeRange
    code: bytes | None

    def __iter__(self) -> Iterator[Instruction]:
        return streamed(self.landmarks, self.span, self.code)


def _slots_of(instructions: Iterable[Instruction]) -> tuple[Slot, ...]:
    slots = (instruction.target.slot for instruction in instructions if instruction.target is not None)
    return tuple({slot.vaddr: slot for slot in slots if slot is not None}.values())


def disassembly_of(
    landmarks: Landmarks, name: str, library: Library | None = None, *, lines: bool = False
) -> Disassembly:
    """Disassemble what ``name`` says: from the file, or from memory when it is loaded as ``library``.

    With ``lines``, those of the source code are looked for, too.
    """
    image = landmarks.image
    kind = kind_of(image)
    if kind.name == "debug-only":
        raise ElfError(image.path, "sections", kind.words, "code", hint=kind.instead)
    processor = processor_of(image)
    span = locate(landmarks, name)
    readable = any(
        "r" in load.flags and load.vaddr <= span.vaddr and span.end <= load.file_end for load in image.loads
    )
    code = ctypes.string_at(library.base + span.vaddr, span.size) if library and readable else None
    instructions: Iterable[Instruction] = _StreamedCode(landmarks, span, code)
    if span.size <= STREAMED:
        instructions = tuple(instructions)
    return Disassembly(
        landmarks=landmarks,
        processor=processor.label,
        span=span,
        instructions=instructions,
        base=library.base if library else None,
        held=_held(landmarks, _slots_of(instructions), library) if library else {},
        lines=source_lines(image, span.vaddr, span.end) if lines else None,
    )


def _held(landmarks: Landmarks, slots: Sequence[Slot], library: Library) -> dict[int, SlotContents]:
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
        held[slot.vaddr] = SlotContents(value, owner, value in meant)
    return held
