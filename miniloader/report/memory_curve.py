"""The curve of a page about an audit over time: RSS, PSS, USS, what eroded; drawn, and as a table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from miniloader.lab.audit.timeline import Moment
from miniloader.report.audit_growth import said_of_family
from miniloader.report.numbers import size
from miniloader.values import dataclass

__all__ = ["MemoryCurve", "curve_of"]

_WIDTH: Final = 720
_HEIGHT: Final = 220
_GAP: Final = 15  # units between two names at the curve's end, at least
_MOST_ROWS: Final = 200


@dataclass(frozen=True)
class CurveLine:
    """One line: its name, its points as SVG has them, and where its name stands, with its last value."""

    name: str
    points: str
    at: float
    last: str


@dataclass(frozen=True)
class MemoryCurve:
    """What is drawn on _WIDTH × _HEIGHT units; ``marks`` are where something happened, and what."""

    width: int
    height: int
    lines: tuple[CurveLine, ...]
    marks: tuple[tuple[float, str], ...]
    top: str
    seconds: str
    rows: tuple[tuple[str, ...], ...]
    left_out: int


def curve_of(moments: Iterable[Moment]) -> MemoryCurve | None:
    """The curve of at least two moments; None for fewer."""
    looks = tuple(moments)
    if len(looks) < 2:
        return None
    start, length = looks[0].when, max(looks[-1].when - looks[0].when, 1e-3)
    top = max(max(look.rss, look.pss or 0, look.uss) for look in looks) or 1
    across = [(look.when - start) / length * _WIDTH for look in looks]
    series: list[tuple[str, list[int | None]]] = [
        ("RSS", [look.rss for look in looks]),
        ("PSS", [look.pss for look in looks]),
        ("USS", [look.uss for look in looks]),
        ("eroded", [look.eroded for look in looks]),
    ]
    lines, lowest = list[CurveLine](), -float(_GAP)
    for name, values in series:
        known = [(x, value) for x, value in zip(across, values, strict=True) if value is not None]
        if known:
            lowest = max(_down(known[-1][1], top), lowest + _GAP)
            points = " ".join(f"{x:.1f},{_down(value, top):.1f}" for x, value in known)
            lines.append(CurveLine(name, points, round(lowest, 1), size(known[-1][1])))
    shown = looks[:: -(-len(looks) // _MOST_ROWS)]
    return MemoryCurve(
        width=_WIDTH,
        height=_HEIGHT,
        lines=tuple(lines),
        marks=tuple(
            (round(x, 1), f"{look.when - start:.0f} s: {_happened(look)}")
            for x, look in zip(across, looks, strict=True)
            if look.eventful
        ),
        top=size(top),
        seconds=f"{length:.0f} s",
        rows=tuple(_row(look, start) for look in shown),
        left_out=len(looks) - len(shown),
    )


def _down(value: int, top: int) -> float:
    """How far below the upper edge a value is drawn."""
    return _HEIGHT - value / top * _HEIGHT


def _row(look: Moment, start: float) -> tuple[str, ...]:
    clock = time.strftime("%H:%M:%S", time.localtime(look.when))
    sizes = (
        "?" if number is None else size(number) for number in (look.rss, look.pss, look.uss, look.eroded)
    )
    return (clock, f"{look.when - start:.1f}", f"{look.processes:,}", *sizes, _happened(look))


def _happened(look: Moment) -> str:
    return ", ".join(said_of_family(look.family))
