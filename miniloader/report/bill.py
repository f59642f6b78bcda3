"""What loading has cost while a program ran: as a tree of imports, in a few lines, as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import COUNT, INT, NUMBER, TEXT, Schema, array, by_name, keys, record, words
from miniloader.report.text import Part, Table, listed
from miniloader.whole_numbers import count

if TYPE_CHECKING:
    from miniloader.loader.running.bill import Bill, BilledLibrary, Opened

__all__ = ["SCHEMA", "as_json", "lines", "summary"]

#: Columns of the tree: the heading, and the part of a bill.
_COLUMNS: Final = ("search", "map", "bind", "relocate", "constructors", "other")
_HEADINGS: Final = (
    "what was opened", ">ms", *(f">{name}" for name in _COLUMNS), ">page faults", ">private pages"
)  # fmt: skip
_SHOWN: Final = 1e-4  # seconds from which on a constructor has a row of its own
_SLOWEST: Final = 3


# ---------------------------------------------------------------------------------------------- JSON
def as_json(bill: Bill) -> dict[str, Any]:
    """The object that ``run --json`` writes; times are in milliseconds."""
    return {
        "loading_ms": bill.seconds * 1e3,
        "program_ms": bill.program_seconds * 1e3,
        "lookups": bill.lookups,
        "lookups_ms": bill.lookup_seconds * 1e3,
        "opened": [_opened_as_json(opened) for opened in bill.opened],
        "fell_back": [{"name": name, "reason": reason} for name, reason in bill.fell_back],
    }


def _opened_as_json(opened: Opened) -> dict[str, Any]:
    return {
        "name": opened.name,
        "how": opened.how,
        "ms": opened.seconds * 1e3,
        "page_faults": opened.page_faults,
        "libraries": [
            {
                "path": library.path,
                "parts_ms": {name: seconds * 1e3 for name, seconds in library.parts.items()},
                "constructors": [
                    {"vaddr": constructor.vaddr, "ms": constructor.seconds * 1e3}
                    for constructor in library.constructors
                ],
                "private_pages": library.private_pages,
            }
            for library in opened.libraries
        ],
        "nested": [_opened_as_json(nested) for nested in opened.nested],
    }


_OPENED: Final[Schema] = record(
    keys(TEXT, "name"),
    {"how": words("loaded present ld.so refused"), "ms": NUMBER, "page_faults": COUNT},
    {"nested": {"type": "array"}},
    {"libraries": array(record(
        {"path": TEXT, "parts_ms": by_name(NUMBER), "private_pages": COUNT},
        {"constructors": array(record({"vaddr": INT, "ms": NUMBER}))},
    ))},
)  # fmt: skip

SCHEMA: Final = record(
    keys(NUMBER, "loading_ms program_ms lookups_ms"),
    {"lookups": COUNT, "opened": array(_OPENED), "fell_back": array(record(keys(TEXT, "name reason")))},
)
"""What :func:`as_json` gives; ``nested`` holds more of what ``opened`` does."""


# ---------------------------------------------------------------------------------------- for people
def summary(bill: Bill) -> Iterator[Part]:
    """A few lines: how much was loaded, where the time went, what took longest, what ld.so has loaded."""
    libraries = [library for opened in bill.opened for library in _of(opened) if library.private_pages]
    parts = {name: sum(library.parts[name] for o in bill.opened for library in _of(o)) for name in _COLUMNS}
    spent = [f"{name} {_ms(seconds)}" for name, seconds in parts.items() if seconds >= _SHOWN / 2]
    loaded, calls = count(len(libraries), "library", "libraries"), count(len(bill.opened), "call")
    yield (
        (f"miniloader loaded {loaded} in {_ms(bill.seconds)} ms", "bold"),
        f" for {calls} of dlopen; the program itself took {_ms(bill.program_seconds)} ms",
    )
    yield ("  " + ", ".join([*spent, f"dlsym {_ms(bill.lookup_seconds)}"]),)
    slowest = sorted(bill.opened, key=lambda opened: -opened.seconds)[:_SLOWEST]
    if slowest:
        yield ("  slowest: " + ", ".join(f"{_short(o.name)} {_ms(o.seconds)} ms" for o in slowest),)
    if bill.fell_back:
        names = [_short(name) for name, _ in bill.fell_back]
        yield (f"  by ld.so instead: {listed(names, 5)}",)


def lines(bill: Bill) -> Iterator[Part]:
    """The whole bill as a tree: each call of dlopen, the libraries that came, constructors that took long."""
    yield from summary(bill)
    yield ()
    rows = [row for opened in bill.opened for row in _rows(opened, 0)]
    rows.append(("dlsym", _ms(bill.lookup_seconds), *[""] * len(_COLUMNS), "", ""))
    rows.append(
        ("the modules' own Python, and the program", _ms(bill.program_seconds), *[""] * len(_COLUMNS), "", "")
    )
    yield Table(_HEADINGS, rows)
    if bill.fell_back:
        yield ()
        yield Table(
            ("loaded by ld.so instead", "why"), [(_short(n), printable(why)) for n, why in bill.fell_back]
        )


def _of(opened: Opened) -> Iterator[BilledLibrary]:
    """All libraries of a call, and of those nested in it."""
    yield from opened.libraries
    for nested in opened.nested:
        yield from _of(nested)


def _rows(opened: Opened, depth: int) -> Iterator[tuple[Any, ...]]:
    """The call itself, with the sums of its libraries; then each library, if there are several."""
    indent, libraries = "  " * depth, opened.libraries
    sums = [sum(library.parts[name] for library in libraries) for name in _COLUMNS]
    pages = sum(library.private_pages for library in libraries)
    note = "" if opened.how == "loaded" else f" ({opened.how})"
    name: list[Any] = [indent, (_short(opened.name), "bold"), note]
    yield (name, _ms(opened.seconds), *map(_cell, sums), f"{opened.page_faults:,}", f"{pages:,}")
    for library in libraries:
        inner = indent + "  "
        if len(libraries) > 1:
            parts = [library.parts[part] for part in _COLUMNS]
            yield (
                f"{inner}{_short(library.path)}", _ms(library.seconds), *map(_cell, parts),
                "", f"{library.private_pages:,}",
            )  # fmt: skip
            inner += "  "
        for constructor in library.constructors:
            if constructor.seconds >= _SHOWN:
                text = f"{inner}constructor at vaddr {constructor.vaddr:#x}"
                blank = [""] * _COLUMNS.index("constructors")
                yield text, "", *blank, _ms(constructor.seconds), "", "", ""
    for nested in opened.nested:
        yield from _rows(nested, depth + 1)


def _short(path: str) -> str:
    """The name of a file without what all extension modules end with, and its directory for a module.

    >>> _short("/venv/scipy/linalg/_fblas.cpython-311-x86_64-linux-gnu.so"), _short("/usr/lib/libz.so.1")
    ('linalg/_fblas', 'libz.so.1')
    """
    directory, name = os.path.split(path)
    stem, _, ending = name.partition(".")
    if ending.startswith(("cpython-", "abi3")):
        return printable(f"{os.path.basename(directory)}/{stem}")
    return printable(name)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _cell(seconds: float) -> str:
    return _ms(seconds) if seconds >= 5e-6 else ""
