"""What a forked process has mapped anew, told apart from memory whose protection alone has changed.

The kernel notes an mmap(2) and an mprotect(2) alike: where the area lies, of which file it is, its protection
now; neighbours that have become one area are noted as one.  What was there before, by ``maps`` at the fork
and by what has been noted since, tells which it was: an mprotect(2) that changes nothing is not noted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from miniloader.kernel.family_faults import FamilyEvent
from miniloader.kernel.maps import Vma
from miniloader.values import NamedTuple

__all__ = ["MappedAnew"]


class _Area(NamedTuple):
    """Memory at [start, end), of the file at ``path``, "" where anonymous; ``protection`` as ``r-x``."""

    start: int
    end: int
    protection: str
    path: str


class MappedAnew:
    """What lies where in a process that was forked when memory was ``vmas``, ascending."""

    def __init__(self, vmas: Sequence[Vma]) -> None:
        self._areas = [
            _Area(vma.start, vma.end, vma.protection, vma.path if vma.is_file else "") for vma in vmas
        ]

    def is_anew(self, event: FamilyEvent) -> bool:
        """Whether what was at the place of that ``event``, a ``map``, is gone.

        It is still there where the protection of a part has changed: but to none at all, by which memory is
        set aside that is new, for stacks and for malloc's arenas.
        """
        path = "" if event.path.startswith(("//", "[")) else event.path
        now = _Area(event.start, event.end, event.protection, path)
        first = bisect_left(self._areas, now.start, key=lambda area: area.end - 1)
        last = bisect_left(self._areas, now.end, key=lambda area: area.start)
        before = self._areas[first:last]
        left = [area._replace(end=now.start) for area in before if area.start < now.start]
        right = [area._replace(start=now.end) for area in before if area.end > now.end]
        self._areas[first:last] = [*left, now, *right]
        changed = any(area.path == path and area.protection != now.protection for area in before)
        return not changed or now.protection == "---"
