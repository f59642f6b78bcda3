"""Where :mod:`miniloader.machine.loops` finds the tables of a mapped library, and may write words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NoReturn

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.checks import refuse_problems
from miniloader.errors import ElfError
from miniloader.machine.loops import Names, Reason, Span, Stopped

__all__ = ["open_names", "readable", "refuse", "writable"]


def open_names(image: ElfImage, spans: Sequence[Span], bias: int, *, at_least: int = 0) -> Names:
    """Its dynamic symbols, ``at_least`` so many; :class:`ElfError` if they are not there."""
    try:
        return Names(bias, spans, image.dynamic.tags, at_least=at_least, check=True)
    except Stopped as stopped:
        refuse(image, stopped)


def readable(plan: LoadPlan) -> list[Span]:
    """Where bytes of the file can be read."""
    return [(m.start, m.end) for m in plan.mappings if m.kind == "file" and "r" in m.protection]


def writable(image: ElfImage, plan: LoadPlan) -> list[Span]:
    """Where words may be relocated: in segments that can be written to, or be made so."""
    found: list[Span] = []
    open_ = image.dynamic.text_relocations
    mappings = [m for m in plan.mappings if "w" in m.protection or (open_ and m.kind == "file")]
    first = 0
    for load in image.loads:  # both are in ascending order
        while first < len(mappings) and mappings[first].end <= load.vaddr:
            first += 1
        for m in islice(mappings, first, None):
            if m.start >= load.end:
                break
            start, end = max(load.vaddr, m.start), min(load.end, m.end)
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


def refuse(image: ElfImage, stopped: Stopped) -> NoReturn:
    """Say what a loop has stopped at: in the words of the rule that the file breaks, else it has changed."""
    if stopped.reason is Reason.TOO_MUCH:
        found = "names that are too long, or too many of one hash, to be looked up"
        raise ElfError(image.path, "dynamic symbols", found, "names that differ")
    refuse_problems(image, when_linked=True)
    field = f"relocation at vaddr {stopped.where:#x}" if stopped.where else "dynamic tables"
    found = "a page that is gone" if stopped.reason is Reason.GONE else "another content"
    raise ElfError(
        image.path, field, found, "what was there", hint="the file was changed while it was being loaded"
    )
