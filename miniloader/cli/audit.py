"""``miniloader audit``: what running processes share of their libraries, and why not the rest."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from miniloader.cli import choosing, options

if TYPE_CHECKING:
    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.library_pages import Sight
    from miniloader.lab.audit.result import Audit
    from miniloader.report.output import Output

__all__ = ["HELP", "configure", "run"]

HELP = "say which pages of running processes are really shared, and why the others are not"

_EXAMPLES = """\
examples:

  miniloader audit 4711 4712                   these two processes
  miniloader audit --name 'gunicorn*'          all that are called so
  miniloader audit --command http.server       all whose command line has this
  miniloader audit --unit nginx                what a unit of systemd runs; --container ID, --cgroup PATTERN
  miniloader audit --all --by user             the whole machine, a row for each user
  miniloader audit --tree 4711 --every 2s      a server and its workers, as their memory erodes
  miniloader audit --tree 4711 --every 2s --for 1m --html erosion.html     the same as a page with a slider
  miniloader audit 4711 --library libcrypto    every private page of one library
  miniloader audit 4711 --library libcrypto --page 0x484000      one page, word by word
  miniloader audit 4711 --bindings             who really serves each symbol that its libraries use

A private page's causes: relocation, overwritten (a relocated slot that was changed later), loader, bss,
write (by the program), identical (copied, yet as in the file), unknown. Nothing is stopped or written.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Which processes, which files, once or repeatedly, and how to print it."""
    options.examples(parser, _EXAMPLES)
    choosing.configure(parser)
    parser.add_argument("--library", metavar="PATTERN", help="only these files, with every private page")
    parser.add_argument(
        "--page",
        metavar="VADDR",
        type=options.number("vaddr", "0x484000"),
        help="one page of the library, word by word",
    )
    parser.add_argument(
        "--bindings",
        action="store_true",
        help="read the slots of one process: who serves each symbol; with --library those that this uses",
    )
    parser.add_argument("--no-causes", action="store_true", help="count only")
    parser.add_argument(
        "--by",
        metavar="WHAT",
        choices=("name", "user", "cgroup", "command", "library"),
        help="a row for each name, user, cgroup or command of processes, or for each library, with totals",
    )
    options.level(parser, ("frames", "flags"))
    parser.add_argument("--every", metavar="TIME", type=_seconds, help="look again so often, such as 2s")
    parser.add_argument("--for", metavar="TIME", type=_seconds, dest="duration", help="stop after this time")
    parser.add_argument("--save", metavar="FILE", help="write the audit to a file, for `miniloader diff`")
    options.html(parser, "write a page to look at, the pages of files drawn")
    parser.add_argument(
        "--csv",
        metavar="WHAT",
        nargs="?",
        const="libraries",
        type=_csv,
        help="print a row for each of the processes, mappings, libraries (the default), or groups of --by",
    )


def _csv(text: str) -> str | int:
    """What to print; or the process that is named behind a plain ``--csv``."""
    if text in ("processes", "mappings", "libraries", "groups"):
        return text
    if text.isdecimal():
        return choosing.pid(text)
    raise argparse.ArgumentTypeError(f"{text!r}: not processes, mappings, libraries or groups")


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    seconds = float(parts[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}[parts[2]] if parts else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 500ms, 2s or 1m")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Audit once or repeatedly, print, save; the exit status is :func:`_status`'s."""
    from miniloader.errors import UsageError

    if arguments.duration is not None and arguments.every is None:
        raise UsageError("--for needs --every")
    if isinstance(arguments.csv, int):  # --csv PID
        arguments.pids, arguments.csv = [arguments.csv, *arguments.pids], "libraries"
    if arguments.csv == "groups" and arguments.by is None:
        raise UsageError("--csv groups needs --by, which says what groups them")
    if arguments.csv and arguments.json:
        raise UsageError("--csv and --json: one of them")
    if arguments.html is not None and arguments.page is not None:
        raise UsageError("--html and --page: one of them")
    options.page_alone(arguments)
    pids = choosing.chosen(arguments)
    if arguments.bindings:
        return _bindings(arguments, pids)
    if arguments.page is not None:
        return _page(arguments, pids)
    if arguments.every is not None:
        return _watch(arguments, pids)
    result = _audit(arguments, pids)
    _save(arguments, result)  # before a reader may close the pipe
    _draw(arguments, result, _sights(arguments, result))
    _print(arguments, result)
    return _status(result)


