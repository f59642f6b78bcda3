"""Chapter 1: mapping files, devices and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any, Final

from miniloader.errors import EvidenceError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
)
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import (
    ZEROS_UNTOLD,
    MappingView,
    before_and_after,
    in_words,
    states_of,
)
from miniloader.walkthrough.step import ChapterStep, Figures, OfPages
from miniloader.walkthrough.traced_calls import Mapping, page_slice, quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "MappedThings"]

_PAGES = 8
_READ_WRITE = PROT_READ | PROT_WRITE
_HUGE = 1 << 30


@dataclass(frozen=True)
class MappedThings:
    """What was seen of the three mappings.  ``kinds`` are the names that ``maps`` gives them, in order."""

    kinds: tuple[str, ...]
    present_at_first: int
    touched: tuple[str, ...]  # states of the file's mapping and of a second one, when all is read
    same_frames: bool | None  # of those two; None: not known
    as_array: bool
    device: bytes
    anonymous: bytes
    anonymous_states: tuple[str, ...]  # never touched, read, written
    from_pwrite: tuple[bytes, ...]  # read through a mapping; on disk and on tmpfs
    by_store: tuple[bytes, ...]  # read with pread
    huge_present: int


def _run(bench: Workbench) -> Generator[ChapterStep, None, MappedThings]:
    content = bytes(range(256)) * (_PAGES * PAGE_SIZE // 256)
    fd = bench.opened(bench.file("data", content), os.O_RDWR)
    file = bench.mapped(_PAGES * PAGE_SIZE, _READ_WRITE, MAP_SHARED, fd)
    zero = bench.opened("/dev/zero", os.O_RDWR)
    device = bench.mapped(2 * PAGE_SIZE, _READ_WRITE, MAP_PRIVATE, zero)
    anonymous = bench.mapped(3 * PAGE_SIZE, _READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    at_first, untouched = bench.look_at(file, title="mapped"), bench.look_at(anonymous)
    kinds, rows = _in_maps(file, device, anonymous)
    yield ChapterStep(
        "mapped",
        "Three things are mapped: a file, a device and memory that nothing is behind.",
        bench.taken(),
        (
            OfPages(
                f"Each is now a line of /proc/self/maps. Of the file's {_PAGES} pages the page table has "
                f"{at_first.present}: the call made a mapping, and loaded nothing."
            ),
        ),
        tables=(Figures("/proc/self/maps", ("addresses", "mode", "what is behind"), rows),),
        grid=at_first.grid,
    )
    huge_present = yield from _huge(bench)
    views, as_array = yield from _read(bench, fd, file, at_first, content)
    zeros, nothing, memory = yield from _zeros(bench, device, anonymous, untouched)
    both_ways = []
    for kind in ("disk", "tmpfs"):
        try:
            both_ways.append((yield from _in_step(bench, kind)))
        except EvidenceError as error:
            yield ChapterStep("in step on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
    return MappedThings(
        kinds=kinds,
        present_at_first=at_first.present,
        touched=views[0].states + views[1].states,
        same_frames=_same(*views),
        as_array=as_array,
        device=zeros,
        anonymous=nothing,
        anonymous_states=(untouched.states[0], memory.states[1], memory.states[2]),
        from_pwrite=tuple(read for read, _ in both_ways),
        by_store=tuple(stored for _, stored in both_ways),
        huge_present=huge_present,
    )


def _in_maps(*mappings: Mapping) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The name that ``maps`` has for each mapping, and their lines."""
    names, rows = [], []
    vmas = read_maps()
    for mapping in mappings:
        vma = next(vma for vma in vmas if mapping.address in vma)
        names.append(os.path.basename(vma.path))
        mode = vma.protection + ("s" if vma.shared else "p")
        rows.append((f"{vma.start:#x}-{vma.end:#x}", mode, vma.path or "nothing: anonymous"))
    return tuple(names), tuple(rows)


