"""``miniloader doctor``: what the kernel and our permissions tell here, and how to be told more."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from miniloader.kernel.privileges import Privileges
    from miniloader.kernel.probe import Capabilities

__all__ = ["HELP", "configure", "run"]

HELP = "say what the kernel tells here, and which evidence that gives"


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments; the help lists what is probed."""
    from miniloader.kernel.features import FEATURES, LEVELS

    def listed(rows: list[tuple[str, str]]) -> str:
        return "\n".join(f"  {name:<15} {text}" for name, text in rows)

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Probed by doing each on a page of its own, never guessed from a version:\n"
        + listed([(feature.name, feature.what) for feature in FEATURES])
        + "\n\nLevels of evidence, best first:\n"
        + listed([(level.name, level.shows) for level in LEVELS])
    )


def run(arguments: argparse.Namespace) -> int:
    """Probe, and print what was found."""
    from miniloader.kernel.privileges import privileges
    from miniloader.kernel.probe import probe

    capabilities, rights = probe(), privileges()
    if arguments.json:
        import json

        print(json.dumps(_as_json(capabilities, rights), indent=2))
    else:
        _show(capabilities, rights)
    return 0


def _as_json(capabilities: Capabilities, rights: Privileges) -> dict[str, Any]:
    import os

    from miniloader.kernel.syscalls import PAGE_SIZE

    system, above = os.uname(), capabilities.next_level
    return {
        "kernel": system.release,
        "architecture": system.machine,
        "page_size": PAGE_SIZE,
        "privileges": {
            "uid": rights.uid,
            "capabilities": list(rights.capabilities),
            "initial_user_namespace": rights.initial_user_namespace,
            "ptrace_scope": rights.ptrace_scope,
            "hidepid": rights.hidepid,
        },
        "features": [
            {
                "name": finding.feature.name,
                "works": finding.works,
                "what": finding.feature.what,
                "why": finding.why,
                "get": finding.feature.get,
            }
            for finding in capabilities.findings
        ],
        "evidence": capabilities.level.name,
        "shows": capabilities.level.shows,
        "next": None if above is None else {"evidence": above.name, "shows": above.shows, "get": above.get},
    }


def _show(capabilities: Capabilities, rights: Privileges) -> None:
    from rich.text import Text

    from miniloader.report.output import console

    out = console()
    out.print(_machine(rights))
    out.print()
    out.print(_features(capabilities))
    out.print()
    level, above = capabilities.level, capabilities.next_level
    out.print(Text.assemble("Evidence here: ", (level.name, "bold"), f" — {level.shows}."))
    if above is not None:
        out.print(Text.assemble("Next level:    ", (above.name, "bold"), f" — {above.shows}."))
        out.print(f"To get it:     {above.get}.")


def _machine(rights: Privileges) -> Table:
    """The kernel, and who we are to it."""
    import os

    from rich.table import Table

    from miniloader.kernel.privileges import CAPABILITIES
    from miniloader.kernel.syscalls import PAGE_SIZE

    system = os.uname()
    namespace = {True: "the initial user namespace", False: "a user namespace of its own", None: "not known"}
    held = "no, but in its own namespace" if rights.initial_user_namespace is False else "yes"
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("kernel", f"{system.sysname} {system.release}, {system.machine}"),
        ("page size", f"{PAGE_SIZE} bytes"),
        ("user", f"uid {rights.uid}, in {namespace[rights.initial_user_namespace]}"),
        *(
            (name, f"{held if name in rights.capabilities else 'no'}: to {what}")
            for name, (_, what) in CAPABILITIES.items()
        ),
        ("ptrace scope", "no Yama" if rights.ptrace_scope is None else f"Yama, {rights.ptrace_scope}"),
        ("hidepid", "not set" if rights.hidepid is None else rights.hidepid),
    ):
        grid.add_row(name, value)
    return grid


def _features(capabilities: Capabilities) -> Table:
    """One row a feature; where it does not work, why not and how to get it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("feature", no_wrap=True)
    table.add_column("works", no_wrap=True)
    table.add_column("what it tells, or why it does not")
    for finding in capabilities.findings:
        feature = finding.feature
        if finding.works:
            table.add_row(feature.name, Text("yes", style="green"), feature.what)
        else:
            why = Text(f"{feature.what}\n").append(f"{finding.why}\nto get it: {feature.get}", style="dim")
            table.add_row(feature.name, Text("no", style="red"), why)
    return table
