"""Whether relatives have more in two copies than they may since a first snapshot, and what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from miniloader.errors import EvidenceError, UsageError, printable
from miniloader.lab.audit.audit import audit
from miniloader.lab.erosion.since import ErodedSince, eroded_between
from miniloader.report.erosion import eroded_rows
from miniloader.report.numbers import count, size
from miniloader.report.text import laid_out, listed, plain
from miniloader.testing.snapshots import MemorySnapshot

__all__ = ["check_erosion"]

_MOST, _WIDTH = 8, 120
_NOTHING = "\0"  # no file is called so: the pages of files are not explained


def check_erosion(snapshots: Sequence[MemorySnapshot], limit: int) -> None:
    """Raise AssertionError when a process shares so many bytes less with a relative than at first.

    Each later snapshot is compared with the first.  Raises UsageError for one snapshot alone or processes
    without a relative, EvidenceError where frames are not known.
    """
    __tracebackhide__ = True
    if len(snapshots) < 2:
        raise UsageError(
            "eroded_at_most= needs a snapshot of before, too: assert_memory([forked, served], …)"
        )
    for snapshot in snapshots[1:]:
        rows = _eroded(snapshots[0], snapshot)
        beyond = [row for row in rows if row.proven > limit]
        if beyond:
            raise AssertionError(_message(snapshots[0], snapshot, rows, beyond, limit))


def _eroded(first: MemorySnapshot, now: MemorySnapshot) -> tuple[ErodedSince, ...]:
    __tracebackhide__ = True
    if first.erosion is None or now.erosion is None:
        raise EvidenceError(
            "erosion is told by page frame numbers: evidence level frames is needed",
            hint="root, or CAP_SYS_ADMIN",
        )
    if not now.erosion:
        raise UsageError("eroded_at_most=: no two of these processes are relatives with memory in common")
    return eroded_between(first.erosion, now.erosion, {*first.pids} & {*now.pids})


def _message(
    first: MemorySnapshot,
    now: MemorySnapshot,
    rows: Sequence[ErodedSince],
    beyond: Sequence[ErodedSince],
    limit: int,
) -> str:
    sizes = [f"{size(row.proven)} of pid {row.pid} with {row.relative}" for row in beyond]
    of = f"{len(beyond)} of {count(len(rows), 'process', 'processes')} with a relative"
    table = "\n".join(map(plain, laid_out(eroded_rows(rows), _WIDTH)))
    at, since = (f"{snapshot.step}: " if snapshot.step else "" for snapshot in (now, first))
    return (
        f"{at}memory no longer shared since {since.removesuffix(': ') or 'the first snapshot'}:"
        f" {listed(sizes, _MOST)}; at most {size(limit)} allowed ({of})\n{table}\n"
        + "".join(f"{line}\n" for line in _objects(now, {row.pid for row in beyond}))
        + "evidence: frames: a page is proven to have been one frame, and is two now"
    )


def _objects(now: MemorySnapshot, pids: set[int]) -> list[str]:
    """What lies there, for whoever is still there to be read."""
    with suppress(EvidenceError):
        rows = audit(now.pids, library=_NOTHING).erosion or ()
        return [
            f"objects on pages of {row.pid} that are two copies: "
            + listed([f"{kind.count:,} {printable(kind.type)}" for kind in row.objects], _MOST)
            for row in rows
            if row.pid in pids and row.objects
        ]
    return []
