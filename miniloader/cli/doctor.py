"""``miniloader doctor``: what the kernel and our permissions tell here, and how to be told more."""

from __future__ import annotations

import argparse

from miniloader.cli import options

__all__ = ["HELP", "configure", "run"]

HELP = "say what the kernel tells here, and which evidence that gives"


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments; the help lists what is probed."""
    from miniloader.kernel.features import FEATURES, LEVELS

    def listed(rows: list[tuple[str, str]]) -> str:
        return "\n".join(f"  {name:<15} {text}" for name, text in rows)

    options.examples(
        parser,
        "Probed by doing each on a page of its own, never guessed from a version:\n"
        + listed([(feature.name, feature.what) for feature in FEATURES])
        + "\n\nLevels of evidence, best first:\n"
        + listed([(level.name, level.shows) for level in LEVELS]),
    )


def run(arguments: argparse.Namespace) -> int:
    """Probe, and print what was found."""
    import os

    from miniloader.kernel.privileges import privileges
    from miniloader.kernel.probe import probe
    from miniloader.report.doctor import as_json, lines
    from miniloader.report.json import dump
    from miniloader.report.output import Output

    found = os.uname(), probe(), privileges()
    if arguments.json:
        dump(as_json(*found))
    else:
        Output().show(lines(*found))
    return 0
