"""A rule: what must hold before a file is used, and the function that finds where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from miniloader.elf.image import ElfImage
from miniloader.values import dataclass

__all__ = ["Fault", "Problem", "Rule", "Severity", "rule"]

Severity = Literal["error", "warning"]
Fault = tuple[str, str, str]
"""Field, found, expected."""

Check = Callable[[ElfImage], Iterator[Fault]]
"""Yields a fault for every place, or raises :class:`ElfError` where a table cannot be read at all."""


@dataclass(frozen=True)
class Problem:
    """A broken rule: ``error`` keeps the file from being loaded, ``warning`` is worth knowing."""

    rule: str
    severity: Severity
    field: str
    found: str
    expected: str


@dataclass(frozen=True)
class Rule:
    """One thing that must hold: what it ``protects`` from and the ``source`` that asks for it.

    ``when_linked`` says that the loader sees to it word by word as it relocates, and so need not look through
    all words before.
    """

    name: str
    protects: str
    source: str
    severity: Severity
    faults: Check
    when_linked: bool


def rule(
    protects: str, *, source: str, severity: Severity = "error", when_linked: bool = False
) -> Callable[[Check], Rule]:
    """Make a function that finds faults a rule, with the function's name.

    >>> @rule("from nothing at all", source="nobody")
    ... def never_broken(image: ElfImage) -> Iterator[Fault]:
    ...     yield from ()
    >>> never_broken.name, never_broken.severity
    ('never-broken', 'error')
    """

    def decorate(faults: Check) -> Rule:
        return Rule(faults.__name__.replace("_", "-"), protects, source, severity, faults, when_linked)

    return decorate
