"""A test that fails on the day when a worker pool stops sharing its memory.

pytest test_workers_share.py     as any user; the fixture ``crew`` comes with miniloader
"""

import platform
from pathlib import Path

import miniloader
from miniloader.testing import StartCrew, assert_copied_only, assert_private_pages, assert_shared

#: The library that miniloader ships for demonstrations; put your own here.
LIBRARY = Path(miniloader.__file__).parent / f"lab/demo/libdemo-{platform.machine()}.so"


def test_what_workers_write_is_all_they_copy(crew: StartCrew) -> None:
    """Two forked workers, one call each: one symbol is written, all else stays one copy."""
    workers = crew(1, library=LIBRARY, by="dlopen").fork(2)
    before = workers.snapshot("forked", library="libdemo")
    workers.call("demo_next()->int")  # counts requests: writes to demo_counters
    after = workers.snapshot("a request later", library="libdemo")

    assert_shared(after, section=".text")
    assert_copied_only([before, after], symbols=["demo_counters"])
    assert_private_pages(after, at_most=1)
