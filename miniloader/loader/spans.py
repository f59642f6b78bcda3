"""Where :mod:`miniloader.native` finds the tables of a mapped library, and may write words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final, NoReturn

from miniloader.elf import ElfImage, LoadPlan, PlannedMapping
from miniloader.elf.checks import refuse_problems
from miniloader.errors import ElfError
from miniloader.loader.symbol_lookup import MappedSymbols, VaddrRange
from miniloader.native import Reason, Stopped

__all__ = ["open_names", "readable", "refuse", "writable"]


def open_names(
    image: ElfImage, spans: Sequence[VaddrRange], bias: int, *, at_least: int = 0
) -> MappedSymbols:
    """Its dynamic symbols, ``at_least`` so many; :class:`ElfError` if they are not there."""
    try:
        return MappedSymbols(bias, spans, image.dynamic.tags, at_least=at_least, check=True)
    except Stopped as stopped:
        refuse(image, stopped)


def readable(image: ElfImage, plan: LoadPlan) -> list[VaddrRange]:
    """Where bytes of the file can be read."""
    mappings = [m for m in plan.mappings if m.kind == "file" and "r" in m.protection]
    return _common(mappings, [(load.vaddr, load.file_end) for load in image.loads])


def writable(image: ElfImage, plan: LoadPlan) -> list[VaddrRange]:
    """Where words may be relocated: in segments that can be written to, or be made so."""
    open_ = image.dynamic.text_relocations
    mappings = [m for m in plan.mappings if "w" in m.protection or (open_ and m.kind == "file")]
    return _common(mappings, [(load.vaddr, load.end) for load in image.loads])


def _common(mappings: Sequence[PlannedMapping], segments: Sequence[VaddrRange]) -> list[VaddrRange]:
    """What lies in both; all are in ascending order."""
    found: list[VaddrRange] = []
    first = 0
    for start, end in segments:
        while first < len(mappings) and mappings[first].end <= start:
            first += 1
        for mapping in islice(mappings, first, None):
            if mapping.start >= end:
                break
            low, high = max(start, mapping.start), min(end, mapping.end)
            if found and found[-1][1] == low:
                low = found.pop()[0]
            found.append((low, high))
    return found


def refuse(image: ElfImage, stopped: Stopped) -> NoReturn:
    """Say what a loop has stopped at: in the words of the rule that the file breaks, if one says it."""
    refuse_problems(image, when_linked=True)
    found, expected = _REASONS[stopped.reason]
    field = f"relocation at vaddr {stopped.where:#x}" if stopped.where else "dynamic tables"
    hint = "the file was changed while it was being loaded" if stopped.reason is Reason.GONE else None
    raise ElfError(image.path, field, found, expected, hint=hint)


#: What is found, and what is expected.
_REASONS: Final = {
    Reason.GONE: ("a page that is gone", "a page of the file"),
    Reason.NO_TABLE: ("a table that is elsewhere, or of another form", "one that can be read"),
    Reason.TOO_MUCH: (
        "names that are too long, or too many of one hash, to be looked up",
        "names that differ",
    ),
    Reason.OUTSIDE: ("a word that cannot be written", "inside a writable segment, and no other's page"),
    Reason.NO_KIND: ("another kind than before", "what has been looked through"),
    Reason.NO_SYMBOL: ("a symbol that there is not", "one of the table"),
    Reason.NOT_RELATIVE: ("another kind than DT_RELACOUNT says", "R_*_RELATIVE"),
    Reason.NO_CODE: ("a constructor or destructor that is no code", "inside an executable segment"),
    Reason.TOO_FAR: ("a value that does not fit", "32 bits"),
}
