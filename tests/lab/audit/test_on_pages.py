"""What the file says of its pages, told of all together: the same as slot by slot."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from miniloader.elf import Source
from miniloader.elf.image import read_image
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.evidence.slots import LOADER
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.private_pages import _on_pages


def _facts(path: str | Path) -> FileFacts:
    source = Source.open(path)
    return FileFacts(source, read_image(source), NameNumbers())


def _libraries() -> list[str]:
    return sorted({vma.path for vma in read_maps() if ".so" in vma.path and os.path.exists(vma.path)})[:24]


@pytest.mark.parametrize("every", [1, 3])
def test_pages_are_told_as_their_slots_are_one_by_one(every: int, demo: Path) -> None:
    """Of all pages with a slot, and of some; and of one that has none."""
    seen = Counter[str]()
    for path in (demo, *_libraries()):
        facts = _facts(path)
        slots = facts.slots[facts.slots["what"] != LOADER]
        bare = int(facts.slot_vaddrs[-1]) // PAGE_SIZE * PAGE_SIZE + (1 << 30) if len(slots) else 0
        pages = sorted({int(vaddr) // PAGE_SIZE * PAGE_SIZE for vaddr in facts.slot_vaddrs})[::every]
        told = _on_pages(facts, [*pages, bare])
        assert [*told] == [*pages, bare]
        assert told[bare].relocated == frozenset()
        assert told[bare].kinds == ()
        for page in pages:
            here = slots[(slots["vaddr"] >= page) & (slots["vaddr"] < page + PAGE_SIZE)]
            symbols = facts.symbols_at(here["vaddr"])
            kinds = sorted(Counter(here["kind"].tolist()).items())
            assert told[page].relocated == {*symbols[symbols >= 0].tolist()}
            assert told[page].kinds == tuple((facts.kind_name(kind), count) for kind, count in kinds)
            assert told[page].section == facts.section_on(page)
            seen.update(symbols=len(told[page].relocated), kinds=len(kinds), several=len(kinds) > 1)
    assert min(seen[name] for name in ("symbols", "kinds", "several")) > 20


def test_nothing_is_told_of_pages_of_a_file_that_cannot_be_read() -> None:
    (told,) = _on_pages(None, [0x1000]).values()
    assert (told.section, told.relocated, told.kinds) == ("", frozenset(), ())


def test_the_last_page_of_all_is_a_page(demo: Path) -> None:
    """A file in a low place has a negative bias, and vaddrs just below the end."""
    last = 2**64 - PAGE_SIZE
    assert _on_pages(_facts(demo), [last])[last].kinds == ()


def test_symbols_cover_what_one_by_one_they_cover(demo: Path) -> None:
    facts = _facts(demo)
    starts, ends, _ = facts._named
    vaddrs = np.unique(np.concatenate([starts, ends, starts + np.uint64(1), ends - np.uint64(1)]))
    found = {
        int(vaddr): number
        for number, first, end in zip(*facts.symbols_over(vaddrs), strict=True)
        for vaddr in vaddrs[first:end]
    }
    assert found == {
        int(vaddr): int(number)
        for vaddr, number in zip(vaddrs, facts.symbols_at(vaddrs), strict=True)
        if number >= 0
    }
