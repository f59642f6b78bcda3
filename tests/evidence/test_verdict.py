"""Verdicts: what one claim says, and what many add up to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniloader.evidence.verdict import EXIT_STATUS, Claim, combine, judge


def claim(holds: bool | None) -> Claim:
    reason = "no frames" if holds is None else ""
    return judge("code-shared", "one copy", holds=holds, expected="1 frame", observed="2", reason=reason)


def test_json_has_the_keys_it_promises() -> None:
    assert json.loads(json.dumps(claim(True).to_json())) == {
        "id": "code-shared",
        "statement": "one copy",
        "verdict": "proven",
        "observed": "2",
        "expected": "1 frame",
    }
    assert claim(None).to_json()["reason"] == "no frames"
    assert claim(False).verdict == "refuted"


def test_unknown_says_why_and_nothing_else_does() -> None:
    with pytest.raises(ValueError, match="reason"):
        Claim("x", "", "unknown", "", "")
    with pytest.raises(ValueError, match="reason"):
        Claim("x", "", "proven", "", "", "because")


@given(st.lists(st.sampled_from([True, False, None])))
def test_refuted_wins_then_unknown(holds: list[bool | None]) -> None:
    expected = "refuted" if False in holds else "unknown" if None in holds or not holds else "proven"
    assert combine(map(claim, holds)) == expected


def test_exit_status() -> None:
    assert EXIT_STATUS == {"proven": 0, "refuted": 1, "unknown": 3}
