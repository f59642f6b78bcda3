"""``miniloader check``: will it load, and everything that is wrong with it at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from miniloader.cli import options
from miniloader.startup import import_numpy

if TYPE_CHECKING:
    from miniloader.lab.check.check import Checker

__all__ = ["HELP", "configure", "run"]

HELP = "say whether programs and libraries will load, and everything that keeps them from it"


def configure(parser: argparse.ArgumentParser) -> None:
    """The files, where they are to be loaded, and what is shown."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="a program or library: a path, or a name")
    parser.add_argument(
        "--root", metavar="DIR", default="/", help="look inside another root: a container's, a sysroot"
    )
    parser.add_argument(
        "--in",
        dest="within",
        metavar="PROGRAM|PID",
        help="judge libraries inside this program or process (else: a Python extension in the Python that"
        " runs, any other library alone)",
    )
    parser.add_argument("--libc", metavar="VERSION", help="the oldest glibc it is meant for, such as 2.28")
    parser.add_argument("--policy", metavar="NAME", help="the policy of its wheel, such as manylinux_2_28")
    parser.add_argument(
        "--hwcaps", action="store_true", help="with --root: search this processor's directories"
    )
    parser.add_argument(
        "--symbol", metavar="NAME", help="show who defines NAME, who uses it, and whose each gets"
    )
    parser.add_argument("--all", action="store_true", help="show what is merely worth knowing, too")
    options.examples(
        parser,
        "Nothing is run.  A library is judged as dlopen(3) with RTLD_NOW would, a program as its start with\n"
        "LD_BIND_NOW=1.  Exit status 1: something does not load.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Judge each file; 1 when one of them does not load."""
    import_numpy()
    from miniloader.lab.check.check import Checker
    from miniloader.lab.check.releases import limit_of
    from miniloader.report.output import Output
    from miniloader.report.progress import progress

    limit = limit_of(libc=arguments.libc, policy=arguments.policy)
    hwcaps = arguments.hwcaps or arguments.root == "/"
    checker = Checker(arguments.root, within=arguments.within, limit=limit, hwcaps=hwcaps)
    if arguments.symbol is not None:
        return _symbol(checker, arguments)
    with progress() as say:
        files = []
        for number, path in enumerate(arguments.files, 1):
            say(f"{number:,} of {len(arguments.files):,}: {path}")
            files.append(checker.check(path))
    failed = [file for file in files if not file.loads]
    if arguments.json:
        from miniloader.report.check import to_json
        from miniloader.report.json import dump

        dump(to_json(files))
    else:
        from miniloader.report.check import lines

        out = Output()
        for file in files:
            out.show(lines(file, everything=arguments.all))
        if len(files) > 1:
            out.show([(f"{len(files) - len(failed):,} of {len(files):,} load",)])
    return 1 if failed else 0


def _symbol(checker: Checker, arguments: argparse.Namespace) -> int:
    """Who uses the symbol in each file's tree, and whose it gets."""
    from miniloader.lab.check.bindings import bindings
    from miniloader.report.bindings import lines, to_json
    from miniloader.report.output import Output

    found = [(path, list(bindings(checker.situation(path), arguments.symbol))) for path in arguments.files]
    if arguments.json:
        from miniloader.report.json import dump

        dump(to_json(found))
    else:
        for path, rows in found:
            Output().show(lines(path, rows))
    return 0