def _huge(bench: Workbench) -> Generator[ChapterStep, None, int]:
    fd = bench.opened(os.path.join(bench.place().directory, "huge"), os.O_RDWR | os.O_CREAT)
    bench.ftruncate(fd, _HUGE)
    start = time.perf_counter_ns()
    huge = bench.mmap(_HUGE, PROT_READ, MAP_SHARED, fd)
    took = (time.perf_counter_ns() - start) / 1000
    view = bench.look([("this process", os.getpid(), huge.address)], 1024)[0]
    bench.munmap(huge)
    yield ChapterStep(
        "a gibibyte",
        "A file of 1 GiB (all hole, it takes no room on the disk) is mapped, and not touched.",
        bench.taken(),
        (
            OfPages(
                f"The call took {took:.0f} µs and brought in {view.present} pages: its cost is not the size."
            ),
        ),
    )
    return view.present


def _read(
    bench: Workbench, fd: int, file: Mapping, at_first: MappingView, content: bytes
) -> Generator[ChapterStep, None, tuple[tuple[MappingView, ...], bool]]:
    """Read the file through two mappings; what is seen of them, and whether the bytes are ``content``."""
    second = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    whole = bench.load(file.address, file.length, f"file[0:{file.length}]")
    bench.load(second.address, second.length, f"second[0:{second.length}]")
    middle = bench.load(file.address + PAGE_SIZE + 65, 1, f"file[{PAGE_SIZE} + 65]")
    rows = [("file", os.getpid(), file.address), ("second", os.getpid(), second.address)]
    views = bench.look(rows, _PAGES, "read")
    yield ChapterStep(
        "read like an array",
        "The file is mapped a second time, and both are read: plain loads, no read(2).",
        bench.taken(),
        (
            f"Byte {PAGE_SIZE + 65} is {quoted(middle)}; all {len(content):,} bytes are the file's.",
            "Both mappings point at the same frames, the page cache's: no byte was copied to us.",
        ),
        evidence=(before_and_after("Pages of the file", at_first, views[0], range(4)),),
        grid=views[0].grid,
    )
    return views, whole == content and middle == content[PAGE_SIZE + 65 : PAGE_SIZE + 66]


def _zeros(
    bench: Workbench, device: Mapping, anonymous: Mapping, untouched: MappingView
) -> Generator[ChapterStep, None, tuple[bytes, bytes, MappingView]]:
    """Read and write memory without a file; what the device gave, what memory gave, and its pages."""
    zeros = bench.load(device.address, 8, "device[0:8]")
    nothing = bench.load(anonymous.page(1), 8, page_slice(1, 8, "memory"))
    bench.store(anonymous.page(2), b"mine", f"memory[{2 * PAGE_SIZE}]")
    memory = bench.look_at(anonymous, title="device and memory")
    yield ChapterStep(
        "device and memory",
        "/dev/zero gives zeros for ever; so does anonymous memory. One page of it is read, one written.",
        bench.taken(),
        (
            OfPages(
                f"Only read: {memory.words(1)}. All of the system's untouched memory can be that one page."
            ),
            OfPages(f"Written: {memory.words(2)}."),
        ),
        evidence=(before_and_after("Anonymous memory", untouched, memory, range(3)),),
    )
    return zeros, nothing, memory


def _in_step(bench: Workbench, kind: str) -> Generator[ChapterStep, None, tuple[bytes, bytes]]:
    fd = bench.opened(bench.file("in-step", bytes(PAGE_SIZE), kind), os.O_RDWR)
    memory = bench.mapped(PAGE_SIZE, _READ_WRITE, MAP_SHARED, fd)
    bench.load(memory.address, 8, "p[0:8]")
    bench.pwrite(fd, b"written", 0)
    read = bench.load(memory.address, 7, "p[0:7]")
    bench.store(memory.address + 100, b"stored", "p[100]")
    stored = bench.pread(fd, 6, 100)
    yield ChapterStep(
        f"in step on {bench.place(kind).file_system}",
        "The file is written with pwrite and read through the mapping, then the other way round.",
        bench.taken(),
        (
            f"The mapping shows {quoted(read)}, pread gives {quoted(stored)}: "
            "they are the same page, at any moment.",
        ),
    )
    return read, stored


