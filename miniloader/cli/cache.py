"""``miniloader cache``: what has been prepared."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miniloader.loader.prepare import Entry

__all__ = ["HELP", "configure", "run", "show"]

HELP = "list, verify or clear what `miniloader prepare` has kept"


def configure(parser: argparse.ArgumentParser) -> None:
    """What to do with it."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="read and check every page, and every library")
    what.add_argument("--clear", action="store_true", help="remove everything, and forget the addresses")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 1 when something that was verified cannot be used."""
    from miniloader.loader.prepare import entries, verify
    from miniloader.loader.prepared import store

    prepared = verify() if arguments.verify else entries()
    if arguments.clear:
        store.clear()
    show(prepared, arguments, removed=arguments.clear)
    return 1 if arguments.verify and any(entry.fault for entry in prepared) else 0


def show(entries: Sequence[Entry], arguments: argparse.Namespace, *, removed: bool = False) -> None:
    """Print what is in the cache, or was until it was ``removed``."""
    from miniloader.report.prepared import as_json, lines

    if arguments.json:
        from miniloader.loader.prepared import store
        from miniloader.report.json import dump

        dump(as_json(store.directory(), entries, removed=removed))
    else:
        from miniloader.report.output import Output

        Output().show(lines(entries, removed=removed))
