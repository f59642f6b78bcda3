"""From program headers to the mmap calls that a loader makes: the load plan.

A shared object is linked as if it lay at vaddr 0 (or another fixed address); in memory it lies ``bias`` bytes
higher.  The plan says, in vaddrs, what comes where.  For a library with a text and a data segment and
pages of 0x1000 bytes::

    PT_LOAD r-x  offset 0x0000  vaddr 0x0000  filesz 0x1a30  memsz 0x1a30
    PT_LOAD rw-  offset 0x1de8  vaddr 0x2de8  filesz 0x0248  memsz 0x1500

    0x0000 ┌────────────────┐ file, r-x, offset 0x0000: the segment, rounded out to whole pages
    0x2000 ├────────────────┤ file, rw-, offset 0x1000: 0x2de8 and 0x1de8 round down together,
           │                │   since both leave the same remainder (p_offset ≡ p_vaddr)
    0x3000 │    ┈┈ 0x3030   │ the file's part ends here; the rest of its last page is zeroed
    0x4000 ├────────────────┤ zero, rw-: whole pages of bss are anonymous
    0x5000 └────────────────┘

A file page may be mapped twice (here offset 0x1000, as the end of the text and as the start of the data):
that is how the linker saves a page in the file.  A page of memory that two segments share is mapped for the
later one; there is no plan where the earlier would lose something by that.  Pages of the span that no segment
covers stay inaccessible (``gap``).  Source: gABI chapter 5, "Program Loading"; rounding as in glibc's
``elf/dl-load.c``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final, Literal

from miniloader.elf.header import Segment
from miniloader.errors import ElfError, UsageError
from miniloader.forking import cached_property
from miniloader.showing import Showing, dataframe
from miniloader.values import dataclass

__all__ = ["LoadPlan", "PlannedCall", "PlannedMapping", "Span", "plan_segments"]

Kind = Literal["file", "zero", "gap"]
Step = Literal["reserve", "map", "guard", "zero", "protect"]
_LAST: Final = 1 << 64
_RIGHTS: Final = {"r": "be read", "w": "be written", "x": "run"}
_PROTECTIONS: Final = {"r": "PROT_READ", "w": "PROT_WRITE", "x": "PROT_EXEC", "b": "PROT_BTI"}


@dataclass(frozen=True)
class Span:
    """The vaddrs from ``start`` up to but not including ``end``."""

    start: int
    end: int

    def __bool__(self) -> bool:
        return self.end > self.start


@dataclass(frozen=True)
class PlannedMapping:
    """One range of whole pages: ``file`` from ``file_offset``, ``zero`` (anonymous), or ``gap``.

    A gap has the file offset it would have if the first mapping went on, which is what the kernel shows for
    it, as the whole span is reserved by one inaccessible mapping of the file.
    """

    start: int
    end: int
    file_offset: int
    protection: str
    kind: Kind

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class PlannedCall:
    """A call of mmap, mprotect or memset that a loader makes to carry out a plan, and ``why``.

    ``start`` is a vaddr and ``length`` is in bytes.  ``protection`` is ``""`` for memset, and ``r-xb`` with
    PROT_BTI; ``flags`` are those of mmap, by name; ``file_offset`` is ``None`` where no file is mapped.
    ``step`` is when it is made: ``reserve`` and ``map`` come first, then ``guard``, on processors that know
    landing pads; ``zero`` when all is mapped, ``protect`` when all is relocated.
    """

    step: Step
    call: Literal["mmap", "mprotect", "memset"]
    start: int
    length: int
    protection: str
    flags: tuple[str, ...]
    file_offset: int | None
    why: str

    @property
    def end(self) -> int:
        """The vaddr after the last byte."""
        return self.start + self.length

    def text(self, bias: int | None = None) -> str:
        """The call as strace(1) would show it; without a ``bias``, addresses are relative to ``base``.

        >>> PlannedCall("protect", "mprotect", 0x3000, 0x1000, "r--", (), None, "RELRO").text()
        'mprotect(base+0x3000, 0x1000, PROT_READ)'
        """
        address = (
            (f"base+{self.start:#x}" if self.start else "base") if bias is None else hex(bias + self.start)
        )
        if self.call == "memset":
            return f"memset({address}, 0, {self.length:#x})"
        protection = "|".join(_PROTECTIONS[sign] for sign in self.protection if sign != "-") or "PROT_NONE"
        if self.call == "mprotect":
            return f"mprotect({address}, {self.length:#x}, {protection})"
        file = "-1, 0" if self.file_offset is None else f"fd, {self.file_offset:#x}"
        if self.is_placed:
            return f"mmap({address}, {self.length:#x}, {protection}, {'|'.join(self.flags)}, {file})"
        less = f" - {self.start:#x}" if self.start else ""
        return f"base = mmap(NULL, {self.length:#x}, {protection}, {'|'.join(self.flags)}, {file}){less}"

    def __str__(self) -> str:
        """The call, and behind it why.

        >>> str(PlannedCall("protect", "mprotect", 0x3000, 0x1000, "r--", (), None, "RELRO"))
        'mprotect(base+0x3000, 0x1000, PROT_READ)  # RELRO'
        """
        return f"{self.text()}  # {self.why}"

    @property
    def is_placed(self) -> bool:
        """Whether the caller says where, and not the kernel."""
        return self.call != "mmap" or not {"MAP_FIXED", "MAP_FIXED_NOREPLACE"}.isdisjoint(self.flags)


@dataclass(frozen=True)
class LoadPlan(Showing):
    """What goes where, relative to the load bias.

    ``mappings`` cover ``start`` to ``end`` without overlap, in ascending order.  ``zeroed`` are the parts of
    file pages that are bss.  ``relro`` is made read-only once relocated.  The bias is a multiple of
    ``alignment``.  In code that is ``guarded`` indirect jumps lead to landing pads only (BTI, aarch64).
    """

    page_size: int
    alignment: int
    mappings: tuple[PlannedMapping, ...]
    zeroed: tuple[Span, ...]
    relro: Span
    guarded: bool = False

    def __repr__(self) -> str:
        length, page_size = self.length, self.page_size
        return f"<LoadPlan: {len(self.mappings)} mappings, {length:#x} bytes in pages of {page_size:#x}>"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; ``calls`` are :meth:`calls`, addresses are vaddrs, sizes bytes."""
        return {**asdict(self), "calls": [asdict(call) for call in self.calls()]}

    def to_dataframe(self) -> Any:
        """The calls as a pandas ``DataFrame``, a row each; MiniloaderError without pandas."""
        return dataframe(self.to_json()["calls"])

    @cached_property
    def start(self) -> int:
        """The lowest vaddr mapped."""
        return self.mappings[0].start

    @cached_property
    def end(self) -> int:
        """The vaddr after the last page mapped."""
        return self.mappings[-1].end

    @cached_property
    def length(self) -> int:
        """Bytes of address space from start to end."""
        return self.end - self.start

    def at(self, vaddr: int) -> PlannedMapping | None:
        """The mapping that holds ``vaddr``."""
        place = bisect_right(self.mappings, vaddr, key=attrgetter("start")) - 1
        mapping = self.mappings[place] if place >= 0 else None
        return mapping if mapping is not None and vaddr < mapping.end else None

    def calls(self, *, placed: bool = False) -> tuple[PlannedCall, ...]:
        """The mmap, mprotect and memset calls that carry the plan out, in order.

        The kernel decides where the first one maps, unless it is ``placed`` by who loads; with that the load
        bias (``base``) is settled, and all others are relative to it.

        >>> text = PlannedMapping(0, 0x2000, 0, "r-x", "file")
        >>> data = PlannedMapping(0x2000, 0x3000, 0x1000, "rw-", "file")
        >>> plan = LoadPlan(0x1000, 0x1000, (text, data), (Span(0x2830, 0x3000),), Span(0x2000, 0x2000))
        >>> for call in plan.calls():
        ...     print(call.text())
        base = mmap(NULL, 0x3000, PROT_NONE, MAP_PRIVATE, fd, 0x0)
        mmap(base, 0x2000, PROT_READ|PROT_EXEC, MAP_PRIVATE|MAP_FIXED, fd, 0x0)
        mmap(base+0x2000, 0x1000, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_FIXED, fd, 0x1000)
        memset(base+0x2830, 0, 0x7d0)
        """
        return *_reserve(self, placed), *self._behind_reserve

    def calls_of(self, step: Step) -> list[PlannedCall]:
        """The calls of :meth:`calls` that are of one ``step`` behind reserving room."""
        return [call for call in self._behind_reserve if call.step == step]

    @cached_property
    def _behind_reserve(self) -> tuple[PlannedCall, ...]:
        """The calls of :meth:`calls` but those that reserve room."""
        return tuple(_calls(self))


