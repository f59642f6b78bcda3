"""Chapter 8: how the segments of a library become mappings.  The chapter is a loader's first half."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any, Final

from miniloader.elf import ElfImage, LoadPlan, inspect
from miniloader.errors import EvidenceError
from miniloader.kernel.maps import read_maps, within
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.memory import flag_bits, protection_bits
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, in_words
from miniloader.walkthrough.step import ChangedWord, ChapterStep, Figures, OfPages, PageBytes, Part
from miniloader.walkthrough.traced_calls import quoted
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "MappedRange", "MappedSegments"]

#: A mapping as both the plan and the kernel tell it: first vaddr, end, protection, file offset or None.
MappedRange = tuple[int, int, str, int | None]

#: Looks at the pages of the library, under a title.
_Look = Callable[[str], MappingView]


@dataclass(frozen=True)
class MappedSegments:
    """What was planned, what the kernel shows, and what is in memory."""

    planned: tuple[MappedRange, ...]
    kernel: tuple[MappedRange, ...]
    present_at_first: int
    twice: tuple[str, str]  # states of the two pages that show one file page
    twice_frames: tuple[int, int]
    twice_bytes_equal: bool
    tail: bytes  # what is after the segment's last byte of the file, when zeroed
    tail_in_file: bytes
    tail_state: tuple[str, str]  # of its page, before and after


def _run(bench: Workbench) -> Generator[ChapterStep, None, MappedSegments]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    plan = image.plan(PAGE_SIZE)
    planned = _planned(plan)
    bias = _map(bench, path, plan)
    parts = tuple(Part(mapping.start - plan.start, mapping.protection) for mapping in plan.mappings)

    def look(title: str) -> MappingView:
        rows = [("this process", os.getpid(), bias + plan.start)]
        return bench.look(rows, plan.length // PAGE_SIZE, title, parts)[0]

    kernel, at_first = _in_kernel(bias, plan.start, plan.end), look("mapped")
    columns = ("from", "to", "mode", "shows")
    yield ChapterStep(
        "mapped",
        "One call reserves room for the whole library; then each PT_LOAD is mapped over its part of it.",
        bench.taken(),
        (
            OfPages(
                f"{len(planned)} mappings, and {at_first.present} pages in memory: nothing has been loaded "
                "yet."
            ),
        ),
        tables=(
            Figures("PT_LOAD in the file", _SEGMENTS, _segment_rows(image)),
            Figures("What a loader does with them", ("call", "from", "to", "why"), _call_rows(plan)),
            Figures("/proc/self/maps, less the load bias", columns, _rows(kernel)),
        ),
        grid=at_first.grid,
    )
    touched, (first, second), alike = yield from _mapped_twice(bench, image, plan, bias, look)
    zeroed, in_file, tail_state = yield from _zero_the_tail(bench, plan, bias, look)
    return MappedSegments(
        planned=planned,
        kernel=kernel,
        present_at_first=at_first.present,
        twice=(touched.states[first], touched.states[second]),
        twice_frames=(touched.frames[first], touched.frames[second]),
        twice_bytes_equal=alike,
        tail=zeroed,
        tail_in_file=in_file,
        tail_state=tail_state,
    )


def _map(bench: Workbench, path: str, plan: LoadPlan) -> int:
    """Make the mmap calls of ``plan``; the load bias, which the first of them settles."""
    fd = bench.opened(path)
    reserve, *calls = (call for call in plan.calls() if call.step in ("reserve", "map"))
    bits = protection_bits(reserve.protection)
    bias = bench.mapped(reserve.length, bits, flag_bits(reserve.flags), fd).address - plan.start
    for call in calls:
        file = (-1, 0) if call.file_offset is None else (fd, call.file_offset)
        bits = protection_bits(call.protection)
        bench.mmap(call.length, bits, flag_bits(call.flags), *file, address=bias + call.start)
    return bias


def _planned(plan: LoadPlan) -> tuple[MappedRange, ...]:
    return tuple(
        (
            mapping.start,
            mapping.end,
            mapping.protection,
            mapping.file_offset if mapping.kind == "file" else None,
        )
        for mapping in plan.mappings
        if mapping.kind != "gap"
    )


def _in_kernel(bias: int, start: int, end: int) -> tuple[MappedRange, ...]:
    """What ``maps`` has between vaddrs ``start`` and ``end``, in vaddrs."""
    return tuple(
        (vma.start - bias, vma.end - bias, vma.protection, vma.file_offset if vma.is_file else None)
        for vma in within(read_maps(), bias + start, bias + end)
        if vma.protection != "---"
    )


def _rows(ranges: tuple[MappedRange, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (f"{start:#x}", f"{end:#x}", protection, "zeros" if offset is None else f"file, from {offset:#x}")
        for start, end, protection, offset in ranges
    )


_SEGMENTS = ("flags", ">file offset", ">in file", ">vaddr", ">in memory")


def _segment_rows(image: ElfImage) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (load.flags, f"{load.file_offset:#x}", f"{load.filesz:#x}", f"{load.vaddr:#x}", f"{load.memsz:#x}")
        for load in image.loads
    )


def _call_rows(plan: LoadPlan) -> tuple[tuple[str, ...], ...]:
    return tuple((call.call, f"{call.start:#x}", f"{call.end:#x}", call.why) for call in plan.calls())


def _mapped_twice(
    bench: Workbench, image: ElfImage, plan: LoadPlan, bias: int, look: _Look
) -> Generator[ChapterStep, None, tuple[MappingView, tuple[int, int], bool]]:
    """Read the file page that is mapped twice; the view then, its two pages, and whether they are alike."""
    first, second, offset = _file_page_mapped_twice(plan)
    length = min(PAGE_SIZE, image.source.size - offset)
    read = [
        bench.load(bias + vaddr, length, f"library[{vaddr:#x}:{vaddr + length:#x}]")
        for vaddr in (first, second)
    ]
    view = look("read")
    pages = ((first - plan.start) // PAGE_SIZE, (second - plan.start) // PAGE_SIZE)
    yield ChapterStep(
        "one file page, mapped twice",
        f"Constants end and data begins in one page of the file. It is seen at {first:#x}, read-only, and "
        f"at {second:#x}, writable.",
        bench.taken(),
        (
            OfPages(f"At {first:#x}: {view.words(pages[0])}. At {second:#x}: {view.words(pages[1])}."),
            "That saves a page in the file; each mapping uses its own part of it.",
        ),
        grid=view.grid,
    )
    return view, pages, read[0] == read[1]


def _file_page_mapped_twice(plan: LoadPlan) -> tuple[int, int, int]:
    """Two vaddrs that show the same page of the file, and its offset; EvidenceError where there is none."""
    vaddrs: dict[int, int] = {}
    for start, end, _, offset in _planned(plan):
        if offset is not None:
            for vaddr in range(start, end, plan.page_size):
                first = vaddrs.setdefault(offset + vaddr - start, vaddr)
                if first != vaddr:
                    return first, vaddr, offset + vaddr - start
    raise EvidenceError(
        f"with pages of {plan.page_size} bytes no page of this library's file is mapped twice"
    )


def _zero_the_tail(
    bench: Workbench, plan: LoadPlan, bias: int, look: _Look
) -> Generator[ChapterStep, None, tuple[bytes, bytes, tuple[str, str]]]:
    """Zero what follows the data; what is there then, what the file had there, and the page's two states."""
    tail = next(call for call in plan.calls() if call.call == "memset")
    page, near = (tail.start - plan.start) // PAGE_SIZE, min(32, tail.length)
    around, name = bias + tail.start - 32, f"library[{tail.start - 32:#x}:{tail.start + near:#x}]"
    # Looked at once it was read: a touch nearby maps a page only if its folio is not locked just then.
    bytes_before, before = bench.load(around, 32 + near, name), look("tail read")
    bench.store(bias + tail.start, bytes(tail.length), f"library[{tail.start:#x}:{tail.end:#x}]")
    zeroed = bench.load(bias + tail.start, tail.length, f"library[{tail.start:#x}:{tail.end:#x}]")
    bytes_after = bench.load(around, 32 + near, name)
    after = look("tail zeroed")
    pages = range(max(page - 1, 0), page + 1)
    bss = ChangedWord(32, near, "bss: zeroed by the loader")
    title = "where data ends and bss begins"
    yield ChapterStep(
        "the tail is zeroed",
        f"The file's part of the data ends at {tail.start:#x}, in the middle of a page. What follows is bss "
        "and has to be zero; what is there is whatever comes next in the file.",
        bench.taken(),
        (OfPages(f"So the loader writes zeros, and that copies the page: {after.words(page)}."),),
        evidence=(before_and_after("Pages of the data segment", before, after, pages),),
        bytes=(PageBytes(title, tail.start - 32, bytes_before, bytes_after, (bss,)),),
        grid=after.grid,
    )
    return zeroed, bytes_before[32:], (before.states[page], after.states[page])


