"""The curve of an audit over time, of moments that are made up."""

from __future__ import annotations

from miniloader.lab.audit.growth import Family
from miniloader.lab.audit.timeline import Moment
from miniloader.report.memory_curve import curve_of

_MIB = 1 << 20


def _moment(when: float, eroded: int | None) -> Moment:
    return Moment(
        when, 2, rss=8 * _MIB, pss=6 * _MIB, uss=4 * _MIB, eroded=eroded, family=Family((), (), (), ())
    )


def test_what_eroded_is_a_line_and_a_column() -> None:
    curve = curve_of([_moment(0, 0), _moment(10, 2 * _MIB)])
    assert curve is not None
    assert [line.name for line in curve.lines] == ["RSS", "PSS", "USS", "eroded"]
    eroded = curve.lines[-1]
    assert eroded.points == "0.0,220.0 720.0,165.0"
    assert eroded.last == "2 MiB"
    assert [row[3:7] for row in curve.rows] == [
        ("8 MiB", "6 MiB", "4 MiB", "0 bytes"),
        ("8 MiB", "6 MiB", "4 MiB", "2 MiB"),
    ]


def test_without_frames_nothing_is_drawn_of_it() -> None:
    curve = curve_of([_moment(0, None), _moment(10, None)])
    assert curve is not None
    assert [line.name for line in curve.lines] == ["RSS", "PSS", "USS"]
    assert [row[6] for row in curve.rows] == ["?", "?"]
