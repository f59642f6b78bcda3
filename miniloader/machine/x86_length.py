"""How long an x86 instruction is, told by its encoding alone, where the prefix settles that.

A VEX or EVEX prefix names the opcode's map, and the map says what follows the opcode, whatever instruction it
is: a ModRM byte with what belongs to it, and an immediate byte or none.  So an instruction that is newer than
the disassembler can be stepped over.  Source: Intel SDM 2, sections 2.3, 2.7 and appendix A; AVX512-FP16 for
the maps 5 and 6.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LONGEST", "vector_length"]

LONGEST: Final = 15  # bytes of any instruction
_SEGMENTS: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65")
_VEX2, _VEX3, _EVEX = 0xC5, 0xC4, 0x62
_IMMEDIATE: Final = frozenset(b"\x70\x71\x72\x73\xc2\xc4\xc5\xc6")  # opcodes of map 1
_NO_MODRM: Final = 0x77  # of map 1: vzeroupper, vzeroall
_MAPS: Final = {_VEX2: (1,), _VEX3: (1, 2, 3), _EVEX: (1, 2, 3, 5, 6)}


def vector_length(code: bytes, bits: int) -> int | None:
    """How many bytes the instruction takes that ``code`` begins with; None where the encoding does not say.

    >>> vector_length(bytes.fromhex("62f56c185dc2c3"), 64)  # vminph zmm0, zmm2, zmm2 {sae}; ret
    6
    """
    at = 0
    while at < len(code) and code[at] in _SEGMENTS:
        at += 1
    if at + 1 >= len(code) or code[at] not in _MAPS:
        return None
    prefix = code[at]
    if bits == 32 and code[at + 1] < 0xC0:
        return None  # les, lds or bound
    opcodes = 1 if prefix == _VEX2 else code[at + 1] & (0x7 if prefix == _EVEX else 0x1F)
    at += {_VEX2: 2, _VEX3: 3, _EVEX: 4}[prefix]
    if opcodes not in _MAPS[prefix] or at >= len(code):
        return None
    opcode = code[at]
    immediate = opcodes == 3 or (opcodes == 1 and opcode in _IMMEDIATE)
    if opcodes == 1 and opcode == _NO_MODRM and prefix != _EVEX:
        return at + 1
    operand = _operand_length(code, at + 1)
    end = None if operand is None else at + 1 + operand + immediate
    return end if end is not None and end <= min(len(code), LONGEST) else None


def _operand_length(code: bytes, at: int) -> int | None:
    """Bytes of the ModRM byte ``at``, and of SIB and displacement behind it."""
    if at >= len(code):
        return None
    mode, register = code[at] >> 6, code[at] & 7
    if mode == 3:
        return 1
    length, displacement = 1, {0: 0, 1: 1, 2: 4}[mode]
    if register == 4:
        if at + 1 >= len(code):
            return None
        length += 1
        register = code[at + 1] & 7
    if mode == 0 and register == 5:
        displacement = 4
    return length + displacement
