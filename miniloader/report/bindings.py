"""Who binds to what, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import TEXT, array, keys, nullable, record
from miniloader.report.text import Cell, Part, Table, pairs

if TYPE_CHECKING:
    from miniloader.lab.check.bindings import SymbolBinding

__all__ = [
    "ROWS_SCHEMA",
    "SCHEMA",
    "lines",
    "paths_of",
    "rows_json",
    "short_names",
    "symbol_text",
    "to_json",
]


def rows_json(rows: Iterable[SymbolBinding]) -> list[dict[str, Any]]:
    """``[{referrer, symbol, version, provider, also[]}]``."""
    return [asdict(row) | {"also": [*row.also]} for row in rows]


ROWS_SCHEMA: Final = array(
    record(keys(TEXT, "referrer symbol"), keys(nullable(TEXT), "version provider"), {"also": array(TEXT)})
)
"""What :func:`rows_json` gives."""


def to_json(files: Iterable[tuple[str, Sequence[SymbolBinding]]]) -> dict[str, Any]:
    """The object that ``check --symbol --json`` prints."""
    return {"files": [{"path": path, "bindings": rows_json(rows)} for path, rows in files]}


SCHEMA: Final = record({"files": array(record({"path": TEXT, "bindings": ROWS_SCHEMA}))})
"""What :func:`to_json` gives."""


def lines(path: str, rows: Sequence[SymbolBinding]) -> Iterator[Part]:
    """Who refers to what in the tree of ``path``, and who serves it: file names, whose paths come last."""
    if not rows:
        yield ((printable(path), "bold"), "  nothing in its tree looks that up")
        return
    yield ((printable(path), "bold"),)
    names = short_names(path for row in rows for path in (row.referrer, row.provider, *row.also) if path)
    table: list[list[Cell]] = [
        [
            symbol_text(row.symbol, row.version),
            names[row.referrer],
            names[row.provider] if row.provider else ("nobody", "bold yellow"),
            ", ".join(names[path] for path in row.also),
        ]
        for row in rows
    ]
    yield Table(("symbol", "used by", "served by", "also defined by"), table, 2)
    yield from paths_of(names)


def symbol_text(symbol: str, version: str | None) -> str:
    """``symbol@version`` as it may be printed."""
    return printable(symbol) + (f"@{printable(version)}" if version else "")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """What each of ``paths`` is called in a table: its file name, where no other path ends so.

    >>> short_names(["/lib/libz.so.1", "/lib/libc.so.6", "/opt/libc.so.6"])["/lib/libz.so.1"]
    'libz.so.1'
    """
    distinct = list(dict.fromkeys(paths))
    count = Counter(path.rpartition("/")[2] for path in distinct)
    names = {path: path.rpartition("/")[2] for path in distinct}
    return {path: printable(name if name and count[name] == 1 else path) for path, name in names.items()}


def paths_of(names: Mapping[str, str]) -> Iterator[Part]:
    """Where the files are that a table calls by their ``names``."""
    places = [(name, printable(path)) for path, name in names.items() if name != printable(path)]
    if places:
        yield ()
        yield pairs(places, 2)
