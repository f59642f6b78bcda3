"""What grew between two audits: each process, each kind and name of memory, each library, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, Literal

from miniloader.json_schema import COUNT, HEX, TEXT, array, nullable, record, words
from miniloader.lab.audit.mappings import KIND_SCHEMA, AuditedMapping, MappingKind
from miniloader.lab.audit.result import Audit, AuditedLibrary, AuditedProcess
from miniloader.lab.erosion.since import ERODED_SCHEMA, ErodedSince, eroded_since
from miniloader.values import NamedTuple, dataclass

__all__ = [
    "GROWTH_KEYS",
    "AmountChange",
    "Family",
    "Growth",
    "LibraryGrowth",
    "MappingGrowth",
    "ProcessGrowth",
    "family_of",
    "growth",
]


State = Literal["came", "went", "stayed"]


@dataclass(frozen=True)
class AmountChange:
    """A figure in two audits, in bytes; None where there was nothing, or it is not known.

    >>> AmountChange(None, 4096).change, AmountChange(8192, 4096).change
    (4096, -4096)
    """

    before: int | None
    after: int | None

    @property
    def change(self) -> int:
        """How much more it is; what was not there counts as nothing."""
        return (self.after or 0) - (self.before or 0)


@dataclass(frozen=True)
class ProcessGrowth:
    """A process that is in both audits, or in one of them only."""

    pid: int
    name: str
    state: State
    rss: AmountChange
    pss: AmountChange
    uss: AmountChange
    swapped: AmountChange


@dataclass(frozen=True)
class MappingGrowth:
    """All mappings of one kind and name, over all processes; the columns of an audit's ``mappings``."""

    kind: MappingKind
    name: str
    own: AmountChange
    inherited: AmountChange
    shared: AmountChange


@dataclass(frozen=True)
class LibraryGrowth:
    """A library over all processes: own copies, copies that relatives share, and the file's own pages."""

    path: str
    build_id: str | None
    own: AmountChange
    inherited: AmountChange
    shared: AmountChange


