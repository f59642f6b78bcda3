"""What an earlier look proves: pages that were one frame for two relatives then, and are two now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.json_schema import COUNT, array, keys, nullable, record
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.result import Audit
from miniloader.lab.erosion.result import Erosion, pages_in, spans_of
from miniloader.values import dataclass

__all__ = ["ERODED_SCHEMA", "ErodedSince", "eroded_between", "eroded_since", "newly_proven", "proven_by"]


@dataclass(frozen=True)
class ErodedSince:
    """What a process and its nearest living ``relative`` had in common at the first look, and have not now.

    In bytes; of them ``same`` hold the same bytes (None: nobody read them).
    """

    pid: int
    relative: int
    proven: int
    same: int | None


def eroded_since(first: Audit, now: Audit) -> tuple[ErodedSince, ...] | None:
    """A row for each process that has a relative in ``now``; None where one of the looks had no frames."""
    if first.erosion is None or now.erosion is None:
        return None
    return eroded_between(first.erosion, now.erosion, _stayed(first, now), now.page_size)


def eroded_between(
    first: Sequence[Erosion], now: Sequence[Erosion], stayed: Collection[int], page_size: int = PAGE_SIZE
) -> tuple[ErodedSince, ...]:
    """A row for each of the rows ``now``; ``stayed`` are the pids that are the same processes as at first."""
    rows = []
    for row, together in zip(now, _together_at(first, now, stayed, page_size), strict=True):
        eroded = np.intersect1d(_apart(row, page_size), together, assume_unique=True)
        same = np.intersect1d(eroded, pages_in(row.pages.same, page_size), assume_unique=True)
        rows.append(
            ErodedSince(
                pid=row.pid,
                relative=row.relative,
                proven=len(eroded) * page_size,
                same=None if row.same is None else len(same) * page_size,
            )
        )
    return tuple(rows)


def proven_by(first: Audit, now: Audit) -> Audit:
    """``now``, where what was one frame at the ``first`` look, or proven there, is proven to have been it.

    So each look of many hands on to the next what those before it have proven, of whoever was forked since
    as well.
    """
    if first.erosion is None or now.erosion is None:
        return now
    stayed = _stayed(first, now)
    together_at = _together_at(first.erosion, now.erosion, stayed, now.page_size)
    proven_at = _proven_at(first.erosion, now.erosion, stayed, now.page_size)
    rows = [
        _proven(row, np.union1d(*pages), now.page_size)
        for row, *pages in zip(now.erosion, together_at, proven_at, strict=True)
    ]
    return replace(now, erosion=tuple(rows))


def newly_proven(first: Audit, now: Audit) -> int:
    """How many bytes are proven to be two copies ``now``, and were not at the ``first`` look."""
    if first.erosion is None or now.erosion is None:
        return 0
    proven_at = _proven_at(first.erosion, now.erosion, _stayed(first, now), now.page_size)
    pages = [
        np.setdiff1d(pages_in(row.pages.proven, now.page_size), known, assume_unique=True)
        for row, known in zip(now.erosion, proven_at, strict=True)
    ]
    return sum(map(len, pages)) * now.page_size


def _proven(row: Erosion, together: NDArray[np.uint64], page_size: int) -> Erosion:
    possible = pages_in(row.pages.possible, page_size)
    moved = np.intersect1d(possible, together, assume_unique=True)
    if not len(moved):
        return row
    proven = np.union1d(pages_in(row.pages.proven, page_size), moved)
    possible = np.setdiff1d(possible, moved, assume_unique=True)
    pages = replace(row.pages, proven=spans_of(proven), possible=spans_of(possible))
    return replace(row, proven=len(proven) * page_size, possible=len(possible) * page_size, pages=pages)


def _stayed(first: Audit, now: Audit) -> frozenset[int]:
    """The pids of the same processes as at first, none of which has executed another program since."""
    at_first = {(process.pid, process.started): process for process in first.processes}
    return frozenset(
        process.pid
        for process in now.processes
        if (before := at_first.get((process.pid, process.started))) is not None
        and not process.executed_since(before)
    )


def _together_at(
    first: Sequence[Erosion], now: Sequence[Erosion], stayed: Collection[int], page_size: int
) -> list[NDArray[np.uint64]]:
    """For each row of ``now`` the pages that its two processes had as one frame at the ``first`` look."""
    rows = {row.pid: row for row in first}
    return [
        _together(rows, row.pid, row.relative, page_size)
        if row.pid in stayed and row.relative in stayed
        else np.empty(0, np.uint64)
        for row in now
    ]


def _proven_at(
    first: Sequence[Erosion], now: Sequence[Erosion], stayed: Collection[int], page_size: int
) -> list[NDArray[np.uint64]]:
    """For each row of ``now`` the pages that were proven for the same two processes at the ``first`` look."""
    rows = {(row.pid, row.relative): row.pages.proven for row in first}
    return [
        pages_in(
            rows.get((row.pid, row.relative), ()) if {row.pid, row.relative} <= {*stayed} else (), page_size
        )
        for row in now
    ]


def _together(rows: Mapping[int, Erosion], pid: int, relative: int, page_size: int) -> NDArray[np.uint64]:
    """The pages that two processes had as one frame, by way of the relatives that they had."""
    lines = [_line(rows, process) for process in (pid, relative)]
    meeting = next((ancestor for ancestor in lines[0] if ancestor in lines[1]), None)
    if meeting is None:
        return np.empty(0, np.uint64)
    steps = [rows[process].pages.together for line in lines for process in line[: line.index(meeting)]]
    pages = [pages_in(step, page_size) for step in steps]
    return reduce(partial(np.intersect1d, assume_unique=True), pages)


def _line(rows: Mapping[int, Erosion], pid: int) -> list[int]:
    """A process, its relative, the relative of that one, and so on."""
    line = [pid]
    while line[-1] in rows and rows[line[-1]].relative not in line:
        line.append(rows[line[-1]].relative)
    return line


def _apart(row: Erosion, page_size: int) -> NDArray[np.uint64]:
    return np.union1d(pages_in(row.pages.proven, page_size), pages_in(row.pages.possible, page_size))


ERODED_SCHEMA: Final = nullable(array(record(keys(COUNT, "pid relative proven"), {"same": nullable(COUNT)})))
"""What :func:`eroded_since` gives, in ``--json``."""
