"""What must hold before anything of a file is mapped: one table of rules.

Each :class:`Rule` says what it protects and which document asks for it, and finds the places where a file
breaks it.  The same table gives ``inspect``'s problems, ``load``'s refusals and the documentation.  What
makes a file unreadable altogether (magic, class, byte order, header sizes) is found by
:func:`miniloader.elf.read_image` before any rule can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.dynamic import (
    DT_FINI_ARRAY,
    DT_FINI_ARRAYSZ,
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
    tag_name,
)
from miniloader.elf.image import ElfImage
from miniloader.elf.plan import plan_segments
from miniloader.errors import ElfError

__all__ = ["RULES", "Problem", "Rule", "outcomes", "problems_of", "refuse_problems"]

Severity = Literal["error", "warning"]
Fault = tuple[str, str, str]  # field, found, expected

_MOST_SPAN: Final = 1 << 40
_MOST_ALIGN: Final = 1 << 32
_NO_WORDS: Final = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule: ``error`` keeps the file from being loaded, ``warning`` is worth knowing."""

    rule: str
    severity: Severity
    field: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that must hold: what it ``protects`` and the ``source`` that asks for it."""

    name: str
    protects: str
    source: str
    severity: Severity
    faults: Callable[[ElfImage], Iterator[Fault]]


def _segments_in_file(image: ElfImage) -> Iterator[Fault]:
    for load in image.loads:
        if load.file_offset + load.filesz > image.source.size and load.filesz:
            end = load.file_offset + load.filesz
            yield (
                f"PT_LOAD[{load.index}].p_filesz",
                f"bytes to {end:#x}",
                f"a file that long ({image.source.size:#x} bytes)",
            )


def _plan(image: ElfImage) -> Iterator[Fault]:
    try:
        plan = plan_segments(image.segments, 4096)
    except ElfError as error:
        yield error.field, error.found, error.expected
        return
    if plan.length > _MOST_SPAN or plan.end > 1 << (47 if image.header.elf_class == 64 else 32):
        yield (
            "PT_LOAD",
            f"a span of {plan.length:#x} bytes to {plan.end:#x}",
            f"at most {_MOST_SPAN:#x} bytes",
        )
    if plan.alignment > _MOST_ALIGN:
        yield "PT_LOAD.p_align", f"{plan.alignment:#x}", f"at most {_MOST_ALIGN:#x}"


def _dynamic(image: ElfImage) -> Iterator[Fault]:
    if image.segment("PT_DYNAMIC") is None:
        yield "PT_DYNAMIC", "none", "one (a statically linked file cannot be loaded as a library)"
        return
    if not image.dynamic.entries:
        yield "PT_DYNAMIC", "no entries", "at least DT_SYMTAB and DT_STRTAB"


def _one_of_each(image: ElfImage) -> Iterator[Fault]:
    for kind in ("PT_DYNAMIC", "PT_TLS", "PT_GNU_RELRO", "PT_INTERP"):
        count = sum(segment.type == kind for segment in image.segments)
        if count > 1:
            yield kind, f"{count} of them", "at most one"


def _strings(image: ElfImage) -> Iterator[Fault]:
    _ = image.needed, image.soname, image.runpath, image.rpath
    size = len(image.symbols.strings)
    beyond = np.flatnonzero(image.symbols.rows["name"] >= max(size, 1))
    if len(beyond):
        offset = int(image.symbols.rows["name"][beyond[0]])
        yield (
            f"DT_SYMTAB[{int(beyond[0])}].st_name",
            f"{offset:#x}",
            f"inside the string table of {size:#x} bytes",
        )


def _symbols(image: ElfImage) -> Iterator[Fault]:
    _ = image.symbols  # reading them checks every extent
    yield from ()


def _relocation_targets(image: ElfImage) -> Iterator[Fault]:
    word = image.header.word
    for name, offsets in _target_arrays(image):
        outside = _outside(image, offsets, word, writable=not image.dynamic.text_relocations)
        if len(outside):
            where = "a writable segment" if not image.dynamic.text_relocations else "a segment"
            yield f"{name} r_offset", f"{int(offsets[outside[0]]):#x}", f"{word} bytes inside {where}"


def _target_arrays(image: ElfImage) -> Iterator[tuple[str, NDArray[np.uint64]]]:
    yield "DT_RELR", image.relocations.relr
    for table in image.relocations.tables:
        offsets = table.rows["offset"]
        # R_*_NONE relocates nothing, wherever it points.
        yield table.name, offsets[table.rows["type"] != 0] if not table.rows["type"].all() else offsets


def _outside(image: ElfImage, offsets: NDArray[np.uint64], size: int, *, writable: bool) -> NDArray[np.intp]:
    """The positions in ``offsets`` of which ``size`` bytes are not within one (writable) PT_LOAD."""
    if not len(offsets):
        return np.empty(0, np.intp)
    low, high = int(offsets.min()), int(offsets.max())
    inside = np.zeros(len(offsets), bool)
    for load in image.loads:
        if load.memsz < size or load.end > 1 << 64 or (writable and "w" not in load.flags):
            continue
        if load.vaddr <= low and high <= load.end - size:
            return np.empty(0, np.intp)
        inside |= (offsets >= np.uint64(load.vaddr)) & (offsets <= np.uint64(load.end - size))
    return np.flatnonzero(~inside)


def _relocation_symbols(image: ElfImage) -> Iterator[Fault]:
    count = len(image.symbols)
    for table in image.relocations.tables:
        if len(table.rows) and int(table.rows["symbol"].max()) >= count:
            yield (
                f"{table.name} r_info",
                f"symbol {int(table.rows['symbol'].max())}",
                f"one of the {count} symbols",
            )


def _arrays(image: ElfImage) -> Iterator[Fault]:
    word = image.header.word
    for start, size in ((DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ)):
        length = image.dynamic.tags.get(size, 0)
        if start not in image.dynamic.tags or not length:
            continue
        if length % word:
            yield tag_name(size), f"{length} bytes", f"a multiple of {word}"
        vaddr = image.dynamic.tags[start]
        if not any(load.vaddr <= vaddr and vaddr + length <= load.end for load in image.loads):
            yield tag_name(start), f"{vaddr:#x}, {length} bytes", "inside one PT_LOAD"


def _tls(image: ElfImage) -> Iterator[Fault]:
    tls = image.tls
    if tls is None:
        return
    if tls.align & (tls.align - 1):
        yield "PT_TLS.p_align", f"{tls.align:#x}", "0 or a power of two"
    if tls.filesz > tls.memsz:
        yield "PT_TLS.p_filesz", f"{tls.filesz:#x}", f"at most p_memsz, {tls.memsz:#x}"
    if tls.memsz > _MOST_SPAN or tls.align > _MOST_ALIGN:
        yield "PT_TLS", f"{tls.memsz:#x} bytes aligned to {tls.align:#x}", "less than the address space"
    if tls.filesz:
        image.read(tls.vaddr, tls.filesz, "PT_TLS")


def _relro(image: ElfImage) -> Iterator[Fault]:
    relro = image.segment("PT_GNU_RELRO")
    if relro is None or not relro.memsz:
        return
    # Linkers may pad it to the end of its segment's last page.
    ends = (-(-load.end // 4096) * 4096 for load in image.loads if load.vaddr <= relro.vaddr < load.end)
    if not any(relro.end <= end for end in ends):
        yield "PT_GNU_RELRO", f"{relro.vaddr:#x} to {relro.end:#x}", "inside a PT_LOAD"


def _executable_stack(image: ElfImage) -> Iterator[Fault]:
    if image.executable_stack:
        yield "PT_GNU_STACK.p_flags", "executable", "a stack that is not executable"


def _writable_code(image: ElfImage) -> Iterator[Fault]:
    for load in image.loads:
        if "w" in load.flags and "x" in load.flags:
            yield f"PT_LOAD[{load.index}].p_flags", load.flags, "writable or executable, not both"


def _text_relocations(image: ElfImage) -> Iterator[Fault]:
    if image.dynamic.text_relocations:
        yield "DT_TEXTREL", "set", "code that needs no relocation, so that it can be shared"


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "segments-in-file",
        "from SIGBUS on pages beyond the end of the file",
        "gABI 5, p_filesz",
        "error",
        _segments_in_file,
    ),
    Rule(
        "segments-mappable",
        "from overlapping, misaligned or endless mappings",
        "gABI 5, PT_LOAD",
        "error",
        _plan,
    ),
    Rule(
        "dynamic-section",
        "from linking by tables that are not there",
        "gABI 5, Dynamic Section",
        "error",
        _dynamic,
    ),
    Rule(
        "one-of-each",
        "from choosing between two templates or tables",
        "gABI 5, Program Header",
        "error",
        _one_of_each,
    ),
    Rule(
        "symbol-tables",
        "from reading symbols, hashes and versions outside the image",
        "gABI 5, Hash Table; LSB",
        "error",
        _symbols,
    ),
    Rule("strings", "from names outside the string table", "gABI 4, String Table", "error", _strings),
    Rule(
        "relocation-targets",
        "from writing outside the image",
        "gABI 4, r_offset",
        "error",
        _relocation_targets,
    ),
    Rule(
        "relocation-symbols",
        "from symbols outside their table",
        "gABI 4, r_info",
        "error",
        _relocation_symbols,
    ),
    Rule(
        "init-arrays", "from calling what is no function pointer", "gABI 5, DT_INIT_ARRAY", "error", _arrays
    ),
    Rule("tls-template", "from copying a template that is not there", "gABI 5, PT_TLS", "error", _tls),
    Rule("relro", "from protecting pages of something else", "psABI, PT_GNU_RELRO", "error", _relro),
    Rule(
        "executable-stack",
        "from a stack that can run injected code",
        "psABI, PT_GNU_STACK",
        "warning",
        _executable_stack,
    ),
    Rule("writable-code", "from code that can be overwritten", "gABI 5, p_flags", "warning", _writable_code),
    Rule(
        "text-relocations",
        "from code that every process has its own copy of",
        "gABI 5, DT_TEXTREL",
        "warning",
        _text_relocations,
    ),
)
"""Every rule, in the order they are checked; a later one may rely on the earlier."""


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


def refuse_problems(image: ElfImage) -> None:
    """Raise :class:`ElfError` for the first problem of the file that keeps it from being loaded."""
    for rule in RULES:
        if rule.severity == "error":
            for problem in _broken(rule, image):
                raise ElfError(image.path, problem.field, problem.found, problem.expected)