@dataclass(frozen=True)
class Growth:
    """What grew.  There are no ``mappings`` where an older version saved one of the audits without them.

    ``rss``, ``pss`` and ``uss`` are those of all processes, each address space counted once; so is what is
    ``swapped`` out, which is in none of them: who is swapped out seems to shrink.  What relatives have in
    common there counts for each of them.  ``erosion`` is what relatives have no longer in common; None where
    one of the audits had no frames.  ``executed`` are those that stayed with another program, before and
    after.
    """

    rss: AmountChange
    pss: AmountChange
    uss: AmountChange
    swapped: AmountChange
    processes: tuple[ProcessGrowth, ...]
    mappings: tuple[MappingGrowth, ...]
    libraries: tuple[LibraryGrowth, ...]
    erosion: tuple[ErodedSince, ...] | None = None
    executed: tuple[tuple[AuditedProcess, AuditedProcess], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The keys that ``diff --json`` has besides ``changes``."""
        figures = asdict(replace(self, executed=()))
        figures["executed"] = [after.pid for _, after in self.executed]
        return {name: value for name, value in figures.items() if name in GROWTH_KEYS}


class Family(NamedTuple):
    """What has become of the processes between two looks.

    ``forked`` have a parent among those of the look before, ``came`` have none; ``replaced`` are the same
    process with a program that it has executed since: before and after.
    """

    forked: tuple[AuditedProcess, ...]
    came: tuple[AuditedProcess, ...]
    replaced: tuple[tuple[AuditedProcess, AuditedProcess], ...]
    ended: tuple[AuditedProcess, ...]


def growth(before: Audit, after: Audit) -> Growth:
    """What is more, or less, in the audit ``after``; what grew most comes first."""

    def swapped(process: AuditedProcess) -> int:
        return process.swapped * before.page_size

    return Growth(
        rss=AmountChange(before.rss, after.rss),
        pss=AmountChange(before.pss, after.pss),
        uss=AmountChange(before.uss, after.uss),
        swapped=AmountChange(*(sum(map(swapped, audit.counted)) for audit in (before, after))),
        processes=tuple(sorted(_processes(before, after), key=lambda process: -process.uss.change)),
        mappings=tuple(sorted(_mappings(before, after), key=_order)),
        libraries=tuple(sorted(_libraries(before, after), key=_order)),
        erosion=eroded_since(before, after),
        executed=family_of(before, after).replaced,
    )


def family_of(before: Audit, after: Audit) -> Family:
    """Who was forked, came, executed another program, or ended between two looks."""
    old, new = _by_identity(before), _by_identity(after)
    parents = {process.pid for process in (*before.processes, *after.processes)}
    strangers = [process for key, process in new.items() if key not in old]
    both = [(old[key], process) for key, process in new.items() if key in old]
    return Family(
        forked=tuple(process for process in strangers if process.parent in parents),
        came=tuple(process for process in strangers if process.parent not in parents),
        replaced=tuple((first, second) for first, second in both if second.executed_since(first)),
        ended=tuple(process for key, process in old.items() if key not in new),
    )


def _by_identity(audit: Audit) -> dict[tuple[int, int], AuditedProcess]:
    return {(process.pid, process.started): process for process in audit.processes}


def _processes(before: Audit, after: Audit) -> Iterable[ProcessGrowth]:
    old, new = _by_identity(before), _by_identity(after)
    for key in [*new, *(key for key in old if key not in new)]:
        first, second = old.get(key), new.get(key)
        process = second or first
        if process is not None:
            figures = {
                name: _of_process(first, second, name, unit)
                for name, unit in {"rss": 1, "pss": 1, "uss": 1, "swapped": before.page_size}.items()
            }
            state: State = "came" if first is None else "went" if second is None else "stayed"
            yield ProcessGrowth(process.pid, process.name, state, **figures)


def _of_process(
    first: AuditedProcess | None, second: AuditedProcess | None, name: str, unit: int
) -> AmountChange:
    figures = (None if process is None else getattr(process, name) for process in (first, second))
    return AmountChange(*(None if figure is None else figure * unit for figure in figures))


def _mappings(before: Audit, after: Audit) -> Iterable[MappingGrowth]:
    if not (before.mappings and after.mappings):
        return
    old, new = (
        {(row.kind, row.name): _of_mapping(row) for row in audit.mappings} for audit in (before, after)
    )
    for kind, name in {**new, **old}:
        yield MappingGrowth(kind, name, **_figures(old.get((kind, name)), new.get((kind, name))))


def _of_mapping(row: AuditedMapping) -> dict[str, int]:
    return {name: sum(getattr(process, name) for process in row.processes) for name in _COLUMNS}


def _libraries(before: Audit, after: Audit) -> Iterable[LibraryGrowth]:
    old, new = (
        {library.build_id or library.path: library for library in audit.libraries}
        for audit in (before, after)
    )
    for key, library in {**old, **new}.items():
        sums = [
            _of_library(found, before.page_size) if found else None for found in (old.get(key), new.get(key))
        ]
        yield LibraryGrowth(library.path, library.build_id, **_figures(*sums))


def _of_library(library: AuditedLibrary, page_size: int) -> dict[str, int]:
    pages = {
        "own": library.private - library.common,
        "inherited": library.common,
        "shared": sum(process.shared for process in library.processes),
    }
    return {name: number * page_size for name, number in pages.items()}


def _figures(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> dict[str, AmountChange]:
    figures = {name: [None if sums is None else sums[name] for sums in (before, after)] for name in _COLUMNS}
    return {name: AmountChange(*values) for name, values in figures.items()}


def _order(row: MappingGrowth | LibraryGrowth) -> tuple[int, int, int]:
    return -row.own.change, -row.inherited.change, -row.shared.change


_COLUMNS: Final[Sequence[str]] = ("own", "inherited", "shared")
_BEFORE_AFTER: Final = record(dict.fromkeys(("before", "after"), nullable(COUNT)))
_FIGURES: Final = dict.fromkeys(_COLUMNS, _BEFORE_AFTER)

GROWTH_KEYS: Final = {
    "processes": array(record(
        {"pid": COUNT, "name": TEXT, "state": words("came went stayed")},
        dict.fromkeys(("rss", "pss", "uss", "swapped"), _BEFORE_AFTER),
    )),
    "mappings": array(record({"kind": KIND_SCHEMA, "name": TEXT}, _FIGURES)),
    "libraries": array(record({"path": TEXT, "build_id": nullable(HEX)}, _FIGURES)),
    "erosion": ERODED_SCHEMA,
    "executed": array(COUNT),
}  # fmt: skip
"""The keys of what :meth:`Growth.to_json` gives, each with its schema."""
