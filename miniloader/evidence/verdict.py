"""Claims and what became of them: proven, refuted, or unknown or nothing to judge, with the reason why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from miniloader.json_schema import TEXT, keys, record
from miniloader.values import dataclass

__all__ = [
    "CLAIM_SCHEMA",
    "EXIT_STATUS",
    "NOTHING_TO_JUDGE",
    "VERDICT_SCHEMA",
    "Claim",
    "Holds",
    "Verdict",
    "combine",
    "judge",
]

Verdict = Literal["proven", "refuted", "unknown", "nothing to judge"]

NOTHING_TO_JUDGE: Final = "nothing to judge"
"""Of a claim about pages, where there are none."""

EXIT_STATUS: Final[dict[Verdict, int]] = {"proven": 0, "refuted": 1, "unknown": 3, "nothing to judge": 0}
"""The exit status of the command line for each verdict."""

Holds = bool | Literal["nothing to judge"] | None
"""Whether a statement holds; None where that cannot be told."""

_VERDICTS: Final[dict[Holds, Verdict]] = {True: "proven", False: "refuted", None: "unknown"}
_BY_WEIGHT: Final[tuple[Verdict, ...]] = ("refuted", "unknown", "proven", NOTHING_TO_JUDGE)


VERDICT_SCHEMA: Final = {"enum": [*EXIT_STATUS]}
"""What ``verdict`` may be in ``--json``."""

CLAIM_SCHEMA: Final = record(
    keys(TEXT, "id statement observed expected"), {"verdict": VERDICT_SCHEMA}, optional={"reason": TEXT}
)
"""What :meth:`Claim.to_json` gives."""


@dataclass(frozen=True)
class Claim:
    """One statement about what the kernel does, what was expected of it, and what was observed.

    ``id`` is stable (``code-shared``); the rest are sentences.  ``reason`` says why the verdict is
    neither ``proven`` nor ``refuted``, and is "" otherwise.
    """

    id: str
    statement: str
    verdict: Verdict
    observed: str
    expected: str
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.verdict in ("proven", "refuted")) == bool(self.reason):
            raise ValueError(f"claim {self.id}: a reason belongs to unknown and nothing to judge")

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


def judge(id: str, statement: str, *, holds: Holds, expected: str, observed: str, reason: str = "") -> Claim:
    """The claim with its verdict; where ``holds`` is neither True nor False, ``reason`` says why."""
    verdict = _VERDICTS.get(holds, NOTHING_TO_JUDGE)
    return Claim(id, statement, verdict, observed, expected, "" if isinstance(holds, bool) else reason)


def combine(claims: Iterable[Claim]) -> Verdict:
    """One verdict for all: refuted wins, then unknown, then proven; no claim at all is unknown.

    >>> claim = judge("code-shared", "…", holds=True, expected="1 frame", observed="1 frame")
    >>> combine([claim]), combine([])
    ('proven', 'unknown')
    """
    verdicts = {claim.verdict for claim in claims}
    return next((verdict for verdict in _BY_WEIGHT if verdict in verdicts), "unknown")
