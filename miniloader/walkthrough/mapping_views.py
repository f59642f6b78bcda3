"""What the kernel says of the pages of a mapping: states and frames, by page, and words for people."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.evidence.sharing import STATES, analyse
from miniloader.evidence.snapshot import ProcessRange, take
from miniloader.walkthrough.step import BeforeAfter, Grid, Row

__all__ = [
    "ZEROS_UNTOLD",
    "MappingView",
    "address_of",
    "before_and_after",
    "copied_pages",
    "in_words",
    "states_of",
    "views_of",
]

#: Why a state may be unknown where frames are hidden (before Linux 6.7).
ZEROS_UNTOLD: Final = "this kernel does not say which pages are the page of zeros"

_WORDS: Final = {state.name: state.name for state in STATES} | {
    "absent": "not in the page table",
    "shared": "page cache",  # whether others have it, too, is seen in a grid
    "sole": "page cache",
    "copied": "private page",
    "copied-shared": "private page in common",
    "zero": "page of zeros",
}


def in_words(states: Iterable[str]) -> str:
    """States as a reader meets them, each once.

    >>> in_words(("sole", "copied", "sole"))
    'page cache, private page'
    """
    return ", ".join(sorted({_WORDS[state] for state in states}))


class MappingView:
    """What the kernel said of the pages of one mapping.

    ``states`` are names of :data:`~miniloader.evidence.sharing.STATES`; ``frames`` are page frame numbers, 0
    where there is none or the kernel does not tell.
    """

    def __init__(self, states: Sequence[str], frames: NDArray[np.uint64], grid: Grid) -> None:
        self.states = tuple(states)
        self.frames = tuple(int(frame) for frame in frames)
        self.grid = grid

    @property
    def present(self) -> int:
        """How many pages the page table has."""
        return sum(state not in ("absent", "swapped", "unknown") for state in self.states)

    def pages(self, *states: str) -> tuple[int, ...]:
        """The numbers of the pages in one of ``states``."""
        return tuple(page for page, state in enumerate(self.states) if state in states)

    def words(self, page: int) -> str:
        """One page for people: what it is, and its frame where that is known."""
        frame = self.frames[page]
        return _WORDS[self.states[page]] + (f", frame {frame:#x}" if frame else "")


def views_of(grid: Grid) -> tuple[MappingView, ...]:
    """A view for each row of ``grid``."""
    names = [state.name for state in STATES]
    return tuple(
        MappingView([names[code] for code in states], process.pages["frame"], grid)
        for states, process in zip(grid.sharing.states.tolist(), grid.snapshot.processes, strict=True)
    )


def before_and_after(
    title: str, before: MappingView, after: MappingView, pages: Iterable[int], pid: int | str = "self"
) -> BeforeAfter:
    """What the page table of process ``pid`` had of some ``pages`` before a step, and after."""
    rows = tuple(Row(f"page {page}", before.words(page), after.words(page)) for page in pages)
    return BeforeAfter(title, f"/proc/{pid}/pagemap", rows)


# -------------------------------------------------------------------------------- mappings of Python's
def address_of(memory: mmap.mmap) -> int:
    """The address of the first byte of a Python mapping."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def states_of(memory: mmap.mmap) -> tuple[str, ...]:
    """The state of each page of a Python mapping; EvidenceError where the kernel does not tell.

    States come from flags, even where frames are told: one process's frames do not say who else has them.

    >>> memory = mmap.mmap(-1, 3 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    >>> memory[mmap.PAGESIZE] = 1
    >>> states_of(memory)
    ('absent', 'copied', 'absent')
    """
    snapshot = take([ProcessRange(os.getpid(), address_of(memory), 0, len(memory))], level="flags")
    if snapshot.processes[0].reason:
        raise EvidenceError(snapshot.processes[0].reason)
    return tuple(STATES[code].name for code in analyse(snapshot).states[0].tolist())


def copied_pages(memory: mmap.mmap) -> tuple[int, ...]:
    """The numbers of the pages of a Python mapping that were copied on write."""
    return tuple(page for page, state in enumerate(states_of(memory)) if state.startswith("copied"))
