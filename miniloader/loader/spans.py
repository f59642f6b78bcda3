"""Where :mod:`miniloader.native` finds the tables of a mapped library, and may write words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

from miniloader.elf import ElfImage, LoadPlan, PlannedMapping
from miniloader.elf.checks import refuse_problems
from miniloader.errors import ElfError
from miniloader.loader.symbol_lookup import MappedSymbols, VaddrRange
from miniloader.native import Reason, Stopped

__all__ = ["error_for", "open_names", "readable", "refuse", "writable"]


def open_names(
    image: ElfImage, spans: Sequence[VaddrRange], bias: int, *, at_least: int = 0, check: bool = True
) -> MappedSymbols:
    """The dynamic symbols of ``image``, mapped with ``bias``; :class:`ElfError` if they cannot be read.

    ``spans`` are the vaddrs that can be read; there have to be ``at_least`` so many symbols.  Every name is
    looked at but where there is no need to ``check`` them.
    """
    try:
        return MappedSymbols(bias, spans, image.dynamic.tags, at_least=at_least, check=check)
    except Stopped as stopped:
        refuse(image, stopped)


def readable(image: ElfImage, plan: LoadPlan) -> list[VaddrRange]:
    """The vaddrs [start, end) at which bytes of the file can be read, ascending, without its holes."""
    mappings = [m for m in plan.mappings if m.kind == "file" and "r" in m.protection]
    parts: list[VaddrRange] = []
    for load in image.loads:
        distance = load.vaddr - load.file_offset
        held = image.source.parts(load.file_offset, load.filesz)
        parts += [(start + distance, end + distance) for start, end in held]
    return _common(mappings, parts)


def writable(image: ElfImage, plan: LoadPlan) -> list[VaddrRange]:
    """The vaddrs [start, end) that may be relocated: of segments that are writable, or can be made so."""
    open_ = image.dynamic.text_relocations
    mappings = [m for m in plan.mappings if "w" in m.protection or (open_ and m.kind == "file")]
    return _common(mappings, [(load.vaddr, load.end) for load in image.loads])


def _common(mappings: Sequence[PlannedMapping], segments: Sequence[VaddrRange]) -> list[VaddrRange]:
    """What lies in both; all are in ascending order."""
    common: list[VaddrRange] = []
    first = 0
    if len(segments) == len(mappings) and all(
        mapping.start <= start and end <= mapping.end
        for mapping, (start, end) in zip(mappings, segments, strict=True)
    ):
        mappings = ()  # each lies in one of its own, as in most files
        for start, end in segments:
            if common and common[-1][1] == start:
                start = common.pop()[0]
            common.append((start, end))
        return common
    for start, end in segments:
        while first < len(mappings) and mappings[first].end <= start:
            first += 1
        for mapping in mappings[first:]:
            low, high = mapping.start, mapping.end
            if low >= end:
                break
            low, high = low if low > start else start, high if high < end else end
            if common and common[-1][1] == low:
                low = common.pop()[0]
            common.append((low, high))
    return common


def refuse(image: ElfImage, stopped: Stopped) -> NoReturn:
    """Raise :class:`ElfError` for what a loop has stopped at: in the words of the rule that the file breaks.

    Where no rule says it, the file has changed since it was checked, or the loops know better.
    """
    refuse_problems(image, when_linked=True)
    raise error_for(image.path, stopped)


def error_for(path: str, stopped: Stopped) -> ElfError:
    """What a loop has stopped at in the file ``path``, as an error."""
    found, expected = _REASONS[stopped.reason]
    found = found.format(what=stopped.what)
    field = f"relocation at vaddr {stopped.where:#x}" if stopped.where else "dynamic tables"
    hint = "the file was changed while it was being loaded" if stopped.reason is Reason.GONE else None
    return ElfError(path, field, found, expected, hint=hint)


#: What is found, where ``{what}`` is the number that the loop gives with its reason, and what is expected.
_REASONS: Final = {
    Reason.GONE: ("a page that cannot be read: the file no longer reaches there", "a page of the file"),
    Reason.NO_TABLE: (
        "a table outside the segments, or with entries of another size",
        "one that can be read",
    ),
    Reason.TOO_MUCH: (
        "names that are too long, or too many with one hash value, to be looked up",
        "names that differ",
    ),
    Reason.OUTSIDE: ("a word outside every segment that may be written", "one inside a writable segment"),
    Reason.NO_KIND: (
        "relocation kind {what:#x}, which was not counted before",
        "the kinds that were counted",
    ),
    Reason.NO_SYMBOL: ("symbol {what}, which the symbol table does not have", "one of its symbols"),
    Reason.NOT_RELATIVE: ("relocation kind {what:#x} among those of DT_RELACOUNT", "R_*_RELATIVE only"),
    Reason.NO_CODE: (
        "a constructor or destructor at {what:#x}, where there is no code",
        "an address inside an executable segment",
    ),
    Reason.TOO_FAR: ("{what:#x}, which does not fit", "a value of 32 bits"),
}
