"""What a program or a library needs, and where that is found: as a tree, as lists, upside down, as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import TEXT, array, keys, nullable, record, words
from miniloader.report.text import Cell, Part, Piece, Table, listed

if TYPE_CHECKING:
    from miniloader.lab.check.tree import Dependency, Tree

__all__ = ["SCHEMA", "flat", "lines", "reverse", "to_json"]

_INDENT: Final = 2  # columns a level
_DEEPEST: Final = 40  # levels that are set in further
_VERSIONS: Final = 6  # names of versions in a line


def to_json(tree: Tree) -> dict[str, Any]:
    """The object that ``tree --json`` prints; see :class:`miniloader.lab.check.tree.Dependency`.

    ``searched`` are the paths of all files that were looked at, in order.
    """
    return {
        "path": tree.path,
        "interpreter": tree.interpreter,
        "libraries": [
            {
                "name": library.name,
                "path": library.path,
                "found_by": library.found_by,
                "found_in": library.found_in,
                "needed_by": [*library.needed_by],
                "versions": [*library.versions],
                "searched": [step.path for step in library.searched],
            }
            for library in tree.libraries
        ],
    }


SCHEMA: Final = record(
    keys(TEXT, "path"),
    {
        "interpreter": nullable(TEXT),
        "libraries": array(
            record(
                keys(TEXT, "name"),
                keys(nullable(TEXT), "path found_in"),
                {"found_by": nullable(words("path rpath runpath LD_LIBRARY_PATH cache default loaded"))},
                keys(array(TEXT), "needed_by versions searched"),
            )
        ),
    },
)
"""What :func:`to_json` gives."""


# ---------------------------------------------------------------------------------------- for a person
def lines(tree: Tree) -> Iterator[Part]:
    """The tree: what each needs, set in below it; a library is gone into where it comes first."""
    yield _first_line(tree)
    seen: set[int] = set()
    stack = [(1, need) for need in reversed(tree.needs_of.get(tree.path, ()))]
    while stack:
        depth, need = stack.pop()
        margin = " " * _INDENT * min(depth, _DEEPEST)
        if need.library < 0:
            yield (margin, (_name(need.name), "bold"), ("  the file itself", "dim"))
            continue
        library = tree.libraries[need.library]
        if need.library in seen:
            yield (margin, _name(need.name), ("  (see above)", "dim"))
            continue
        seen.add(need.library)
        yield (margin, (_name(need.name), "bold"), "  ", *_where(library))
        yield from _notes(library, margin + " " * _INDENT)
        if library.path is not None:
            stack += ((depth + 1, below) for below in reversed(tree.needs_of.get(library.path, ())))
    yield from _ending(tree)


def flat(tree: Tree) -> Iterator[Part]:
    """Every library once, in the order in which ld.so loads them."""
    rows: list[list[Cell]] = [
        [_name(library.name), [*_where(library)], _newest(library.versions)] for library in tree.libraries
    ]
    if rows:
        yield Table(("library", "found", "newest versions needed"), rows)
    for library in tree.missing:
        yield ((_name(library.name), "bold"), "  ", *_where(library))
        yield from _notes(library, " " * _INDENT)
    yield from _ending(tree)


def reverse(tree: Tree, libraries: Iterable[Dependency]) -> Iterator[Part]:
    """Who needs each of ``libraries``, who needs that, and so on up to the file."""
    needed_by = {library.path: library.needed_by for library in tree.libraries if library.path != tree.path}
    for library in libraries:
        yield ((_name(library.name), "bold"), "  ", *_where(library))
        seen: set[str] = set()
        stack = [(1, needer) for needer in reversed(library.needed_by)]
        while stack:
            depth, needer = stack.pop()
            margin = " " * _INDENT * min(depth, _DEEPEST)
            above = needed_by.get(needer, ())
            repeated = needer in seen and bool(above)
            seen.add(needer)
            yield (margin, _name(needer), ("  (see above)", "dim") if repeated else "")
            if not repeated:
                stack += ((depth + 1, path) for path in reversed(above))


def _first_line(tree: Tree) -> Part:
    interpreter = f"  started by {printable(tree.interpreter)}" if tree.interpreter else ""
    return ((printable(tree.path), "bold"), (interpreter, "dim"))


def _ending(tree: Tree) -> Iterator[Part]:
    if not tree.libraries:
        yield ("needs no library: it is linked statically" if not tree.needs else "needs no other library",)
    elif tree.missing:
        yield ()
        names = listed([printable(library.name) for library in tree.missing], _VERSIONS)
        yield ((f"missing: {names}", "bold red"),)


def _name(name: str) -> str:
    return printable(name) or '""'


_WHY: Final = {
    "path": "by its path",
    "rpath": "RPATH of {}",
    "runpath": "RUNPATH of {}",
    "LD_LIBRARY_PATH": "LD_LIBRARY_PATH",
    "cache": "the cache",
    "default": "a default directory",
    "loaded": "is there before all others",
}


def _where(library: Dependency) -> Iterator[Piece]:
    """The path of the library and why it is that, or that there is none."""
    if library.path is None:
        yield ("not found" if library.fault is None else "refused", "bold red")
        if library.optional:
            yield (", and not necessary", "dim")
        return
    yield (printable(library.path), "green")
    if library.found_by is not None:
        yield (f"  {_WHY[library.found_by].format(printable(library.found_in or ''))}", "dim")


def _notes(library: Dependency, margin: str) -> Iterator[Part]:
    """The newest versions that are needed of it; for one that is missing, every place that was looked at."""
    if library.versions:
        yield (margin, (f"up to {_newest(library.versions)}", "dim"))
    if library.path is None or library.fault is not None:
        if library.fault is not None:
            yield (margin, (printable(library.fault), "red"))
        rows = [(step.rule, step.outcome, printable(step.path)) for step in library.searched]
        yield Table((), rows, len(margin)) if rows else (margin, "there was no place to look at")


def _newest(versions: Iterable[str]) -> str:
    """The newest of each series of versions.

    >>> _newest(["GLIBC_2.2.5", "GLIBC_2.14", "ZLIB_1.2", "GLIBC_PRIVATE"])
    'GLIBC_2.14, GLIBC_PRIVATE, ZLIB_1.2'
    """
    newest: dict[str, str] = {}
    for version in versions:
        series = re.sub(r"[0-9.]+$", "", version)
        newest[series] = max(newest.get(series, version), version, key=_numbers)
    return listed(sorted(map(printable, newest.values())), _VERSIONS)


def _numbers(version: str) -> list[int]:
    return [int(number[:9]) for number in re.findall(r"[0-9]+", version)]
