"""What a page of a library holds, and why it is written: sections, symbols, relocations, bytes.

Everything here is for a person to look at, and bounded: the first few of many, with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan
from miniloader.lab.page_bytes import ChangedPage
from miniloader.lab.proof.spare_word import Word
from miniloader.machine.names_at import Landmarks, Slot
from miniloader.report.text import listed

__all__ = ["bytes_of_pages", "ranges", "short"]

_MOST_RANGES: Final = 4000
_MOST_SYMBOLS: Final = 6000  # of a library, by name
_SYMBOLS_SHOWN: Final = 5  # of a page
_LONGEST_NAME: Final = 60
_WORD: Final = 8


# ----------------------------------------------------------------------------------- runs of pages
def ranges(image: ElfImage, plan: LoadPlan, word: Word | None) -> tuple[tuple[int, int, str, str], ...]:
    """What to say of pages: (first page, after the last, heading, text)."""
    notes = [*_sections(image, plan), *_causes(image, plan, word), *_symbols(image, plan)]
    return tuple(notes[:_MOST_RANGES])


def _pages(plan: LoadPlan, start: int, end: int) -> tuple[int, int]:
    """The indices of the pages that hold the vaddrs [start, end)."""
    return (start - plan.start) // plan.page_size, -(-(end - plan.start) // plan.page_size)


def _sections(image: ElfImage, plan: LoadPlan) -> Iterator[tuple[int, int, str, str]]:
    for section in image.sections:
        if section.allocated and section.size and section.name != ".tbss":
            yield *_pages(plan, section.vaddr, section.end), "section", section.name


def _causes(image: ElfImage, plan: LoadPlan, word: Word | None) -> Iterator[tuple[int, int, str, str]]:
    if word is not None:
        page = _pages(plan, word.vaddr, word.vaddr + 1)
        yield *page, "cause", f"written: each process wrote its pid at {word.vaddr:#x} ({word.place})"
    for span in plan.zeroed:
        text = f"zeroed from {span.start:#x} on: bss begins in the middle of this page"
        yield *_pages(plan, span.start, span.start + 1), "cause", text
    for mapping in plan.mappings:
        if mapping.kind == "zero":
            yield (
                *_pages(plan, mapping.start, mapping.end),
                "cause",
                "bss: anonymous memory, no file behind it",
            )
    pages, counts = _relocations(image, plan)
    edges = [0, *(np.flatnonzero((np.diff(pages) != 1) | (np.diff(counts) != 0)) + 1).tolist(), len(pages)]
    for first, end in pairwise(edges if len(pages) else []):
        number = int(counts[first])
        hold = "word of this page holds" if number == 1 else "words of this page hold"
        text = f"relocation: {number:,} {hold} an address"
        yield int(pages[first]), int(pages[end - 1]) + 1, "cause", text
    if plan.relro:
        yield *_pages(plan, plan.relro.start, plan.relro.end), "relro", "read-only once relocated (RELRO)"


def _relocations(image: ElfImage, plan: LoadPlan) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The pages that hold relocations, and how many each."""
    targets = (image.relocations.targets().astype(np.int64) - plan.start) // plan.page_size
    pages, counts = np.unique(targets, return_counts=True)
    return pages, counts


def _symbols(image: ElfImage, plan: LoadPlan) -> Iterator[tuple[int, int, str, str]]:
    """The first symbols of each page; pages that can be written come first, while names last."""
    table = image.symbols
    rows = table.rows
    index = np.flatnonzero(table.defined & (rows["value"] > 0) & (rows["value"] < np.uint64(plan.end)))
    index = index[np.argsort(rows["value"][index], kind="stable")]
    pages = (rows["value"][index].astype(np.int64) - plan.start) // plan.page_size
    first, counts = np.unique(pages, return_index=True, return_counts=True)[1:]
    order = sorted(range(len(first)), key=lambda at: "w" not in _protection(plan, int(pages[first[at]])))
    for at in order[: _MOST_SYMBOLS // _SYMBOLS_SHOWN]:
        start, count = int(first[at]), int(counts[at])
        names = [table.name(int(symbol)) for symbol in index[start : start + min(count, _SYMBOLS_SHOWN)]]
        text = listed([*map(short, names)], _SYMBOLS_SHOWN, count)
        yield int(pages[start]), int(pages[start]) + 1, "symbols", text


def _protection(plan: LoadPlan, page: int) -> str:
    mapping = plan.at(plan.start + page * plan.page_size)
    return mapping.protection if mapping else "---"


def short(name: str) -> str:
    """``name``, cut where it is very long (C++)."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


# -------------------------------------------------------------------------------------------- bytes
def bytes_of_pages(
    landmarks: Landmarks, plan: LoadPlan, pages: Sequence[ChangedPage], word: Word | None
) -> dict[int, dict[str, Any]]:
    """By page: its bytes in the file, the words that differ in each process at each step, and their names."""
    return {
        (page.vaddr - plan.start) // plan.page_size: {
            "before": bytes(page.in_file),
            "after": {
                step: [words and [(offset, value.hex()) for offset, value in words] for words in processes]
                for step, processes in page.words.items()
            },
            "names": {str(offset): _name(landmarks, page.vaddr + offset, word) for offset in _offsets(page)},
        }
        for page in pages
    }


def _offsets(page: ChangedPage) -> list[int]:
    """Where any process has another word than the file."""
    lists = [words for processes in page.words.values() for words in processes if words is not None]
    return sorted({offset for words in lists for offset, _ in words})


def _name(landmarks: Landmarks, vaddr: int, word: Word | None) -> str:
    """Why the word at ``vaddr`` is not as in the file."""
    if word is not None and word.vaddr == vaddr:
        return f"the word that each process wrote, {word.place}"
    slot = landmarks.slot_at(vaddr, _WORD)
    if slot is None:
        target = landmarks.at(vaddr)
        return f"written in {short(target.name)}" if target else "written"
    return f"{slot.relocation}: {short(_meaning(landmarks, slot))}"


def _meaning(landmarks: Landmarks, slot: Slot) -> str:
    """What the address in ``slot`` leads to, in words where the slot has no symbol."""
    meaning = landmarks.meaning(slot)
    target = landmarks.at(slot.addend, address_taken=True) if meaning.startswith("*ABS*") else None
    return target.name if target is not None else meaning
