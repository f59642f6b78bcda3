"""Which pages the chapter on erosion looks at: those that nobody else can have anything on."""

from __future__ import annotations

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough.object_pool import PAGES, _longest_run, built

SIZE, POOL, HEAD = 48, 1 << 14, 48
START = 1 << 24


def blocks(pools: int) -> list[int]:
    """Where objects are that fill this many of CPython's pools one after another."""
    number = (POOL - HEAD) // SIZE
    return [START + pool * POOL + HEAD + block * SIZE for pool in range(pools) for block in range(number)]


def test_pools_that_follow_one_another_are_one_run() -> None:
    run = _longest_run(blocks(16), SIZE)
    assert run == range(START // PAGE_SIZE + 1, (START + 16 * POOL) // PAGE_SIZE - 1)


def test_room_for_one_object_ends_a_run() -> None:
    addresses = blocks(16)
    pool = len(addresses) // 16
    # Where a pool's first one is missing, the last one before it lies at the end of the page before.
    for place, pages in ((10 * pool + 20, 0), (10 * pool, 1)):
        missing = addresses[place]
        run = _longest_run([address for address in addresses if address != missing], SIZE)
        assert run == range(START // PAGE_SIZE + 1, missing // PAGE_SIZE - pages)


def test_what_is_built_has_enough_of_them() -> None:
    items, start = built()
    addresses = {*map(id, items)}
    assert start % PAGE_SIZE == 0
    assert all(
        any(page <= address < page + PAGE_SIZE for address in addresses)
        for page in range(start, start + PAGES * PAGE_SIZE, PAGE_SIZE)
    )
