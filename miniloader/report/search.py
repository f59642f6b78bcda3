"""Where the libraries that a library needs are looked for, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import TEXT, array, keys, nullable, record
from miniloader.report.text import Part, Piece, Table, heading

if TYPE_CHECKING:
    from miniloader.loader.copies import Copies
    from miniloader.loader.surroundings import NeedFound

__all__ = ["COPIES", "SCHEMA", "copies_as_json", "lines", "to_json"]


def to_json(needs: Iterable[NeedFound]) -> list[dict[str, Any]]:
    """``[{needed, needed_by, path, copies, steps[{rule, path, outcome}]}]``, in the order of ``needs``.

    ``copies`` is as :func:`copies_as_json` has it; null where what is found would be loaded.
    """
    return [
        {
            "needed": need.found.name,
            "needed_by": need.needed_by,
            "path": need.found.path,
            "copies": copies_as_json(need.copies) if need.copies is not None else None,
            "steps": [
                {"rule": step.rule, "path": step.path, "outcome": step.outcome} for step in need.found.steps
            ],
        }
        for need in needs
    ]


def copies_as_json(copies: Copies) -> dict[str, Any]:
    """``{name, used, used_version, found, found_version}``: two paths, and the newest version of each."""
    return {
        "name": copies.name,
        "used": copies.used,
        "used_version": copies.used_version,
        "found": copies.found,
        "found_version": copies.found_version,
    }


COPIES: Final = record(
    keys(TEXT, "name used found"),
    {"used_version": nullable(TEXT), "found_version": nullable(TEXT)},
)
"""What :func:`copies_as_json` gives."""


SCHEMA: Final = array(
    record(
        keys(TEXT, "needed needed_by"),
        {
            "path": nullable(TEXT),
            "copies": nullable(COPIES),
            "steps": array(record(keys(TEXT, "rule path outcome"))),
        },
    )
)
"""What :func:`to_json` gives."""


def lines(needs: Iterable[NeedFound]) -> Iterator[Part]:
    """For each name: who needs it first, every place that was looked at, and what was there."""
    yield heading("Search", "where each library it needs is looked for, in the order of ld.so(8)")
    for need in needs:
        found, copies = need.found, need.copies
        path = copies.used if copies is not None else found.path
        outcome: Piece = (printable(path), "green") if path else ("not found", "bold red")
        yield ("  ", (printable(found.name), "bold"), "  ", outcome)
        yield (f"    needed by {printable(need.needed_by)}",)
        yield Table((), [(step.rule, step.outcome, printable(step.path)) for step in found.steps], 4)
        if copies is not None:
            yield (f"    {printable(copies.text())}; a process without it gets what is found",)
