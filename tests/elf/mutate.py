"""Malformed libraries: bytes of a good one with something wrong, from a seed."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable

import numpy as np

from miniloader.elf import ElfImage
from miniloader.errors import ElfError
from miniloader.report import inspect as say
from miniloader.report import inspect_view
from miniloader.report.symbols import symbol_list

__all__ = ["exercise", "mutated"]

EXTREMES = (
    0,
    1,
    2,
    3,
    7,
    0x7F,
    0x80,
    0xFF,
    0xFFF,
    0x1000,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
)
WIDE = (0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFF000, 0xFFFFFFFFFFFFFFFF)


def exercise(image: ElfImage) -> None:
    """Decode everything there is, as inspect and the checks do; :class:`ElfError` is an answer, too."""
    table = None
    reads: list[Callable[[], object]] = [
        lambda: image.dynamic,
        lambda: image.relocations.by_kind(),
        lambda: image.relocations.by_page(4096),
        lambda: image.sections,
        lambda: image.section_at(0x1000),
        lambda: (image.needed, image.soname),
        lambda: (image.runpath, image.rpath),
        lambda: (image.build_id, image.tls, image.executable_stack),
        lambda: image.plan(4096),
        lambda: image.plan(65536),
    ]
    for read in reads:
        with contextlib.suppress(ElfError):
            read()
    with contextlib.suppress(ElfError):
        table = image.symbols
    if table is not None:
        for name in ("crc32", "", "malloc", table.name(len(table) - 1) if len(table) else "x"):
            table.find(name)
            table.find(name, "V_1")
        for vaddr in (0, 0x1000, 0xFFFFFFFFFFFFFFFF):
            table.at(vaddr)
        if len(table) < 500:
            list(symbol_list(image))
    say.to_json(image, 4096)
    for line in (*inspect_view.page(image, 4096, 80, 80), *inspect_view.checks(image, 80)):
        assert all(isinstance(piece, str) or len(piece) == 2 for piece in line)


def mutated(data: bytes, seed: int) -> bytes:
    """``data`` with one to four things wrong."""
    chance = random.Random(seed)
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_MUTATIONS)(made, chance)
    return bytes(made)


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _splice(data: bytearray, chance: random.Random) -> None:
    if len(data) > 64:
        length = chance.randrange(1, 64)
        start, to = (chance.randrange(len(data) - length) for _ in range(2))
        data[to : to + length] = data[start : start + length]


def _put(data: bytearray, chance: random.Random, at: int, size: int) -> None:
    """An extreme number, or one near what is there, at ``at``."""
    if at < 0 or at + size > len(data):
        return
    order = "big" if data[5] == 2 else "little"
    old = int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]
    choices = [*EXTREMES, *(WIDE if size == 8 else ()), old + 1, old - 1, old * 2, old ^ 0x1000, len(data)]
    value = chance.choice(choices) & ((1 << 8 * size) - 1)
    data[at : at + size] = value.to_bytes(size, order)  # type: ignore[arg-type]


def _header(data: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4, 8))
    _put(data, chance, chance.randrange(64), size)


def _layout(data: bytearray) -> tuple[int, int, int, str] | None:
    """phoff, phentsize, phnum and byte order, as far as they can be read."""
    if len(data) < 64 or data[4] not in (1, 2):
        return None
    order = ">" if data[5] == 2 else "<"
    if data[4] == 2:
        phoff, phentsize, phnum = (
            *struct.unpack_from(order + "Q", data, 32),
            *struct.unpack_from(order + "HH", data, 54),
        )
    else:
        phoff, phentsize, phnum = (
            *struct.unpack_from(order + "I", data, 28),
            *struct.unpack_from(order + "HH", data, 42),
        )
    return phoff, phentsize, phnum, order


def _program_header(data: bytearray, chance: random.Random) -> None:
    layout = _layout(data)
    if layout and layout[2]:
        phoff, phentsize, phnum, _ = layout
        size = 8 if data[4] == 2 else 4
        field = chance.choice((0, *range(4 if size == 4 else 8, phentsize or 8, size)))
        _put(data, chance, phoff + chance.randrange(phnum) * phentsize + field, 4 if field == 0 else size)


def _dynamic(data: bytearray, chance: random.Random) -> None:
    found = _dynamic_extent(data)
    if found:
        start, length, word = found
        _put(data, chance, start + chance.randrange(max(length // word, 1)) * word, word)


def _dynamic_extent(data: bytearray) -> tuple[int, int, int] | None:
    layout = _layout(data)
    if not layout:
        return None
    phoff, phentsize, phnum, order = layout
    for index in range(min(phnum, 64)):
        at = phoff + index * phentsize
        if at + 56 > len(data):
            return None
        if struct.unpack_from(order + "I", data, at)[0] == 2:
            if data[4] == 2:
                return (
                    *struct.unpack_from(order + "Q", data, at + 8),
                    *struct.unpack_from(order + "Q", data, at + 32),
                    8,
                )
            return (
                *struct.unpack_from(order + "I", data, at + 4),
                *struct.unpack_from(order + "I", data, at + 16),
                4,
            )
    return None


def _pointed_to(data: bytearray, chance: random.Random) -> None:
    """Somewhere in the first bytes of a table that the dynamic section points to."""
    found = _dynamic_extent(data)
    if not found or found[0] + found[1] > len(data):
        return
    start, length, word = found
    order = ">" if data[5] == 2 else "<"
    rows = np.frombuffer(
        bytes(data[start : start + length // (2 * word) * 2 * word]), f"{order}u{word}"
    ).reshape(-1, 2)
    places = [int(value) for tag, value in rows.tolist() if value < len(data) and tag not in (0, 1, 14)]
    if places:
        _put(data, chance, chance.choice(places) + chance.randrange(96) // 2 * 2, chance.choice((2, 4, word)))


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _truncate, _splice, _header, _program_header, _program_header, _dynamic, _dynamic, _pointed_to,
    _pointed_to,
)  # fmt: skip
