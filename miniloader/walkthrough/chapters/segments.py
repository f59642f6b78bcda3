"""Chapter 7: how the segments of a library become mappings.  The chapter is a loader's first half."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from miniloader.elf import ElfImage, inspect
from miniloader.elf.plan import PlannedCall, PlannedMapping
from miniloader.errors import EvidenceError
from miniloader.kernel.maps import read_maps, within
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.memory import flag_bits, protection_bits
from miniloader.values import dataclass
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    PageBytes,
    Part,
    Question,
    Statement,
    Step,
    Table,
    Word,
)
from miniloader.walkthrough.recorded_calls import Mapping
from miniloader.walkthrough.workbench import Bench, rows_of, shipped

__all__ = ["CHAPTER", "Line", "Seen"]

#: A mapping as both the plan and the kernel tell it: first vaddr, end, protection, file offset or None.
Line = tuple[int, int, str, int | None]


@dataclass(frozen=True)
class Seen:
    """What was planned, what the kernel shows, and what is in memory."""

    planned: tuple[Line, ...]
    kernel: tuple[Line, ...]
    present_at_first: int
    twice: tuple[str, str]  # states of the two pages that show one file page
    twice_frames: tuple[int, int]
    twice_bytes_equal: bool
    tail: bytes  # what is after the segment's last byte of the file, when zeroed
    tail_in_file: bytes
    tail_state: tuple[str, str]  # of its page, before and after


def _planned(mappings: tuple[PlannedMapping, ...]) -> tuple[Line, ...]:
    return tuple(
        (one.start, one.end, one.protection, one.file_offset if one.kind == "file" else None)
        for one in mappings
        if one.kind != "gap"
    )


def _in_kernel(bias: int, start: int, end: int) -> tuple[Line, ...]:
    """What ``maps`` has there, in vaddrs."""
    return tuple(
        (vma.start - bias, vma.end - bias, vma.protection, vma.file_offset if vma.is_file else None)
        for vma in within(read_maps(), bias + start, bias + end)
        if vma.protection != "---"
    )


def _rows(lines: tuple[Line, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (f"{start:#x}", f"{end:#x}", protection, "zeros" if offset is None else f"file, from {offset:#x}")
        for start, end, protection, offset in lines
    )


def _file_page_mapped_twice(lines: tuple[Line, ...]) -> tuple[int, int]:
    """Two vaddrs that show the same page of the file; EvidenceError where there is none."""
    pages: dict[int, int] = {}
    for start, end, _, offset in lines:
        for vaddr in range(start, end, PAGE_SIZE) if offset is not None else ():
            first = pages.setdefault((offset or 0) + vaddr - start, vaddr)
            if first != vaddr:
                return first, vaddr
    raise EvidenceError(f"with pages of {PAGE_SIZE} bytes no page of this library's file is mapped twice")


def _mmap(bench: Bench, call: PlannedCall, fd: int, address: int = 0) -> Mapping:
    """Map as a call of the plan says, at ``address`` or where there is room."""
    file = (-1, 0) if call.file_offset is None else (fd, call.file_offset)
    return bench.mmap(
        call.length, protection_bits(call.protection), flag_bits(call.flags), *file, address=address
    )


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    plan = image.plan(PAGE_SIZE)
    planned = _planned(plan.mappings)
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    calls = plan.calls()
    room = bench.keep(_mmap(bench, calls[0], fd))
    bias = room.address - plan.start
    for call in calls:
        if call.step == "map":
            _mmap(bench, call, fd, bias + call.start)
    kernel = _in_kernel(bias, plan.start, plan.end)
    parts = tuple(Part(one.start - plan.start, one.protection) for one in plan.mappings)
    row = [("this process", os.getpid(), room.address)]
    pages = plan.length // PAGE_SIZE
    at_first = bench.look(row, pages, "mapped", parts)[0]
    yield Step(
        "mapped",
        "One call reserves room for the whole library; then each PT_LOAD is mapped over its part of it.",
        bench.calls(),
        (f"{len(planned)} mappings, and {at_first.present} pages in memory: nothing has been loaded yet.",),
        tables=(
            Table("PT_LOAD in the file", _SEGMENTS, _segment_rows(image)),
            Table("/proc/self/maps, less the load bias", ("from", "to", "mode", "shows"), _rows(kernel)),
        ),
        grid=at_first.grid,
    )

    first, second = _file_page_mapped_twice(planned)
    size = image.source.size
    offset = next(line[3] or 0 for line in planned if line[0] <= first < line[1]) // PAGE_SIZE * PAGE_SIZE
    length = min(PAGE_SIZE, size - offset)
    once = bench.load(bias + first, length, f"library[{first:#x}:+{length}]")
    again = bench.load(bias + second, length, f"library[{second:#x}:+{length}]")
    touched = bench.look(row, pages, "read", parts)[0]
    page, other = (first - plan.start) // PAGE_SIZE, (second - plan.start) // PAGE_SIZE
    yield Step(
        "one file page, mapped twice",
        f"Constants end and data begins in one page of the file. It is seen at {first:#x}, read-only, and "
        f"at {second:#x}, writable.",
        bench.calls(),
        (
            f"At {first:#x}: {touched.words(page)}. At {second:#x}: {touched.words(other)}.",
            "That saves a page in the file; each mapping uses its own part of it.",
        ),
        grid=touched.grid,
    )

    tail = next(call for call in calls if call.call == "memset")
    tail_page = (tail.start - plan.start) // PAGE_SIZE
    near = min(32, tail.end - tail.start)
    around = bias + tail.start - 32
    bytes_before = bench.load(around, 32 + near, f"library[{tail.start - 32:#x}:+{32 + near}]")
    bench.store(bias + tail.start, bytes(tail.end - tail.start), f"library[{tail.start:#x}:{tail.end:#x}]")
    zeroed = bench.load(bias + tail.start, tail.end - tail.start, f"library[{tail.start:#x}:{tail.end:#x}]")
    bytes_after = bench.load(around, 32 + near, f"library[{tail.start - 32:#x}:+{32 + near}]")
    after = bench.look(row, pages, "tail zeroed", parts)[0]
    yield Step(
        "the tail is zeroed",
        f"The file's part of the data ends at {tail.start:#x}, in the middle of a page. What follows is bss "
        "and has to be zero; what is there is whatever comes next in the file.",
        bench.calls(),
        (f"So the loader writes zeros, and that copies the page: {after.words(tail_page)}.",),
        evidence=(
            Evidence(
                "Pages of the data segment",
                "/proc/self/pagemap",
                rows_of(touched, after, range(max(tail_page - 1, 0), tail_page + 1)),
            ),
        ),
        bytes=(
            PageBytes(
                "where data ends and bss begins",
                tail.start - 32,
                bytes_before,
                bytes_after,
                (Word(32, near, "bss: zeroed by the loader"),),
            ),
        ),
        grid=after.grid,
    )
    return Seen(
        planned,
        kernel,
        at_first.present,
        (touched.states[page], touched.states[other]),
        (touched.frames[page], touched.frames[other]),
        once == again,
        zeroed,
        bytes_before[32:],
        (touched.states[tail_page], after.states[tail_page]),
    )


_SEGMENTS = ("flags", ">file offset", ">in file", ">vaddr", ">in memory")


def _segment_rows(image: ElfImage) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (one.flags, f"{one.file_offset:#x}", f"{one.filesz:#x}", f"{one.vaddr:#x}", f"{one.memsz:#x}")
        for one in image.loads
    )


# ---------------------------------------------------------------------------------------- claims
def _decides(seen: Seen) -> Finding:
    missing = [line for line in seen.planned if line not in seen.kernel]
    return Finding(
        not missing and len(seen.planned) == len(seen.kernel),
        f"{len(seen.planned)} mappings, as the program headers say",
        f"{len(seen.kernel)} in /proc/self/maps, {len(seen.planned) - len(missing)} of them as planned",
    )


def _nothing(seen: Seen) -> Finding:
    return Finding(seen.present_at_first == 0, "0 pages in memory", str(seen.present_at_first))


def _twice(seen: Seen) -> Finding:
    frames = seen.twice_frames
    same = frames[0] == frames[1]
    good = {*seen.twice} <= {"sole", "shared"} and seen.twice_bytes_equal and same
    return Finding(
        good,
        "the same bytes, both the page cache's own page",
        f"{', '.join(seen.twice)}; bytes {'equal' if seen.twice_bytes_equal else 'differ'}"
        + ("; one frame" if same and frames[0] else "" if same else "; two frames"),
    )


def _zeroed(seen: Seen) -> Finding:
    return Finding(
        not any(seen.tail) and seen.tail_state[1] == "copied",
        "only zeros, on a page of our own",
        f"{sum(map(bool, seen.tail))} bytes are not zero; the page is {seen.tail_state[1]}",
    )


def _before(seen: Seen) -> Finding:
    return Finding(
        any(seen.tail_in_file) and seen.tail_state[0] in ("sole", "shared"),
        "other bytes of the file, on the page cache's page",
        f"{seen.tail_in_file[:8]!r}, {seen.tail_state[0]}",
    )


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
    left = sum(map(bool, segment[100:]))
    return Answer(
        not left, f"{left} bytes of the tail are not zero" if left else "the tail is zero, as bss is"
    )


CHAPTER = Chapter(
    id="segments",
    number=7,
    title="From segments to mappings",
    claim="The PT_LOAD entries of a library decide every mapping of it.",
    surprise="One page of the file can be mapped twice, and the end of the data is zeroed by hand.",
    claims=(
        Statement("segments-decide", "Each mapping is what a program header asks for", _decides),
        Statement("nothing-loaded", "Mapping a library loads none of it", _nothing, "flags"),
        Statement("one-page-twice", "One page of the file is mapped at two addresses", _twice, "flags"),
        Statement(
            "tail-was-not-zero", "Past the end of the data come other bytes of the file", _before, "flags"
        ),
        Statement("tail-zeroed", "The loader zeroes that tail, on a copy", _zeroed, "flags"),
    ),
    question=Question(
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
    sources=("System V gABI, chapter 5, Program Loading", "glibc, elf/dl-map-segments.h", "elf(5), Phdr"),
    exercise=Exercise(
        "Make the segment as a loader would: its first 100 bytes from the file, zeros after that, the file "
        "itself as it is.",
        _SNIPPET,
        _SNIPPET + "segment[100:] = bytes(PAGE - 100)\n",
        _check,
    ),
    run=_run,
)
