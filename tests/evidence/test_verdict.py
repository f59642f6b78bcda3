"""Verdicts: what one claim says, and what many add up to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniloader.evidence.verdict import EXIT_STATUS, NOTHING_TO_JUDGE, Claim, Holds, combine, judge


def claim(holds: Holds) -> Claim:
    reason = "" if isinstance(holds, bool) else "no frames"
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


def test_what_is_neither_proven_nor_refuted_says_why_and_nothing_else_does() -> None:
    for verdict in ("unknown", NOTHING_TO_JUDGE):
        with pytest.raises(ValueError, match="reason"):
            Claim("x", "", verdict, "", "")
    with pytest.raises(ValueError, match="reason"):
        Claim("x", "", "proven", "", "", "because")


@given(st.lists(st.sampled_from([True, False, None, NOTHING_TO_JUDGE])))
def test_refuted_wins_then_unknown_then_proven(holds: list[Holds]) -> None:
    judged = "refuted" if False in holds else "unknown" if None in holds or not holds else "proven"
    nothing = holds and set(holds) == {NOTHING_TO_JUDGE}
    assert combine(map(claim, holds)) == (NOTHING_TO_JUDGE if nothing else judged)


def test_exit_status() -> None:
    assert EXIT_STATUS == {"proven": 0, "refuted": 1, "unknown": 3, NOTHING_TO_JUDGE: 0}