# ---------------------------------------------------------------------------------------- claims
@claim("segments-decide", "Each mapping is what a program header asks for")
def _decides(seen: MappedSegments) -> Finding:
    as_planned = sum(mapping in seen.kernel for mapping in seen.planned)
    return Finding(
        as_planned == len(seen.planned) == len(seen.kernel),
        f"{len(seen.planned)} mappings, as the program headers say",
        f"{len(seen.kernel)} in /proc/self/maps, {as_planned} of them as planned",
    )


@equal("nothing-loaded", "Mapping a library loads none of it", 0, "{} pages in memory", "flags")
def _nothing(seen: MappedSegments) -> int:
    return seen.present_at_first


@claim("one-page-twice", "One page of the file is mapped at two addresses", "flags")
def _twice(seen: MappedSegments) -> Finding:
    frames = seen.twice_frames
    same = frames[0] == frames[1]
    return Finding(
        {*seen.twice} <= {"sole", "shared"} and seen.twice_bytes_equal and same,
        "the same bytes, both the page cache's own page",
        f"{in_words(seen.twice)}; bytes {'equal' if seen.twice_bytes_equal else 'differ'}"
        + ("; one frame" if same and frames[0] else "" if same else "; two frames"),
    )


@claim("tail-was-not-zero", "Past the end of the data come other bytes of the file", "flags")
def _before(seen: MappedSegments) -> Finding:
    return Finding(
        any(seen.tail_in_file) and seen.tail_state[0] in ("sole", "shared"),
        "other bytes of the file, on the page cache's page",
        f"{quoted(seen.tail_in_file[:8])}, {in_words([seen.tail_state[0]])}",
    )


