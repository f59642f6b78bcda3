"""Chapter 0: pages, frames, page tables, the page cache, faults and a process's map, in one picture."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Generator
from typing import Any, Final

from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    mincore,
)
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, in_words, states_of
from miniloader.walkthrough.step import ChapterStep, Figures, OfPages
from miniloader.walkthrough.traced_calls import Mapping
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "PagesAndFrames"]

_PAGES, _OF_FILE = 4, 2
_BYTE = 100  # of a page, that is looked at


@dataclass(frozen=True)
class PagesAndFrames:
    """What was seen of four pages of memory and two of a file.

    ``states`` are of the four pages when one of them has been written; ``faults`` are the page faults of the
    first access to each of the others, ``again`` those of the second.
    """

    line: str  # of maps, that holds the memory
    untouched: int
    states: tuple[str, ...]
    faults: tuple[int, ...]
    again: tuple[int, ...]
    cached: int  # pages of the file in the page cache, when it was written with write(2)
    in_table: int  # of them in our page table then
    addresses: tuple[int, int]  # of one page of the file, mapped twice
    frames: tuple[int, int]
    bytes_read: tuple[bytes, bytes]


def _run(bench: Workbench) -> Generator[ChapterStep, None, PagesAndFrames]:
    memory = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    untouched = bench.look_at(memory)
    vma = next(vma for vma in read_maps() if memory.address in vma)
    line = f"{vma.start:x}-{vma.end:x} {vma.protection}{'s' if vma.shared else 'p'}"
    yield ChapterStep(
        "the map",
        f"A process asks for {_PAGES} pages of memory. The kernel writes down the range of addresses.",
        bench.taken(),
        (
            f"A page has {PAGE_SIZE:,} bytes here. Address {memory.address + PAGE_SIZE + _BYTE:#x} is byte "
            f"{_BYTE} of page 1 of this memory: an address is the number of a page, and an offset in it.",
            "The list of all such ranges is the process's map, /proc/self/maps. The line that has ours may "
            "be longer: the kernel joins neighbours of one kind.",
        ),
        tables=(Figures("/proc/self/maps", ("line",), ((line,),)),),
    )
    states = yield from _touch(bench, memory, untouched)
    faults, again = yield from _count_faults(bench)
    seen = yield from _cache(bench)
    addresses, frames, bytes_read = yield from _one_frame(bench, memory, *seen[:2])
    return PagesAndFrames(
        line=line,
        untouched=untouched.present,
        states=states.states,
        faults=faults,
        again=again,
        cached=seen[2],
        in_table=seen[3],
        addresses=addresses,
        frames=frames,
        bytes_read=bytes_read,
    )


def _touch(
    bench: Workbench, memory: Mapping, untouched: MappingView
) -> Generator[ChapterStep, None, MappingView]:
    """Write one byte of page 1."""
    bench.store(memory.page(1), b"A", f"p[{PAGE_SIZE}]")
    view = bench.look_at(memory, title="one page is written")
    yield ChapterStep(
        "the page table",
        "One byte of page 1 is written. The page table had no entry for it: the processor stops, and asks "
        "the kernel. That is a page fault.",
        bench.taken(),
        (
            "The kernel took a free frame, filled in the entry, and let the store go on.",
            "The other pages still have no entry. Nobody has needed them.",
        ),
        evidence=(before_and_after("The page table", untouched, view, range(_PAGES)),),
        grid=view.grid,
    )
    return view


def _count_faults(bench: Workbench) -> Generator[ChapterStep, None, tuple[tuple[int, ...], ...]]:
    """The faults of writing each page of fresh memory, and of writing it once more."""
    memory = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    rounds = [tuple(_faults_of(memory.page(page)) for page in range(_PAGES)) for _ in range(2)]
    for page in range(_PAGES):
        bench.note(f'q[{page * PAGE_SIZE}] = "x"', access=True)
    rows = tuple(
        (f"page {page}", str(first), str(second))
        for page, (first, second) in enumerate(zip(*rounds, strict=True))
    )
    columns = ("write to", ">page faults, first time", ">second time")
    yield ChapterStep(
        "faults",
        f"Each of {_PAGES} fresh pages is written, and then written again.",
        bench.taken(),
        ("The first access to a page faults. The second finds the entry: no fault, and no time lost.",),
        tables=(Figures("getrusage(2), ru_minflt", columns, rows),),
    )
    return rounds[0], rounds[1]


def _faults_of(address: int) -> int:
    """The page faults while a byte is stored; the fewest that Python itself adds."""
    byte = ctypes.c_char.from_address(address)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    byte.value = b"x"
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _cache(bench: Workbench) -> Generator[ChapterStep, None, tuple[int, Mapping, int, int]]:
    """Map a file that was just written; its descriptor, mapping, pages in the cache, and in the table."""
    content = b"".join(bytes([letter]) * PAGE_SIZE for letter in b"XY")
    fd = bench.opened(bench.file("data", content), os.O_RDONLY)
    file = bench.mapped(_OF_FILE * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    view = bench.look_at(file, title="the file, mapped")
    text = f"mincore({file.address:#x}, {file.length}, …)"
    cached = sum(bench.do(text, lambda: mincore(*file), lambda pages: f"0: {sum(pages)} pages"))
    yield ChapterStep(
        "the page cache",
        f"A file of {_OF_FILE} pages was written a moment ago, with write(2). Now it is mapped, not read.",
        bench.taken(),
        (
            f"{cached} of its {_OF_FILE} pages are in memory: the kernel keeps what was written or read of a "
            "file. That is the page cache.",
            OfPages(
                f"Our page table has {view.present} of them: in memory is not the same as in a page table."
            ),
        ),
    )
    return fd, file, cached, view.present


def _one_frame(
    bench: Workbench, memory: Mapping, fd: int, file: Mapping
) -> Generator[ChapterStep, None, tuple[tuple[int, int], tuple[int, int], tuple[bytes, bytes]]]:
    """Map the file again, read both, and draw all there is."""
    again = bench.mapped(_OF_FILE * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    bytes_read = (bench.load(file.address, 1, "data[0]"), bench.load(again.address, 1, "again[0]"))
    rows = [("data", os.getpid(), file.address), ("again", os.getpid(), again.address)]
    first, second = bench.look(rows, _OF_FILE, "two mappings of one file")
    third = bench.look_at(memory)
    yield ChapterStep(
        "one picture",
        "The file is mapped a second time, at another address; one byte is read through each mapping.",
        bench.taken(),
        (
            "Two addresses, one frame: a page table says where an address leads. The same can be done from "
            "two processes, and that is how they share memory.",
        ),
        tables=(
            Figures(
                "Addresses, page table, memory",
                ("address", "is", "", "page table entry", "", "memory"),
                (
                    _row(memory, 0, "page 0 of memory", third, ""),
                    _row(memory, 1, "page 1 of memory", third, "a frame of our own, with A in it"),
                    _row(file, 0, "page 0 of data", first, "the page cache: data, page 0"),
                    _row(again, 0, "page 0 of again", second, "the page cache: data, page 0"),
                ),
            ),
        ),
        grid=first.grid,
    )
    return (file.address, again.address), (first.frames[0], second.frames[0]), bytes_read


def _row(mapping: Mapping, page: int, name: str, view: MappingView, memory: str) -> tuple[str, ...]:
    """A line of the picture: from an address to what is behind it, as far as that is told here."""
    if view.states[page] == "unknown":
        return f"{mapping.page(page):#x}", name, "→", "not told here", "", ""
    frame = f"frame {view.frames[page]:#x}" if view.frames[page] else "there (its frame only root may know)"
    entry, arrow = (frame, "→") if view.states[page] != "absent" else ("none: a page fault", "")
    return f"{mapping.page(page):#x}", name, "→", entry, arrow, memory


# ---------------------------------------------------------------------------------------- claims
@claim("in-the-map", "What is mapped is a line in the process's map")
def _in_the_map(seen: PagesAndFrames) -> Finding:
    return Finding(" rw-p" in seen.line, "a line with rw-p, readable and writable", seen.line)


@equal(
    "table-empty", "The page table has no entry for a page that nobody has touched", 0, "{} entries", "flags"
)
def _table_empty(seen: PagesAndFrames) -> int:
    return seen.untouched


@claim("one-entry", "A fault fills in the entry of the page that was touched", "flags")
def _one_entry(seen: PagesAndFrames) -> Finding:
    written = seen.states[1]
    others = {state for page, state in enumerate(seen.states) if page != 1}
    holds = written not in ("absent", "zero") and others == {"absent"}
    expected = "page 1 has a frame, the other pages have none"
    return Finding(holds, expected, f"page 1: {in_words([written])}; others: {in_words(others)}")


@claim("first-touch-faults", "The first access to a page faults, the second does not")
def _faulted(seen: PagesAndFrames) -> Finding:
    observed = f"{', '.join(map(str, seen.faults))}; then {', '.join(map(str, seen.again))}"
    return Finding(min(seen.faults) >= 1 and min(seen.again) == 0, "1 or more each; then 0", observed)


@claim("cached", "What was written to a file is in the page cache, whoever has it mapped")
def _cached(seen: PagesAndFrames) -> Finding:
    return Finding(seen.cached == _OF_FILE, f"{_OF_FILE} pages in memory", f"{seen.cached} pages in memory")


@equal(
    "cached-is-not-mapped", "Being in the page cache is not being in a page table", 0, "{} entries", "flags"
)
def _not_mapped(seen: PagesAndFrames) -> int:
    return seen.in_table


@claim("two-addresses-one-frame", "Two addresses can lead to one frame", "frames")
def _two_addresses(seen: PagesAndFrames) -> Finding:
    told = all(seen.frames)
    apart = seen.addresses[0] != seen.addresses[1]
    observed = f"frames {seen.frames[0]:#x} and {seen.frames[1]:#x}"
    return Finding(
        told and apart and seen.frames[0] == seen.frames[1], "two addresses, equal frames", observed
    )


@equal("same-bytes", "The same bytes are read at both", (b"X", b"X"), "{} and {}")
def _same_bytes(seen: PagesAndFrames) -> tuple[bytes, bytes]:
    return seen.bytes_read


_SNIPPET = """\
import mmap

