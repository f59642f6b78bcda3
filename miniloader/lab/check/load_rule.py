"""A rule of :mod:`miniloader.lab.check.rules`: what holds where a file will load.

Each :class:`LoadRule` is a decorated function with the kind of its problems, their severity, and a sentence
that says what holds where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from miniloader.lab.check.situation import Situation
from miniloader.values import dataclass

__all__ = ["LoadProblem", "LoadRule", "Severity", "load_rule"]

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class LoadProblem:
    """Something that keeps a file from being loaded (``error``), or is worth knowing (``warning``, ``info``).

    ``name`` is a library, ``version`` a version of it, ``symbol`` what is looked for; ``needed_by`` is the
    path of who needs it, in which ``section`` and ``function``; ``providers`` are paths of who would have it.
    """

    kind: str = ""
    severity: Severity = "info"
    name: str | None = None
    version: str | None = None
    symbol: str | None = None
    needed_by: str | None = None
    section: str | None = None
    function: str | None = None
    providers: tuple[str, ...] = ()
    hint: str | None = None


Finder = Callable[[Situation], Iterator[LoadProblem]]


@dataclass(frozen=True)
class LoadRule:
    """What holds (``sentence``) where ``find`` finds no problem of this ``kind``."""

    kind: str
    severity: Severity
    sentence: str
    find: Finder

    def problems(self, situation: Situation) -> Iterator[LoadProblem]:
        """The problems of the rule's kind; a rule may give single ones another severity."""
        for problem in self.find(situation):
            severity = problem.severity if problem.severity != "info" else self.severity
            yield replace(problem, kind=self.kind, severity=severity)


def load_rule(kind: str, severity: Severity, sentence: str) -> Callable[[Finder], LoadRule]:
    """Make a function that finds problems a rule."""
    return lambda find: LoadRule(kind, severity, sentence, find)
