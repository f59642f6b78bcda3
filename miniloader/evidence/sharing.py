"""Which pages of a snapshot are one frame of memory, and which are copies: pure functions.

At level ``frames`` two processes share a page when their entries hold the same frame number, and nothing
else is believed.  At level ``flags`` the frame numbers are hidden, yet bit 61 says that a page is the
page cache's own, of which there is one for each place in a file: so two processes that have the same
place of the same file mapped, both with bit 61, have the same frame.  Bit 61 clear is a copy, and bit 56
then says that nobody else maps it.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.evidence.snapshot import ProcessPages, Snapshot
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import distinct
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = [
    "ABSENT",
    "CHANGED",
    "COPIED",
    "COPIED_SHARED",
    "SHARED",
    "SOLE",
    "STATES",
    "SWAPPED",
    "UNKNOWN",
    "ZERO",
    "Run",
    "Sharing",
    "State",
    "analyse",
]


@dataclass(frozen=True)
class State:
    """What one page is in one process: its code in :attr:`Sharing.states`, a name, a sign, what it says."""

    code: int
    name: str
    sign: str
    help: str


STATES: Final = tuple(
    State(code, *row)
    for code, row in enumerate(
        (
            ("absent", "·", "not in this process's page table (never touched, or the process has ended)"),
            ("shared", "█", "the file's own page, and another row has the same"),
            ("sole", "▒", "the file's own page, and no other row is seen to have it"),
            ("copied", "◆", "a frame of this process alone: copied on write, or anonymous from the start"),
            (
                "copied-shared",
                "◇",
                "a copy that is mapped more than once: inherited by fork, or merged (KSM)",
            ),
            ("zero", "0", "the kernel's one page of zeros: uses no memory"),
            ("swapped", "~", "not in memory: swapped out, or on the move"),
            ("changed", "!", "changed while we looked: nothing is concluded"),
            ("unknown", "?", "the kernel does not say at this level of evidence"),
        )
    )
)
"""Every state; ``STATES[code].code == code``."""

ABSENT, SHARED, SOLE, COPIED, COPIED_SHARED, ZERO, SWAPPED, CHANGED, UNKNOWN = (s.code for s in STATES)
_IN_FRAMES: Final = (SHARED, SOLE, COPIED, COPIED_SHARED)  # the states of pages that use memory


@dataclass(frozen=True)
class Run:
    """Neighbouring pages [``start``, ``stop``) (indices) that look the same in every process.

    ``states`` has a code for each process; ``partners`` for each process the first process whose page is
    the same frame (itself, when it is the first), -1 where there is no frame.
    """

    start: int
    stop: int
    vaddr: int
    states: tuple[int, ...]
    partners: tuple[int, ...]

    @property
    def pages(self) -> int:
        """How many pages it stands for."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Sharing:
    """What the processes of a snapshot share, page by page; all arrays are read-only.

    ``vaddrs`` has shape (pages,); ``states`` (codes of STATES) and ``frame_group`` have shape
    (processes, pages).  Equal numbers in ``frame_group`` are equal frames, numbered from 1 in the order
    in which they appear, page by page; 0: no frame, or not known which.
    """

    level: LevelName
    pids: tuple[int, ...]
    vaddrs: NDArray[np.uint64]
    states: NDArray[np.uint8]
    frame_group: NDArray[np.int32]

    def count(self, state: int) -> int:
        """How many pages, over all processes, are in ``state``."""
        return int(np.count_nonzero(self.states == state))

    @property
    def present_pages(self) -> int:
        """Pages that use memory, each process counted for itself (the page of zeros uses none)."""
        return int(np.isin(self.states, _IN_FRAMES).sum())

    @property
    def distinct_frames(self) -> int:
        """Frames behind those pages.  A copy whose partners are not known counts as its own."""
        groups = self.frame_group[np.isin(self.states, _IN_FRAMES)]
        return len(distinct(groups[groups > 0])) + int(np.count_nonzero(groups == 0))

    @property
    def used_bytes(self) -> int:
        """The memory that these pages really use."""
        return self.distinct_frames * PAGE_SIZE

    @property
    def unshared_bytes(self) -> int:
        """The memory they would use if every process had copies of its own."""
        return self.present_pages * PAGE_SIZE

    def runs(self, breaks: Collection[int] = ()) -> tuple[Run, ...]:
        """The pages, with neighbours that look the same in every process collapsed into one run.

        A run also ends before every vaddr in ``breaks`` (where a segment begins, say) and where the
        vaddrs have a gap.
        """
        if not len(self.vaddrs):
            return ()
        partners = self.partners
        columns = np.concatenate([self.states.astype(np.int32), partners])
        ends = np.any(columns[:, 1:] != columns[:, :-1], axis=0)
        ends |= np.diff(self.vaddrs) != PAGE_SIZE
        ends |= np.isin(self.vaddrs[1:], np.array([*breaks], dtype=np.uint64))
        edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(self.vaddrs)]
        return tuple(
            Run(
                start,
                stop,
                int(self.vaddrs[start]),
                tuple(self.states[:, start].tolist()),
                tuple(partners[:, start].tolist()),
            )
            for start, stop in pairwise(edges)
        )

    @property
    def partners(self) -> NDArray[np.int32]:
        """For each process and page, the first process with the same frame there; -1: no frame."""
        partners = np.full(self.frame_group.shape, -1, dtype=np.int32)
        for process in reversed(range(len(self.pids))):
            partners[self.frame_group == self.frame_group[process]] = process
        partners[self.frame_group == 0] = -1
        return partners


