"""Causes of made-up pages: the demonstration library's bytes, relocated and written to by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from miniloader.elf import Source
from miniloader.elf.image import read_image
from miniloader.evidence.cause import Classified, classify
from miniloader.evidence.cause_names import CAUSES, bit, cause_names
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.evidence.space import Placed, Space
from miniloader.kernel.syscalls import PAGE_SIZE

BIAS = 0x7F00_0000_0000


class Made:
    """The writable pages of a library as they would be in a process."""

    def __init__(self, path: Path) -> None:
        source = Source.open(path)
        self.image = read_image(source)
        self.facts = FileFacts(source, self.image, NameNumbers())
        self.plan = self.image.plan(PAGE_SIZE)
        writable = [m for m in self.plan.mappings if m.kind == "file" and "w" in m.protection]
        relro = [m for m in self.plan.mappings if m.kind == "file" and m.start == self.plan.relro.start]
        mappings = {m.start: m for m in (*writable, *relro)}.values()
        self.vaddrs = np.concatenate([np.arange(m.start, m.end, PAGE_SIZE, np.uint64) for m in mappings])
        self.offsets = np.concatenate(
            [np.arange(m.start, m.end, PAGE_SIZE, np.uint64) - m.start + m.file_offset for m in mappings]
        ).astype(np.uint64)
        self.live = self.facts.pages(self.offsets).copy()
        for span in self.plan.zeroed:  # as any loader does
            page = span.start & -PAGE_SIZE
            if page in self.vaddrs:
                self.live[self.row(page), span.start - page :] = 0

    def row(self, vaddr: int) -> int:
        return int(np.flatnonzero(self.vaddrs == vaddr & -PAGE_SIZE)[0])

    def vaddr(self, name: str) -> int:
        number = self.image.symbols.find(name)
        assert number is not None
        return int(self.image.symbols.rows["value"][number])

    def store(self, vaddr: int, value: int) -> None:
        struct.pack_into("<Q", self.live[self.row(vaddr)], vaddr % PAGE_SIZE, value % 2**64)

    def relocate(self) -> None:
        """RELATIVE: bias + addend; 64: the symbol's address."""
        for row in (row for table in self.image.relocations.tables for row in table.rows):
            kind, place, addend = int(row["type"]), int(row["offset"]), int(row["addend"])
            if kind == 8:
                self.store(place, BIAS + addend)
            elif kind == 1:
                value = int(self.image.symbols.rows["value"][int(row["symbol"])])
                self.store(place, BIAS + value + addend)

    def classified(self) -> Classified:
        placed = Placed(BIAS, BIAS + self.plan.start, BIAS + self.plan.end, self.facts)
        code = [(BIAS + m.start, BIAS + m.end) for m in self.plan.mappings if "x" in m.protection]
        return classify(self.facts, Space([placed], code), BIAS, self.vaddrs, self.offsets, self.live.copy())

    def causes(self, name: str) -> set[str]:
        causes: NDArray[np.uint8] = self.classified().causes
        return {*cause_names(int(causes[self.row(self.vaddr(name))]))}

    def written(self) -> set[tuple[str, int, str]]:
        """Symbol, page, cause."""
        return {
            (self.facts.symbol_name(symbol), int(self.vaddrs[page]), *cause_names(cause))
            for page, symbol, cause in self.classified().written.tolist()
        }


@pytest.fixture
def made(demo: Path) -> Made:
    return Made(demo)


def test_bits_and_names() -> None:
    assert cause_names(0) == ()
    assert [cause_names(bit(cause)) for cause in CAUSES] == [(cause,) for cause in CAUSES]
    assert cause_names(bit("write") | bit("relocation")) == ("relocation", "write")


def test_as_in_the_file_it_is_identical(made: Made) -> None:
    assert made.causes("demo_spare") == {"identical"}
    assert made.causes("demo_operations") == {"identical"}
    assert made.written() == set()


def test_relocated_and_nothing_else(made: Made) -> None:
    made.relocate()
    assert made.causes("demo_operations") == {"relocation"}
    assert made.causes("demo_current") >= {"relocation"}
    assert not made.causes("demo_current") & {"write", "overwritten"}
    assert made.causes("demo_spare") == {"identical"}
    assert made.written() == set()


@pytest.mark.parametrize("value", [1, BIAS, 2**64 - 1])
def test_a_slot_with_another_value_is_overwritten(made: Made, value: int) -> None:
    made.relocate()
    made.store(made.vaddr("demo_operations"), value)
    assert made.causes("demo_operations") == {"relocation", "overwritten"}
    page = made.vaddr("demo_operations") & -PAGE_SIZE
    assert made.written() == {("demo_operations", page, "overwritten")}


def test_the_address_of_another_symbol_is_not_its_own(made: Made) -> None:
    made.relocate()
    made.store(made.vaddr("demo_current"), BIAS + made.vaddr("demo_spare"))
    assert "overwritten" in made.causes("demo_current")


def test_a_single_byte_beside_a_slot_is_a_write(made: Made) -> None:
    made.relocate()
    vaddr = made.vaddr("demo_operations") + 9  # in the name of the first
    made.live[made.row(vaddr), vaddr % PAGE_SIZE] ^= 1
    assert made.causes("demo_operations") == {"relocation", "write"}
    (word,) = [one for one in made.classified().words if one["slot"] < 0]
    assert int(word["vaddr"]) == vaddr - 1


def test_every_word_of_data_is_found(made: Made) -> None:
    made.relocate()
    first = made.vaddr("demo_counters")
    for at in range(first, first + PAGE_SIZE, 8):
        fresh = Made.__new__(Made)
        fresh.__dict__ |= {**made.__dict__, "live": made.live.copy()}
        if at % 256 == 0:
            fresh.store(at, 0x1234)
            assert fresh.written() == {("demo_counters", first, "write")}


def test_the_tail_of_the_last_page_is_bss(made: Made) -> None:
    made.relocate()
    (span,) = [span for span in made.plan.zeroed if span.start % PAGE_SIZE]
    row = made.row(span.start)
    assert "write" not in cause_names(int(made.classified().causes[row]))
    made.live[row, PAGE_SIZE - 1] = 1
    assert "bss" in cause_names(int(made.classified().causes[row]))
    assert "write" not in cause_names(int(made.classified().causes[row]))


def test_what_cannot_be_read_is_unknown(made: Made) -> None:
    """A symbol's address in a file that nobody may read."""
    made.relocate()
    made.store(made.vaddr("demo_current"), BIAS + 0x100_0000)
    elsewhere = Placed(BIAS + 0x100_0000, BIAS + 0x100_0000, BIAS + 0x200_0000, None)
    placed = Placed(BIAS, BIAS + made.plan.start, BIAS + made.plan.end, made.facts)
    answer = classify(
        made.facts, Space([placed, elsewhere], []), BIAS, made.vaddrs, made.offsets, made.live.copy()
    )
    row = made.row(made.vaddr("demo_current"))
    assert "unknown" in cause_names(int(answer.causes[row]))
    assert answer.unreadable[row]