def _status(audit: Audit) -> int:
    """3 when no process could be audited, 1 when that is because there is none, else 0."""
    if audit.processes or not audit.unreadable:
        return 0
    return 1 if all(process.gone for process in audit.unreadable) else 3


def _audit(arguments: argparse.Namespace, pids: tuple[int, ...]) -> Audit:
    from miniloader.lab.audit.audit import jobs_for
    from miniloader.report.progress import progress

    jobs = min(len(os.sched_getaffinity(0)), jobs_for(pids))
    with progress(forks=jobs > 1) as say:
        tell = lambda done, of: say(f"looking at processes: {done} of {of}")  # noqa: E731
        return _look(arguments, pids, jobs=jobs, causes=not arguments.no_causes, on_progress=tell)


def _look(arguments: argparse.Namespace, pids: tuple[int, ...], **options: Any) -> Audit:
    from miniloader.lab.audit.audit import audit

    return audit(pids, library=arguments.library, level=arguments.level, **options)


def _print(arguments: argparse.Namespace, result: Audit) -> None:
    if options.page_alone(arguments):
        return
    if arguments.json:
        from miniloader.report.json import dump

        dump(_json(arguments, result))
        return
    groups = _groups(arguments, result)
    from miniloader.report.audit import lines, said_of
    from miniloader.report.output import Output

    if arguments.csv:
        from miniloader.report.audit_csv import write_csv

        write_csv(result, sys.stdout, arguments.csv, groups)
        for process in result.unreadable:
            print(f"not audited: {said_of(process)}", file=sys.stderr)
    else:
        out = Output()
        out.show(lines(result, pages=arguments.library is not None, groups=groups))
        out.show(options.page_written(arguments), wrap=False)


def _groups(arguments: argparse.Namespace, result: Audit) -> tuple[MemoryGroup, ...]:
    """What was asked for with ``--by``."""
    if arguments.by is None:
        return ()
    from miniloader.lab.audit.grouping import grouped

    return grouped(result, arguments.by)


def _json(arguments: argparse.Namespace, result: Audit) -> dict[str, Any]:
    """The object that ``--json`` prints of one look."""
    from dataclasses import asdict

    from miniloader.lab.erosion.advice import advice_json

    groups = [asdict(group) for group in _groups(arguments, result)]
    return {
        **result.to_json(),
        "advice": advice_json(result),
        **({"groups": groups} if arguments.by is not None else {}),
    }


def _save(arguments: argparse.Namespace, result: Audit) -> None:
    if arguments.save is not None:
        result.save(arguments.save)


def _sights(arguments: argparse.Namespace, result: Audit, step: str = "now") -> tuple[Sight, ...]:
    """The pages to draw, where any are wanted."""
    if arguments.html is None:
        return ()
    from miniloader.lab.audit.library_pages import look

    return look(result, step)


def _draw(arguments: argparse.Namespace, result: Audit, sights: tuple[Sight, ...]) -> None:
    if arguments.html is not None:
        from miniloader.report.html import write_audit

        write_audit(result, sights, arguments.html)


