"""Prepared libraries, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from miniloader.loader.prepare import Entry
from miniloader.loader.prepared import store
from miniloader.report.json import dump
from miniloader.report.output import count, size
from miniloader.report.text import Line, Piece, columns, room
from miniloader.report.text import show as show_lines

__all__ = ["show"]


def show(entries: Sequence[Entry], *, as_json: bool, removed: bool = False) -> None:
    """Print what is (or was) in the cache."""
    if as_json:
        dump(
            {
                "directory": store.directory(),
                "removed": removed,
                "libraries": [asdict(entry) for entry in entries],
            }
        )
        return
    show_lines(_lines(entries, removed=removed))


def _lines(entries: Sequence[Entry], *, removed: bool) -> Iterator[Line]:
    if not entries:
        yield ("Nothing is prepared.",)
        yield ("  next  miniloader prepare LIB",)
        return
    _, width = room()
    for entry in entries:
        yield ((entry.path or entry.name, "bold"), " (removed)" if removed else "")
        yield from columns(list(_facts(entry)), width)
    if not removed:
        usable = next((entry for entry in entries if entry.fault is None), None)
        if usable is not None:
            yield ("  next      ", f"miniloader prove {usable.path} --prepared")


def _facts(entry: Entry) -> Iterator[Sequence[Piece]]:
    if entry.fault is not None:
        yield "  unusable", (entry.fault, "bold red")
    if entry.path:
        yield "  address", f"{entry.address:#x}, in every process of yours until the machine boots again"
        shared = entry.pages - entry.filled
        yield (
            "  shared",
            f"{count(shared, 'page')} of {entry.pages:,} that are relocated, {size(entry.size)} of cache",
        )
        yield "  private", f"{count(entry.filled, 'page')}, with words that differ from process to process"
        yield "  build-id", entry.build_id
