"""What ``miniloader inspect`` says of an image, as plain values: the JSON object.

A file may be wrong anywhere.  What cannot be read is left empty here and is named among the problems, so that
everything else is still shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from miniloader.elf import ElfImage, PlannedCall, PlannedMapping, kind_of
from miniloader.elf.kinds.file_kind import KINDS_OF_FILE, FileKind
from miniloader.elf.kinds.program import kernel_calls, kernel_mappings
from miniloader.errors import ElfError
from miniloader.forking import importing
from miniloader.json_schema import (
    COUNT,
    HEX,
    INT,
    PROTECTION,
    TEXT,
    array,
    by_name,
    either,
    keys,
    nullable,
    record,
    words,
)  # fmt: skip
from miniloader.report import bindings, search, sizes, symbols
from miniloader.report import inspect_kinds as kinds

if TYPE_CHECKING:
    from miniloader.elf.checks import Rule

__all__ = ["SCHEMA", "checks_json", "machine_name", "readable", "rules_json", "to_json", "type_name"]

T = TypeVar("T")
U = TypeVar("U")


def readable(read: Callable[[], T], otherwise: U) -> T | U:
    """What ``read`` gives, or ``otherwise`` where that part of the file is malformed."""
    try:
        return read()
    except ElfError:
        return otherwise


# ----------------------------------------------------------------------------------------------- JSON
def machine_name(image: ElfImage) -> str:
    """``x86_64``, ``aarch64``, ``386``: the gABI's ``EM_`` name in small letters, or a hexadecimal number."""
    return image.header.machine.lower()


def type_name(image: ElfImage) -> str:
    """``ET_DYN``: the gABI's name of the file's type, or a hexadecimal number."""
    kind = image.header.type
    return kind if kind.startswith("0x") else f"ET_{kind}"


def to_json(image: ElfImage, page_size: int) -> dict[str, Any]:
    """The object that ``inspect --json`` prints; addresses are vaddrs, sizes and offsets are bytes.

    ``calls`` are :meth:`miniloader.elf.LoadPlan.calls`: ``start`` is a vaddr, ``flags`` are the names of
    mmap's, ``protection`` and ``file_offset`` are ``null`` in a call that has none.  ``class`` is 32 or 64.
    ``kind`` is a name of :data:`miniloader.elf.kinds.file_kind.KINDS_OF_FILE`; of a program ``plan`` and
    ``calls`` are the kernel's.  ``tls`` is ``null`` or ``{vaddr, filesz, memsz, align}``.  A problem has the
    keys ``rule, severity, field, found, expected``.  ``dynamic`` has a row for each entry of the dynamic
    section and each of its flags: see :class:`miniloader.elf.asked.Asked`.
    """
    with importing:
        from miniloader.elf.asked import asked_for
        from miniloader.elf.checks import problems_of

    kind = kind_of(image)
    mappings, calls = readable(lambda: _planned(image, kind, page_size), ((), ()))
    defined, undefined = readable(lambda: symbol_counts(image), (0, 0))
    return {
        "path": image.path,
        "machine": machine_name(image),
        "class": image.header.elf_class,
        "byte_order": image.header.byte_order,
        "type": type_name(image),
        "kind": kind.name,
        "interpreter": readable(lambda: image.interpreter, None),
        "entry": image.header.entry,
        "soname": readable(lambda: image.soname, None),
        "build_id": image.build_id,
        "segments": [_without(asdict(segment), "index") for segment in image.segments],
        "plan": [asdict(mapping) for mapping in mappings],
        "calls": [_call(call) for call in calls],
        "dynamic": readable(lambda: [asdict(asked) for asked in asked_for(image)], []),
        "needed": list(readable(lambda: image.needed, ())),
        "runpath": list(readable(lambda: image.runpath, ())),
        "relocations": readable(lambda: image.relocations.by_kind(), {}),
        "symbols": {"defined": defined, "undefined": undefined},
        "tls": asdict(image.tls) if image.tls else None,
        "problems": [asdict(problem) for problem in problems_of(image)],
        **kinds.of_kind(image, kind),
    }


