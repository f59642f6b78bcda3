"""``miniloader diff``: what memory grew between two audits, and which pages of files changed."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "configure", "run"]

HELP = "compare two audits: what memory grew, which pages went private, and which symbols they hold"


def configure(parser: argparse.ArgumentParser) -> None:
    """The two files."""
    parser.add_argument("before", metavar="FILE", help="what `miniloader audit --save FILE` wrote first")
    parser.add_argument("after", metavar="FILE", help="what it wrote later")


def run(arguments: argparse.Namespace) -> int:
    """Read both, print what differs."""
    from miniloader.lab.audit.diff import diff
    from miniloader.lab.audit.growth import growth
    from miniloader.lab.audit.result import Audit

    before, after = Audit.load(arguments.before), Audit.load(arguments.after)
    changes, grown = diff(before, after), growth(before, after)
    if arguments.json:
        from dataclasses import asdict

        from miniloader.report.json import dump

        changed = [asdict(change) for change in changes]
        dump({"since": before.when, "until": after.when, **grown.to_json(), "changes": changed})
        return 0
    from miniloader.report.audit_growth import changes_view, growth_view
    from miniloader.report.output import Output

    Output().show([*growth_view(grown)])
    Output().show(changes_view(changes, grown, after.page_size))
    return 0