PAGES, PAGE = 16, mmap.PAGESIZE
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE)

for page in range(PAGES):
    memory[page * PAGE] = 1            # touches every page
"""


def _check(names: dict[str, Any]) -> Answer:
    touched = [page for page, state in enumerate(states_of(names["memory"])) if state != "absent"]
    if touched == [5]:
        return Answer(True, "the page table has page 5, and no other")
    told = f"page{'s' * (len(touched) != 1)} {', '.join(map(str, touched[:6]))}" if touched else "no page"
    return Answer(False, f"the page table has {told}{', …' * (len(touched) > 6)}; only page 5 was asked for")


CHAPTER: Final[Chapter[PagesAndFrames]] = Chapter(
    id="memory",
    number=0,
    title="Pages, frames, and who finds them",
    claim="A process has addresses; page tables lead them to frames of memory; the kernel fills them in.",
    surprise="Asking for memory gives none: there is an entry in the page table once it is touched.",
    claims=(
        _in_the_map,
        _table_empty,
        _one_entry,
        _faulted,
        _cached,
        _not_mapped,
        _two_addresses,
        _same_bytes,
    ),
    question=Quiz(
        "A program asks for 4 pages of memory and is given an address. How many frames are behind it?",
        (
            Choice("4", "It might never use them. The kernel waits and sees."),
            Choice("None", "The range is written down. A frame is given when a page is touched."),
            Choice("1, the first", "Not even that: nothing has been touched."),
        ),
        1,
    ),
    explanation=(
        "A program only knows addresses. The processor splits each into the number of a page and an offset, "
        "and looks the page up in the process's page table. The entry there has the number of a frame, a "
        "page of physical memory, and says what may be done with it.",
        "Where there is no entry, or it forbids the access, the processor raises a page fault, and the "
        "kernel decides. It looks at the process's map: which mapping has that address, and what is behind "
        "it? A file: the page cache has its pages, or reads them. Nothing: a frame of zeros. No mapping at "
        "all: the program gets SIGSEGV.",
        "All that follows in these chapters is who fills in which entry, when, and with whose frame.",
    ),
    sources=(
        "Documentation/admin-guide/mm/concepts.rst",
        "Documentation/mm/page_tables.rst",
        "proc_pid_maps(5)",
        "getrusage(2), ru_minflt",
        "mincore(2)",
    ),
    exercise=Exercise(
        "The loop touches all 16 pages. Change the snippet so that page 5 is in the page table, and no "
        "other page.",
        _SNIPPET,
        _SNIPPET.replace(
            "for page in range(PAGES):\n    memory[page * PAGE] = 1            # touches every page\n",
            "memory[5 * PAGE] = 1\n",
        ),
        _check,
        hints=(
            "Which statement touches the pages that are not wanted?",
            "Page 5 begins at byte 5 * PAGE: access that byte, and no loop.",
        ),
    ),
    source_of={
        "in-the-map": "proc_pid_maps(5)",
        "table-empty": (
            "Documentation/admin-guide/mm/concepts.rst, Anonymous Memory: a mapping only defines an area;"
            " Documentation/admin-guide/mm/pagemap.rst, bit 63, page present"
        ),
        "one-entry": (
            "Documentation/mm/page_tables.rst, MMU, TLB, and Page Faults: handle_mm_fault() finds and "
            "fills the entry"
        ),
        "first-touch-faults": (
            "Documentation/mm/page_tables.rst, MMU, TLB, and Page Faults: where no translation is found; "
            "getrusage(2), ru_minflt"
        ),
        "cached": "Documentation/admin-guide/mm/concepts.rst, Page cache",
        "cached-is-not-mapped": "mincore(2); Documentation/admin-guide/mm/pagemap.rst, bit 63",
        "two-addresses-one-frame": (
            "Documentation/admin-guide/mm/concepts.rst, Virtual Memory Primer: a physical page can be "
            "mapped as one or more virtual pages"
        ),
        "same-bytes": (
            "mmap(2), DESCRIPTION: the contents of a file mapping are those of the file; "
            "Documentation/admin-guide/mm/concepts.rst, Virtual Memory Primer"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "A program writes to one page twice. How many page faults is that?",
            (
                Choice(
                    "Two: each access asks the kernel", "Then every access would be as slow as a system call."
                ),
                Choice(
                    "One",
                    "The first fills in the entry. The second finds it, and the kernel does not hear of it.",
                ),
                Choice("None", "The first access finds no entry."),
            ),
            1,
            step="faults",
        ),
        Quiz(
            "One page of a file is mapped at two addresses. How many frames is that?",
            (
                Choice("One", "The page cache has each page of a file once; two entries lead there."),
                Choice("Two", "Nothing was copied: nobody has written."),
                Choice("It depends on the addresses", "Any entry may lead to any frame."),
            ),
            0,
            step="one picture",
        ),
    ),
)