def _same(first: MappingView, second: MappingView) -> bool | None:
    """Whether two mappings have the same frames; None where those are not told."""
    return first.frames == second.frames if all(first.frames) and all(second.frames) else None


# ---------------------------------------------------------------------------------------- claims
@equal("file-mapped", "A file is mapped into the address space", "data", "a mapping of {}")
def _file(things: MappedThings) -> str:
    return things.kinds[0] or "nothing"


@equal("device-mapped", "A device is mapped: /dev/zero", ("zero", bytes(8)), "a mapping of {} that reads {}")
def _device(things: MappedThings) -> tuple[str, bytes]:
    return things.kinds[1], things.device


@claim("anonymous-mapped", "Memory without a file is mapped")
def _anonymous(things: MappedThings) -> Finding:
    good = things.kinds[2] in ("", "[anon]") and things.anonymous == bytes(8)
    observed = f"{things.kinds[2] or 'nothing'}, which reads {quoted(things.anonymous)}"
    return Finding(good, "a mapping of nothing that reads 0", observed)


_AT_FIRST = f"{{}} of {_PAGES} pages; of the gibibyte {{}}"


@equal("nothing-loaded", "The call loads nothing", (0, 0), _AT_FIRST, "flags")
def _nothing(things: MappedThings) -> tuple[int, int]:
    return things.present_at_first, things.huge_present


@claim("page-tables", "The page table points directly at the page cache", "flags")
def _page_tables(things: MappedThings) -> Finding:
    direct = {*things.touched} <= {"shared", "sole"} and things.same_frames is not False
    frames = {None: "", True: ", the same frames in both mappings", False: ", different frames"}
    observed = f"{in_words(things.touched)}{frames[things.same_frames]}"
    return Finding(direct, "every entry points to the page cache's own page", observed)


@claim("like-an-array", "The mapping is read like an array")
def _array(things: MappedThings) -> Finding:
    observed = "every byte as in the file" if things.as_array else "other bytes than the file's"
    return Finding(things.as_array, "loads give the file's bytes", observed)


def _three(states: tuple[str, ...]) -> str:
    return "untouched: {}; read: {}; written: {}".format(*(in_words([state]) for state in states))


@claim("zero-then-own", "Anonymous memory gets a frame when written", "flags")
def _zero_then_own(things: MappedThings) -> Finding:
    wanted = ("absent", "zero", "copied")
    holds = None if "unknown" in things.anonymous_states else things.anonymous_states == wanted
    return Finding(holds, _three(wanted), _three(things.anonymous_states), ZEROS_UNTOLD)


@claim("in-step", "The kernel keeps mapping and file in step")
def _steps(things: MappedThings) -> Finding:
    good = {*things.from_pwrite} == {b"written"} and {*things.by_store} == {b"stored"}
    loaded, read = (", ".join(map(quoted, words)) for words in (things.from_pwrite, things.by_store))
    observed = f"after pwrite the mapping shows {loaded}; after a store pread gives {read}"
    return Finding(good, "what one writes the other reads, both ways", observed)


_SNIPPET = """\
import mmap, tempfile

PAGE = mmap.PAGESIZE
with tempfile.TemporaryFile() as file:
    file.truncate(64 * PAGE)
    memory = mmap.mmap(file.fileno(), 0)

file = memory[:]                   # reads all 64 pages
letter = memory[40 * PAGE]
"""


def _check(names: dict[str, Any]) -> Answer:
    present = sum(state not in ("absent", "swapped") for state in states_of(names["memory"]))
    if names["letter"] != 0:
        return Answer(False, "letter should still be the byte at 40 * PAGE")
    if 0 < present < 64:
        return Answer(True, f"{present} of 64 pages are in the page table, and page 40 is among them")
    return Answer(False, f"{present} of 64 pages are in the page table; touch page 40, but not all")


