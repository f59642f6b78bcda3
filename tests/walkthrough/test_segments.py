"""The library of the chapter on segments shows what the chapter tells, on each machine it ships for."""

from __future__ import annotations

import pytest

from fixtures import build
from miniloader.elf import inspect
from miniloader.walkthrough.chapters.segments import _file_page_mapped_twice

SIZES = {"x86_64": (0x1000,), "aarch64": (0x1000, 0x4000, 0x10000)}


@pytest.mark.parametrize(("machine", "size"), [(name, size) for name in SIZES for size in SIZES[name]])
def test_one_page_of_the_file_is_mapped_twice(machine: str, size: int) -> None:
    plan = inspect(build.CHAPTERS["chapters", machine]).plan(size)
    first, second, offset = _file_page_mapped_twice(plan)
    for vaddr, writable in ((first, False), (second, True)):
        (part,) = (part for part in plan.mappings if part.start <= vaddr < part.end)
        assert part.file_offset + vaddr - part.start == offset
        assert ("w" in part.protection) is writable
    assert plan.zeroed
