"""Prepared libraries, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import BOOL, COUNT, TEXT, array, keys, nullable, record
from miniloader.report.numbers import count, size
from miniloader.report.text import Part, Piece, Table

if TYPE_CHECKING:
    from miniloader.loader.prepare import Entry

__all__ = ["SCHEMA", "as_json", "lines"]


def as_json(directory: str, entries: Sequence[Entry], *, removed: bool) -> dict[str, Any]:
    """The object that ``prepare --json`` and ``cache --json`` print: what is, or was, in ``directory``."""
    return {
        "directory": directory,
        "removed": removed,
        "libraries": [asdict(entry) for entry in entries],
    }


SCHEMA: Final = record(
    {"directory": TEXT, "removed": BOOL},
    {"libraries": array(record(
        keys(TEXT, "name path build_id"),
        keys(COUNT, "address length words pages filled size"),
        {"fault": nullable(TEXT)},
    ))},
)  # fmt: skip
"""What :func:`as_json` gives."""


def lines(entries: Sequence[Entry], *, removed: bool) -> Iterator[Part]:
    """What is, or was, in the cache, and what to do with it."""
    if not entries:
        yield ("Nothing is prepared.",)
        yield ("  next  miniloader prepare LIB",)
        return
    for entry in entries:
        yield ((printable(entry.path or entry.name), "bold"), " (removed)" if removed else "")
        yield Table((), list(_facts(entry)), 2)
    if not removed:
        usable = [entry for entry in entries if entry.fault is None]
        saving = next((entry for entry in usable if entry.pages > entry.filled), None)
        if saving is not None:
            yield ("  next      ", printable(f"miniloader prove {saving.path} --prepared"))
        elif usable:
            yield ("Nothing is saved: no page of it is the same in every process once it is relocated.",)


def _facts(entry: Entry) -> Iterator[Sequence[Piece]]:
    if entry.fault is not None:
        yield "unusable", (printable(entry.fault), "bold red")
    if entry.path:
        yield "address", f"{entry.address:#x}, in every process of yours until the machine boots again"
        shared = entry.pages - entry.filled
        yield (
            "shared",
            f"{count(shared, 'page')} of {entry.pages:,} that are relocated, {size(entry.size)} of cache",
        )
        yield "private", f"{count(entry.filled, 'page')}, with words that differ from process to process"
        yield "build-id", entry.build_id