def _planned(
    image: ElfImage, kind: FileKind, page_size: int
) -> tuple[tuple[PlannedMapping, ...], tuple[PlannedCall, ...]]:
    """The mappings and calls by which a file of its kind comes into memory; none where it does not."""
    if kind.is_program:
        return kernel_mappings(image, page_size), kernel_calls(image, page_size)
    if kind.name in ("object", "core", "debug-only"):
        return (), ()
    plan = image.plan(page_size)
    return plan.mappings, plan.calls()


def _call(call: PlannedCall) -> dict[str, Any]:
    row = _without(asdict(call), "step")
    return row | {"protection": call.protection or None, "flags": [*call.flags]}


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def symbol_counts(image: ElfImage) -> tuple[int, int]:
    """How many symbols can be bound to here, and how many are needed from elsewhere."""
    return int(image.symbols.defined.sum()), int(image.symbols.undefined.sum())


def rules_json() -> list[dict[str, str]]:
    """Every rule: ``name, protects, source, severity``."""
    with importing:
        from miniloader.elf.checks import RULES

    return [_rule(rule) for rule in RULES]


def _rule(rule: Rule) -> dict[str, str]:
    return {
        "name": rule.name,
        "protects": rule.protects,
        "source": rule.source,
        "severity": rule.severity,
    }


def checks_json(image: ElfImage) -> list[dict[str, Any]]:
    """Every rule with its outcome: ``name, protects, source, severity, outcome, problems``."""
    with importing:
        from miniloader.elf.checks import outcomes

    return [
        {
            **_rule(rule),
            "outcome": "broken" if broken else "holds",
            "problems": [asdict(problem) for problem in broken],
        }
        for rule, broken in outcomes(image)
    ]


_SEVERITY: Final = words("error warning")
_RULE: Final = keys(TEXT, "name protects source") | {"severity": _SEVERITY}
_PROBLEM: Final = record(keys(TEXT, "rule field found expected"), {"severity": _SEVERITY})
_CALL: Final = record(
    {"call": words("mmap mprotect memset munmap"), "start": INT, "length": COUNT, "why": TEXT},
    {"protection": nullable(PROTECTION), "flags": array(TEXT), "file_offset": nullable(COUNT)},
)
_IMAGE: Final = record(
    {"path": TEXT, "machine": TEXT, "type": TEXT, "soname": nullable(TEXT), "build_id": nullable(HEX)},
    {"kind": {"enum": [*KINDS_OF_FILE]}, "interpreter": nullable(TEXT), "entry": COUNT},
    {"class": {"enum": [32, 64]}, "byte_order": words("little big")},
    {"segments": array(record(
        {"type": TEXT, "flags": PROTECTION}, keys(COUNT, "file_offset vaddr filesz memsz align")
    ))},
    {"plan": array(record(
        keys(COUNT, "start end file_offset"), {"protection": PROTECTION, "kind": words("file zero gap")}
    ))},
    {"dynamic": array(record(
        keys(TEXT, "name why"),
        {"value": COUNT, "text": nullable(TEXT), "outcome": words("honoured refused ignored")},
    ))},
    {"calls": array(_CALL), "needed": array(TEXT), "runpath": array(TEXT), "relocations": by_name(COUNT)},
    {"symbols": record(
        keys(COUNT, "defined undefined"), optional={"table": array(symbols.SCHEMA)}
    )},
    {"tls": nullable(record(keys(COUNT, "vaddr filesz memsz align"))), "problems": array(_PROBLEM)},
    optional={
        "checks": array(record(_RULE, {"outcome": TEXT, "problems": array(_PROBLEM)})),
        "search": search.SCHEMA,
        "bindings": bindings.ROWS_SCHEMA,
        "sizes": sizes.SCHEMA,
        **kinds.KEYS,
    },
)  # fmt: skip

SCHEMA: Final = either(
    _IMAGE, kinds.ARCHIVE_SCHEMA, kinds.SCRIPT_SCHEMA, record({"checks": array(record(_RULE))})
)
"""What ``inspect --json`` prints: :func:`to_json`, what :mod:`miniloader.report.inspect_kinds` makes of what
is no image, or :func:`rules_json` where no file is named."""