def plan_segments(
    segments: Sequence[Segment], page_size: int, name: str | None = None, *, guarded: bool = False
) -> LoadPlan:
    """Plan the mappings of ``segments`` for pages of ``page_size`` bytes (a power of two).

    Their code is marked as ``guarded``, or not: see :class:`LoadPlan`.
    Raises :class:`ElfError` where a PT_LOAD cannot be mapped with such pages.
    """
    if page_size < 1 or page_size & (page_size - 1):
        raise UsageError(f"page size {page_size}: expected a power of two")
    every = [segment for segment in segments if segment.type == "PT_LOAD"]
    loads = [segment for segment in every if segment.memsz]
    if not loads:
        raise ElfError(name, "program headers", "no PT_LOAD with memory", "at least one")
    for segment in every:
        _check(segment, page_size, name)
    for previous, segment in pairwise(loads):
        if previous.end > segment.vaddr & -page_size:
            _check_order(previous, segment, page_size, name)
    _check_ends(every, page_size, name)
    mappings: list[PlannedMapping] = []
    for segment in loads:
        for mapping in _pages(segment, page_size):
            if mappings and mappings[-1].end > mapping.start:
                _make_room(mappings, mapping.start)
            mappings.append(mapping)
    alignment = max(page_size, *[segment.align for segment in loads])
    ends = [_zeroed(load, page_size) for load in loads if load.memsz > load.filesz]
    zeroed, relro = tuple(filter(None, ends)), _relro(segments, page_size)
    return LoadPlan(page_size, alignment, _with_gaps(mappings), zeroed, relro, guarded)