_ZEROED = "{} bytes are not zero; the page: {}"


@equal("tail-zeroed", "The loader zeroes that tail, on a copy", (0, "private page"), _ZEROED, "flags")
def _zeroed(seen: MappedSegments) -> tuple[int, str]:
    return sum(map(bool, seen.tail)), in_words([seen.tail_state[1]])


_SNIPPET = """\
import mmap, os, tempfile

PAGE = mmap.PAGESIZE
file = tempfile.TemporaryFile()
file.write(b"d" * 100 + b"other things in the file".ljust(PAGE - 100, b"!"))
file.flush()

# A segment: filesz 100, memsz PAGE.  After its 100 bytes it must be zero.
segment = mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE)
"""


def _check(names: dict[str, Any]) -> Answer:
    segment, in_file = bytes(names["segment"][:]), os.pread(names["file"].fileno(), 200, 0)
    if in_file[100:105] != b"other":
        return Answer(False, "the file was changed; only this process's pages may be")
    if segment[:100] != b"d" * 100:
        return Answer(False, "the first 100 bytes should be the file's")
    unzeroed = sum(map(bool, segment[100:]))
    if unzeroed:
        return Answer(False, f"{unzeroed} bytes of the tail are not zero")
    return Answer(True, "the tail is zero, as bss is")