def _page(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    from miniloader.errors import UsageError
    from miniloader.lab.audit.page_words import view_page

    if len(pids) != 1 or arguments.library is None:
        raise UsageError("--page needs one process, and --library to say of which file")
    view = view_page(pids[0], arguments.page, arguments.library)
    if arguments.json:
        from miniloader.report.json import dump

        dump(view.to_json())
        return 0
    from miniloader.report.audit_words import page_view
    from miniloader.report.output import Output

    Output().show(page_view(view))
    return 0


def _bindings(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    from miniloader.errors import UsageError
    from miniloader.lab.audit.live_bindings import live_bindings

    others = ("page", "every", "save", "html", "csv")
    given = [f"--{name}" for name in others if getattr(arguments, name) is not None]
    if len(pids) != 1 or given:
        raise UsageError("--bindings needs one process" + (f", and goes without {given[0]}" if given else ""))
    live = live_bindings(pids[0], arguments.library)
    if arguments.json:
        from miniloader.report.json import dump

        dump(live.to_json())
        return 0
    from miniloader.report.live_bindings import lines
    from miniloader.report.output import Output

    Output().show(lines(live, everything=arguments.library is not None))
    return 0


# ------------------------------------------------------------------------------------------- over time
def _watch(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    """Look again and again; at the end, or at Ctrl-C, say what has changed since the start."""
    from miniloader.lab.audit.diff import diff
    from miniloader.lab.erosion.since import proven_by
    from miniloader.report.output import Output

    quiet = arguments.json or arguments.csv or options.page_alone(arguments)
    out = Output(stderr=quiet)
    since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))  # as processes start
    first = _audit(arguments, pids)
    sights = _sights(arguments, first, "start")
    looks = _Looks(arguments, first, since)
    try:
        _follow(arguments, looks, out)
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the summary is short; some senders send it twice
        out.show([("stopped",)])
    last = proven_by(first, _audit(arguments, looks.pids()))
    if first.processes and not last.processes:
        out.show([("all of them have ended: this is what they were at the start",)])
        last = first
    changes = diff(first, last)
    _save(arguments, last)  # before a reader may close the pipe
    if sights:
        from miniloader.lab.audit.library_pages import look_again

        sights = look_again(sights, last, f"{last.when - first.when:.0f} s later")
    _draw(arguments, last, sights)
    if arguments.json:
        from dataclasses import asdict

        from miniloader.report.json import dump

        changed = [asdict(change) for change in changes]
        dump({**_json(arguments, last), "since": first.when, "changes": changed}, line=True)
    else:
        _print(arguments, last)
        if not (arguments.csv or options.page_alone(arguments)):
            from miniloader.lab.audit.growth import growth
            from miniloader.report.audit_growth import changes_view, growth_view

            out.show([(), (f"since the start, {last.when - first.when:.0f} s ago:",)])
            out.show([*growth_view(growth(first, last))])
            out.show(changes_view(changes, last.page_size))
    return _status(first)


def _follow(arguments: argparse.Namespace, looks: _Looks, out: Output) -> None:
    """A live table in a terminal, else a line for every look; one object a line for ``--json``."""
    from miniloader.report.audit_growth import tick
    from miniloader.report.audit_rows import library_rows

    first = looks.first
    if not out.is_terminal or arguments.json:
        for audit, previous in looks:
            out.show([tick(audit, first, previous)])
            if arguments.json:
                from miniloader.report.json import dump

                dump({**_json(arguments, audit), "since": first.when}, line=True)
                sys.stdout.flush()
        return
    with out.live() as show:
        show([tick(first, first), library_rows(first, first)])
        for audit, previous in looks:
            show([tick(audit, first, previous), library_rows(audit, first)])


class _Looks:
    """The looks after the ``first``, of the whole family: whoever is forked, or fits now, is looked at, too.

    Iterated, each look with the one before, whenever one is due, until the time is over or nobody is left.
    ``since`` is when it began, in clock ticks since boot.
    """

    def __init__(self, arguments: argparse.Namespace, first: Audit, since: int) -> None:
        self._arguments, self._since, self.first = arguments, since, first
        self._family = {process.pid: process.started for process in first.processes}

    def pids(self) -> tuple[int, ...]:
        """Who belongs to the family now."""
        from miniloader.errors import ProcessGone, UsageError
        from miniloader.lab.audit.select import still_there

        fitting = tuple[int, ...]()
        if choosing.asks(self._arguments):
            with suppress(UsageError, ProcessGone):  # the tree's root has ended: the others are followed
                fitting = choosing.fitting(self._arguments)
        return tuple(sorted({*still_there(self._family, self._since), *fitting}))

    def __iter__(self) -> Iterator[tuple[Audit, Audit]]:
        from miniloader.lab.erosion.since import proven_by

        duration = self._arguments.duration
        end = None if duration is None else time.monotonic() + duration
        due, previous = time.monotonic(), self.first
        while True:
            due = max(due + self._arguments.every, time.monotonic())
            if end is not None and due > end:
                time.sleep(max(0.0, end - time.monotonic()))
                return
            time.sleep(max(0.0, due - time.monotonic()))
            audit = _look(self._arguments, self.pids(), causes=False)  # the table is the progress
            audit = proven_by(self.first, audit)
            if not audit.processes:
                return
            self._family |= {process.pid: process.started for process in audit.processes}
            yield audit, previous
            previous = audit
