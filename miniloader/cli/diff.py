"""``miniloader diff``: what has changed between two audits."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "configure", "run"]

HELP = "compare two audits: which pages went private, and which symbols they hold"


def configure(parser: argparse.ArgumentParser) -> None:
    """The two files."""
    parser.add_argument("before", metavar="FILE", help="what `miniloader audit --save FILE` wrote first")
    parser.add_argument("after", metavar="FILE", help="what it wrote later")


def run(arguments: argparse.Namespace) -> int:
    """Read both, print what differs."""
    from miniloader.lab.audit.diff import diff
    from miniloader.lab.audit.result import Audit

    before, after = Audit.load(arguments.before), Audit.load(arguments.after)
    changes = diff(before, after)
    if arguments.json:
        from dataclasses import asdict

        from miniloader.report.json import dump

        dump({"since": before.when, "until": after.when, "changes": [asdict(change) for change in changes]})
        return 0
    from miniloader.report.audit import changes_view
    from miniloader.report.output import Output

    Output().show(changes_view(changes, after.page_size))
    return 0
