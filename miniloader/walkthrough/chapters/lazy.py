"""Chapter 2: pages enter memory when they are touched."""

from __future__ import annotations

import ctypes
import os
import resource
from collections import Counter
from collections.abc import Generator
from typing import Any, Final

import numpy as np

from miniloader.errors import EvidenceError
from miniloader.kernel.frames import KPF, frame_flags
from miniloader.kernel.syscalls import MAP_PRIVATE, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE, mincore
from miniloader.values import NamedTuple, dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import MappingView, address_of, in_words, states_of
from miniloader.walkthrough.step import BeforeAfter, ChapterStep, Figures, OfPages, Row
from miniloader.walkthrough.traced_calls import Mapping
from miniloader.walkthrough.workbench import Workbench
from miniloader.whole_numbers import count

__all__ = ["CHAPTER", "Faults", "TouchedPages"]

_PAGES = 1024
_LENGTH = _PAGES * PAGE_SIZE
_TOUCHED = 300
_ENTRIES = PAGE_SIZE // 8  # of a page table: one word each
_AROUND = max((64 << 10) // PAGE_SIZE, 1)  # pages, as Linux has it from the start (fault_around_bytes)
_FOLIOS = (64, 128, 256, 512) if PAGE_SIZE == 4096 else (16, 32, 64)
_TRIES = 5


class Faults(NamedTuple):
    """How often a touch had to wait for the kernel: without the disk (minor), and for it (major)."""

    minor: int
    major: int


@dataclass(frozen=True)
class TouchedPages:
    """What was seen; counts of pages and of faults."""

    before: int  # pages present when mapped
    touched_before: str  # state of the page that is then touched
    touched_after: str
    by_one_touch: int
    by_one_write: int
    cached: int  # pages of the file that the page cache still had when it was to be cold
    cold: Faults
    warm: Faults
    everything: int  # pages present when all were touched


def _run(bench: Workbench) -> Generator[ChapterStep, None, TouchedPages]:
    fd = bench.opened(bench.file("large", os.urandom(_LENGTH)))
    before, after = yield from _one_touch(bench, fd)
    yield from _folios(bench)
    written = yield from _one_write(bench, fd)
    cached, cold, warm, everything = yield from _cold_and_warm(bench)
    yield from _one_at_a_time(bench)
    return TouchedPages(
        before=before.present,
        touched_before=before.states[_TOUCHED],
        touched_after=after.states[_TOUCHED],
        by_one_touch=len(after.pages("shared", "sole")),
        by_one_write=written.present,
        cached=cached,
        cold=cold,
        warm=warm,
        everything=everything,
    )


def _one_touch(bench: Workbench, fd: int) -> Generator[ChapterStep, None, tuple[MappingView, MappingView]]:
    memory = bench.mapped(_LENGTH, PROT_READ, MAP_SHARED, fd)
    before = bench.look_at(memory, title="mapped")
    bench.load(memory.page(_TOUCHED), 1, f"p[{_TOUCHED * PAGE_SIZE}]")
    after = bench.look_at(memory, title="one touch")
    pages = after.pages("shared", "sole")
    around = f"{pages[0]} to {pages[-1]}" if pages else "none"
    rows = (
        Row("present", f"{before.present}", f"{after.present} of {_PAGES:,}"),
        Row(f"page {_TOUCHED}", before.words(_TOUCHED), after.words(_TOUCHED)),
        Row("page 0", before.words(0), after.words(0)),
    )
    yield ChapterStep(
        "one touch",
        f"A file of {_PAGES:,} pages, all in the page cache, is mapped; one byte of page {_TOUCHED} is read.",
        bench.taken(),
        (
            OfPages(
                f"One fault brought {count(len(pages), 'page')}: {around}. The kernel maps what is at hand "
                "around the one that was asked for."
            ),
            "So a page that is present need not have been touched.",
        ),
        evidence=(BeforeAfter("Pages of the mapping", "/proc/self/pagemap", rows),),
        grid=after.grid,
    )
    return before, after


def _folios(bench: Workbench) -> Generator[ChapterStep, None, None]:
    """One touch of files whose pages lie in folios of different sizes; several files of each."""
    rows = []
    for pages in _FOLIOS:
        views = [_touch_new(bench, f"of-{pages}-{number}", pages) for number in range(_TRIES)]
        bench.taken()
        folios = Counter(_folio(view.frames[pages // 2]) for view in views)
        mapped = Counter(f"{view.present}" for view in views)
        rows.append((f"{pages}", _tally(folios), _tally(mapped)))
    for pages in _FOLIOS:
        bench.note(f"{_TRIES} times: open, mmap, load 1 byte of page {pages // 2} of {pages}", access=True)
    columns = (">pages written at once", "pages of the folio", "pages mapped by one touch")
    yield ChapterStep(
        "what comes along",
        "Files that were written in one call each; the file system may keep such pages together, in one "
        f"folio. One byte of each file is read; {_TRIES} files of each size.",
        bench.taken(),
        (
            f"As a rule a read fault maps up to {_AROUND} pages, 64 KiB, around the one that was asked for, "
            "however large its folio is. It may be that page alone, or the folio as a whole.",
            f"A folio that fills a whole table of {_ENTRIES} entries is mapped at once: by one entry of the "
            "page middle directory, the level above.",
        ),
        tables=(Figures("One read fault", columns, tuple(rows)),),
    )


def _touch_new(bench: Workbench, name: str, pages: int) -> MappingView:
    """A fresh file of so many pages, mapped, when one byte in its middle has been read."""
    fd = bench.opened(bench.file(name, os.urandom(pages * PAGE_SIZE)))
    memory = bench.mapped(pages * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    bench.load(memory.page(pages // 2))
    return bench.look_at(memory)


def _tally(counts: Counter[str]) -> str:
    """What was seen, the most frequent first: ``16 (4 times), 1``."""
    return ", ".join(f"{text} ({times} times)" if times > 1 else text for text, times in counts.most_common())


def _folio(frame: int) -> str:
    """How many pages the folio of ``frame`` has, where that is told; it lies at a multiple of its size."""
    if not frame:
        return "only root may know"
    first = frame - frame % _ENTRIES
    try:
        flags = frame_flags(np.arange(first, first + _ENTRIES, dtype=np.uint64))
    except EvidenceError:
        return "not told"
    tails = (flags & KPF["compound_tail"].mask) != 0
    starts = np.flatnonzero(~tails)  # each folio's first page
    before = starts[starts <= frame - first]
    after = starts[starts > frame - first]
    return f"{(after[0] if len(after) else _ENTRIES) - before[-1]}" if len(before) else "not told"


def _one_write(bench: Workbench, fd: int) -> Generator[ChapterStep, None, MappingView]:
    private = bench.mapped(_LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd)
    bench.store(private.page(_TOUCHED), b"x", f"q[{_TOUCHED * PAGE_SIZE}]")
    written = bench.look_at(private, title="one write")
    yield ChapterStep(
        "one write",
        "The same file in a private mapping; this time the first touch is a store.",
        bench.taken(),
        (
            OfPages(
                f"One fault brought {count(written.present, 'page')}: a write needs a copy, and copies are "
                "made one at a time."
            ),
        ),
        grid=written.grid,
    )
    return written


def _cold_and_warm(bench: Workbench) -> Generator[ChapterStep, None, tuple[int, Faults, Faults, int]]:
    """Read a file twice; how much of it was cached, the faults of both times, and the pages at last."""
    fd = bench.opened(bench.file("cold", os.urandom(_LENGTH)))
    bench.drop_cache(fd)
    cached = _cached(bench, fd)
    faults = []
    for _ in range(2):
        mapping = bench.mmap(_LENGTH, PROT_READ, MAP_SHARED, fd)
        faults.append(_touch_all(bench, mapping))
        everything = bench.look_at(mapping).present
        bench.munmap(mapping)
    cold, warm = faults
    rows = tuple(
        (file, f"{_PAGES:,}", f"{touched.minor}", f"{touched.major}")
        for file, touched in (("cold", cold), ("warm", warm))
    )
    columns = ("file", ">pages touched", ">minor faults", ">major faults")
    yield ChapterStep(
        "cold and warm",
        "A file that the page cache has let go of is mapped and read page by page, and then once more.",
        bench.taken(),
        (
            f"Cold: {cold.major} of the faults waited for the disk; read-ahead brought the rest in time.",
            f"Warm: {warm.major} of them did, and {warm.minor} were enough for {_PAGES:,} pages.",
        ),
        tables=(Figures("getrusage(2)", columns, rows),),
    )
    return cached, cold, warm, everything


def _cached(bench: Workbench, fd: int) -> int:
    """How many pages of the file are in the page cache."""
    memory = bench.mmap(_LENGTH, PROT_READ, MAP_SHARED, fd)
    text = f"mincore({memory.address:#x}, {memory.length}, …)"
    cached = sum(bench.do(text, lambda: mincore(*memory), lambda pages: f"0: {sum(pages)} pages"))
    bench.munmap(memory)
    return cached


def _touch_all(bench: Workbench, mapping: Mapping) -> Faults:
    """Read a byte of each page, in order; the faults that took."""
    array = (ctypes.c_char * mapping.length).from_address(mapping.address)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for offset in range(0, mapping.length, PAGE_SIZE):
        array[offset]
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = Faults(after.ru_minflt - before.ru_minflt, after.ru_majflt - before.ru_majflt)
    text = f"load 1 byte of each of {mapping.pages:,} pages"
    bench.note(text, f"{faults.minor} minor, {faults.major} major faults", access=True)
    return faults


def _one_at_a_time(bench: Workbench) -> Generator[ChapterStep, None, None]:
    fd = bench.opened(bench.file("random", os.urandom(_LENGTH)))
    bench.drop_cache(fd)
    memory = bench.mapped(_LENGTH, PROT_READ, MAP_SHARED, fd)
    bench.madvise(memory, "MADV_RANDOM")
    bench.load(memory.page(_TOUCHED), 1, f"p[{_TOUCHED * PAGE_SIZE}]")
    view = bench.look_at(memory, title="cold, at random")
    yield ChapterStep(
        "one at a time",
        "A cold file again, and the kernel is told that we read at random: no read-ahead.",
        bench.taken(),
        (OfPages(f"One touch brought {view.present} of {_PAGES:,} pages: there was nothing else to bring."),),
        grid=view.grid,
    )


# ---------------------------------------------------------------------------------------- claims
@claim("on-demand", "Pages are mapped when they are touched", "flags")
def _on_demand(pages: TouchedPages) -> Finding:
    came = pages.touched_before == "absent" and pages.touched_after in ("shared", "sole")
    return Finding(
        pages.before == 0 and came and pages.by_one_touch < _PAGES,
        "0 pages when mapped; the page when it is touched, and not the whole file",
        f"{pages.before} pages, then {pages.by_one_touch} of {_PAGES:,}; "
        f"the page: {in_words([pages.touched_after])}",
    )


@claim("one-fault-many", "One fault brings the page, and may bring neighbours", "flags")
def _at_least_one(pages: TouchedPages) -> Finding:
    return Finding(pages.by_one_touch >= 1, "1 page or more by one touch", f"{pages.by_one_touch}")


@equal("write-one", "A write to a private page brings that page alone", 1, "pages by one write: {}", "flags")
def _write_one(pages: TouchedPages) -> int:
    return pages.by_one_write


@claim("by-fault", "Every page comes by a page fault", "flags")
def _by_fault(pages: TouchedPages) -> Finding:
    faults = sum(pages.warm)
    return Finding(
        1 <= faults <= _PAGES + 64 and pages.everything == _PAGES,
        f"all {_PAGES:,} pages, by at least one fault and at most one each",
        f"{pages.everything:,} pages by {faults} faults",
    )


@claim("cold-and-warm", "A cold file waits for the disk, a warm one does not")
def _cold_major(pages: TouchedPages) -> Finding:
    expected = "cold: at least one fault waits for the disk; warm: none"
    observed = f"cold: {pages.cold.major}, warm: {pages.warm.major}"
    if pages.cached:
        reason = f"the page cache would not let go of {pages.cached:,} pages of the file"
        return Finding(None, expected, observed, reason)
    return Finding(pages.cold.major >= 1 and pages.warm.major == 0, expected, observed)


_SNIPPET = """\
import mmap, os, tempfile

PAGES, PAGE = 64, mmap.PAGESIZE
with tempfile.TemporaryFile() as file:
    file.write(os.urandom(PAGES * PAGE))
    file.flush()
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)

first = memory[20 * PAGE]          # a read: more than one page comes
"""


def _check(names: dict[str, Any]) -> Answer:
    memory = names["memory"]
    states = states_of(memory)
    present = sum(state != "absent" for state in states)
    if states[20] == "absent":
        return Answer(False, "page 20 is not in the page table")
    if present > 1:
        return Answer(
            False, f"{present} pages are in the page table, 1 was asked for; what if you do not read?"
        )
    near = slice(20 - 20 % _AROUND, 20 - 20 % _AROUND + _AROUND)
    if not states[20].startswith("copied") and sum(mincore(address_of(memory), len(memory))[near]) > 1:
        return Answer(
            False,
            "page 20 came alone by chance: pages around it are in the page cache, and as a rule a read "
            "brings them, too; what if you do not read?",
        )
    return Answer(True, "one fault brought exactly one page")


CHAPTER: Final[Chapter[TouchedPages]] = Chapter(
    id="lazy",
    number=2,
    title="Lazy loading",
    claim="A page enters memory when it is first touched, and not before.",
    surprise=f"One read may bring 1 page, {_AROUND}, or all of {_ENTRIES}; one write brings exactly 1.",
    claims=(_on_demand, _at_least_one, _write_one, _by_fault, _cold_major),
    question=Quiz(
        f"A file of {_PAGES:,} pages is in the page cache. A program maps it and reads one byte. "
        "How many pages has its page table then?",
        (
            Choice("1", "It could be, and for a write it is. For a read the kernel is more generous."),
            Choice(
                "1 or more",
                f"The one; as a rule its neighbours, up to 64 KiB, or {_ENTRIES} that lie together.",
            ),
            Choice(f"{_PAGES:,}", "That is what MAP_POPULATE asks for. Without it, only what is near."),
        ),
        1,
    ),
    explanation=(
        "Touching a page that has no entry raises a page fault. The kernel looks up the mapping, finds the "
        "page in the page cache or reads it from the disk (a major fault), fills in the entry, and lets the "
        "instruction run again. The program notices nothing but the time.",
        "Since a fault costs more than an entry, a read fault maps pages around it, too, if they are in "
        "the page cache: as a rule up to 64 KiB (fault-around), whatever the size of the folio that the page "
        f"is part of. A folio of {_ENTRIES} pages is mapped by a single entry one level up, in the page "
        "middle directory, and so comes as a whole. Present is not the same as touched.",
    ),
    sources=(
        "mm/memory.c, do_fault_around() and fault_around_bytes",
        "mm/filemap.c, filemap_map_pages() and filemap_map_pmd()",
        "getrusage(2), ru_minflt and ru_majflt",
        "posix_fadvise(2), madvise(2)",
    ),
    exercise=Exercise(
        "The snippet reads one byte, and several pages come. Touch page 20 so that exactly one page comes.",
        _SNIPPET,
        _SNIPPET.replace(
            "first = memory[20 * PAGE]          # a read: more than one page comes", "memory[20 * PAGE] = 1"
        ),
        _check,
        hints=(
            "Does reading bring one page? What does writing do in this chapter?",
            "A store into a private mapping needs a copy, and only one page is copied: memory[20 * "
            "PAGE] = 1.",
        ),
    ),
    source_of={
        "on-demand": "Documentation/admin-guide/mm/concepts.rst, Virtual Memory Primer: demand paging",
        "one-fault-many": "mm/memory.c, do_fault_around(); mm/filemap.c, filemap_map_pages()",
        "write-one": "mm/memory.c, do_cow_fault(): one page is allocated and copied",
        "by-fault": (
            "Documentation/mm/page_tables.rst, MMU, TLB, and Page Faults; getrusage(2), ru_minflt and "
            "ru_majflt"
        ),
        "cold-and-warm": (
            "getrusage(2), ru_majflt: page faults that required I/O; posix_fadvise(2), POSIX_FADV_DONTNEED"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "The same file in a private mapping: the first access is a store. How many pages come?",
            (
                Choice("1", "A store needs a copy, and only the page that is written is copied."),
                Choice(
                    "As many as by a read",
                    "Neighbours are mapped, not copied: to map them for writing would copy them.",
                ),
                Choice("None", "A store, too, needs a page."),
            ),
            0,
            step="one write",
        ),
        Quiz(
            "A cold file of 1,024 pages is read in order. How many faults wait for the disk?",
            (
                Choice("1,024", "Read-ahead brings what comes next, before it is asked for."),
                Choice(
                    "A few", "The disk is asked for much at once; most pages are there when they are touched."
                ),
                Choice("None", "Somebody has to fetch the first page."),
            ),
            1,
            step="cold and",
        ),
    ),
)
