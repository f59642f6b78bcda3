"""What every process of an audit has no longer in common with its nearest living relative."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Survey
from miniloader.lab.erosion.contents import compare
from miniloader.lab.erosion.memory import private_memory
from miniloader.lab.erosion.pairs import Pair, pairs_of
from miniloader.lab.erosion.result import ErodedPages, Erosion, spans_of

__all__ = ["erosion"]


def erosion(
    processes: Sequence[Survey], merged: NDArray[np.uint64] | None, *, contents: bool
) -> tuple[Erosion, ...]:
    """A row for each process that has a relative among ``processes``, whose frames must be known.

    ``merged`` are the frames of KSM (None: not known).  ``contents``: whether the bytes are read as well.
    """
    pairs = pairs_of([private_memory(process) for process in processes], merged)
    return tuple(_row(pair, contents=contents) for pair in pairs)


def _row(pair: Pair, *, contents: bool) -> Erosion:
    same, changed = None, 0
    if contents:
        with suppress(EvidenceError):  # one of them has ended, or nobody may read it
            same, changed = _contents(pair)
    possible = np.setdiff1d(pair.apart, pair.proven, assume_unique=True)
    return Erosion(
        pid=pair.pid,
        relative=pair.relative,
        proven=len(pair.proven) * PAGE_SIZE,
        possible=len(possible) * PAGE_SIZE,
        same=None if same is None else len(same) * PAGE_SIZE,
        changed=changed * PAGE_SIZE,
        pages=ErodedPages(
            together=spans_of(pair.together),
            proven=spans_of(pair.proven),
            possible=spans_of(possible),
            same=() if same is None else spans_of(same),
        ),
    )


def _contents(pair: Pair) -> tuple[NDArray[np.uint64], int]:
    """The addresses of the pages that hold the same bytes, and of how many pages nothing can be said."""
    parts = [(part.same, part.read) for part in compare(pair)]
    if not parts:
        return pair.apart, 0
    same, read = (np.concatenate(column) for column in zip(*parts, strict=True))
    return pair.apart[same], int(np.count_nonzero(~read))
