"""What each relocation kind computes, per processor: one table.

The letters are the psABI's: S the symbol's address, A the addend, B the load bias, P the place relocated,
Z the symbol's size.
"""

from __future__ import annotations

from typing import Final, Literal

from miniloader.values import dataclass

__all__ = ["BELOW_THREAD_POINTER", "KINDS", "RESERVED_SLOTS", "Formula", "Kind", "code_of", "word_of"]

Formula = Literal[
    "none",  # nothing is written
    "B + A",
    "S + A",
    "S",
    "S + A - P",
    "Z + A",
    "indirect",  # the address that the resolver at B + A returns
    "module",  # the TLS module that defines the symbol
    "module offset",  # S + A within its module's block
    "thread offset",  # S + A from the thread pointer
    "descriptor",  # a TLS descriptor: a function, and its argument
    "copy",  # the bytes of a symbol of another library
]


@dataclass(frozen=True)
class Kind:
    """One relocation kind: its psABI name, what is stored, in how many bytes, whether for calls only.

    ``less`` is what has to be taken from the value that the formula gives.
    """

    name: str
    formula: Formula
    size: int = 8
    signed: bool = False
    call: bool = False
    less: int = 0


KINDS: Final[dict[str, dict[int, Kind]]] = {
    # System V ABI, AMD64 supplement, table 4.9.
    "X86_64": {
        0: Kind("R_X86_64_NONE", "none", 0),
        1: Kind("R_X86_64_64", "S + A"),
        2: Kind("R_X86_64_PC32", "S + A - P", 4, signed=True),
        4: Kind("R_X86_64_PLT32", "S + A - P", 4, signed=True),
        5: Kind("R_X86_64_COPY", "copy"),
        6: Kind("R_X86_64_GLOB_DAT", "S"),
        7: Kind("R_X86_64_JUMP_SLOT", "S", call=True),
        8: Kind("R_X86_64_RELATIVE", "B + A"),
        10: Kind("R_X86_64_32", "S + A", 4),
        11: Kind("R_X86_64_32S", "S + A", 4, signed=True),
        16: Kind("R_X86_64_DTPMOD64", "module"),
        17: Kind("R_X86_64_DTPOFF64", "module offset"),
        18: Kind("R_X86_64_TPOFF64", "thread offset"),
        21: Kind("R_X86_64_DTPOFF32", "module offset", 4, signed=True),
        23: Kind("R_X86_64_TPOFF32", "thread offset", 4, signed=True),
        24: Kind("R_X86_64_PC64", "S + A - P"),
        32: Kind("R_X86_64_SIZE32", "Z + A", 4),
        33: Kind("R_X86_64_SIZE64", "Z + A"),
        36: Kind("R_X86_64_TLSDESC", "descriptor", 16),
        37: Kind("R_X86_64_IRELATIVE", "indirect"),
        38: Kind("R_X86_64_RELATIVE64", "B + A"),
    },
    # System V ABI, Intel386 supplement; "ELF Handling For Thread-Local Storage".  Addends lie in the words.
    "386": {
        0: Kind("R_386_NONE", "none", 0),
        1: Kind("R_386_32", "S + A", 4),
        2: Kind("R_386_PC32", "S + A - P", 4),
        5: Kind("R_386_COPY", "copy", 4),
        6: Kind("R_386_GLOB_DAT", "S", 4),
        7: Kind("R_386_JUMP_SLOT", "S", 4, call=True),
        8: Kind("R_386_RELATIVE", "B + A", 4),
        14: Kind("R_386_TLS_TPOFF", "thread offset", 4),
        35: Kind("R_386_TLS_DTPMOD32", "module", 4),
        36: Kind("R_386_TLS_DTPOFF32", "module offset", 4),
        38: Kind("R_386_SIZE32", "Z + A", 4),
        41: Kind("R_386_TLS_DESC", "descriptor", 8),
        42: Kind("R_386_IRELATIVE", "indirect", 4),
    },
    # ELF for the Arm 64-bit Architecture, "Dynamic relocations" and "Static data relocations".
    "AARCH64": {
        0: Kind("R_AARCH64_NONE", "none", 0),
        256: Kind("R_AARCH64_NONE", "none", 0),
        257: Kind("R_AARCH64_ABS64", "S + A"),
        258: Kind("R_AARCH64_ABS32", "S + A", 4),
        260: Kind("R_AARCH64_PREL64", "S + A - P"),
        261: Kind("R_AARCH64_PREL32", "S + A - P", 4, signed=True),
        1024: Kind("R_AARCH64_COPY", "copy"),
        1025: Kind("R_AARCH64_GLOB_DAT", "S + A"),
        1026: Kind("R_AARCH64_JUMP_SLOT", "S + A", call=True),
        1027: Kind("R_AARCH64_RELATIVE", "B + A"),
        1028: Kind("R_AARCH64_TLS_DTPMOD64", "module"),
        1029: Kind("R_AARCH64_TLS_DTPREL64", "module offset"),
        1030: Kind("R_AARCH64_TLS_TPREL64", "thread offset"),
        1031: Kind("R_AARCH64_TLSDESC", "descriptor", 16),
        1032: Kind("R_AARCH64_IRELATIVE", "indirect"),
    },
    # RISC-V psABI, table 3: those that dynamic linkers process.  DTV pointers lead 0x800 into their blocks.
    "RISCV": {
        0: Kind("R_RISCV_NONE", "none", 0),
        1: Kind("R_RISCV_32", "S + A", 4),
        2: Kind("R_RISCV_64", "S + A"),
        3: Kind("R_RISCV_RELATIVE", "B + A"),
        4: Kind("R_RISCV_COPY", "copy"),
        5: Kind("R_RISCV_JUMP_SLOT", "S", call=True),
        7: Kind("R_RISCV_TLS_DTPMOD64", "module"),
        9: Kind("R_RISCV_TLS_DTPREL64", "module offset", less=0x800),
        11: Kind("R_RISCV_TLS_TPREL64", "thread offset"),
        12: Kind("R_RISCV_TLSDESC", "descriptor", 16),
        58: Kind("R_RISCV_IRELATIVE", "indirect"),
    },
}
"""By machine (``image.header.machine``) and ``ELF64_R_TYPE``.

Of a machine that is here an audit knows what relocation wrote; where libraries are loaded is said in
:mod:`miniloader.native.gate`.
"""

RESERVED_SLOTS: Final = {"RISCV": 2}
"""How many words at the beginning of ``DT_PLTGOT`` are the dynamic linker's own, where it is not three."""

BELOW_THREAD_POINTER: Final = frozenset({"X86_64", "386"})
"""The machines whose static thread-local blocks lie below the thread pointer: TLS variant II.

On the others they lie above it: "ELF Handling For Thread-Local Storage", section 3.
"""


def code_of(machine: str, formula: Formula) -> int:
    """The number of the first kind of whole words that computes ``formula`` on ``machine``.

    >>> code_of("X86_64", "thread offset"), code_of("AARCH64", "thread offset")
    (18, 1030)
    """
    return next(code for code, kind in KINDS[machine].items() if kind.formula == formula and kind.size >= 8)


def word_of(machine: str) -> int:
    """Bytes of a word that relocation fills with an address on ``machine``; 0 where its kinds are not known.

    >>> word_of("X86_64"), word_of("386"), word_of("SPARC")
    (8, 4, 0)
    """
    kinds = KINDS.get(machine, {}).values()
    return next((kind.size for kind in kinds if kind.formula == "B + A"), 0)
