"""Who is whose nearest living relative, and which pages must have been one frame at a fork.

A frame that two relatives have at one address has come to both by fork, from whom they descend: nothing else
puts one anonymous frame there twice (but KSM, whose frames are left out).  So if two lineages of one parent
have it, the parent had it from the first of these forks to the last, and whoever was forked between has had
it as well.  A parent that has it still has had it since.  That is how a third relative proves what two can
only suggest: where both built the same thing after the fork, no third one has a frame of either.

Who was there before that parent began cannot descend from it.  What such a relative and one of these lineages
have in one frame the parent has had since it began.

The kernel calls parent also who has adopted an orphan: the first process of a namespace, a subreaper
(PR_SET_CHILD_SUBREAPER).  The orphan's own parent was a descendant of it, and has ended.  So where a parent,
or a descendant of it, has lost a child, nothing is proven by third relatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.lost_children import has_lost_children
from miniloader.kernel.procfs import read_stat
from miniloader.lab.erosion.memory import PrivateMemory
from miniloader.values import NamedTuple

__all__ = ["Kin", "OneFrame", "kin_of", "one_frame"]

_STILL: Final = np.iinfo(np.int64).max
_BEFORE: Final = -1  # all forks of a parent: of who was there before it


class Kin(NamedTuple):
    """A process, its nearest living relative, and the parent that both descend from (None: not known)."""

    process: PrivateMemory
    relative: PrivateMemory
    parent: int | None


class OneFrame(NamedTuple):
    """Places at which a parent had one frame from the fork ``first`` to the fork ``last``, a row each."""

    addresses: NDArray[np.uint64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    def at(self, *forks: int) -> NDArray[np.uint64]:
        """The addresses at which all that were forked then have had the one frame; ascending."""
        covered = np.ones(len(self.addresses), np.bool_)
        for fork in forks:
            covered &= (self.first <= fork) & (fork <= self.last)
        return np.unique(self.addresses[covered])


def kin_of(processes: Sequence[PrivateMemory], merged: NDArray[np.uint64]) -> list[Kin]:
    """Each process with its nearest living relative among them: its parent, else the eldest that is left.

    Who has no elder relative, or has not one page in common with it any more, is not in the list.  ``merged``
    are the frames of KSM, which make no relatives.
    """
    families: dict[int, list[PrivateMemory]] = {}
    for process in sorted(processes, key=lambda process: (process.started, process.pid)):
        families.setdefault(process.stack, []).append(process)
    kin = []
    sure: dict[int, bool] = {}
    for family in families.values():
        for number, process in enumerate(family):
            elders = sorted(family[:number], key=lambda elder: _distance(process, elder))
            relative = next((elder for elder in elders if _is_kin(process, elder, merged)), None)
            if relative is not None:
                parent = _common_parent(process, relative)
                if parent is not None and parent not in sure:
                    sure[parent] = not any(map(has_lost_children, _line(parent, family)))
                kin.append(Kin(process, relative, parent if parent is not None and sure[parent] else None))
    return kin


def _distance(process: PrivateMemory, elder: PrivateMemory) -> int:
    """0 for the parent, 1 for a sibling, 2 for anybody else: the eldest of these comes first."""
    return 0 if elder.pid == process.parent else 1 if elder.parent == process.parent else 2


def _is_kin(process: PrivateMemory, elder: PrivateMemory, merged: NDArray[np.uint64]) -> bool:
    """Whether they still have one copy at one address."""
    _, first, second = np.intersect1d(
        process.addresses[process.copied & process.several],
        elder.addresses[elder.copied & elder.several],
        assume_unique=True,
        return_indices=True,
    )
    frames = process.frames[process.copied & process.several][first]
    common = frames[frames == elder.frames[elder.copied & elder.several][second]]
    return bool((~np.isin(common, merged)).any())


def _common_parent(process: PrivateMemory, relative: PrivateMemory) -> int | None:
    """Who both were forked by, where that is sure: the relative itself, or one that has the same stack."""
    if relative.pid == process.parent:
        return relative.pid
    if relative.parent != process.parent:
        return None
    try:
        return process.parent if int(read_stat(process.parent)[1][25]) == process.stack else None
    except EvidenceError:
        return None


def _line(parent: int, family: Sequence[PrivateMemory]) -> set[int]:
    """The parent, and who of the ``family``, by age, descends from it."""
    line = {parent}
    for process in family:
        if process.parent in line:
            line.add(process.pid)
    return line


def one_frame(
    parent: int, processes: Sequence[PrivateMemory], merged: NDArray[np.uint64]
) -> tuple[OneFrame, Mapping[int, int]]:
    """What ``parent`` had as one frame over its forks; and the number of the fork that each process is of.

    The parent itself has the number of no fork: what it still has, it has had to the end.
    """
    by_pid = {process.pid: process for process in processes}
    ordered = sorted(processes, key=lambda process: (process.started, process.pid))
    rank = {process.pid: number for number, process in enumerate(ordered)}
    forks = {process.pid: _fork(process, parent, by_pid, rank) for process in processes}
    holders = [process for process in ordered if forks[process.pid] is not None]
    chosen = [process.copied & process.several & ~np.isin(process.frames, merged) for process in holders]
    empty = np.empty(0, np.uint64)
    addresses, frames = (
        np.concatenate(
            [empty, *(getattr(process, name)[rows] for process, rows in zip(holders, chosen, strict=True))]
        )
        for name in ("addresses", "frames")
    )
    fork = np.concatenate(
        [
            np.empty(0, np.int64),
            *(
                np.full(np.count_nonzero(rows), forks[process.pid], np.int64)
                for process, rows in zip(holders, chosen, strict=True)
            ),
        ]
    )
    order = np.lexsort((fork, frames, addresses))
    addresses, frames, fork = addresses[order], frames[order], fork[order]
    starts = np.ones(len(addresses), np.bool_)
    starts[1:] = (addresses[1:] != addresses[:-1]) | (frames[1:] != frames[:-1])
    begin = np.flatnonzero(starts)
    end = np.append(begin[1:], len(addresses)) - 1
    first, last = fork[begin], fork[end]
    several = first != last  # of one lineage alone it may be younger than the fork
    found = OneFrame(addresses[begin[several]], first[several], last[several])
    return found, {pid: number for pid, number in forks.items() if number is not None}


def _fork(
    process: PrivateMemory,
    parent: int,
    by_pid: Mapping[int, PrivateMemory],
    rank: Mapping[int, int],
) -> int | None:
    """By which fork of ``parent`` the process or its ancestor came; None where neither did.

    Who was there before that parent had what they have in common before all of its forks.
    """
    if process.pid == parent:
        return _STILL
    of_parent = by_pid.get(parent)
    if of_parent is not None and process.stack == of_parent.stack and process.started < of_parent.started:
        return _BEFORE
    for _ in by_pid:
        if process.parent == parent:
            return rank[process.pid]
        ancestor = by_pid.get(process.parent)
        if ancestor is None or ancestor.stack != process.stack:
            return None
        process = ancestor
    return None
