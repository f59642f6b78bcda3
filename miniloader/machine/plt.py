"""Where the stubs of the procedure linkage table are, and through which GOT slot each jumps.

A stub is a few instructions that jump to the address in a GOT slot.  They are found by what they are, not by
where: each linker's stub is a :class:`Form`, bytes of which some are fixed, and the slot it names must be one
that a relocation fills.  Section names only limit where to look (a function may end in such a jump, too).

Sources: each processor's psABI, "Procedure Linkage Table", and what GNU ld, gold, lld and mold emit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.values import dataclass

__all__ = ["STUB", "find_stubs"]

STUB: Final = np.dtype([("vaddr", "u8"), ("end", "u8"), ("slot", "u8")])
"""A stub: its first vaddr, the one after its last byte, and the vaddr of its GOT slot."""

Windows = NDArray[np.uint8]  # a row of bytes for each place where a form was found
Vaddrs = NDArray[np.int64]
SlotOf = Callable[[Windows, Vaddrs, int], Vaddrs]


@dataclass(frozen=True, eq=False)
class Form:
    """Code that matches ``value`` under ``mask``; ``slot(bytes, vaddrs, DT_PLTGOT)`` is where it jumps."""

    mask: NDArray[np.uint8]
    value: NDArray[np.uint8]
    align: int
    slot: SlotOf


# ----------------------------------------------------------------------------------------------- x86
def _octets(pattern: str, align: int, slot: Callable[[int], SlotOf]) -> Form:
    """A form written in hexadecimal, ``..`` for any byte; ``DD`` is the displacement, four bytes long."""
    words = pattern.replace("DD", "DD .. .. ..").split()
    mask = [0 if word in ("..", "DD") else 0xFF for word in words]
    value = [0 if word in ("..", "DD") else int(word, 16) for word in words]
    return Form(np.array(mask, np.uint8), np.array(value, np.uint8), align, slot(words.index("DD")))


def _of(code: Windows, at: int, dtype: str) -> Vaddrs:
    """The four bytes from ``at`` on in each row, as ``dtype``."""
    return np.frombuffer(code[:, at : at + 4].tobytes(), dtype).astype(np.int64)


def _from_here(at: int) -> SlotOf:
    """x86-64: relative to the end of the jump, which ends with its displacement."""
    return lambda code, vaddrs, got: vaddrs + at + 4 + _of(code, at, "<i4")


def _from_got(at: int) -> SlotOf:
    """i386: relative to the GOT, whose address is in ebx."""
    return lambda code, vaddrs, got: ((got & 0xFFFFFFFF) + _of(code, at, "<i4")) & 0xFFFFFFFF


def _absolute(at: int) -> SlotOf:
    return lambda code, vaddrs, got: _of(code, at, "<i4") & 0xFFFFFFFF


# ------------------------------------------------------------------------------ words of four bytes
def _words(slot: SlotOf, *words: tuple[int, int]) -> Form:
    """A form of 32-bit instructions, each a mask and the value under it."""
    mask, value = (b"".join(struct.pack("<I", word[part]) for word in words) for part in (0, 1))
    return Form(np.frombuffer(mask, np.uint8), np.frombuffer(value, np.uint8), 4, slot)


def _column(code: Windows, index: int) -> Vaddrs:
    return _of(code, 4 * index, "<u4")


def _signed(value: Vaddrs, bits: int) -> Vaddrs:
    sign = 1 << (bits - 1)
    return np.asarray((value & (sign - 1)) - (value & sign), np.int64)


def _aarch64(first: int) -> SlotOf:
    """``adrp x16, page`` (the instruction ``first``) and ``ldr x17, [x16, #offset]``."""

    def slot(code: Windows, vaddrs: Vaddrs, got: int) -> Vaddrs:
        adrp, ldr = _column(code, first), _column(code, first + 1)
        pages = _signed((adrp >> 5 & 0x7FFFF) << 2 | adrp >> 29 & 3, 21)
        slots: Vaddrs = ((vaddrs + 4 * first) & ~0xFFF) + (pages << 12) + (ldr >> 10 & 0xFFF) * 8
        return slots

    return slot


def _rotated(word: Vaddrs) -> Vaddrs:
    """An A32 data-processing immediate: eight bits, rotated right by twice the four before them."""
    turn, value = (word >> 8 & 0xF) * 2, word & 0xFF
    return (value >> turn | value << (32 - turn)) & 0xFFFFFFFF


def _arm(first: int, adds: int) -> SlotOf:
    """``add ip, pc, #…``, more ``add ip, ip, #…``, ``ldr pc, [ip, #…]!``; pc is two instructions ahead."""

    def slot(code: Windows, vaddrs: Vaddrs, got: int) -> Vaddrs:
        parts = [_rotated(_column(code, first + index)) for index in range(adds)]
        last = _column(code, first + adds) & 0xFFF
        return (vaddrs + 4 * first + 8 + sum(parts, last)) & 0xFFFFFFFF

    return slot


def _riscv(code: Windows, vaddrs: Vaddrs, got: int) -> Vaddrs:
    """``auipc t3, high`` and ``ld t3, low(t3)``."""
    high, low = _signed(_column(code, 0) & 0xFFFFF000, 32), _signed(_column(code, 1) >> 20, 12)
    return vaddrs + high + low


_ENDBR, _LAZY = "F3 0F 1E FA", " 68 .. .. .. .. E9 .. .. .. .."
_RETPOLINE = "E8 .. .. .. .. E9 .. .. .. .. 68 .. .. .. .. E9 .. .. .. .."
_EXACT = 0xFFFFFFFF
_BTI, _AUTH = (_EXACT, 0xD503245F), (_EXACT, 0xD503219F)  # bti c; autia1716
_ADRP, _LDR, _ADD = (0x9F00001F, 0x90000010), (0xFFC003FF, 0xF9400211), (0xFFC003FF, 0x91000210)
_BR = (_EXACT, 0xD61F0220)
_THUMB = ((_EXACT, 0x46C04778), (_EXACT, 0xE7FD4778))  # bx pc, then nop or a branch to itself
_ADD_PC, _ADD_IP, _LDR_PC = (0xFFFFF000, 0xE28FC000), (0xFFFFF000, 0xE28CC000), (0xFFFFF000, 0xE5BCF000)

_FORMS: Final[dict[str, tuple[Form, ...]]] = {
    "X86_64": (
        _octets("FF 25 DD" + _LAZY, 8, _from_here),
        _octets("FF 25 DD", 8, _from_here),
        _octets(f"{_ENDBR} F2 FF 25 DD", 8, _from_here),
        _octets(f"{_ENDBR} FF 25 DD", 8, _from_here),
        _octets(f"{_ENDBR} 41 BB .. .. .. .. FF 25 DD", 8, _from_here),  # mold
        _octets(f"4C 8B 1D DD {_RETPOLINE}", 16, _from_here),  # lld, -z retpolineplt
        _octets("4C 8B 1D DD E9 .. .. .. .. CC CC CC CC", 16, _from_here),  # and -z now
    ),
    "386": (
        *(
            _octets(f"{prefix} FF {modrm} DD {lazy}", 8, slot)
            for prefix in ("", "F3 0F 1E FB")
            for modrm, slot in (("A3", _from_got), ("25", _absolute))
            for lazy in (_LAZY, "")
        ),
        _octets(f"50 8B 83 DD {_RETPOLINE}", 16, _from_got),  # lld, -z retpolineplt
        _octets(f"50 A1 DD {_RETPOLINE}", 16, _absolute),
    ),
    "AARCH64": tuple(
        _words(_aarch64(len(landing)), *landing, _ADRP, _LDR, _ADD, *signing, _BR)
        for landing in ((), (_BTI,))
        for signing in ((), (_AUTH,))
    ),
    "ARM": tuple(
        _words(_arm(len(thumb), adds), *thumb, _ADD_PC, *[_ADD_IP] * (adds - 1), _LDR_PC)
        for thumb in ((), *((word,) for word in _THUMB))
        for adds in (2, 3)
    ),
    "RISCV": (_words(_riscv, (0xFFF, 0xE17), (0xFFFFF, 0xE3E03), (_EXACT, 0xE0367), (_EXACT, 0x13)),),
}


# ------------------------------------------------------------------------------------------ finding
def find_stubs(image: ElfImage, covered: Callable[[NDArray[np.uint64]], NDArray[np.bool_]]) -> NDArray[Any]:
    """Every PLT stub of ``image`` as an array of :data:`STUB`, ascending.

    ``covered`` tells which of some vaddrs a symbol covers: where no section says where the PLT is, a jump in
    the middle of a function is none of it.
    """
    forms = _FORMS.get(image.header.machine, ())
    slots = np.concatenate([np.empty(0, np.uint64), *(t.rows["offset"] for t in image.relocations.tables)])
    got = image.dynamic.tags.get(DT_PLTGOT, 0)
    matches = [_matches(code, vaddr, form, got) for vaddr, code in _regions(image) for form in forms]
    stubs = np.concatenate([np.empty(0, STUB), *matches])
    stubs = stubs[np.isin(stubs["slot"], slots)]
    if not image.sections:
        stubs = stubs[~covered(stubs["vaddr"])]
    return _without_overlaps(stubs[np.lexsort((-stubs["end"].astype(np.int64), stubs["vaddr"]))])


def _regions(image: ElfImage) -> Iterator[tuple[int, bytes]]:
    """Where stubs may be: the vaddr and bytes of ``.plt`` and its like, or of all code without sections."""
    code = [load for load in image.loads if "x" in load.flags and load.end < 1 << 63]
    if not image.sections:
        for load in code:
            yield load.vaddr, bytes(image.read(load.vaddr, load.filesz, "code"))
        return
    for section in image.sections:
        if not section.allocated or not section.name.startswith((".plt", ".iplt")):
            continue
        if any(load.vaddr <= section.vaddr and section.end <= load.file_end for load in code):
            yield section.vaddr, bytes(image.read(section.vaddr, section.size, section.name))


def _matches(code: bytes, vaddr: int, form: Form, got: int) -> NDArray[Any]:
    size = len(form.mask)
    skip = -vaddr % form.align
    octets = np.frombuffer(code, np.uint8)[skip:]
    if len(octets) < size:
        return np.empty(0, STUB)
    windows = np.lib.stride_tricks.sliding_window_view(octets, size)[:: form.align]
    hits = np.arange(len(windows))
    for column in np.flatnonzero(form.mask).tolist():  # a byte at a time: few rows are left after two
        hits = hits[windows[hits, column] & form.mask[column] == form.value[column]]
    vaddrs = vaddr + skip + hits * form.align
    rows = np.zeros(len(hits), STUB)
    rows["vaddr"], rows["end"] = vaddrs, vaddrs + size
    rows["slot"] = form.slot(windows[hits], vaddrs, got).astype(np.uint64)
    return rows


def _without_overlaps(rows: NDArray[Any]) -> NDArray[Any]:
    """Of rows that overlap only the first, which is the longest that starts there."""
    reach = np.maximum.accumulate(rows["end"][:-1]) if len(rows) else rows["end"]
    first = np.ones(min(len(rows), 1), bool)
    return np.asarray(rows[np.concatenate([first, rows["vaddr"][1:] >= reach])])