CHAPTER: Final[Chapter[MappedSegments]] = Chapter(
    id="segments",
    number=8,
    title="From segments to mappings",
    claim="The PT_LOAD entries of a library decide every mapping of it.",
    surprise="One page of the file can be mapped twice, and the end of the data is zeroed by hand.",
    claims=(_decides, _nothing, _twice, _before, _zeroed),
    question=Quiz(
        "A segment has 0x190 bytes in the file and 0x1190 in memory. Where do the other 0x1000 come from?",
        (
            Choice("From the file", "The file ends the segment at 0x190; what follows belongs to others."),
            Choice(
                "Zeros: the rest of the page is written, further pages are anonymous",
                "The last page of the file's part is zeroed by a write, whole pages come from no file.",
            ),
            Choice("They do not exist until used", "Their addresses do; the program may read zeros at once."),
        ),
        1,
    ),
    explanation=(
        "A loader makes one mmap call for each PT_LOAD: file offset and vaddr are rounded down to whole "
        "pages together, which works since both leave the same remainder. First it reserves the whole span, "
        "so that nobody else comes between.",
        "Rounding means that a mapping may show bytes at its edges that belong to a neighbour: one page of "
        "the file is then mapped twice, once for each.",
        "bss is memsz minus filesz: the part in the file's last page is zeroed by a store, which copies that "
        "page; the rest is anonymous memory.",
    ),
    sources=("System V gABI and psABI, Program Loading", "glibc, elf/dl-map-segments.h", "elf(5), Phdr"),
    exercise=Exercise(
        "Make the segment as a loader would: its first 100 bytes from the file, zeros after that, the file "
        "itself as it is.",
        _SNIPPET,
        _SNIPPET + "segment[100:] = bytes(PAGE - 100)\n",
        _check,
        hints=(
            "What is behind the first 100 bytes of the page, and what should be there?",
            "The mapping is private: segment[100:] = bytes(PAGE - 100) zeroes the tail, and the file "
            "stays as it is.",
        ),
    ),
    source_of={
        "segments-decide": (
            "System V gABI, Program Loading; elf(5), PT_LOAD: the bytes from the file are mapped"
        ),
        "nothing-loaded": "mmap(2), MAP_POPULATE: only with it are page tables prefaulted",
        "one-page-twice": (
            "System V psABI, AMD64, 5.1, Program Loading: the end of text and the beginning of data will "
            "be mapped twice"
        ),
        "tail-was-not-zero": (
            "System V psABI, AMD64, 5.1, Program Loading: the last data page may contain file information"
            " not relevant"
        ),
        "tail-zeroed": (
            "System V psABI, AMD64, 5.1, Program Loading: the extraneous data must be set to zero; glibc,"
            " elf/dl-map-segments.h"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "Two segments meet in the middle of one page of the file. What does a loader do?",
            (
                Choice("It copies the page", "It need not: a page of a file can be mapped more than once."),
                Choice(
                    "It maps that page twice", "At two addresses, with two protections: each uses its part."
                ),
                Choice("It refuses the library", "Linkers do this to save room in the file."),
            ),
            1,
            step="one file",
        ),
        Quiz(
            "The file's part of the data ends inside a page, and bss begins there. What is in the "
            "rest of that page?",
            (
                Choice(
                    "Zeros, from the kernel",
                    "Only what is past the end of the file is zeros. The file goes on.",
                ),
                Choice(
                    "Whatever comes next in the file",
                    "So the loader writes zeros over it, and the page is copied.",
                ),
                Choice("Nothing: it cannot be read", "It is part of a page that is mapped."),
            ),
            1,
            step="the tail",
        ),
    ),
)
