"""The one piece of code that is made at run time, of bytes: a jump that replaces an argument.

All other machine code of ours is compiled beforehand (:mod:`miniloader.native`).  Source: the AMD64 psABI,
section 3.2, and the procedure call standard of the Arm 64-bit architecture (which registers carry arguments),
and the manuals of both for the encodings.
"""

from __future__ import annotations

import struct
from typing import Final

from miniloader.native.gate import processor
from miniloader.values import NamedTuple

__all__ = ["jumps_to", "with_third_argument"]


class _Jump(NamedTuple):
    """How the code is packed: its instructions, and between or behind them the value and the function."""

    packing: struct.Struct
    instructions: tuple[bytes, ...]
    value: int  # their places among what is packed
    function: int

    def pack(self, value: int, function: int) -> bytes:
        parts: list[bytes | int] = list(self.instructions)
        parts.insert(self.value, value)
        parts.insert(self.function, function)
        return self.packing.pack(*parts)

    def unpack(self, code: bytes) -> int | None:
        if len(code) < self.packing.size:
            return None
        parts = list(self.packing.unpack_from(code))
        function = parts.pop(self.function)
        parts.pop(self.value)
        return int(function) if tuple(parts) == self.instructions else None


_JUMPS: Final = {
    # endbr64; mov rdx, value; mov rax, function; jmp rax
    "x86_64": _Jump(
        struct.Struct("<4s2sQ2sQ2s"), (b"\xf3\x0f\x1e\xfa", b"\x48\xba", b"\x48\xb8", b"\xff\xe0"), 2, 4
    ),
    # bti c; ldr x2, value; ldr x16, function; br x16; and both
    "aarch64": _Jump(
        struct.Struct("<16sQQ"), (struct.pack("<4I", 0xD503245F, 0x58000062, 0x58000090, 0xD61F0200),), 1, 2
    ),
}


def with_third_argument(function: int, value: int) -> bytes:
    """Jump to ``function`` with its third argument replaced by ``value``, on this process's processor."""
    return _JUMPS[processor()].pack(value, function)


def jumps_to(code: bytes) -> int | None:
    """The function that the code of :func:`with_third_argument` jumps to; ``None`` for any other code.

    >>> hex(jumps_to(with_third_argument(0x401000, 7)))
    '0x401000'
    """
    jump = _JUMPS.get(processor())
    return jump.unpack(code) if jump is not None else None
