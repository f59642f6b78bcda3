"""A process beside a relative: which pages are one frame for both, which no more, and what is proven."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from miniloader.lab.erosion.lineage import Kin, OneFrame, kin_of, one_frame
from miniloader.lab.erosion.memory import PrivateMemory
from miniloader.values import dataclass

__all__ = ["Pair", "pairs_of"]

Addresses = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Pair:
    """A process and its nearest living relative; addresses of pages that both have, ascending.

    ``together`` are one frame for both; ``apart`` are two frames at one address, at least one of them a copy
    (two that KSM has merged, each with pages of others, are no copies of their own, and are left out); of
    these it is ``proven`` that they were one.  ``frames`` are those of the pages apart, of the process
    and of the relative; ``several`` says which of the process's are mapped by others, too.
    """

    pid: int
    relative: int
    together: Addresses
    apart: Addresses
    proven: Addresses
    frames: tuple[Addresses, Addresses]
    several: NDArray[np.bool_]


def pairs_of(processes: Sequence[PrivateMemory], merged: Addresses | None) -> Iterator[Pair]:
    """Each process with its nearest living relative among ``processes``.

    ``merged`` are the frames of KSM; None where nobody knows which they are: then nothing is proven here.
    """
    known = np.empty(0, np.uint64) if merged is None else merged
    histories: dict[int, tuple[OneFrame, dict[int, int]]] = {}
    for kin in kin_of(processes, known):
        if kin.parent is not None and kin.parent not in histories:
            history, forks = one_frame(kin.parent, processes, known)
            histories[kin.parent] = history, dict(forks)
        yield _pair(kin, histories.get(kin.parent or 0) if merged is not None else None, known)


def _pair(kin: Kin, history: tuple[OneFrame, dict[int, int]] | None, merged: Addresses) -> Pair:
    process, relative, _ = kin
    addresses, first, second = np.intersect1d(
        process.addresses, relative.addresses, assume_unique=True, return_indices=True
    )
    frames = process.frames[first], relative.frames[second]
    equal = frames[0] == frames[1]
    copied = process.copied[first], relative.copied[second]
    apart = ~equal & (copied[0] | copied[1])
    if len(merged):
        apart &= ~(np.isin(frames[0], merged) & np.isin(frames[1], merged))
    proven = np.empty(0, np.uint64)
    if history is not None:
        once, forks = history
        had = once.at(*_children(forks, (process.pid, relative.pid), kin.parent))
        proven = np.intersect1d(addresses[apart & copied[0] & copied[1]], had, assume_unique=True)
    return Pair(
        pid=process.pid,
        relative=relative.pid,
        together=addresses[equal],
        apart=addresses[apart],
        proven=proven,
        frames=(frames[0][apart], frames[1][apart]),
        several=process.several[first][apart],
    )


def _children(forks: dict[int, int], pids: Iterable[int], parent: int | None) -> Iterator[int]:
    """The forks that two processes came by; a parent was there at each."""
    return (forks[pid] for pid in pids if pid != parent)
