"""What ``miniloader audit`` does with each look: it is made, saved, measured, drawn, printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from miniloader.cli import options
from miniloader.errors import UsageError, printable, tell
from miniloader.startup import import_numpy

if TYPE_CHECKING:
    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.library_pages import Sight
    from miniloader.lab.audit.result import Audit
    from miniloader.lab.audit.timeline import Moment

__all__ = [
    "draw",
    "look",
    "look_patiently",
    "measure",
    "object_of",
    "output_is_taken",
    "save",
    "show",
    "sights_of",
    "status_of",
]


def look_patiently(arguments: argparse.Namespace, pids: tuple[int, ...]) -> Audit:
    """Look at the processes, with as much help as is worth it; on a terminal say how far it is."""
    import_numpy()
    from miniloader.lab.audit.audit import jobs_for
    from miniloader.report.progress import progress

    jobs = min(len(os.sched_getaffinity(0)), jobs_for(pids))
    with progress(forks=jobs > 1) as say:
        tell = lambda done, of: say(f"looking at processes: {done} of {of}")  # noqa: E731
        return look(arguments, pids, jobs=jobs, causes=not arguments.no_causes, on_progress=tell)


def look(arguments: argparse.Namespace, pids: tuple[int, ...], **options: Any) -> Audit:
    """Look at the processes, at the files and the level that were asked for."""
    from miniloader.lab.audit.audit import audit

    return audit(pids, library=arguments.library, level=arguments.level, **options)


def show(arguments: argparse.Namespace, result: Audit) -> None:
    """Print one look, as it was asked for."""
    if output_is_taken(arguments):
        return
    if arguments.json:
        from miniloader.report.json import dump

        dump(object_of(arguments, result))
        return
    groups = _groups_of(arguments, result)
    from miniloader.report.audit import lines, said_of
    from miniloader.report.output import Output

    if arguments.csv:
        from miniloader.report.audit_csv import write_csv

        write_csv(result, sys.stdout, arguments.csv, groups)
        for process in result.unreadable:
            tell(f"not audited: {said_of(process)}")
    else:
        out = Output()
        out.show(lines(result, pages=arguments.library is not None, groups=groups))
        out.show(options.page_written(arguments), wrap=False)
        if arguments.openmetrics is not None:
            out.show([(printable(f"The metrics are {arguments.openmetrics}"),)], wrap=False)


def _groups_of(arguments: argparse.Namespace, result: Audit) -> tuple[MemoryGroup, ...]:
    """What was asked for with ``--by``."""
    if arguments.by is None:
        return ()
    from miniloader.lab.audit.grouping import grouped

    return grouped(result, arguments.by)


def object_of(arguments: argparse.Namespace, result: Audit) -> dict[str, Any]:
    """The object that ``--json`` prints of one look."""
    from dataclasses import asdict

    from miniloader.lab.erosion.advice import advice_json

    groups = [asdict(group) for group in _groups_of(arguments, result)]
    return {
        **result.to_json(),
        "advice": advice_json(result),
        **({"groups": groups} if arguments.by is not None else {}),
    }


def save(arguments: argparse.Namespace, result: Audit) -> None:
    """Write what was asked for besides: the audit for ``diff``, and its metrics."""
    if arguments.save is not None:
        result.save(arguments.save)
    measure(arguments, result)


def measure(arguments: argparse.Namespace, result: Audit) -> None:
    """Write the metrics, where they are wanted: to a file, or to standard output, which they have then."""
    if arguments.openmetrics is None:
        return
    from miniloader.report.openmetrics import exposition, write_metrics

    if arguments.openmetrics == "-":
        sys.stdout.buffer.write(exposition(result, _groups_of(arguments, result)))
        sys.stdout.buffer.flush()
    else:
        write_metrics(result, _groups_of(arguments, result), arguments.openmetrics)


def output_is_taken(arguments: argparse.Namespace) -> bool:
    """Whether a page or metrics have standard output; UsageError where something else wants it, too."""
    metrics: bool = arguments.openmetrics == "-"
    if metrics and (arguments.json or arguments.csv or arguments.html == "-"):
        raise UsageError("--openmetrics - is on standard output, and --json, --csv or --html - would be, too")
    return options.page_alone(arguments) or metrics


def sights_of(arguments: argparse.Namespace, result: Audit, step: str = "now") -> tuple[Sight, ...]:
    """The pages to draw, where any are wanted."""
    if arguments.html is None:
        return ()
    from miniloader.lab.audit.library_pages import look

    return look(result, step)


def draw(
    arguments: argparse.Namespace, result: Audit, sights: tuple[Sight, ...], moments: Iterable[Moment] = ()
) -> None:
    """Write the page, where one is wanted; ``moments`` are all looks, for its curve."""
    if arguments.html is not None:
        from miniloader.report.html import write_audit

        write_audit(result, sights, arguments.html, moments)


def status_of(audit: Audit) -> int:
    """3 when no process could be audited, 1 when that is because there is none, else 0."""
    if audit.processes or not audit.unreadable:
        return 0
    return 1 if all(process.gone for process in audit.unreadable) else 3
