"""What disassembly must know of each processor: one table.

Which capstone mode decodes it, which instructions leave a function's straight line, which registers survive a
call, and which instructions compute the addresses that code refers to: on x86-64 one instruction does it,
elsewhere two or three work together (``adrp`` and ``add``, ``auipc`` and ``ld``, a literal and ``pc``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Final

from miniloader.values import NamedTuple, dataclass

__all__ = ["PROCESSORS", "Processor", "Rule", "Value"]


class Value(NamedTuple):
    """A known number; ``anchored`` when it was computed from where the code is, so that it may be a vaddr."""

    number: int
    anchored: bool


#: What an instruction puts in its first operand, from all operands' values (None: not known) and its vaddr.
#: The value of a memory operand is its address for ``lea``, else what is read from there, if that is known.
Rule = Callable[[Sequence["Value | None"], int], "Value | None"]


@dataclass(frozen=True)
class Processor:
    """One processor.  Mnemonics are capstone's, without prefixes (``bnd``) and widths (``.w``)."""

    label: str
    arch: str  # CS_ARCH_…
    modes: tuple[str, ...]  # CS_MODE_…
    calls: frozenset[str]
    jumps: frozenset[str]  # without condition
    stops: frozenset[str]  # nothing after them is reached by them
    link: str | None = None  # a jump to this register returns
    computes: Mapping[str, Rule] = field(default_factory=dict)
    addresses: frozenset[str] = frozenset()  # of ``computes``, those whose result is worth naming
    literals: frozenset[str] = frozenset()  # of ``computes``, those that read constants beside the code
    tracked: bool = True  # whether what one instruction computes matters to the next
    preserved: frozenset[str] = frozenset()  # by a call
    relative: bool = False  # whether capstone leaves branch targets relative


def _copy(values: Sequence[Value | None], vaddr: int) -> Value | None:
    return values[1] if len(values) == 2 else None


def _anchor(values: Sequence[Value | None], vaddr: int) -> Value | None:
    """An operand that capstone gives as a vaddr already."""
    source = _copy(values, vaddr)
    return source and Value(source.number, True)


def _add(values: Sequence[Value | None], vaddr: int) -> Value | None:
    first, second = values[-2:] if len(values) in (2, 3) else (None, None)
    return first and second and Value(first.number + second.number, first.anchored or second.anchored)


def _subtract(values: Sequence[Value | None], vaddr: int) -> Value | None:
    first, second = values[-2:] if len(values) in (2, 3) else (None, None)
    return first and second and Value(first.number - second.number, first.anchored and not second.anchored)


def _auipc(values: Sequence[Value | None], vaddr: int) -> Value | None:
    high = _copy(values, vaddr)
    return high and Value(vaddr + (high.number << 12), True)


def _thumb_adr(values: Sequence[Value | None], vaddr: int) -> Value | None:
    offset = _copy(values, vaddr)
    return offset and Value(((vaddr + 4) & ~3) + offset.number, True)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


PROCESSORS: Final[Mapping[tuple[str, int], Processor]] = {
    ("X86_64", 64): Processor(
        "x86-64",
        arch="X86",
        modes=("64",),
        calls=_set("call"),
        jumps=_set("jmp"),
        stops=_set("ret retf hlt ud2 iretq"),
        computes={"lea": _copy},
        addresses=_set("lea"),
        tracked=False,
    ),
    ("386", 32): Processor(
        "i386",
        arch="X86",
        modes=("32",),
        calls=_set("call"),
        jumps=_set("jmp"),
        stops=_set("ret retf hlt ud2 iretd"),
        computes={"lea": _copy, "mov": _copy, "add": _add, "sub": _subtract},
        addresses=_set("lea add"),
        preserved=_set("ebx esi edi ebp"),
    ),
    ("AARCH64", 64): Processor(
        "aarch64",
        arch="ARM64",
        modes=("ARM",),
        calls=_set("bl blr blraa blrab blraaz blrabz"),
        jumps=_set("b br braa brab braaz brabz"),
        stops=_set("ret retaa retab eret udf brk"),
        computes={"adrp": _anchor, "adr": _anchor, "mov": _copy, "add": _add, "sub": _subtract},
        addresses=_set("adr add"),
        preserved=_set("x19 x20 x21 x22 x23 x24 x25 x26 x27 x28 fp"),
    ),
    ("ARM", 32): Processor(
        "arm",
        arch="ARM",
        modes=("ARM",),
        calls=_set("bl blx"),
        jumps=_set("b bx bxj tbb tbh"),
        stops=_set("udf bkpt"),
        link="lr",
        computes={"ldr": _copy, "mov": _copy, "add": _add, "sub": _subtract, "adr": _thumb_adr},
        addresses=_set("add adr"),
        literals=_set("ldr"),
        preserved=_set("r4 r5 r6 r7 r8 sb sl fp"),
    ),
    ("RISCV", 64): Processor(
        "riscv64",
        arch="RISCV",
        modes=("RISCV64", "RISCVC"),
        calls=_set("jal jalr c.jal c.jalr"),
        jumps=_set("j jr c.j c.jr"),
        stops=_set("ret ebreak c.ebreak unimp c.unimp"),
        link="ra",
        computes={"auipc": _auipc, "addi": _add, "c.addi": _add, "mv": _copy, "c.mv": _copy},
        addresses=_set("addi c.addi"),
        preserved=_set("s0 s1 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11"),
        relative=True,
    ),
}
"""By the ELF header's machine and class; all are little endian."""
