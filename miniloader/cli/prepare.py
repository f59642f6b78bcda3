"""``miniloader prepare``: relocate libraries once, for every process that loads them with ``--prepared``."""

from __future__ import annotations

import argparse
from functools import partial

from miniloader.cli import options

__all__ = ["HELP", "configure", "run"]

HELP = "relocate libraries once and keep the pages, so that processes share them"

_GIVEN_UP = """\
Processes that load a prepared library with `miniloader load --prepared` map its relocated pages from one
file: they are one copy for all of them, and loading takes no relocating.

What is given up: every process of yours has the library at the same address, until the machine boots
again. It is chosen at random for you and this boot, so that strangers cannot know it; but who can read
the memory of one of your processes knows it for the others, which is not so where each process has an
address of its own. To refuse it, do not use --prepared; `miniloader cache --clear` forgets all addresses.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The libraries."""
    options.examples(parser, _GIVEN_UP)
    options.library(parser, several=True)


def run(arguments: argparse.Namespace) -> int:
    """Prepare each in a process of its own, as several need not have room in one; stop where one fails."""
    from miniloader.cli import reported
    from miniloader.cli.cache import show
    from miniloader.lab.workers.crash_guard import in_child
    from miniloader.loader import inspect
    from miniloader.loader.prepare import entries, prepare

    def prepared(library: str, doing: object) -> int:
        def work() -> int:
            prepare(library)
            return 0

        return reported(work, as_json=arguments.json, debug=arguments.debug)

    for library in arguments.libraries:
        status = in_child(partial(prepared, library), library)
        if status:
            return status
    made = {inspect(library).build_id for library in arguments.libraries}
    show([entry for entry in entries() if entry.build_id in made], arguments)
    return 0
