"""``miniloader audit --every``: looks at a family of processes again and again, and what became of them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from miniloader.cli import choosing
from miniloader.cli.audit_look import (
    draw,
    look,
    look_patiently,
    measure,
    object_of,
    output_is_taken,
    save,
    show,
    sights_of,
    status_of,
)

if TYPE_CHECKING:
    from miniloader.lab.audit.result import Audit
    from miniloader.lab.audit.timeline import Timeline
    from miniloader.report.output import Output

__all__ = ["watch"]


def watch(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    """Look again and again; at the end, or at Ctrl-C, say what has changed since the start.

    The exit status is that of the first look.
    """
    from miniloader.lab.audit.timeline import Timeline
    from miniloader.report.output import Output

    out = Output(stderr=arguments.json or arguments.csv or output_is_taken(arguments))
    since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))  # as processes start
    first = look_patiently(arguments, pids)
    measure(arguments, first)
    looks, timeline = _Looks(arguments, first, since), Timeline(first)
    drawn = _PagesOverTime(arguments, first)
    try:
        _follow(arguments, looks, out, timeline, drawn)
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the summary is short; some senders send it twice
        out.show([("stopped",)])
    last = looks.proven(look_patiently(arguments, looks.pids()))
    if first.processes and not last.processes:
        out.show([("all of them have ended: this is what they were at the start",)])
        last = first
    else:
        timeline.add(last, looks.previous)
    save(arguments, last)  # before a reader may close the pipe
    drawn.again(last)
    draw(arguments, last, drawn.sights, timeline)
    _conclude(arguments, first, last, out)
    return status_of(first)


def _conclude(arguments: argparse.Namespace, first: Audit, last: Audit, out: Output) -> None:
    """Print the last look, and what has changed since the first."""
    from miniloader.lab.audit.diff import diff

    changes = diff(first, last)
    if arguments.json:
        from dataclasses import asdict

        from miniloader.report.json import dump

        changed = [asdict(change) for change in changes]
        dump({**object_of(arguments, last), "since": first.when, "changes": changed}, line=True)
        return
    show(arguments, last)
    if not (arguments.csv or output_is_taken(arguments)):
        from miniloader.lab.audit.growth import growth
        from miniloader.report.audit_growth import changes_view, growth_view

        out.show([(), (f"since the start, {last.when - first.when:.0f} s ago:",)])
        grown = growth(first, last)
        out.show([*growth_view(grown)])
        out.show(changes_view(changes, grown, last.page_size))


def _follow(
    arguments: argparse.Namespace, looks: _Looks, out: Output, timeline: Timeline, drawn: _PagesOverTime
) -> None:
    """A live table in a terminal, else a line for every look; one object a line for ``--json``."""
    from miniloader.report.audit_growth import live_view, tick

    first = looks.first
    if not out.is_terminal or arguments.json:
        for audit, previous in looks:
            with _whole():
                out.show([tick(audit, first, previous)])
                if arguments.json:
                    from miniloader.report.json import dump

                    dump({**object_of(arguments, audit), "since": first.when}, line=True)
                    sys.stdout.flush()
                _keep(arguments, audit, previous, timeline, drawn)
        return
    with out.live() as show_live:
        show_live(live_view(first, first, first))
        for audit, previous in looks:
            with _whole():
                show_live(live_view(audit, first, previous))
                _keep(arguments, audit, previous, timeline, drawn)


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until a look is told and kept: what was told is then also on the page."""
    import signal

    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _keep(
    arguments: argparse.Namespace, audit: Audit, previous: Audit, timeline: Timeline, drawn: _PagesOverTime
) -> None:
    """What a look leaves behind: a point of the curve, a step of the slider, new metrics."""
    timeline.add(audit, previous)
    drawn.again(audit)
    measure(arguments, audit)


class _PagesOverTime:
    """The pages of files at several looks, where a page is wanted: ``sights`` are what it draws."""

    def __init__(self, arguments: argparse.Namespace, first: Audit) -> None:
        self._start = first.when
        self.sights = sights_of(arguments, first, "start")

    def again(self, audit: Audit) -> None:
        """One more step."""
        if self.sights:
            from miniloader.lab.audit.library_pages import look_again

            self.sights = look_again(self.sights, audit, f"{audit.when - self._start:.0f} s later")


class _Looks:
    """The looks after the ``first``, of the whole family: whoever is forked, or fits now, is looked at, too.

    Iterated, each look with the one before, whenever one is due, until the time is over or nobody is left;
    ``previous`` is the last one so far.
    ``since`` is when it began, in clock ticks since boot.
    """

    def __init__(self, arguments: argparse.Namespace, first: Audit, since: int) -> None:
        self._arguments, self._since, self.first, self.previous = arguments, since, first, first
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

    def proven(self, audit: Audit) -> Audit:
        """A look, with what those before it prove: the last one of those forked since the first, too."""
        from miniloader.lab.erosion.since import proven_by

        return proven_by(self.previous, proven_by(self.first, audit))

    def __iter__(self) -> Iterator[tuple[Audit, Audit]]:
        duration = self._arguments.duration
        end = None if duration is None else time.monotonic() + duration
        due = time.monotonic()
        while True:
            due = max(due + self._arguments.every, time.monotonic())
            if end is not None and due > end:
                time.sleep(max(0.0, end - time.monotonic()))
                return
            time.sleep(max(0.0, due - time.monotonic()))
            audit = self.proven(look(self._arguments, self.pids(), causes=False))  # the table is the progress
            if not audit.processes:
                return
            self._family |= {process.pid: process.started for process in audit.processes}
            previous, self.previous = self.previous, audit
            yield audit, previous
