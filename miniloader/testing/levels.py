"""The snapshots that an assertion judges, and whether they hold as much evidence as it wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from miniloader.errors import EvidenceError, UsageError
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.testing.snapshots import MemorySnapshot

__all__ = ["RANKS", "Snapshots", "at", "check_level", "each", "evidence_of"]

Snapshots = MemorySnapshot | Sequence[MemorySnapshot]
"""One snapshot, or several, in the order in which they were taken."""

RANKS: Final = [level.name for level in LEVELS]


def each(snapshots: Snapshots) -> tuple[MemorySnapshot, ...]:
    """The snapshots one by one; UsageError when there is none, or something else."""
    series = list[MemorySnapshot]()
    given: Iterable[object] = snapshots if isinstance(snapshots, Iterable) else (snapshots,)
    for value in given:
        if not isinstance(value, MemorySnapshot):
            name = type(value).__name__
            raise UsageError(f"{name} is no snapshot: judge what miniloader.testing.snapshot(PIDS) returns")
        series.append(value)
    if not series:
        raise UsageError("no snapshot to judge")
    return tuple(series)


def check_level(snapshot: MemorySnapshot, level: LevelName | None) -> None:
    """Raise EvidenceError unless the snapshot knows of pages, and has what the test insists on."""
    __tracebackhide__ = True
    needed: LevelName = "frames" if level == "frames" else "flags"
    if RANKS.index(snapshot.level) > RANKS.index(needed):
        how = next(candidate.get for candidate in LEVELS if candidate.name == needed)
        raise EvidenceError(
            f"{at(snapshot)}evidence level {needed} is needed, this snapshot has {snapshot.level}", hint=how
        )


def at(snapshot: MemorySnapshot) -> str:
    """The name of a snapshot's step, as a message begins with it."""
    return f"{snapshot.step}: " if snapshot.step else ""


def evidence_of(snapshot: MemorySnapshot) -> str:
    """The last line of a failure: what its evidence is, and what that shows."""
    return f"evidence: {snapshot.level}: {LEVELS[RANKS.index(snapshot.level)].shows}"
