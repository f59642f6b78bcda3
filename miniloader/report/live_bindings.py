"""Who serves the references of a running process, for people: first what is not as one would think."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from miniloader.errors import printable
from miniloader.forking import importing
from miniloader.report.bindings import paths_of, short_names, symbol_text
from miniloader.report.numbers import count
from miniloader.report.text import Cell, Part, Table, more

if TYPE_CHECKING:
    from miniloader.lab.audit.live_bindings import LiveBinding, LiveBindings

__all__ = ["lines"]

_MOST_ROWS: Final = 12  # of each state
_PLAIN: Final = ("bound", "lazy", "nobody", "offset", "unread")  # nothing to see but that they are so many
_STYLES: Final = {"rebound": "bold red", "stand-in": "bold yellow", "preempted": "bold yellow"}


def lines(live: LiveBindings, *, everything: bool = False) -> Iterator[Part]:
    """How many bindings show what, then the remarkable ones; or ``everything``, row by row."""
    with importing:
        from miniloader.lab.audit.live_bindings import STATES

    rows = live.bindings
    slots = sum(row.slots for row in rows)
    referrers = len({row.referrer for row in rows})
    yield (
        (f"process {live.pid} ({printable(live.name)})", "bold"),
        f": {count(len(rows), 'binding')} of {count(referrers, 'file')}, in {count(slots, 'slot')}",
    )
    yield ()
    by_state = Counter(row.state for row in rows)
    yield Table(
        ("state", "bindings", "what the slot shows"),
        [
            [(state, _STYLES.get(state, "bold")), f"{by_state[state]:,}", meaning]
            for state, meaning in STATES.items()
            if by_state[state]
        ],
        2,
    )
    names = short_names(
        path for row in rows for path in (row.referrer, row.provider, *row.also) if path is not None
    )
    shown, left_out = list[list[Cell]](), 0
    for state in STATES:
        if not everything and state in _PLAIN:
            continue
        of_state = [row for row in rows if row.state == state]
        most = len(of_state) if everything else _MOST_ROWS
        shown += [_row(row, names) for row in of_state[:most]]
        left_out += max(len(of_state) - most, 0)
    if shown:
        yield ()
        yield Table(("symbol", "used by", "state", "served by", "leads to", "also defined by"), shown, 2)
    if left_out:
        yield ((f"  {more(left_out)}; --library NAME lists all of one, --json everything", "dim"),)
    yield from paths_of(names)
    for path, reason in live.unreadable:
        yield (("not read: ", "bold yellow"), printable(f"{path}: {reason}"))


def _row(row: LiveBinding, names: dict[str, str]) -> list[Cell]:
    place = row.leads_to or ""
    path, separator, function = place.partition(": ")
    return [
        symbol_text(row.symbol, row.version),
        names[row.referrer],
        (row.state, _STYLES.get(row.state, "")),
        names[row.provider] if row.provider is not None else "nobody",
        printable(f"{names.get(path, path)}{separator}{function}"),
        ", ".join(names[other] for other in row.also),
    ]
