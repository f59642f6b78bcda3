"""``miniloader cache``: what has been prepared."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "configure", "run"]

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
    from miniloader.report.prepared import show

    if arguments.clear:
        known = entries()
        store.clear()
        show(known, as_json=arguments.json, removed=True)
        return 0
    known = verify() if arguments.verify else entries()
    show(known, as_json=arguments.json)
    return 1 if arguments.verify and any(entry.fault for entry in known) else 0