def _check(segment: Segment, page_size: int, name: str | None) -> None:
    if segment.align & (segment.align - 1):
        fault = "p_align", f"{segment.align:#x}", "0 or a power of two"
    elif (segment.vaddr - segment.file_offset) % page_size:
        place = f"{segment.file_offset:#x} for p_vaddr {segment.vaddr:#x}"
        fault = "p_offset", place, f"the same remainder by the page size, {page_size:#x}"
    elif segment.filesz > segment.memsz:
        fault = "p_filesz", f"{segment.filesz:#x}", f"at most p_memsz, {segment.memsz:#x}"
    elif segment.end > _LAST - page_size:
        place = f"{segment.memsz:#x} from p_vaddr {segment.vaddr:#x} on"
        fault = "p_memsz", place, "an end within 64 bits"
    else:
        return
    field, found, expected = fault
    raise ElfError(name, f"PT_LOAD[{segment.index}].{field}", found, expected)


def _check_order(previous: Segment, segment: Segment, page_size: int, name: str | None) -> None:
    """Raise :class:`ElfError` for a segment before the end of ``previous``, or in a page of it not for both.

    Pages are mapped whole: what ``previous`` has in the page where ``segment`` begins stays only if it is the
    file's page for both, and ``segment`` grants all the rights that it needs.
    """
    page, end = segment.vaddr & -page_size, previous.end
    field = f"PT_LOAD[{segment.index}].p_vaddr"
    if segment.vaddr < end:
        expected = f"at least {end:#x}, where the segment before it ends"
        raise ElfError(name, field, f"{segment.vaddr:#x}", expected)
    lost = [right for sign, right in _RIGHTS.items() if sign in previous.flags and sign not in segment.flags]
    if previous.end > max(page, previous.file_end):
        what = "the zeros of its bss are lost"
    elif previous.vaddr - previous.file_offset != segment.vaddr - segment.file_offset:
        what = "its content is lost"
    elif lost:
        what = f"its right to {lost[-1]} is lost"
    else:
        return
    found = f"{segment.vaddr:#x}, in a page of PT_LOAD[{previous.index}]: {what}"
    raise ElfError(name, field, found, _another_page(previous.end, page_size))


def _check_ends(loads: Sequence[Segment], page_size: int, name: str | None) -> None:
    """Raise :class:`ElfError` where the last segment begins in a page of the first, as glibc 2.35 does."""
    first, last = loads[0], loads[-1]
    if last is not first and last.vaddr & -page_size < _round_up(first.file_end, page_size):
        found = f"{last.vaddr:#x}, in a page of the first one, which ld.so refuses, too"
        expected = _another_page(first.file_end, page_size)
        raise ElfError(name, f"PT_LOAD[{last.index}].p_vaddr", found, expected)


def _another_page(end: int, page_size: int) -> str:
    return f"at least {_round_up(end, page_size):#x}: pages have {page_size:#x} bytes"


