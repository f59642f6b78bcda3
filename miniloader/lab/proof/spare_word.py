"""Which word of a loaded library may be written, and put back, without the library minding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from miniloader.elf import ElfImage, LoadPlan, PlannedMapping
from miniloader.elf.plan import Span
from miniloader.values import dataclass

__all__ = ["Word", "choose_word"]

_SIZE: Final = 8
_MOST_BSS: Final = 16  # pages: one is as good as another


@dataclass(frozen=True)
class Word:
    """Eight aligned bytes at ``vaddr`` that can be written.

    ``fresh``: their page is still the file's own in every process, so that the write will copy it.
    ``padding``: no section, no symbol and no segment's contents are there, so that nothing depends on them.
    ``section`` is the section they are in, or after which they come; "" without section headers.
    """

    vaddr: int
    fresh: bool
    padding: bool
    section: str

    @property
    def place(self) -> str:
        """Where the word is, for people.

        >>> Word(0x4010, fresh=True, padding=True, section=".data").place
        'padding after .data'
        """
        if self.padding:
            return f"padding after {self.section}" if self.section else "padding"
        return f"in {self.section}" if self.section else "data"


def choose_word(image: ElfImage, plan: LoadPlan, fresh: Collection[int], *, idle: bool) -> Word | None:
    """The best word to write once the library is loaded; None where there is none.

    ``fresh`` are the vaddrs of pages that are still the file's own.  Such a page comes first, for there a
    write shows most; among such pages one with padding.  A word of the library's own is taken only while the
    library is ``idle``: while no thread can see it changed.  Of bss the first pages are gone through.
    """
    words = [word for mapping in plan.mappings for word in _words(image, plan, mapping, fresh)]
    allowed = [word for word in words if word.padding or idle]
    return min(allowed, key=lambda word: (not word.fresh, not word.padding, word.vaddr), default=None)


def _words(
    image: ElfImage, plan: LoadPlan, mapping: PlannedMapping, fresh: Collection[int]
) -> Iterator[Word]:
    """One word of each page of ``mapping`` that stays writable; padding where the page has some."""
    if "w" not in mapping.protection or "x" in mapping.protection:
        return
    described = _described(image)
    pages = _MOST_BSS if mapping.kind == "zero" else mapping.length // plan.page_size
    for start in range(mapping.start, mapping.end, plan.page_size)[:pages]:
        if plan.relro.start <= start < plan.relro.end:
            continue
        vaddr = _padding(image, described, Span(start, start + plan.page_size))
        padding = vaddr is not None
        chosen = start if vaddr is None else vaddr
        before = [name for span, name in described if span.start <= chosen and span]
        yield Word(chosen, start in fresh, padding, before[-1] if before else "")


def _described(image: ElfImage) -> Sequence[tuple[Span, str]]:
    """What the file says is there, by vaddr: sections, or without section headers whole segments."""
    sections = [(Span(s.vaddr, s.end), s.name) for s in image.sections if s.allocated and s.name != ".tbss"]
    spans = sections or [(Span(segment.vaddr, segment.end), "") for segment in image.loads]
    return sorted(spans, key=lambda described: described[0].start)


def _padding(image: ElfImage, described: Sequence[tuple[Span, str]], page: Span) -> int | None:
    """The first aligned word of ``page`` that nothing is said about."""
    vaddr = page.start
    for span, _ in described:
        if span.end <= vaddr:
            continue
        if vaddr + _SIZE <= span.start:
            break
        vaddr = -(-span.end // _SIZE) * _SIZE
    return vaddr if vaddr + _SIZE <= page.end and image.symbols.at(vaddr) is None else None
