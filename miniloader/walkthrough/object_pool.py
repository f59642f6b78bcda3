"""A parent with small objects, and workers that it forks: what the chapter on erosion works with."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator, Sequence
from itertools import compress, count, pairwise
from typing import Any, Final

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough.child_processes import Child
from miniloader.walkthrough.mapping_views import MappingView
from miniloader.walkthrough.traced_calls import Calls
from miniloader.walkthrough.workbench import Workbench

__all__ = ["PAGES", "Item", "ObjectPool", "built"]

PAGES: Final = 48
"""How many pages of the objects are looked at."""
_FEWEST: Final = 12_000
_MOST: Final = 3_000_000  # 140 MiB
_ALIGNMENT: Final = 16  # bytes, of CPython's blocks
_POOL, _POOL_HEAD = 1 << 14, 48  # bytes of blocks that are alike, and of what they begin with


class Item:
    """A small object, which the collector looks at."""

    __slots__ = ("following",)

    def __init__(self) -> None:
        self.following = None


class ObjectPool:
    """A parent with objects, and workers that it forks, each of which does one thing with them."""

    def __init__(self, bench: Workbench) -> None:
        """Build them; raises EvidenceError where they are not given pages in a row."""
        self.bench = bench
        self.items, self.start = built()
        self.children: dict[str, Child] = {}

    def fork(self, name: str, work: Callable[[list[Item]], None], told: str) -> None:
        """Fork a worker that will do ``work``, told as ``told``."""

        def body(calls: Calls) -> Generator[Any, None, None]:
            yield None
            work(self.items)
            calls.note(told, access=True)
            yield None

        self.children[name] = child = self.bench.child(name, body)
        self.bench.resume(child)
        self.bench.note("fork()", str(child.pid))

    def work(self, name: str) -> None:
        """Have a worker do what it is there for."""
        self.bench.resume(self.children[name])

    def look(self, names: Sequence[str], title: str) -> dict[str, MappingView]:
        """The pages of the objects in the parent and in these workers."""
        pids = {"parent": os.getpid()} | {name: self.children[name].pid for name in names}
        rows = [(name, pid, self.start) for name, pid in pids.items()]
        return dict(zip(pids, self.bench.look(rows, PAGES, title), strict=True))

    def equal(self, name: str) -> int:
        """How many of these pages hold the same bytes in a worker as here."""
        here = ctypes.string_at(self.start, PAGES * PAGE_SIZE)
        with open(f"/proc/{self.children[name].pid}/mem", "rb", buffering=0) as memory:
            memory.seek(self.start)
            there = memory.read(len(here))
        pages = range(0, len(here), PAGE_SIZE)
        return sum(here[page : page + PAGE_SIZE] == there[page : page + PAGE_SIZE] for page in pages)


def built() -> tuple[list[Item], int]:
    """Objects, and where pages begin that hold nothing else, one after another.

    In a process that has run for a while the first ones fill gaps among other objects, which somebody may
    write to: then more are needed, twice as many each time.
    """
    items = list[Item]()
    size = -(-sys.getsizeof(Item()) // _ALIGNMENT) * _ALIGNMENT
    while len(items) < _MOST:
        items += [Item() for _ in range(len(items) or _FEWEST)]
        run = _longest_run(sorted(map(id, items)), size)
        if len(run) >= PAGES:
            return items, run[(len(run) - PAGES) // 2] * PAGE_SIZE
    raise EvidenceError(f"{len(items)} objects were not given {PAGES} pages in a row")


def _longest_run(addresses: Sequence[int], size: int) -> range:
    """The most pages in a row with objects of ``size`` bytes at these ``addresses``, and no room for others.

    Nothing is between two of them but the head of a pool: one other object there, and its page is written to
    by who uses that.
    """
    gaps = (
        second - first != size
        and not (first // _POOL != second // _POOL and second - first < 2 * size + _POOL_HEAD)
        for first, second in pairwise(addresses)
    )
    bounds = [0, *compress(count(1), gaps), len(addresses)]
    runs = (
        range(-(-addresses[first] // PAGE_SIZE), addresses[end - 1] // PAGE_SIZE)
        for first, end in pairwise(bounds)
    )
    return max(runs, key=len)
