"""The mappings of a process in columns; what a line of maps says besides addresses is understood once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from miniloader.kernel.maps import Vma
from miniloader.kernel.zeros import NOT_PAGES

__all__ = ["Outline", "Outlines"]

_FACTS: Final = np.dtype([
    ("file", np.int64),  # which one, of which it is a private mapping; -1: none
    ("offset", np.uint64),
    *((name, np.bool_) for name in ("nameless", "writable", "outside", "stack", "unnamed")),
])  # fmt: skip


class Outlines:
    """All lines of maps that were met, but for their addresses: what follows of one is worked out once."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Any, ...], int] = {}
        self._files: dict[tuple[Any, ...], int] = {}
        self._facts = np.empty(256, _FACTS)

    def of(self, vmas: Sequence[Vma]) -> Outline:
        """The outline of a process whose mappings are ``vmas``."""
        try:
            lines = [self._lines[vma[2:]] for vma in vmas]
        except KeyError:
            lines = [self._number(vma) for vma in vmas]
        return Outline(vmas, lines, self._facts[lines])

    def _number(self, vma: Vma) -> int:
        """The number of a line."""
        number = self._lines.setdefault(vma[2:], len(self._lines))
        if number == len(self._facts):
            self._facts = np.append(self._facts, np.empty_like(self._facts))
        private = vma.inode != 0 and not vma.shared and vma.path != "/anon_hugepage"  # MAP_HUGETLB: no file
        self._facts[number] = (
            self._files.setdefault(vma[5:], len(self._files)) if private else -1,
            vma.file_offset,
            not vma.inode,
            private and "w" in vma.protection,
            vma.path in NOT_PAGES,
            vma.path == "[stack]",
            not vma.path,
        )
        return number


class Outline:
    """The mappings of a process, in columns.

    ``lines`` are the numbers of what maps says of each; equal ones are alike.  ``starts`` are addresses,
    ``sizes`` bytes, ``offsets`` places in files; ``nameless`` says whether it is of no file.  By index,
    ``writable`` are private ones of files that may be written to, ``outside`` have entries that are no pages,
    ``stacks`` and ``unnamed`` are what they say; ``files`` are the private ones of each file.
    """

    def __init__(self, vmas: Sequence[Vma], lines: list[int], facts: np.ndarray[Any, Any]) -> None:
        self.lines = lines
        self.starts = np.array([vma[0] for vma in vmas], np.uint64)
        self.sizes = np.array([vma[1] for vma in vmas], np.uint64) - self.starts
        self.offsets, self.nameless = facts["offset"].copy(), facts["nameless"].copy()
        self.writable, self.outside, self.stacks, self.unnamed = (
            facts[name].nonzero()[0].tolist() for name in ("writable", "outside", "stack", "unnamed")
        )
        files: dict[int, list[int]] = {}
        for index, file in enumerate(facts["file"].tolist()):
            if file >= 0:
                files.setdefault(file, []).append(index)
        self.files = [*files.values()]
