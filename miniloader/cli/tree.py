"""``miniloader tree``: what a program or a library needs, where each is found, and why there."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from miniloader.cli import options
from miniloader.errors import LoadError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miniloader.lab.check.tree import Dependency, Tree

__all__ = ["HELP", "configure", "run"]

HELP = "show what a program or library needs, where it is found, and why there"


def configure(parser: argparse.ArgumentParser) -> None:
    """The file, where it is looked at, and as what the answer is shown."""
    parser.add_argument("file", metavar="FILE", help="a program or library: a path, or a name")
    parser.add_argument(
        "--root", metavar="DIR", default="/", help="look inside another root: a container's, a sysroot"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--flat", action="store_true", help="list each once, in the order of loading")
    shape.add_argument("--paths", action="store_true", help="print only the paths that were found")
    shape.add_argument("--reverse", metavar="NAME", help="show who needs the library NAME")
    options.examples(parser, "Nothing is run.  Exit status 1: something is missing.")


def run(arguments: argparse.Namespace) -> int:
    """Search, and print what was found; 1 when something is missing."""
    from miniloader.lab.check.tree import tree

    answer = tree(arguments.file, root=arguments.root)
    libraries = _named(answer, arguments.reverse) if arguments.reverse is not None else None
    if arguments.json:
        from miniloader.report.json import dump
        from miniloader.report.tree import to_json

        said = to_json(answer)
        if libraries is not None:
            paths = [library.path for library in libraries]
            said["libraries"] = [row for row in said["libraries"] if row["path"] in paths]
        dump(said)
    elif arguments.paths:
        _print_paths([library.path for library in answer.libraries if library.path is not None])
    else:
        _print(answer, libraries, flat=arguments.flat)
    return 1 if answer.missing else 0


def _named(found: Tree, name: str) -> Sequence[Dependency]:
    """The libraries that are called ``name``; :class:`LoadError` where none is."""
    libraries = found.who_needs(name)
    if not libraries:
        from difflib import get_close_matches

        near = get_close_matches(name, [library.name for library in found.libraries], n=1)
        hint = f"did you mean {near[0]}?" if near else None
        raise LoadError(f"{found.path}: needs nothing that is called {printable(name)}", hint=hint)
    return libraries


def _print_paths(paths: Sequence[str]) -> None:
    """A path a line: for a program that reads them byte by byte as they are, for a terminal inert."""
    if sys.stdout.isatty():
        print(*map(printable, paths), sep="\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(os.fsencode(path) + b"\n" for path in paths)


def _print(found: Tree, libraries: Sequence[Dependency] | None, *, flat: bool) -> None:
    from miniloader.report import tree
    from miniloader.report.output import Output

    if libraries is not None:
        parts = tree.reverse(found, libraries)
    else:
        parts = tree.flat(found) if flat else tree.lines(found)
    Output().show(parts)
