"""The few instructions that have to be real code, as bytes, for x86-64.

Source: the AMD64 psABI, sections 3.2 (which registers carry arguments) and 5.2 (the procedure linkage
table), and the AMD64 manual for the encodings.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = [
    "jumps_to",
    "with_third_argument",
]

#: endbr64; mov rdx, value; mov rax, function; jmp rax
_WITH_THIRD: Final = struct.Struct("<4s2sQ2sQ2s")
_THIRD: Final = b"\xf3\x0f\x1e\xfa", b"\x48\xba", b"\x48\xb8", b"\xff\xe0"


def with_third_argument(function: int, value: int) -> bytes:
    """Jump to ``function`` with its third argument replaced by ``value``."""
    marker, into_rdx, into_rax, jump = _THIRD
    return _WITH_THIRD.pack(marker, into_rdx, value, into_rax, function, jump)


def jumps_to(code: bytes) -> int | None:
    """The function that the code of :func:`with_third_argument` jumps to; ``None`` for any other code.

    >>> hex(jumps_to(with_third_argument(0x401000, 7)))
    '0x401000'
    """
    marker, into_rdx, _, into_rax, function, jump = _WITH_THIRD.unpack(code[: _WITH_THIRD.size])
    return function if (marker, into_rdx, into_rax, jump) == _THIRD else None