def analyse(snapshot: Snapshot) -> Sharing:
    """What the processes of ``snapshot`` share."""
    processes, level = snapshot.processes, snapshot.level
    vaddrs = distinct(np.concatenate([process.pages["vaddr"] for process in processes] or [_no_vaddrs()]))
    shape = (len(processes), len(vaddrs))
    states = np.full(shape, UNKNOWN, dtype=np.uint8)
    exclusive = np.zeros(shape, dtype=np.bool_)
    keys = np.zeros(shape, dtype=np.int64)  # equal keys are equal frames
    places = _Places(processes)
    for row, process in enumerate(processes):
        columns = np.searchsorted(vaddrs, process.pages["vaddr"])
        states[row, columns] = _states_alone(process, level)
        exclusive[row, columns] = process.pages["exclusive"]
        keys[row, columns] = process.pages["frame"] if level == "frames" else places.keys(process)
    if level != "frames":
        # A copy that is mapped once is a frame of its own: each gets a key below 0. Zeros have one.
        copies = states == COPIED
        keys[copies] = -2 - np.flatnonzero(copies)
        keys[states == ZERO] = -1
        keys[states == COPIED_SHARED] = 0
    keys[~np.isin(states, (*_IN_FRAMES, ZERO))] = 0
    groups = _numbered(keys)
    several = _processes_of(groups)[groups] >= 2
    if level == "frames":
        states[(states == COPIED) & several] = COPIED_SHARED
        states[(states == SOLE) & several] = SHARED
    else:
        # Two have this place of the file, yet bit 56 says that one does: not the same file after all.
        contradicted = (states == SOLE) & several & exclusive
        states[contradicted], groups[contradicted] = UNKNOWN, 0
        states[(states == SOLE) & several] = SHARED
    for array in (vaddrs, states, groups):
        array.flags.writeable = False
    return Sharing(level, tuple(process.pid for process in processes), vaddrs, states, groups)


def _no_vaddrs() -> NDArray[np.uint64]:
    return np.empty(0, dtype=np.uint64)


def _states_alone(process: ProcessPages, level: LevelName) -> NDArray[np.uint8]:
    """The state of each page as far as the process alone tells: SOLE may yet turn out SHARED."""
    pages = process.pages
    if process.gone:
        return np.full(len(pages), ABSENT, dtype=np.uint8)
    if process.reason:
        return np.full(len(pages), UNKNOWN, dtype=np.uint8)
    if level == "frames":
        no_frame = pages["frame"] == 0
        file, copied = np.where(no_frame, UNKNOWN, SOLE), np.where(no_frame, UNKNOWN, COPIED)
    else:
        named = np.array([backing.vma.is_file for backing in process.mappings] + [False])
        file = np.where(named[pages["mapping"]], SOLE, UNKNOWN)
        # In anonymous memory, not exclusive may also mean the page of zeros, where nothing tells.
        sure = named[pages["mapping"]] | pages["zero_known"]
        copied = np.where(pages["exclusive"], COPIED, np.where(sure, COPIED_SHARED, UNKNOWN))
    return np.select(
        [
            pages["changed"],
            pages["guard"],
            pages["swapped"],
            ~pages["present"],
            pages["file"],
            pages["zero"],
        ],
        [CHANGED, ABSENT, SWAPPED, ABSENT, file, ZERO],
        copied,
    ).astype(np.uint8)


class _Places:
    """Numbers places in files: the same file and offset, the same number, over all processes.

    The same file means the same device, inode, path and build-id: more than one of these alone, since
    overlays and subvolumes reuse the numbers.
    """

    def __init__(self, processes: Collection[ProcessPages]) -> None:
        self._files: dict[object, int] = {}
        offsets = [process.pages["file_offset"] for process in processes]
        self._offsets = distinct(np.concatenate(offsets or [_no_vaddrs()]))

    def keys(self, process: ProcessPages) -> NDArray[np.int64]:
        """A number from 1 for each page of a file mapping, else 0."""
        files = [self._file(process, index) for index in range(len(process.mappings))] + [-1]
        file = np.array(files, dtype=np.int64)[process.pages["mapping"]]
        offset = np.searchsorted(self._offsets, process.pages["file_offset"])
        return np.where(file >= 0, file * len(self._offsets) + offset + 1, 0)

    def _file(self, process: ProcessPages, index: int) -> int:
        backing = process.mappings[index]
        if not backing.vma.is_file:
            return -1
        identity = (backing.vma.device, backing.vma.inode, backing.vma.path, backing.build_id)
        return self._files.setdefault(identity, len(self._files))


def _numbered(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    """Equal keys, equal numbers, from 1 in the order of appearance column by column; 0 stays 0."""
    by_column = keys.T.ravel()
    values, first, inverse = np.unique(by_column, return_index=True, return_inverse=True)
    first = np.where(values == 0, -1, first)  # so that 0 comes first and is number 0 …
    rank = np.empty(len(values), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(values))
    rank += int(not np.any(values == 0))  # … or, where there is none, the numbers still begin at 1
    return rank[inverse].reshape(keys.T.shape).T.copy()


def _processes_of(groups: NDArray[np.int32]) -> NDArray[np.intp]:
    """By group number: in how many processes (rows) it occurs; 0 for group 0."""
    count, (rows, _) = int(groups.max(initial=0)) + 1, groups.shape
    pairs = distinct(groups.astype(np.int64) * rows + np.arange(rows)[:, np.newaxis])
    occurrences = np.bincount(pairs // max(rows, 1), minlength=count)
    occurrences[0] = 0
    return occurrences