CHAPTER: Final[Chapter[MappedThings]] = Chapter(
    id="mapping",
    number=1,
    title="Mapping files, devices and memory",
    claim="mmap makes a mapping of a file, a device or memory, to be read like an array.",
    surprise="The call itself loads nothing: a gibibyte is mapped in microseconds.",
    claims=(_file, _device, _anonymous, _nothing, _page_tables, _array, _zero_then_own, _steps),
    question=Quiz(
        "A program maps a file of 1 GiB and touches nothing yet. How much of the file is in its page table?",
        (
            Choice("All of it", "That would take a quarter of a million page table entries at once."),
            Choice("The first page", "Not even that. The kernel only notes which addresses mean which file."),
            Choice("Nothing", "The call notes the range in a list. Pages come when they are touched."),
        ),
        2,
    ),
    explanation=(
        "mmap adds a line to the list of mappings that /proc/self/maps shows: these addresses mean that "
        "file, from that offset. Page table entries are filled in later, one fault at a time.",
        "When they are, they point at the page cache's own frames. The file is not copied to the program: it "
        "is let in where the file already is. That is why a mapping and read(2) never disagree.",
        "Anonymous memory has no file. A first read gets the kernel's one page of zeros, a first write a "
        "frame of one's own.",
    ),
    sources=("mmap(2)", "proc_pid_maps(5)", "Documentation/admin-guide/mm/concepts.rst, Anonymous Memory"),
    exercise=Exercise(
        "The snippet copies the whole mapping to read one byte. Change it so that the letter is read "
        "and most of the file never enters the page table.",
        _SNIPPET,
        _SNIPPET.replace("file = memory[:]                   # reads all 64 pages\n", ""),
        _check,
        hints=(
            "What does a slice of the whole mapping do to each page of it?",
            "letter = memory[40 * PAGE] alone is enough: take the line with memory[:] away.",
        ),
    ),
    source_of={
        "file-mapped": "mmap(2), DESCRIPTION: it creates a new mapping in the virtual address space",
        "device-mapped": "mmap(2), DESCRIPTION: a file (or other object); drivers/char/mem.c, mmap_zero()",
        "anonymous-mapped": "mmap(2), MAP_ANONYMOUS: not backed by any file, contents initialised to zero",
        "nothing-loaded": "mmap(2), MAP_POPULATE: only with it are page tables prefaulted",
        "page-tables": (
            "Documentation/admin-guide/mm/concepts.rst, Page cache; "
            "Documentation/admin-guide/mm/pagemap.rst, bit 61"
        ),
        "like-an-array": "mmap(2), DESCRIPTION: the contents of a file mapping are those of the file",
        "zero-then-own": (
            "Documentation/admin-guide/mm/concepts.rst, Anonymous Memory: a page of zeros when read, a "
            "regular page when written"
        ),
        "in-step": (
            "Documentation/admin-guide/mm/concepts.rst, Page cache: what is read and what is written is "
            "there; mmap(2), MAP_SHARED: carried through to the underlying file"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "The file is mapped a second time, and both are read. How many frames hold its 8 pages?",
            (
                Choice("16", "That would be a copy, and nobody has asked for one."),
                Choice("8", "Both mappings lead to the page cache's frames."),
                Choice(
                    "0: it is on the disk", "A load needs memory: the page is brought into the page cache."
                ),
            ),
            1,
            step="read like",
        ),
        Quiz(
            "A page of anonymous memory is only read. What does that cost?",
            (
                Choice(
                    "One frame", "It would hold nothing but zeros. The kernel has a page of those already."
                ),
                Choice("No frame", "The entry leads to the kernel's one page of zeros."),
                Choice("An error: nothing was written", "Anonymous memory reads as zeros."),
            ),
            1,
            step="device and",
        ),
    ),
)
