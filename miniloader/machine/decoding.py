"""Bytes as instructions: the one module behind which capstone stands.

What capstone does not know is never guessed at: :class:`Decoder` gives it as unknown bytes, and goes on where
an instruction is known to begin.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, Literal

import capstone

from miniloader.forking import cached_property
from miniloader.machine.processors import Processor, Value
from miniloader.machine.register_flow import Effect, Flow, MemoryOperand, Operand
from miniloader.machine.x86_length import LONGEST, vector_length
from miniloader.values import NamedTuple, dataclass

__all__ = ["UNKNOWN", "Decoded", "Decoder", "Kind", "Region"]

Kind = Literal["code", "thumb", "data"]
Region = tuple[int, int, Kind]
"""The vaddrs from the first to before the second are code or data."""
UNKNOWN: Final = "(unknown)"
"""The mnemonic of bytes that are no instruction that is known here."""

_DATA: Final = {4: ".word", 2: ".short", 1: ".byte"}
_WINDOW: Final = 1 << 16  # bytes that capstone is given at a time
_MOST_PASSES: Final = 16
_ALWAYS: Final = (0, capstone.arm.ARM_CC_AL)
_LAST_NUMBER: Final = re.compile(r"-?(0x[0-9a-f]+|[0-9]+)$")
_BRANCH: Final = re.compile(r"(?:j|call|loop)")
#: The parts of x86 registers, by the whole.
_PARTS: Final = {
    part: f"e{part}" if part.endswith(("x", "i", "p")) else f"e{part[0]}x"
    for part in "al ah ax bl bh bx cl ch cx dl dh dx si di bp sp".split()
}


@dataclass(frozen=True)
class Decoded:
    """What capstone says of one instruction: for people, and for :mod:`miniloader.machine.register_flow`."""

    octets: bytes
    mnemonic: str
    text: str
    effect: Effect


class Gap(NamedTuple):
    """From ``start`` to before ``end`` is what capstone does not know: vaddrs."""

    start: int
    end: int


class Decoder:
    """Decodes parts of ``code``, which lies at ``vaddr``; at ``starts``, ascending, instructions begin."""

    def __init__(self, processor: Processor, code: bytes, vaddr: int, starts: Sequence[int] = ()) -> None:
        self.processor = processor
        self.code = code
        self.vaddr = vaddr
        self.starts = starts

    def all(self, regions: Sequence[Region]) -> Iterator[Decoded]:
        """Every instruction, every piece of data and of what is unknown, in order."""
        self._regions = [*self._cut(regions)]
        for start, end, kind in self._regions:
            if kind == "data":
                yield from _data(self.code[start - self.vaddr : end - self.vaddr], start)
                continue
            engine = self._engine(kind)
            engine.detail = True
            for step in self._steps(engine.disasm, start, end, kind, lambda: self._targets):
                if isinstance(step, Gap):
                    octets = self.code[step.start - self.vaddr : step.end - self.vaddr]
                    effect = Effect(step.start, len(octets), "", (), (), "stop", None, False)
                    yield Decoded(octets, UNKNOWN, "", effect)
                else:
                    yield self._instruction(step, thumb=kind == "thumb")

    def _cut(self, regions: Iterable[Region]) -> Iterator[Region]:
        """``regions``, divided where an instruction is known to begin."""
        for start, end, kind in regions:
            first, last = bisect_right(self.starts, start), bisect_right(self.starts, end - 1)
            bounds = [start, *self.starts[first:last], end] if kind != "data" else [start, end]
            yield from ((begin, finish, kind) for begin, finish in pairwise(bounds))

    def _engine(self, kind: Kind) -> Any:
        modes = ("THUMB",) if kind == "thumb" else self.processor.modes
        arch = getattr(capstone, f"CS_ARCH_{self.processor.arch}")
        return capstone.Cs(arch, sum(getattr(capstone, f"CS_MODE_{mode}") for mode in modes))

    def _steps(
        self, decode: Any, start: int, end: int, kind: Kind, places: Callable[[], Sequence[int]]
    ) -> Iterator[Any]:
        """What ``decode`` (capstone's) gives from ``start`` to ``end``, and a gap for what it does not know.

        Behind a gap it goes on at the next of ``places``, where the encoding does not say how long that is.
        """
        at = start
        while at < end:
            stop = min(end, at + _WINDOW)
            for insn in decode(self.code[at - self.vaddr : stop - self.vaddr], at):
                yield insn
                at = insn[0] + insn[1] if isinstance(insn, tuple) else insn.address + insn.size
            if at == stop or (stop < end and stop - at < LONGEST):
                continue  # the window may have cut an instruction
            length = self._length(at, kind)
            resume = at + length if length else _next(places(), at, end)
            yield Gap(at, min(resume, end))
            at = min(resume, end)

    def _length(self, at: int, kind: Kind) -> int | None:
        """How long the instruction there is, where its encoding says so though capstone does not know it."""
        code = self.code[at - self.vaddr : at - self.vaddr + LONGEST]
        if self.processor.arch == "X86":
            return vector_length(code, 64 if "64" in self.processor.modes else 32)
        if kind == "thumb":
            return 4 if len(code) > 1 and code[1] >> 3 in (0b11101, 0b11110, 0b11111) else 2
        if self.processor.arch == "RISCV":
            return 4 if code[0] & 3 == 3 else 2
        return 4

    @cached_property
    def _targets(self) -> Sequence[int]:
        """Where branches lead, ascending: those of the code that is known, and of what these make known."""
        places: list[int] = []
        if self.processor.arch != "X86":
            return places
        for _ in range(_MOST_PASSES):
            reached = sorted({*places, *self._branches(places)})
            if len(reached) == len(places):
                break
            places = reached
        return places

    def _branches(self, places: Sequence[int]) -> Iterator[int]:
        """Where branches lead in code that is decoded with ``places`` to go on at."""
        for start, end, kind in self._regions:
            for step in self._steps(self._engine(kind).disasm_lite, start, end, kind, lambda: places):
                if not isinstance(step, Gap) and _BRANCH.match(step[2]) and step[3].startswith("0x"):
                    yield int(step[3], 16)

    def _instruction(self, insn: Any, *, thumb: bool) -> Decoded:
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
        return Decoded(bytes(insn.bytes), insn.mnemonic, text, effect)

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


def _next(places: Sequence[int], at: int, end: int) -> int:
    """The first of ``places`` behind ``at``, at most ``end``."""
    place = bisect_right(places, at)
    return min(places[place], end) if place < len(places) else end


def _data(octets: bytes, vaddr: int) -> Iterator[Decoded]:
    """``octets`` as aligned words and what is left of them."""
    at = 0
    while at < len(octets):
        size = next(size for size in _DATA if (vaddr + at) % size == 0 and len(octets) - at >= size)
        effect = Effect(vaddr + at, size, "", (), (), "stop", None, False)
        item = octets[at : at + size]
        number = int.from_bytes(item, "little")
        yield Decoded(item, _DATA[size], f"{number:#0{2 + 2 * size}x}", effect)
        at += size
