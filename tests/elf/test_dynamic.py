"""The dynamic section, decoded: to DT_NULL or the end, in every class and byte order, and not for ever."""

from __future__ import annotations

import struct

import pytest

from miniloader.elf.dynamic import parse_dynamic
from miniloader.errors import ElfError


@pytest.mark.parametrize(("elf_class", "pair"), [(64, "qQ"), (32, "iI")])
@pytest.mark.parametrize("order", "<>")
def test_entries_before_the_null_entry(elf_class: int, pair: str, order: str) -> None:
    entries = [(1, 5), (-2, 7), (1, 9), (0, 0), (1, 11)]
    data = b"".join(struct.pack(order + pair, *entry) for entry in entries) + b"\1\2\3"
    found = parse_dynamic(data, elf_class, order)
    assert found.entries == tuple(entries[:3])
    assert found.all(1) == (5, 9)
    assert dict(found.tags) == {1: 9, -2: 7}


def test_without_a_null_entry_the_end_ends_it() -> None:
    assert parse_dynamic(struct.pack("<4Q", 1, 2, 3, 4), 64, "<").entries == ((1, 2), (3, 4))
    assert parse_dynamic(b"\1" * 15, 64, "<").entries == ()


def test_no_file_has_thousands_of_entries() -> None:
    entry = struct.pack("<2Q", 1, 2)
    assert len(parse_dynamic(entry * 4096, 64, "<").entries) == 4096
    with pytest.raises(ElfError, match="at most 4096"):
        parse_dynamic(entry * 4097, 64, "<", "some.so")
