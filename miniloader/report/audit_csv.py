"""An audit as CSV: numbers as they are in JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from miniloader.errors import printable
from miniloader.forking import importing
from miniloader.report.audit_rows import COUNTED

if TYPE_CHECKING:
    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.result import Audit

__all__ = ["records", "write_csv"]


def write_csv(
    audit: Audit, file: IO[str], what: str = "libraries", groups: Sequence[MemoryGroup] = ()
) -> None:
    """A row for each process, or for each mapping or library in each process, or for each of ``groups``."""
    with importing:
        import csv

    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(_group_records(groups) if what == "groups" else records(audit, what))


def records(audit: Audit, what: str) -> Iterator[Sequence[object]]:
    """The names of the columns, then a row for each of ``what``: processes, mappings or libraries."""
    return _CSV[what](audit)


def _group_records(groups: Sequence[MemoryGroup]) -> Iterator[Sequence[object]]:
    yield ("by", "name", "processes", *_OF_GROUP)
    for group in groups:
        yield (group.by, printable(group.name), len(group.pids), *_values(group, _OF_GROUP))


def _process_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("pid", "name", *_OF_PROCESS, *_KNOWN_BY)
    for process in audit.processes:
        known_by = [printable(text) for text in _values(process, _KNOWN_BY)]
        yield (process.pid, printable(process.name), *_values(process, _OF_PROCESS), *known_by)


def _mapping_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("kind", "name", "pid", *_OF_MAPPING)
    for mapping in audit.mappings:
        for process in mapping.processes:
            yield (mapping.kind, printable(mapping.name), process.pid, *_values(process, _OF_MAPPING))


def _library_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("path", "build_id", "pid", *_OF_LIBRARY)
    for library in audit.libraries:
        for process in library.processes:
            values = _values(process, _OF_LIBRARY)
            yield (printable(library.path), library.build_id or "", process.pid, *values)


def _values(value: object, fields: Sequence[str]) -> list[object]:
    return [getattr(value, field) for field in fields]


_OF_PROCESS = (
    *("parent", "started", "rss", "pss", "uss", "anonymous", "anonymous_shared"),
    *("ksm", "zero", "huge", "swapped", "memory_of"),
)
_KNOWN_BY = ("user", "command", "cgroup")
_OF_GROUP = ("rss", "pss", "uss", "swapped")
_OF_MAPPING = ("resident", "own", "inherited", "shared", "pss", "zero", "huge", "swapped", "hugetlb")
_OF_LIBRARY = ("base", *COUNTED, "inherited", "swapped", "merged", "pss")
_CSV = {"processes": _process_records, "mappings": _mapping_records, "libraries": _library_records}
