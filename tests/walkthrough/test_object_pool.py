"""The objects of the chapter on erosion lie on pages of their own, whatever the process has done before."""

from __future__ import annotations

import subprocess
import sys

from fixtures import build

_OLD_HEAP = """
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough.object_pool import PAGES, Item, built

others = [Item() for _ in range(40_000)]
del others[::2]
items, start = built()
pages = range(start, start + PAGES * PAGE_SIZE)
print(sum(id(item) in pages for item in items) > 80 * PAGES, sum(id(other) in pages for other in others))
"""


def test_nothing_else_is_on_their_pages() -> None:
    command = [sys.executable, "-c", _OLD_HEAP]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT)
    assert done.stdout == "True 0\n"
