"""What each relocation kind computes, per processor: one table.

The letters are the psABI's: S the symbol's address, A the addend, B the load bias, P the place relocated,
Z the symbol's size.
"""

from __future__ import annotations

from typing import Final, Literal

from miniloader.values import dataclass

__all__ = ["KINDS", "Formula", "Kind"]

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
    """One relocation kind: its psABI name, what is stored, in how many bytes, whether for calls only."""

    name: str
    formula: Formula
    size: int = 8
    signed: bool = False
    call: bool = False


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
}
"""By machine (``image.header.machine``) and ``ELF64_R_TYPE``.

Of a 64-bit machine that is here an audit knows what relocation wrote; loaded is what is for x86-64 alone.
"""
