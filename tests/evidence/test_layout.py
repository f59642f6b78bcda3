"""How slots lie on pages: what is kept for the next process that has the same pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import miniloader
from miniloader.elf import Source
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.layout import Layouts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.kernel.syscalls import PAGE_SIZE


def test_the_last_few_sets_of_pages_are_kept(demo: Path) -> None:
    facts = FileFacts(Source.open(demo), miniloader.inspect(demo), NameNumbers())
    layouts = Layouts()

    def layout(page: int) -> object:
        vaddrs = np.array([page * PAGE_SIZE], np.uint64)
        return layouts.of(facts, vaddrs, vaddrs, np.full(1, PAGE_SIZE))

    first = layout(0)
    assert layout(0) is first
    for page in range(1, 4):
        layout(page)
    assert layout(0) is first, "four are kept, and the last used is the last to go"
    for page in range(1, 5):
        layout(page)
    assert layout(0) is not first


def test_slots_on_two_pages_are_those_on_each(demo: Path) -> None:
    facts = FileFacts(Source.open(demo), miniloader.inspect(demo), NameNumbers())
    pages = np.unique(facts.slot_vaddrs & ~np.uint64(PAGE_SIZE - 1))
    assert len(pages) >= 2
    tails = np.full(len(pages), PAGE_SIZE)
    together = Layouts().of(facts, pages, pages, tails)
    alone = [Layouts().of(facts, pages[[row]], pages[[row]], tails[:1]) for row in range(len(pages))]
    assert together.on_page.tolist() == [int(layout.on_page[0]) for layout in alone]
    assert together.vaddr.tolist() == [vaddr for layout in alone for vaddr in layout.vaddr.tolist()]
    assert sum(together.on_page) == len(facts.slots)
