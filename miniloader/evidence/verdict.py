"""Claims and what became of them: proven, refuted, or unknown with the reason why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from miniloader.json_schema import TEXT, keys, record, words
from miniloader.values import dataclass

__all__ = ["CLAIM_SCHEMA", "EXIT_STATUS", "VERDICT_SCHEMA", "Claim", "Verdict", "combine", "judge"]

Verdict = Literal["proven", "refuted", "unknown"]

EXIT_STATUS: Final[dict[Verdict, int]] = {"proven": 0, "refuted": 1, "unknown": 3}
"""The exit status of the command line for each verdict."""


VERDICT_SCHEMA: Final = words("proven refuted unknown")
"""What ``verdict`` may be in ``--json``."""

CLAIM_SCHEMA: Final = record(
    keys(TEXT, "id statement observed expected"), {"verdict": VERDICT_SCHEMA}, optional={"reason": TEXT}
)
"""What :meth:`Claim.to_json` gives."""


@dataclass(frozen=True)
class Claim:
    """One statement about what the kernel does, what was expected of it, and what was observed.

    ``id`` is stable (``code-shared``); the rest are sentences.  ``reason`` says why the verdict is
    ``unknown``, and is "" otherwise.
    """

    id: str
    statement: str
    verdict: Verdict
    observed: str
    expected: str
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.verdict == "unknown") != bool(self.reason):
            raise ValueError(f"claim {self.id}: a reason belongs to the verdict unknown, and to no other")

    def to_json(self) -> dict[str, str]:
        """The keys that ``--json`` promises, ``reason`` only where there is one."""
        words = {
            "id": self.id,
            "statement": self.statement,
            "verdict": self.verdict,
            "observed": self.observed,
            "expected": self.expected,
        }
        return words | ({"reason": self.reason} if self.reason else {})


def judge(
    id: str, statement: str, *, holds: bool | None, expected: str, observed: str, reason: str = ""
) -> Claim:
    """The claim with its verdict; ``holds`` is None where it cannot be told, and ``reason`` says why."""
    if holds is None:
        return Claim(id, statement, "unknown", observed, expected, reason)
    return Claim(id, statement, "proven" if holds else "refuted", observed, expected)


def combine(claims: Iterable[Claim]) -> Verdict:
    """One verdict for all: refuted wins, then unknown; nothing at all is unknown.

    >>> claim = judge("code-shared", "…", holds=True, expected="1 frame", observed="1 frame")
    >>> combine([claim]), combine([])
    ('proven', 'unknown')
    """
    verdicts = {claim.verdict for claim in claims}
    if "refuted" in verdicts:
        return "refuted"
    return "proven" if verdicts == {"proven"} else "unknown"
