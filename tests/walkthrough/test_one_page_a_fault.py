"""Chapters hold where a fault maps no page but its own: none judges a page that it did not touch itself.

A read fault maps neighbours as well, as a rule (fault-around), but none whose folio is locked just then, and
on some kernels none at all.  Here what came along is let go of again after each access.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from miniloader.kernel import syscalls
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import FILE, PRESENT, read_pagemap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough.chapters import CHAPTERS, chapter
from miniloader.walkthrough.run_chapter import run_chapter
from miniloader.walkthrough.traced_calls import Calls

TABLE = PAGE_SIZE // 8  # pages of a page table
NEAR = 2 * TABLE  # pages on each side: more than any fault brings
#: Chapters whose memory other programs touch, or a loader.
ELSEWHERE = {
    "shared",
    "unmappable",
    "relocation",
    "processes",
    "textrel",
    "tls",
    "prepared",
    "build",
    "erosion",
}


def _mapping_at(address: int) -> tuple[int, int]:
    vma = next(vma for vma in read_maps(os.getpid()) if vma.start <= address < vma.end)
    return max(vma.start, address - NEAR * PAGE_SIZE), min(vma.end, address + NEAR * PAGE_SIZE)


@contextmanager
def nothing_else_comes_along(address: int, length: int) -> Iterator[None]:
    """Let go of the page cache's pages that an access to memory at ``address`` maps besides its own.

    A folio that fills a whole page table is mapped by one entry above it, and comes and goes as a whole.
    """
    start, end = _mapping_at(address)
    start -= start % PAGE_SIZE
    before = read_pagemap(None, start, end)
    yield
    after = read_pagemap(None, start, end)
    came = (after & ~before & PRESENT != 0) & (after & FILE != 0)
    tables = (start // PAGE_SIZE + np.arange(len(came))) // TABLE
    whole = np.bincount(tables - tables[0], came) == TABLE
    came &= ~whole[tables - tables[0]]
    came[(address - start) // PAGE_SIZE : (address + max(length, 1) - 1 - start) // PAGE_SIZE + 1] = False
    for page in np.flatnonzero(came).tolist():
        syscalls.madvise(start + page * PAGE_SIZE, PAGE_SIZE, syscalls.MADV_DONTNEED)


@pytest.fixture(scope="module", autouse=True)
def one_page_a_fault() -> Iterator[None]:
    load, store = Calls.load, Calls.store

    def load_alone(calls: Calls, address: int, length: int = 1, name: str = "") -> bytes:
        with nothing_else_comes_along(address, length):
            return load(calls, address, length, name)

    def store_alone(calls: Calls, address: int, data: bytes, name: str = "") -> None:
        with nothing_else_comes_along(address, len(data)):
            store(calls, address, data, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calls, "load", load_alone)
        patch.setattr(Calls, "store", store_alone)
        yield


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name not in ELSEWHERE])
def test_no_claim_is_refuted(name: str) -> None:
    result = run_chapter(chapter(name))
    assert [(claim.id, claim.observed) for claim in result.claims if claim.verdict == "refuted"] == []
