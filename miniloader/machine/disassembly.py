"""Machine code as instructions, with what each refers to named.

The one module behind which capstone stands.  It decodes; :mod:`miniloader.machine.register_flow` finds what
operands refer to, and :class:`~miniloader.machine.names_at.Landmarks` names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import capstone

from miniloader.elf import ElfImage
from miniloader.errors import ElfError
from miniloader.machine.find_code import CodeRange
from miniloader.machine.names_at import Landmark, Landmarks
from miniloader.machine.processors import PROCESSORS, Processor, Value
from miniloader.machine.register_flow import Effect, Flow, MemoryOperand, Operand, Reference, references
from miniloader.values import dataclass

__all__ = ["Instruction", "disassemble", "processor_of"]

Kind = Literal["code", "thumb", "data"]
Region = tuple[int, int, Kind]  # the vaddrs from the first to before the second are code or data

_DATA: Final = {4: ".word", 2: ".short", 1: ".byte"}
_ALWAYS: Final = (0, capstone.arm.ARM_CC_AL)
_LAST_NUMBER: Final = re.compile(r"-?(0x[0-9a-f]+|[0-9]+)$")
#: The parts of x86 registers, by the whole.
_PARTS: Final = {
    part: f"e{part}" if part.endswith(("x", "i", "p")) else f"e{part[0]}x"
    for part in "al ah ax bl bh bx cl ch cx dl dh dx si di bp sp".split()
}


@dataclass(frozen=True)
class Instruction:
    """One instruction, or data among instructions (mnemonic ``.word``, ``.short`` or ``.byte``).

    ``target`` is what a call or jump leads to, or what a memory or address operand refers to.
    """

    vaddr: int
    bytes: bytes
    mnemonic: str
    operands: str
    target: Landmark | None


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
    image = landmarks.image
    processor = processor_of(image)
    code = code or bytes(image.read(span.vaddr, span.size, f"code of {span.name}"))
    decoder = _Decoder(processor, code, span.vaddr)
    regions = _regions(landmarks, span, code)
    decoded = decoder.all(regions)
    literals = [extent for instruction in decoded for extent in _literals(instruction, span)]
    if literals:  # constants beside the code, which were decoded as if they were code
        decoded = decoder.all(_carved(regions, literals))
    referred = references(
        [instruction.effect for instruction in decoded],
        processor,
        _word_of(image),
        image.header.elf_class,
        _thunk_of(image),
    )
    return tuple(
        Instruction(
            instruction.effect.vaddr,
            instruction.octets,
            instruction.mnemonic,
            instruction.text,
            _target(landmarks, span, instruction, reference),
        )
        for instruction, reference in zip(decoded, referred, strict=True)
    )


def _target(
    landmarks: Landmarks, span: CodeRange, instruction: _Decoded, reference: Reference | None
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


def _literals(instruction: _Decoded, span: CodeRange) -> Iterator[tuple[int, int]]:
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
    """``regions`` with ``literals`` cut out of their code, as data."""
    result = list(regions)
    for start, end in literals:
        pieces: list[Region] = []
        for first, last, kind in result:
            if kind == "data" or end <= first or last <= start:
                pieces.append((first, last, kind))
                continue
            cut = (max(first, start), min(last, end))
            parts: list[Region] = [(first, cut[0], kind), (*cut, "data"), (cut[1], last, kind)]
            pieces += [part for part in parts if part[0] < part[1]]
        result = pieces
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


# ---------------------------------------------------------------------------------------- capstone
@dataclass(frozen=True)
class _Decoded:
    """What capstone says of one instruction: for people, and for :mod:`miniloader.machine.register_flow`."""

    octets: bytes
    mnemonic: str
    text: str
    effect: Effect


class _Decoder:
    """Decodes parts of ``code``, which lies at ``vaddr``."""

    def __init__(self, processor: Processor, code: bytes, vaddr: int) -> None:
        self.processor = processor
        self.code = code
        self.vaddr = vaddr

    def all(self, regions: Iterable[Region]) -> list[_Decoded]:
        """Every instruction and every piece of data, in order."""
        return [instruction for start, end, kind in regions for instruction in self._region(start, end, kind)]

    def _region(self, start: int, end: int, kind: Kind) -> Iterator[_Decoded]:
        code = self.code[start - self.vaddr : end - self.vaddr]
        if kind == "data":
            yield from _data(code, start)
            return
        modes = ("THUMB",) if kind == "thumb" else self.processor.modes
        arch = getattr(capstone, f"CS_ARCH_{self.processor.arch}")
        engine = capstone.Cs(arch, sum(getattr(capstone, f"CS_MODE_{mode}") for mode in modes))
        engine.detail = True
        engine.skipdata = True
        for insn in engine.disasm(code, start):
            if insn.id == 0:  # no instruction
                yield from _data(bytes(insn.bytes), insn.address)
            else:
                yield self._instruction(insn, thumb=kind == "thumb")

    def _instruction(self, insn: Any, *, thumb: bool) -> _Decoded:
        processor, vaddr = self.processor, int(insn.address)
        word = insn.mnemonic.split()[-1].removesuffix(".w")
        operands = tuple(self._operand(insn, operand, thumb=thumb) for operand in insn.operands)
        if processor.arch == "RISCV" and insn.op_str.endswith(")") and len(operands) == 3:
            # Compressed loads and stores: register, offset, base.
            base, offset = operands[2], operands[1]
            if isinstance(base, str) and isinstance(offset, Value):
                operands = (operands[0], MemoryOperand(base, None, 1, offset))
        if processor.arch == "ARM" and len(operands) == 4 and word in ("add", "sub"):
            # An immediate written as eight bits and how far they are rotated to the right.
            octet, turn = operands[2:]
            if isinstance(octet, Value) and isinstance(turn, Value):
                wide = octet.number << 32 - turn.number
                operands = (*operands[:2], Value((wide | wide >> 32) & 0xFFFFFFFF, False))
        flow = self._flow(insn, word, operands)
        text, direct = insn.op_str, None
        last = operands[-1] if operands else None
        if flow in ("call", "branch", "jump") and isinstance(last, Value) and word not in ("jalr", "c.jalr"):
            direct = last.number
            if processor.relative:
                direct += vaddr
                text = _LAST_NUMBER.sub(f"{direct:#x}", text)
        if processor.arch == "ARM64" and word.startswith("ldr") and isinstance(last, Value):
            operands = (*operands[:-1], Value(last.number, True))  # a literal
        effect = Effect(
            vaddr=vaddr,
            size=int(insn.size),
            word=word,
            operands=operands,
            writes=self._writes(insn, operands),
            flow=flow,
            direct=direct,
            conditional=processor.arch == "ARM" and insn.cc not in _ALWAYS,
        )
        return _Decoded(bytes(insn.bytes), insn.mnemonic, text, effect)

    def _flow(self, insn: Any, word: str, operands: tuple[Operand, ...]) -> Flow:
        processor = self.processor
        if word in processor.stops or (word in processor.jumps and operands == (processor.link,)):
            return "stop"
        if word in processor.calls:
            return "call"
        if word in processor.jumps:
            return "jump"
        if insn.group(capstone.CS_GRP_CALL) and processor.arch != "RISCV":
            return "call"
        if insn.group(capstone.CS_GRP_JUMP) or insn.group(capstone.CS_GRP_BRANCH_RELATIVE):
            return "branch"
        if processor.arch == "ARM" and insn.reg_write(capstone.arm.ARM_REG_PC):
            returns = word in ("pop", "ldm")
            return "branch" if insn.cc not in _ALWAYS else "stop" if returns else "jump"
        return "next"

    def _writes(self, insn: Any, operands: tuple[Operand, ...]) -> tuple[str, ...]:
        """The registers that ``insn`` may change; capstone 5 does not tell for RISC-V: its first operand."""
        if not self.processor.tracked:
            return ()
        if self.processor.arch == "RISCV":
            return tuple(operand for operand in operands[:1] if isinstance(operand, str))
        return tuple(self._whole(insn.reg_name(register)) for register in insn.regs_access()[1])

    def _whole(self, register: str) -> str:
        """The register that ``register`` is a part of."""
        if self.processor.arch == "ARM64" and re.fullmatch(r"w[0-9]+", register):
            return f"x{register[1:]}"
        return _PARTS.get(register, register) if self.processor.arch == "X86" else register

    def _operand(self, insn: Any, operand: Any, *, thumb: bool) -> Operand:
        shift = getattr(operand, "shift", None)
        shifted = shift is not None and shift.type != 0
        if operand.type == capstone.CS_OP_IMM:
            number = int(operand.imm)
            return Value(number << shift.value if shifted and shift is not None else number, False)
        if shifted or getattr(operand, "ext", 0):
            return None
        if operand.type == capstone.CS_OP_REG:
            name = insn.reg_name(operand.reg)
            if name == "pc":
                return Value(insn.address + (4 if thumb else 8), True)
            return name if self._whole(name) == name else None
        if operand.type == capstone.CS_OP_MEM:
            return self._memory(insn, operand.mem, thumb=thumb)
        return None

    def _memory(self, insn: Any, mem: Any, *, thumb: bool) -> MemoryOperand | None:
        base = insn.reg_name(mem.base) if mem.base else None
        index_register = getattr(mem, "index", 0)
        index = insn.reg_name(index_register) if index_register else None
        if self.processor.arch == "X86" and insn.reg_name(mem.segment) in ("fs", "gs"):
            return None  # thread-local
        offset = Value(int(mem.disp), False)
        if base == "rip":
            base, offset = None, Value(insn.address + insn.size + mem.disp, True)
        elif base == "pc":
            ahead = (insn.address + 4) & ~3 if thumb else insn.address + 8
            base, offset = None, Value(ahead + mem.disp, True)
        return MemoryOperand(base, index, getattr(mem, "scale", 1), offset)


def _data(octets: bytes, vaddr: int) -> Iterator[_Decoded]:
    """``octets`` as aligned words and what is left of them."""
    while octets:
        size = next(size for size in _DATA if vaddr % size == 0 and len(octets) >= size)
        effect = Effect(vaddr, size, "", (), (), "stop", None, False)
        number = int.from_bytes(octets[:size], "little")
        yield _Decoded(octets[:size], _DATA[size], f"{number:#0{2 + 2 * size}x}", effect)
        octets, vaddr = octets[size:], vaddr + size
