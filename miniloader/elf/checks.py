"""What must hold before anything of a file is used: one table of rules.

Each :class:`Rule` says what it protects and which document asks for it, and finds the places where a file
breaks it.  The same table gives ``inspect``'s problems, ``load``'s refusals and the documentation.  Most of
them are checked before anything is mapped; those of words and names (:attr:`Rule.when_linked`) as they are
linked, before anything runs.  What makes a file unreadable altogether (magic, class, byte order, header
sizes) is found by :func:`miniloader.elf.read_image` before any rule can run.  That it is for another
machine is no fault of a file: only ``load`` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

from miniloader.elf import faults
from miniloader.elf.faults import Fault
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["RULES", "Problem", "Rule", "outcomes", "problems_of", "refuse_problems"]

Severity = Literal["error", "warning"]


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
    """One thing that must hold: what it ``protects`` and the ``source`` that asks for it."""

    name: str
    protects: str
    source: str
    severity: Severity
    faults: Callable[[ElfImage], Iterator[Fault]]
    #: Whether the loader sees to it word by word as it relocates, and so need not look through all words
    #: before.
    when_linked: bool = False


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "identification",
        "from reading what is no ELF file, or one for another system",
        "gABI 4, ELF Identification",
        "error",
        faults.identification,
    ),
    Rule(
        "header-sizes",
        "from program headers that are not there, or of another layout",
        "gABI 4, e_phentsize, e_phnum",
        "error",
        faults.header_sizes,
    ),
    Rule(
        "file-type",
        "from mapping a program or an object file as a library",
        "gABI 4, e_type",
        "error",
        faults.file_type,
    ),
    Rule(
        "segments-in-file",
        "from SIGBUS on pages beyond the end of the file",
        "gABI 5, p_filesz",
        "error",
        faults.segments_in_file,
    ),
    Rule(
        "segments-mappable",
        "from overlapping, unsorted, misaligned or endless mappings",
        "gABI 5, PT_LOAD",
        "error",
        faults.plan,
    ),
    Rule(
        "dynamic-section",
        "from linking by tables that are not there",
        "gABI 5, Dynamic Section",
        "error",
        faults.dynamic,
    ),
    Rule(
        "one-of-each",
        "from choosing between two templates or tables",
        "gABI 5, Program Header",
        "error",
        faults.one_of_each,
    ),
    Rule(
        "symbol-tables",
        "from reading symbols, hashes and versions outside the image",
        "gABI 5, Hash Table; LSB",
        "error",
        faults.symbols,
        when_linked=True,
    ),
    Rule(
        "hash-links",
        "from chains that leave the table or never end",
        "gABI 5, Hash Table",
        "error",
        faults.hash_links,
    ),
    Rule(
        "strings",
        "from names outside the string table",
        "gABI 4, String Table",
        "error",
        faults.strings,
        when_linked=True,
    ),
    Rule(
        "relocation-targets",
        "from writing outside the image",
        "gABI 4, r_offset",
        "error",
        faults.relocation_targets,
        when_linked=True,
    ),
    Rule(
        "relocation-symbols",
        "from symbols outside their table",
        "gABI 4, r_info",
        "error",
        faults.relocation_symbols,
        when_linked=True,
    ),
    Rule(
        "relative-relocations",
        "from taking relocations of another kind for those that only add the load bias",
        "glibc's elf/dynamic-link.h, DT_RELACOUNT",
        "error",
        faults.relative_head,
        when_linked=True,
    ),
    Rule(
        "init-arrays",
        "from calling what is no function pointer",
        "gABI 5, DT_INIT_ARRAY",
        "error",
        faults.arrays,
    ),
    Rule(
        "code-pointers",
        "from calling what is no code at start and end",
        "gABI 5, DT_INIT, DT_FINI",
        "error",
        faults.code_pointers,
    ),
    Rule(
        "array-pointers",
        "from calling what is no code, listed as a constructor or destructor",
        "gABI 5, DT_INIT_ARRAY",
        "error",
        faults.array_pointers,
        when_linked=True,
    ),
    Rule("tls-template", "from copying a template that is not there", "gABI 5, PT_TLS", "error", faults.tls),
    Rule("relro", "from protecting pages of something else", "psABI, PT_GNU_RELRO", "error", faults.relro),
    Rule(
        "executable-stack",
        "from a stack that can run injected code",
        "psABI, PT_GNU_STACK",
        "warning",
        faults.executable_stack,
    ),
    Rule(
        "writable-code",
        "from code that can be overwritten",
        "gABI 5, p_flags",
        "warning",
        faults.writable_code,
    ),
    Rule(
        "text-relocations",
        "from code that every process has its own copy of",
        "gABI 5, DT_TEXTREL",
        "warning",
        faults.text_relocations,
    ),
)
"""Every rule, in the order they are checked; a later one may rely on the earlier."""


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


def outcomes(image: ElfImage) -> Iterator[tuple[Rule, tuple[Problem, ...]]]:
    """Every rule, and where the file breaks it (``()``: it holds)."""
    for rule in RULES:
        yield rule, tuple(_broken(rule, image))


def problems_of(image: ElfImage) -> tuple[Problem, ...]:
    """Every problem of the file, each named once (a table that cannot be read breaks several rules)."""
    found: dict[Fault, Problem] = {}
    for _, problems in outcomes(image):
        for problem in problems:
            found.setdefault((problem.field, problem.found, problem.expected), problem)
    return tuple(found.values())


def refuse_problems(image: ElfImage, *, when_linked: bool = False) -> None:
    """Raise :class:`ElfError` for the first problem of the file that keeps it from being loaded.

    ``when_linked`` says by which rules: those that the loader sees to as it links, or all others.
    """
    for rule in _REFUSED[when_linked]:
        for problem in _broken(rule, image):
            raise ElfError(image.path, problem.field, problem.found, problem.expected)
