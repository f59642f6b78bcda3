"""Which areas that the kernel notes are new, and which have another protection; events are written here."""

from __future__ import annotations

import pytest

from miniloader.kernel.family_faults import FamilyEvent
from miniloader.kernel.maps import parse_vma
from miniloader.lab.erosion.mapped_anew import MappedAnew

_MAPS = """\
10000-20000 rw-p 00000000 00:00 0
20000-30000 ---p 00000000 00:00 0
40000-44000 r--p 00003000 08:01 77    /lib/libcase.so
50000-60000 r-xp 00000000 00:00 0                          [anon:code]
70000-90000 rw-p 00000000 00:00 0                          [heap]
"""


def _event(start: int, end: int, protection: str, path: str = "//anon") -> FamilyEvent:
    return FamilyEvent("map", 0, 1, start=start, end=end, path=path, protection=protection)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # mprotect(2) of all of an area, of a part, and of a part that becomes one with its neighbours again.
        ([(0x10000, 0x20000, "r--")], [False]),
        ([(0x14000, 0x16000, "r--"), (0x10000, 0x20000, "rw-")], [False, False]),
        ([(0x50000, 0x60000, "rw-"), (0x50000, 0x60000, "r-x")], [False, False]),
        ([(0x78000, 0x7A000, "r--", "[heap]"), (0x70000, 0x90000, "rw-", "[heap]")], [False, False]),
        ([(0x40000, 0x44000, "rw-", "/lib/libcase.so")], [False]),
        # An arena grows into what was set aside for it.
        ([(0x10000, 0x24000, "rw-")], [False]),
        # The same again, another thing in its place, or what is set aside for a stack.
        ([(0x10000, 0x20000, "rw-")], [True]),
        ([(0x40000, 0x44000, "rw-")], [True]),
        ([(0x10000, 0x12000, "r--", "/lib/libelse.so")], [True]),
        ([(0x10000, 0x20000, "---"), (0x11000, 0x20000, "rw-")], [True, False]),
        # Where nothing was, and then there again.
        (
            [(0x30000, 0x34000, "rw-"), (0x30000, 0x34000, "rw-"), (0x30000, 0x34000, "r--")],
            [True, True, False],
        ),
        (
            [(0x8000, 0x14000, "rw-"), (0x14000, 0x18000, "r--"), (0x14000, 0x18000, "r--")],
            [True, False, True],
        ),
    ],
)
def test_what_is_new(events: list[tuple[int, int, str]], expected: list[bool]) -> None:
    mapped = MappedAnew([parse_vma(line.encode()) for line in _MAPS.splitlines()])
    assert [mapped.is_anew(_event(*event)) for event in events] == expected
