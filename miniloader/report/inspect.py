"""What ``miniloader inspect`` says of an image, as plain values: the JSON object, the calls to come.

A file may be wrong anywhere.  What cannot be read is left empty here and is named among the problems, so that
everything else is still shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from miniloader.elf import ElfImage, LoadPlan, PlannedMapping, Span
from miniloader.errors import ElfError
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.elf.checks import Rule

__all__ = [
    "Call",
    "calls",
    "checks_json",
    "machine_name",
    "readable",
    "rules_json",
    "to_json",
    "type_name",
]

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

    ``class`` is 32 or 64.  ``tls`` is ``null`` or ``{vaddr, filesz, memsz, align}``.  A problem has the keys
    ``rule, severity, field, found, expected``.
    """
    plan = readable(lambda: image.plan(page_size), None)
    defined, undefined = readable(lambda: symbol_counts(image), (0, 0))
    return {
        "path": image.path,
        "machine": machine_name(image),
        "class": image.header.elf_class,
        "byte_order": image.header.byte_order,
        "type": type_name(image),
        "soname": readable(lambda: image.soname, None),
        "build_id": image.build_id,
        "segments": [_without(asdict(segment), "index") for segment in image.segments],
        "plan": [asdict(mapping) for mapping in plan.mappings] if plan else [],
        "needed": list(readable(lambda: image.needed, ())),
        "runpath": list(readable(lambda: image.runpath, ())),
        "relocations": readable(lambda: image.relocations.by_kind(), {}),
        "symbols": {"defined": defined, "undefined": undefined},
        "tls": asdict(image.tls) if image.tls else None,
        "problems": [asdict(problem) for problem in image.problems],
    }


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def symbol_counts(image: ElfImage) -> tuple[int, int]:
    """How many symbols can be bound to here, and how many are needed from elsewhere."""
    return int(image.symbols.defined.sum()), int(image.symbols.undefined.sum())


def rules_json() -> list[dict[str, str]]:
    """Every rule: ``name, protects, source, severity``."""
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
    from miniloader.elf.checks import outcomes

    return [
        {
            **_rule(rule),
            "outcome": "broken" if broken else "holds",
            "problems": [asdict(problem) for problem in broken],
        }
        for rule, broken in outcomes(image)
    ]


# ---------------------------------------------------------------------------------------- load plan
@dataclass(frozen=True)
class Call:
    """One call that carries out a load plan: the step it belongs to, as strace(1) would show it, and why."""

    step: str
    text: str
    why: str


def calls(plan: LoadPlan) -> Iterator[Call]:
    """The calls that load an image by ``plan``; ``base`` is the load bias, ``fd`` the open file."""
    yield from _reserve(plan)
    for mapping in plan.mappings:
        call = _mmap(_at(mapping.start), mapping, fixed=True)
        if mapping.kind == "file":
            yield Call("map", call, f"{mapping.protection} pages of the file")
        elif mapping.kind == "zero":
            yield Call("bss", call, "pages of zeroes, of no file")
    for span in plan.zeroed:
        yield from _zero(plan, span)
    if plan.relro:
        length = plan.relro.end - plan.relro.start
        why = "RELRO, once it is relocated"
        yield Call("protect", f"mprotect({_at(plan.relro.start)}, {length:#x}, PROT_READ)", why)


def _reserve(plan: LoadPlan) -> Iterator[Call]:
    whole = PlannedMapping(plan.start, plan.end, plan.mappings[0].file_offset, "---", "file")
    less = f" - {plan.start:#x}" if plan.start else ""
    why = "room for all, inaccessible"
    if plan.alignment <= plan.page_size:
        yield Call("reserve", f"base = {_mmap('NULL', whole, fixed=False)}{less}", why)
        return
    room_start = f"(room{less})" if less else "room"
    room = PlannedMapping(0, plan.length + plan.alignment, 0, "---", "zero")
    yield Call(
        "reserve", f"room = {_mmap('NULL', room, fixed=False)}", "enough to find an aligned place in it"
    )
    yield Call("reserve", f"base = {room_start} rounded up to a multiple of {plan.alignment:#x}", "")
    yield Call("reserve", "munmap(what is left of room on both sides)", "")
    yield Call("reserve", _mmap(_at(plan.start), whole, fixed=True), why)


def _zero(plan: LoadPlan, span: Span) -> Iterator[Call]:
    page = plan.at(span.start)
    if page is None or page.kind != "file":
        return  # a later segment took the page
    pages = f"{_at(span.start & -plan.page_size)}, {plan.page_size:#x}"
    writable = "w" in page.protection
    if not writable:
        yield Call("zero", f"mprotect({pages}, PROT_READ|PROT_WRITE)", "")
    yield Call(
        "zero", f"memset({_at(span.start)}, 0, {span.end - span.start:#x})", "bss in the file's last page"
    )
    if not writable:
        yield Call("zero", f"mprotect({pages}, {_bits(page.protection)})", "")


def _at(vaddr: int) -> str:
    return f"base+{vaddr:#x}" if vaddr else "base"


def _mmap(address: str, mapping: PlannedMapping, *, fixed: bool) -> str:
    flags = ["MAP_PRIVATE", *["MAP_FIXED"] * fixed, *["MAP_ANONYMOUS"] * (mapping.kind == "zero")]
    what = "-1, 0" if mapping.kind == "zero" else f"fd, {mapping.file_offset:#x}"
    return f"mmap({address}, {mapping.length:#x}, {_bits(mapping.protection)}, {'|'.join(flags)}, {what})"


def _bits(protection: str) -> str:
    names = {"r": "PROT_READ", "w": "PROT_WRITE", "x": "PROT_EXEC"}
    return "|".join(names[sign] for sign in protection if sign in names) or "PROT_NONE"