def _round_up(vaddr: int, page_size: int) -> int:
    return -(-vaddr // page_size) * page_size


def _pages(segment: Segment, page_size: int) -> list[PlannedMapping]:
    vaddr, flags = segment.vaddr, segment.flags
    start, file_end = vaddr & -page_size, _round_up(segment.file_end, page_size)
    pages = []
    if file_end > start:
        pages.append(PlannedMapping(start, file_end, segment.file_offset - vaddr + start, flags, "file"))
    if segment.end > file_end:
        pages.append(PlannedMapping(file_end, _round_up(segment.end, page_size), 0, flags, "zero"))
    return pages


def _make_room(mappings: list[PlannedMapping], start: int) -> None:
    """Cut off what is there from ``start`` on: of a page that two segments share, the later wins."""
    while mappings and mappings[-1].start >= start:
        mappings.pop()
    if mappings and mappings[-1].end > start:
        last = mappings.pop()
        mappings.append(PlannedMapping(last.start, start, last.file_offset, last.protection, last.kind))


def _with_gaps(mappings: Sequence[PlannedMapping]) -> tuple[PlannedMapping, ...]:
    first = mappings[0]
    covered, end = [], first.start
    for mapping in mappings:
        start = mapping.start
        if start > end:
            offset = first.file_offset + end - first.start if first.kind == "file" else 0
            covered.append(PlannedMapping(end, start, offset, "---", "gap"))
        covered.append(mapping)
        end = mapping.end
    return tuple(covered)


def _zeroed(segment: Segment, page_size: int) -> Span:
    """The bytes of the segment's last file page that are bss: all to the page's end."""
    return Span(segment.file_end, _round_up(segment.file_end, page_size))


def _relro(segments: Sequence[Segment], page_size: int) -> Span:
    """PT_GNU_RELRO in whole pages: both ends round down, for the last page may hold live data."""
    for segment in segments:
        if segment.type == "PT_GNU_RELRO":
            return Span(segment.vaddr & -page_size, segment.end & -page_size)
    return Span(0, 0)


# -------------------------------------------------------------------------------------------- the calls
def _calls(plan: LoadPlan) -> Iterator[PlannedCall]:
    flags = ("MAP_PRIVATE", "MAP_FIXED")
    for mapping in plan.mappings:
        start, length, protection = mapping.start, mapping.length, mapping.protection
        if mapping.kind == "file":
            why = f"{protection} pages of the file"
            yield PlannedCall("map", "mmap", start, length, protection, flags, mapping.file_offset, why)
        elif mapping.kind == "zero":
            why = "bss: pages of zeroes, of no file"
            yield PlannedCall("map", "mmap", start, length, protection, (*flags, "MAP_ANONYMOUS"), None, why)
    for mapping in plan.mappings if plan.guarded else ():
        if mapping.kind == "file" and "x" in mapping.protection:
            span, why = (mapping.start, mapping.length), "indirect jumps lead to landing pads only"
            yield PlannedCall("guard", "mprotect", *span, f"{mapping.protection}b", (), None, why)
    for zeroed in plan.zeroed:
        yield from _zero(plan, zeroed)
    if plan.relro:
        start, length, why = (
            plan.relro.start,
            plan.relro.end - plan.relro.start,
            "RELRO, once it is relocated",
        )
        yield PlannedCall("protect", "mprotect", start, length, "r--", (), None, why)


def _reserve(plan: LoadPlan, placed: bool) -> Iterator[PlannedCall]:
    """Room for the whole span, so that nothing else can come between: inaccessible pages of the file."""
    flags: tuple[str, ...] = ("MAP_PRIVATE",)
    if placed:
        flags = ("MAP_PRIVATE", "MAP_FIXED_NOREPLACE")
    elif plan.alignment > plan.page_size:
        length, flags = plan.length + plan.alignment, ("MAP_PRIVATE", "MAP_ANONYMOUS")
        why = f"room to spare: base is rounded up to {plan.alignment:#x}, what is left over unmapped"
        yield PlannedCall("reserve", "mmap", plan.start, length, "---", flags, None, why)
        flags = ("MAP_PRIVATE", "MAP_FIXED")
    file_offset, why = plan.mappings[0].file_offset, "room for all, inaccessible"
    yield PlannedCall("reserve", "mmap", plan.start, plan.length, "---", flags, file_offset, why)


def _zero(plan: LoadPlan, span: Span) -> Iterator[PlannedCall]:
    mapping = plan.at(span.start)
    if mapping is None or mapping.kind != "file":
        return  # a later segment took the page
    start, sealed = span.start & -plan.page_size, "w" not in mapping.protection
    pages = (start, span.end - start)
    if sealed:
        why = "writable until its end is zeroed"
        yield PlannedCall("zero", "mprotect", *pages, "rw-", (), None, why)
    why = "bss in the file's last page"
    yield PlannedCall("zero", "memset", span.start, span.end - span.start, "", (), None, why)
    if sealed:
        yield PlannedCall("zero", "mprotect", *pages, mapping.protection, (), None, "as the segment asks")
