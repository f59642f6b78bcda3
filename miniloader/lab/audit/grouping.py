"""The processes of an audit by what operators know them by, or their memory by library, with totals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, get_args

from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record
from miniloader.lab.audit.mappings import AuditedMapping
from miniloader.lab.audit.result import Audit, AuditedProcess
from miniloader.values import dataclass

__all__ = ["GROUPED_BY", "GROUP_SCHEMA", "Grouping", "MemoryGroup", "grouped"]

Grouping = Literal["name", "user", "cgroup", "command", "library"]
GROUPED_BY: Final[tuple[Grouping, ...]] = get_args(Grouping)


@dataclass(frozen=True)
class MemoryGroup:
    """What processes that are known by one ``name`` take together, in bytes; or one library in all of them.

    Each memory is counted once, so the groups add up to the sums of the audit.  ``pss`` is None where the
    kernel does not tell it.  ``swapped`` is beside the others.  Of a library they are what its mappings and
    its bss have resident, in proportion and of processes' own; ``name`` is "" for memory of no library.
    """

    by: Grouping
    name: str
    pids: tuple[int, ...]
    rss: int
    pss: int | None
    uss: int
    swapped: int


GROUP_SCHEMA: Final = record(
    {"by": {"enum": [*GROUPED_BY]}, "name": TEXT, "pids": array(COUNT), "pss": nullable(COUNT)},
    keys(COUNT, "rss uss swapped"),
)
"""A :class:`MemoryGroup` in ``--json``."""


def grouped(audit: Audit, by: Grouping) -> tuple[MemoryGroup, ...]:
    """The memory of all processes, grouped; what takes most in proportion comes first."""
    groups = _by_library(audit.mappings) if by == "library" else _by_process(audit, by)
    return tuple(sorted(groups, key=lambda group: (-(group.pss or group.rss), -group.rss, group.name)))


def _by_process(audit: Audit, by: Grouping) -> Iterable[MemoryGroup]:
    groups: dict[str, list[AuditedProcess]] = {}
    for process in audit.processes:
        groups.setdefault(getattr(process, by), []).append(process)
    for name, processes in groups.items():
        counted = [process for process in processes if process.memory_of is None]
        yield MemoryGroup(
            by=by,
            name=name,
            pids=tuple(process.pid for process in processes),
            rss=sum(process.rss for process in counted),
            pss=total(process.pss for process in counted),
            uss=sum(process.uss for process in counted),
            swapped=sum(process.swapped for process in counted) * audit.page_size,
        )


def _by_library(mappings: Iterable[AuditedMapping]) -> Iterable[MemoryGroup]:
    mappings = tuple(mappings)
    files = {mapping.name for mapping in mappings if mapping.kind == "file"}
    groups: dict[str, list[AuditedMapping]] = {}
    for mapping in mappings:
        groups.setdefault(mapping.name if mapping.name in files else "", []).append(mapping)
    for name, together in groups.items():
        processes = [process for mapping in together for process in mapping.processes]
        yield MemoryGroup(
            by="library",
            name=name,
            pids=tuple(dict.fromkeys(process.pid for process in processes)),
            rss=sum(process.resident for process in processes),
            pss=total(process.pss for process in processes),
            uss=sum(process.own for process in processes),
            swapped=sum(process.swapped for process in processes),
        )


def total(numbers: Iterable[int | None]) -> int | None:
    """The sum; None where one of the numbers is not known.

    >>> total([1, 2]), total([1, None]), total([])
    (3, None, 0)
    """
    known = tuple(numbers)
    return None if None in known else sum(filter(None, known))
