"""What a test claims of the whole memory of processes, against budgets in bytes."""

from __future__ import annotations

from typing import Final

from miniloader.errors import UsageError
from miniloader.kernel.features import LevelName
from miniloader.report.audit_rows import mapping_rows
from miniloader.report.numbers import count, size
from miniloader.report.text import laid_out, plain
from miniloader.testing.eroded import check_erosion
from miniloader.testing.levels import Snapshots, at, check_level, each, evidence_of
from miniloader.testing.limits import number_of_bytes
from miniloader.testing.snapshots import MemorySnapshot

__all__ = ["assert_memory"]

_MOST: Final = 8  # processes that a message lists
_WIDTH: Final = 121  # columns of a message


def assert_memory(
    snapshots: Snapshots,
    *,
    own_at_most: int | str | None = None,
    still_shared_at_least: int | str | None = None,
    eroded_at_most: int | str | None = None,
    level: LevelName | None = None,
) -> None:
    """No process has more memory of its own, or shares less with its relatives, than that: heaps and all.

    ``own_at_most`` bounds what each process alone has mapped, its USS; ``still_shared_at_least`` is how much
    each must still have in one copy with relatives by fork (anonymous memory; what KSM has merged counts as
    well).  ``eroded_at_most`` is how much of what each had in one copy with its parent, else its eldest
    sibling, in the first of several snapshots may be two copies in a later one (level ``frames``).  All are
    bytes, or a text like ``"2 MiB"``.  The failure shows what the memory is, by kind and name, and which
    objects lie on the pages that are no longer shared.

    Raises AssertionError when a process is beyond a bound, EvidenceError where pages cannot be told apart,
    UsageError for a bound that is no number of bytes, or when there is none.

    A worker pool that must not erode, after some requests::

        assert_memory(workers.snapshot("served"), own_at_most="8 MiB", still_shared_at_least="20 MiB")
        assert_memory([forked, served], eroded_at_most="2 MiB")
    """
    __tracebackhide__ = True
    if own_at_most is None and still_shared_at_least is None and eroded_at_most is None:
        bounds = "own_at_most=, still_shared_at_least= or eroded_at_most="
        raise UsageError(f"assert_memory: no bound; give {bounds}")
    if eroded_at_most is not None:
        check_erosion(each(snapshots), number_of_bytes(eroded_at_most))
    for snapshot in each(snapshots):
        check_level(snapshot, level)
        if own_at_most is not None:
            _check_memory(snapshot, "own", "at most", own_at_most)
        if still_shared_at_least is not None:
            _check_memory(snapshot, "inherited", "at least", still_shared_at_least)


def _check_memory(snapshot: MemorySnapshot, column: str, bound: str, given: int | str) -> None:
    """Fail when a process has more, or less, than the bound of that column of its mappings."""
    __tracebackhide__ = True
    limit = number_of_bytes(given)
    numbers = dict.fromkeys(snapshot.pids, 0)
    for mapping in snapshot.mappings:
        for process in mapping.processes:
            numbers[process.pid] += getattr(process, column)
    beyond = {
        pid: number
        for pid, number in numbers.items()
        if (number > limit if bound == "at most" else number < limit)
    }
    if not beyond:
        return
    words = "of its own" if column == "own" else "still shared with relatives"
    sizes = [f"{size(number)} in pid {pid}" for pid, number in beyond.items()]
    table = "\n".join(map(plain, laid_out([mapping_rows(snapshot.mappings)], _WIDTH)))
    of = f"{len(beyond)} of {count(len(numbers), 'process', 'processes')}"
    raise AssertionError(
        f"{at(snapshot)}memory {words}: {', '.join(sizes[:_MOST])}{', …' if len(sizes) > _MOST else ''};"
        f" {bound} {size(limit)} {'allowed' if bound == 'at most' else 'expected'} ({of})\n\n{table}\n"
        f"{evidence_of(snapshot)}"
    )
