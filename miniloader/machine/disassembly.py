"""Machine code as instructions, with what each refers to named.

:mod:`miniloader.machine.decoding` decodes, :mod:`miniloader.machine.register_flow` finds what operands refer
to, and :class:`~miniloader.machine.names_at.Landmarks` names it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.errors import ElfError
from miniloader.machine.decoding import UNKNOWN, Decoded, Decoder, Kind, Region
from miniloader.machine.find_code import CodeRange
from miniloader.machine.names_at import Landmark, Landmarks
from miniloader.machine.processors import PROCESSORS, Processor, Value
from miniloader.machine.register_flow import MemoryOperand, Reference, references
from miniloader.values import dataclass

__all__ = ["STREAMED", "Instruction", "disassemble", "processor_of", "streamed"]

STREAMED: Final = 1 << 20
"""Bytes of code above which instructions are made one by one, and registers are not followed."""
_LONGEST_LITERAL: Final = 16  # bytes


@dataclass(frozen=True)
class Instruction:
    """One instruction, or data among instructions (mnemonic ``.word``, ``.short`` or ``.byte``).

    ``target`` is what a call or jump leads to, or what a memory or address operand refers to.  What is not
    ``known`` is bytes that the disassembler does not know: an instruction that is newer, several, or data.
    """

    vaddr: int
    bytes: bytes
    mnemonic: str
    operands: str
    target: Landmark | None

    @property
    def known(self) -> bool:
        """Whether the disassembler knows it."""
        return self.mnemonic != UNKNOWN


def processor_of(image: ElfImage) -> Processor:
    """The processor of ``image``; :class:`ElfError` for one whose code is not known here."""
    header = image.header
    processor = PROCESSORS.get((header.machine, header.elf_class))
    if processor is None or header.byte_order != "little":
        found = f"{header.elf_class}-bit {header.byte_order}-endian {header.machine}"
        labels = ", ".join(processor.label for processor in PROCESSORS.values())
        raise ElfError(image.path, "e_machine", found, f"code that can be disassembled: {labels}")
    return processor


def disassemble(landmarks: Landmarks, span: CodeRange, code: bytes | None = None) -> tuple[Instruction, ...]:
    """The instructions of ``span``, from the file or from ``code`` (its bytes as they are in memory).

    Raises :class:`ElfError` for a processor that is not known, and where the file has no such bytes.
    """
    return tuple(streamed(landmarks, span, code))


def streamed(landmarks: Landmarks, span: CodeRange, code: bytes | None = None) -> Iterator[Instruction]:
    """What :func:`disassemble` gives, of megabytes of code one by one as they are decoded.

    Of so much code a reference is found where one instruction alone says it.
    """
    image = landmarks.image
    processor = processor_of(image)
    code = code or bytes(image.read(span.vaddr, span.size, f"code of {span.name}"))
    decoder = Decoder(processor, code, span.vaddr, landmarks.code_starts(span.vaddr, span.end))
    regions = _regions(landmarks, span, code)
    decoded: Iterable[Decoded] = decoder.all(regions)
    if span.size > STREAMED:
        processor = replace(processor, tracked=False)
    elif processor.literals or processor.arch == "ARM64":
        decoded = [*decoded]
        literals = [extent for instruction in decoded for extent in _literals(instruction, span)]
        if literals:  # constants beside the code, which were decoded as if they were code
            decoded = decoder.all(_carved(regions, literals))
    return _named(landmarks, span, processor, decoded)


def _named(
    landmarks: Landmarks, span: CodeRange, processor: Processor, decoded: Iterable[Decoded]
) -> Iterator[Instruction]:
    """The instructions with what they refer to; one by one where no registers are followed."""
    image = landmarks.image
    groups: Iterable[list[Decoded]] = [[*decoded]] if processor.tracked else ([item] for item in decoded)
    for group in groups:
        referred = references(
            [instruction.effect for instruction in group],
            processor,
            _word_of(image),
            image.header.elf_class,
            _thunk_of(image),
        )
        for instruction, reference in zip(group, referred, strict=True):
            yield Instruction(
                instruction.effect.vaddr,
                instruction.octets,
                instruction.mnemonic,
                instruction.text,
                _target(landmarks, span, instruction, reference),
            )


def _target(
    landmarks: Landmarks, span: CodeRange, instruction: Decoded, reference: Reference | None
) -> Landmark | None:
    image = landmarks.image
    if image.header.type == "REL" or image.dynamic.text_relocations:
        slot = landmarks.slot_at(instruction.effect.vaddr, len(instruction.octets))
        if slot is not None and image.header.type == "REL":
            taken = reference is not None and reference.address_taken
            end = instruction.effect.vaddr + len(instruction.octets)
            return landmarks.linked(slot, end, address_taken=taken)
        if slot is not None:  # what the file holds there is not what will run
            return Landmark("relocation", landmarks.meaning(slot), slot.vaddr, slot)
    stub = landmarks.stub_at(instruction.effect.vaddr)
    through_memory = any(isinstance(operand, MemoryOperand) for operand in instruction.effect.operands)
    if stub is not None and instruction.effect.flow == "jump" and through_memory:
        return landmarks.at(stub.slot.vaddr)  # on i386 through ebx, which is the caller's
    if reference is None:
        return None
    vaddr = reference.vaddr
    if span.whole and span.vaddr <= vaddr < span.end:
        if stub is not None and reference.address_taken:
            return None  # half way to its slot's address
        distance = vaddr - span.vaddr
        return Landmark("symbol", f"{span.name}+{distance:#x}" if distance else span.name, vaddr)
    return landmarks.at(vaddr, address_taken=reference.address_taken)


# ------------------------------------------------------------------------------------ code and data
def _regions(landmarks: Landmarks, span: CodeRange, code: bytes) -> list[Region]:
    """Which parts of ``span`` are code and which data, as far as mapping symbols tell."""
    first: Kind = "thumb" if span.thumb else "code"
    stub = landmarks.stub_at(span.vaddr)
    if landmarks.image.header.machine == "ARM" and stub is not None and code[:2] == b"\x78\x47":
        # A stub that Thumb code can jump to begins with two instructions of Thumb.
        return [(span.vaddr, span.vaddr + 4, "thumb"), (span.vaddr + 4, span.end, "code")]
    marks = landmarks.marks(span.vaddr, span.end)
    if marks and marks[0][0] == span.vaddr:
        first = marks[0][1]
    starts = [(span.vaddr, first), *(mark for mark in marks if mark[0] > span.vaddr)]
    ends = [*(start for start, _ in starts[1:]), span.end]
    return [(start, end, kind) for (start, kind), end in zip(starts, ends, strict=True)]


def _literals(instruction: Decoded, span: CodeRange) -> Iterator[tuple[int, int]]:
    """The first vaddr and the end of a constant within ``span`` that an instruction loads relative to pc."""
    if not instruction.effect.word.startswith(("ldr", "vldr")) or not instruction.effect.operands:
        return
    last = instruction.effect.operands[-1]
    vaddr = last.offset if isinstance(last, MemoryOperand) and not (last.base or last.index) else last
    wide = instruction.effect.word == "ldrd" or instruction.text.startswith(("d", "x"))
    size = 16 if instruction.text.startswith("q") else 8 if wide else 4
    if isinstance(vaddr, Value) and vaddr.anchored and span.vaddr <= vaddr.number <= span.end - size:
        yield vaddr.number, vaddr.number + size


def _carved(regions: Iterable[Region], literals: Iterable[tuple[int, int]]) -> list[Region]:
    """``regions``, ascending, with ``literals`` cut out of their code, as data."""
    places, result = sorted({*literals}), list[Region]()
    for first, last, kind in regions:
        at = first
        low, high = (bisect_left(places, (vaddr, 0)) for vaddr in (first - _LONGEST_LITERAL, last))
        for start, end in places[low:high] if kind != "data" else ():
            start, end = max(start, at), min(end, last)
            if start < end:
                result += [(at, start, kind)] if at < start else []
                result.append((start, end, "data"))
                at = end
        result += [(at, last, kind)] if at < last else []
    return result


def _word_of(image: ElfImage) -> Any:
    def word(vaddr: int) -> int | None:
        try:
            return int.from_bytes(image.read(vaddr, 4), "little")
        except ElfError:
            return None

    return word


def _thunk_of(image: ElfImage) -> Any:
    registers = {0x04: "eax", 0x0C: "ecx", 0x14: "edx", 0x1C: "ebx", 0x2C: "ebp", 0x34: "esi", 0x3C: "edi"}

    def thunk(vaddr: int) -> str | None:
        """``mov reg, [esp]; ret``: how i386 code learns where it is."""
        if image.header.machine != "386":
            return None
        try:
            code = image.read(vaddr, 4)
        except ElfError:
            return None
        return registers.get(code[1]) if (code[0], code[2], code[3]) == (0x8B, 0x24, 0xC3) else None

    return thunk
