"""Who binds to what, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import TEXT, array, keys, nullable, record
from miniloader.report.text import Cell, Part, Table

if TYPE_CHECKING:
    from miniloader.lab.check.bindings import SymbolBinding

__all__ = ["ROWS_SCHEMA", "SCHEMA", "lines", "rows_json", "to_json"]


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
    """Who refers to what in the tree of ``path``, and who serves it."""
    if not rows:
        yield ((printable(path), "bold"), "  nobody in its tree looks that up")
        return
    yield ((printable(path), "bold"),)
    table: list[list[Cell]] = [
        [
            printable(row.symbol) + (f"@{printable(row.version)}" if row.version else ""),
            printable(row.referrer),
            printable(row.provider) if row.provider else ("nobody", "bold yellow"),
            ", ".join(map(printable, row.also)),
        ]
        for row in rows
    ]
    yield Table(("symbol", "used by", "served by", "also defined by"), table, 2)
