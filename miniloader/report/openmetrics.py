"""An audit as metrics for a fleet's own collector, in OpenMetrics, by Prometheus' client library.

What it prints is read by Prometheus itself, by OpenTelemetry, and, as a file, by node_exporter's textfile
collector: gauges without time stamps, in bytes.  Command lines are left out, since passwords stand in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from miniloader.errors import MiniloaderError, printable
from miniloader.forking import importing

if TYPE_CHECKING:
    from prometheus_client import Metric

    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.result import Audit

__all__ = ["exposition", "write_metrics"]

#: Label values, then the number.
_Sample = tuple[Sequence[str], float]

_OF_MAPPING: Final = ("own", "inherited", "shared", "swapped", "huge", "hugetlb")


def exposition(audit: Audit, groups: Sequence[MemoryGroup] = ()) -> bytes:
    """What a collector reads, to its ``# EOF``; ``groups`` are those of ``--by``."""
    with importing:
        from prometheus_client import CollectorRegistry
        from prometheus_client.openmetrics import exposition as openmetrics

    render: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest
    registry = CollectorRegistry()
    registry.register(_Families((*_of_audit(audit), *_of_groups(groups))))
    return render(registry)


def write_metrics(audit: Audit, groups: Sequence[MemoryGroup], path: str | os.PathLike[str]) -> None:
    """Write them to a file, all of them or nothing; MiniloaderError says why not."""
    with importing:
        from miniloader.files import write_whole

    content = exposition(audit, groups)
    try:
        write_whole(path, [content], mode=0o644)  # the collector is another user
    except OSError as error:
        raise MiniloaderError(f"{os.fspath(path)}: cannot write the metrics: {error.strerror}") from error


class _Families:
    """Metrics that are already known, as a registry collects them."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families

    def describe(self) -> Iterator[Metric]:
        yield from self._families


def _family(name: str, text: str, labels: Sequence[str], samples: Iterable[_Sample]) -> Metric:
    """A gauge; samples of the same labels are one, their sum."""
    with importing:
        from prometheus_client.core import GaugeMetricFamily

    sums: dict[tuple[str, ...], float] = {}
    for values, number in samples:
        key = tuple(printable(value) for value in values)
        sums[key] = sums.get(key, 0) + number
    unit = name.rpartition("_")[2]
    family = GaugeMetricFamily(name, text, labels=labels, unit=unit if unit in ("bytes", "seconds") else "")
    for key, number in sums.items():
        family.add_metric(key, number)
    return family


def _of_audit(audit: Audit) -> Iterator[Metric]:
    yield _family(
        "miniloader_audit_info", "By what evidence an audit was made.", ("level",), [((audit.level,), 1)]
    )
    yield _family("miniloader_audit_timestamp_seconds", "When it was made.", (), [((), audit.when)])
    yield _family(
        "miniloader_audit_unreadable_processes",
        "Processes that could not be looked at.",
        (),
        [((), len(audit.unreadable))],
    )
    yield _family(
        "miniloader_process_info",
        "Processes with an address space of their own.",
        ("pid", "name", "user", "cgroup"),
        [((str(process.pid), process.name, process.user, process.cgroup), 1) for process in audit.counted],
    )
    names = {process.pid: process.name for process in audit.processes}
    for column, text in _PROCESS.items():
        yield _family(
            f"miniloader_process_{column}_bytes",
            text,
            ("pid", "name"),
            [
                ((str(process.pid), process.name), number)
                for process in audit.counted
                if (number := getattr(process, column)) is not None
            ],
        )
    yield _family(
        "miniloader_process_memory_bytes",
        "Memory by kind of mapping, and by who has it.",
        ("pid", "name", "kind", "share"),
        [
            ((str(process.pid), names[process.pid], mapping.kind, column), getattr(process, column))
            for mapping in audit.mappings
            for process in mapping.processes
            for column in _OF_MAPPING
        ],
    )
    yield from _of_erosion(audit, names)
    yield from _of_libraries(audit)


def _of_erosion(audit: Audit, names: Mapping[int, str]) -> Iterator[Metric]:
    """No sample where frames are hidden, or where nobody read the bytes."""
    for column, text in _EROSION.items():
        yield _family(
            f"miniloader_process_eroded_{column}_bytes",
            text,
            ("pid", "name", "relative"),
            [
                ((str(row.pid), names.get(row.pid, ""), str(row.relative)), number)
                for row in audit.erosion or ()
                if (number := getattr(row, column)) is not None
            ],
        )


def _of_libraries(audit: Audit) -> Iterator[Metric]:
    for column, text in _LIBRARY.items():
        yield _family(
            f"miniloader_library_{column}_bytes",
            text,
            ("path", "build_id"),
            [
                ((library.path, library.build_id or ""), number * (1 if column == "pss" else audit.page_size))
                for library in audit.libraries
                for number in [library.takes if column == "pss" else getattr(library, column)]
                if number is not None
            ],
        )


def _of_groups(groups: Sequence[MemoryGroup]) -> Iterator[Metric]:
    for column in ("rss", "pss", "uss", "swapped") if groups else ():
        yield _family(
            f"miniloader_group_{column}_bytes",
            "Memory of all that are known by one name.",
            ("by", "group"),
            [
                ((group.by, group.name), number)
                for group in groups
                if (number := getattr(group, column)) is not None
            ],
        )


_PROCESS: Final[Mapping[str, str]] = {
    "rss": "Resident memory of a process.",
    "pss": "Resident memory, each page divided by how many have it.",
    "uss": "Memory that a process alone has mapped.",
}
_EROSION: Final[Mapping[str, str]] = {
    "proven": "Pages that were one frame with the nearest relative, and are two now.",
    "possible": "Pages at one address in two frames that may have been one with that relative.",
    "same": "Of both the pages that hold the same bytes in both processes.",
}
_LIBRARY: Final[Mapping[str, str]] = {
    "present": "Present pages of a file over all processes, each counted for itself.",
    "frames": "Memory that these pages take: at most so much, where frames are hidden.",
    "pss": "What they take in proportion, with those who were not looked at.",
    "own": "Copies of its pages that one process alone has, swapped out or not, and bss.",
}
