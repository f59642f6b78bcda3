"""What must hold before anything of a file is used: one table of rules.

Each :class:`Rule` is a decorated function in one of the modules here: it says what it protects from and which
document asks for it, and finds the places where a file breaks it.  The table gives ``inspect``'s problems,
``load``'s refusals and the documentation.  Most rules are checked before anything is mapped; those of words
and names (:attr:`Rule.when_linked`) as they are linked, before anything runs.  What makes a file unreadable
altogether (magic, class, byte order, header sizes) is found by :func:`miniloader.elf.read_image` before any
rule can run.  That it is for another machine is no fault of a file: only ``load`` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from miniloader.elf.checks import headers, linking, pointers, protections
from miniloader.elf.checks.rule import Fault, Problem, Rule
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError
from miniloader.forking import importing

__all__ = [
    "RULES",
    "Problem",
    "Rule",
    "applying",
    "outcomes",
    "problems_of",
    "refuse_other_types",
    "refuse_problems",
]

RULES: Final[tuple[Rule, ...]] = tuple(
    value
    for subject in (headers, linking, pointers, protections)
    for value in vars(subject).values()
    if isinstance(value, Rule)
)
"""Every rule, in the order they are checked and written; a later one may rely on the earlier."""

_REFUSED: Final = {
    when: tuple(rule for rule in RULES if rule.severity == "error" and rule.when_linked == when)
    for when in (False, True)
}


def _broken(rule: Rule, image: ElfImage) -> Iterator[Problem]:
    try:
        for field, found, expected in rule.faults(image):
            yield Problem(rule.name, rule.severity, field, found, expected)
    except ElfError as error:  # a table could not even be decoded
        yield Problem(rule.name, "error", error.field, error.found, error.expected)


def applying(image: ElfImage) -> tuple[Rule, ...]:
    """The rules that apply to a file of its kind: all to a library, but those of what is linked to others."""
    with importing:
        from miniloader.elf.kinds.file_kind import kind_of

    kind = kind_of(image)
    if kind.is_program:
        left_out = (headers.file_type, *((headers.dynamic_section,) if kind.is_static else ()))
        return tuple(rule for rule in RULES if rule not in left_out)
    return () if kind.name in ("object", "core", "debug-only") else RULES


def outcomes(image: ElfImage) -> Iterator[tuple[Rule, tuple[Problem, ...]]]:
    """Every rule that applies, and where the file breaks it (``()``: it holds)."""
    for rule in applying(image):
        yield rule, tuple(_broken(rule, image))


def problems_of(image: ElfImage) -> tuple[Problem, ...]:
    """Every problem of the file, each named once (a table that cannot be read breaks several rules)."""
    different: dict[Fault, Problem] = {}
    for _, problems in outcomes(image):
        for problem in problems:
            different.setdefault((problem.field, problem.found, problem.expected), problem)
    return tuple(different.values())


def refuse_problems(image: ElfImage, *, when_linked: bool = False) -> None:
    """Raise :class:`ElfError` for the first problem of the file that keeps it from being loaded.

    ``when_linked`` says by which rules: those that the loader sees to as it links, or all others.
    """
    _refuse(image, _REFUSED[when_linked])


def refuse_other_types(image: ElfImage) -> None:
    """Raise :class:`ElfError` for what is no shared object: a program, an object file, a core dump."""
    _refuse(image, (headers.file_type,))


def _refuse(image: ElfImage, rules: Sequence[Rule]) -> None:
    for rule in rules:
        try:
            fault = next(rule.faults(image), None)
        except ElfError as error:  # a table could not even be decoded
            fault = error.field, error.found, error.expected
        if fault is not None:
            raise _refusal(image, fault)


def _refusal(image: ElfImage, fault: Fault) -> ElfError:
    """The error for a fault; of a file that is no library it says what to use instead."""
    with importing:
        from miniloader.elf.kinds.file_kind import kind_of

    kind = kind_of(image)
    if kind.name == "debug-only":
        return ElfError(image.path, "sections", kind.words, "a shared object", hint=kind.instead)
    return ElfError(image.path, *fault, hint=kind.instead)
