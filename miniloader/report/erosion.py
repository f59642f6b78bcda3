"""What processes have no longer in common with their relatives, in words that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from miniloader.report.numbers import size
from miniloader.report.text import Line, Part, Table, heading, more

if TYPE_CHECKING:
    from miniloader.lab.audit.result import Audit
    from miniloader.lab.erosion.result import Erosion
    from miniloader.lab.erosion.since import ErodedSince

__all__ = ["eroded_rows", "erosion_view"]

_MOST: Final = 8


def erosion_view(audit: Audit) -> Iterator[Part]:
    """What every process has no longer in common with its nearest relative: a table, and sentences."""
    if audit.erosion is None:
        if _may_be_relatives(audit):
            yield ()
            yield ("erosion since fork: unknown, for that takes page frame numbers (level frames: root)",)
        return
    rows = sorted((row for row in audit.erosion if row.apart), key=lambda row: (-row.apart, row.pid))
    if not rows:
        return
    yield ()
    about = "two copies now of what was one frame since a fork (proven), or may have been (possible)"
    yield heading("no longer shared", about)
    cells = [
        [
            str(row.pid),
            str(row.relative),
            size(row.proven),
            size(row.possible),
            "?" if row.same is None else size(row.same),
            f"{size(row.changed)} changed while they were read" if row.changed else "",
        ]
        for row in rows[:_MOST]
    ]
    if len(rows) > _MOST:
        cells.append([f"… {more(len(rows) - _MOST)}"])
    yield Table(("process", "with", ">proven", ">possible", ">same bytes", "also"), cells)
    for row in rows[:_MOST]:
        if sentence := _sentence(row):
            yield sentence
    if sum(row.possible for row in rows) > sum(row.proven for row in rows):
        said = "possible: two that built the same thing after the fork look alike; an earlier look proves it"
        yield ((f"  {said} (--save FILE now, `miniloader diff` later; or --every)", "dim"),)


def _may_be_relatives(audit: Audit) -> bool:
    pids = {process.pid for process in audit.processes}
    return any(process.parent in pids for process in audit.processes)


def _sentence(row: Erosion) -> Line:
    """How much of what is two copies now holds the same bytes as the other copy does."""
    if row.same is None:
        return ()
    text = (
        f": {size(row.same)} of {size(row.apart)} that it no longer shares with {row.relative} hold the same"
        " bytes as there"
    )
    return ((str(row.pid), "bold"), text)


def eroded_rows(rows: Sequence[ErodedSince] | None) -> Iterator[Part]:
    """What was one frame at the first look, and is two now; nothing where there is no such page."""
    eroded = sorted((row for row in rows or () if row.proven), key=lambda row: (-row.proven, row.pid))
    if not eroded:
        return
    yield ()
    yield heading("no longer shared", "one frame at the first look, two copies now")
    cells = [
        [str(row.pid), str(row.relative), size(row.proven), "?" if row.same is None else size(row.same)]
        for row in eroded[:_MOST]
    ]
    if len(eroded) > _MOST:
        cells.append([f"… {more(len(eroded) - _MOST)}"])
    yield Table(("process", "with", ">proven", ">same bytes"), cells)
