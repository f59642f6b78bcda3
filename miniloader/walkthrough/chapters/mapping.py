"""Chapter 1: mapping files, devices and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

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
from miniloader.walkthrough.exercises import states_of
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    Question,
    Statement,
    Step,
    Table,
)
from miniloader.walkthrough.recorded_calls import Mapping
from miniloader.walkthrough.workbench import ZEROS_UNTOLD, Bench, View, rows_of

__all__ = ["CHAPTER", "Seen"]

_PAGES = 8
_BOTH = PROT_READ | PROT_WRITE
_HUGE = 1 << 30


@dataclass(frozen=True)
class Seen:
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


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    content = bytes(range(256)) * (_PAGES * PAGE_SIZE // 256)
    path = bench.file("data", content)
    fd = bench.keep_open(bench.open(path, os.O_RDWR))
    file = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, _BOTH, MAP_SHARED, fd))
    zero_fd = bench.keep_open(bench.open("/dev/zero", os.O_RDWR))
    device = bench.keep(bench.mmap(2 * PAGE_SIZE, _BOTH, MAP_PRIVATE, zero_fd))
    anonymous = bench.keep(bench.mmap(3 * PAGE_SIZE, _BOTH, MAP_PRIVATE | MAP_ANONYMOUS))
    at_first = bench.look_at(file, title="mapped")
    none_yet = bench.look_at(anonymous)
    kinds, rows = _in_maps(file, device, anonymous)
    yield Step(
        "mapped",
        "Three things are mapped: a file, a device and memory that nothing is behind.",
        bench.calls(),
        (
            f"Each is now a line of /proc/self/maps. Of the file's {_PAGES} pages the page table has "
            f"{at_first.present}: the call made room, and loaded nothing.",
        ),
        tables=(Table("/proc/self/maps", ("addresses", "mode", "what is behind"), rows),),
        grid=at_first.grid,
    )

    huge_present = yield from _huge(bench)

    second = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd))
    whole = bench.load(file.address, file.length, f"file[0:{file.length}]")
    bench.load(second.address, second.length, f"second[0:{second.length}]")
    middle = bench.load(file.address + PAGE_SIZE + 65, 1, f"file[{PAGE_SIZE} + 65]")
    pid = os.getpid()
    rows2 = [("file", pid, file.address), ("second", pid, second.address)]
    first_view, second_view = bench.look(rows2, _PAGES, "read")
    yield Step(
        "read like an array",
        "The file is mapped a second time, and both are read: plain loads, no read(2).",
        bench.calls(),
        (
            f"Byte {PAGE_SIZE + 65} is {middle!r}; all {len(content):,} bytes are the file's.",
            "Both mappings point at the same frames, the page cache's: no byte was copied to us.",
        ),
        evidence=(
            Evidence("Pages of the file", "/proc/self/pagemap", rows_of(at_first, first_view, range(4))),
        ),
        grid=first_view.grid,
    )

    zeros = bench.load(device.address, 8, "device[0:8]")
    nothing = bench.load(anonymous.page(1), 8, f"memory[{PAGE_SIZE}:+8]")
    bench.store(anonymous.page(2), b"mine", f"memory[{2 * PAGE_SIZE}]")
    memory = bench.look_at(anonymous, title="device and memory")
    yield Step(
        "device and memory",
        "/dev/zero gives zeros for ever; so does anonymous memory. One page of it is read, one written.",
        bench.calls(),
        (
            f"Only read: {memory.words(1)}. All of the system's untouched memory can be that one page.",
            f"Written: {memory.words(2)}.",
        ),
        evidence=(Evidence("Anonymous memory", "/proc/self/pagemap", rows_of(none_yet, memory, range(3))),),
    )

    from_pwrite, by_store = [], []
    for kind in ("disk", "tmpfs"):
        try:
            read, stored = yield from _in_step(bench, kind)
        except EvidenceError as error:
            yield Step("in step on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
            continue
        from_pwrite.append(read)
        by_store.append(stored)
    return Seen(
        kinds,
        at_first.present,
        first_view.states + second_view.states,
        _same(first_view, second_view),
        whole == content and middle == content[PAGE_SIZE + 65 : PAGE_SIZE + 66],
        zeros,
        nothing,
        (none_yet.states[0], memory.states[1], memory.states[2]),
        tuple(from_pwrite),
        tuple(by_store),
        huge_present,
    )


def _same(one: View, other: View) -> bool | None:
    return one.frames == other.frames if all(one.frames) and all(other.frames) else None


def _in_maps(*mappings: Mapping) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The name that ``maps`` has for each, and their lines."""
    names, rows = [], []
    vmas = read_maps()
    for mapping in mappings:
        vma = next(vma for vma in vmas if mapping.address in vma)
        names.append(os.path.basename(vma.path))
        mode = vma.protection + ("s" if vma.shared else "p")
        rows.append((f"{vma.start:#x}-{vma.end:#x}", mode, vma.path or "nothing: anonymous"))
    return tuple(names), tuple(rows)


def _huge(bench: Bench) -> Generator[Step, None, int]:
    path = os.path.join(bench.place().directory, "huge")
    fd = bench.keep_open(bench.open(path, os.O_RDWR | os.O_CREAT))
    bench.ftruncate(fd, _HUGE)
    start = time.perf_counter_ns()
    huge = bench.mmap(_HUGE, PROT_READ, MAP_SHARED, fd)
    took = (time.perf_counter_ns() - start) / 1000
    view = bench.look([("this process", os.getpid(), huge.address)], 1024)[0]
    bench.munmap(huge)
    yield Step(
        "a gibibyte",
        "A file of 1 GiB (all hole, it takes no room on the disk) is mapped, and not touched.",
        bench.calls(),
        (f"The call took {took:.0f} µs and brought in {view.present} pages: its cost is not the size.",),
    )
    return view.present


def _in_step(bench: Bench, kind: str) -> Generator[Step, None, tuple[bytes, bytes]]:
    path = bench.file("in-step", bytes(PAGE_SIZE), kind)
    fd = bench.keep_open(bench.open(path, os.O_RDWR))
    memory = bench.keep(bench.mmap(PAGE_SIZE, _BOTH, MAP_SHARED, fd))
    bench.load(memory.address, 8, "p[0:8]")
    bench.pwrite(fd, b"written", 0)
    read = bench.load(memory.address, 7, "p[0:7]")
    bench.store(memory.address + 100, b"stored", "p[100]")
    stored = bench.pread(fd, 6, 100)
    yield Step(
        f"in step on {bench.place(kind).file_system}",
        "The file is written with pwrite and read through the mapping, then the other way round.",
        bench.calls(),
        (f"The mapping shows {read!r}, pread gives {stored!r}: they are the same page, at any moment.",),
    )
    return read, stored


# ---------------------------------------------------------------------------------------- claims
def _file(seen: Seen) -> Finding:
    return Finding(seen.kinds[0] == "data", "a mapping of data", f"a mapping of {seen.kinds[0] or 'nothing'}")


def _device(seen: Seen) -> Finding:
    good = seen.kinds[1] == "zero" and seen.device == bytes(8)
    return Finding(good, "a mapping of /dev/zero that reads 0", f"{seen.kinds[1]}, {seen.device!r}")


def _anonymous(seen: Seen) -> Finding:
    good = seen.kinds[2] in ("", "[anon]") and seen.anonymous == bytes(8)
    return Finding(
        good, "a mapping of nothing that reads 0", f"{seen.kinds[2] or 'nothing'}, {seen.anonymous!r}"
    )


def _nothing_loaded(seen: Seen) -> Finding:
    observed = f"{seen.present_at_first} of {_PAGES} pages; of the gibibyte {seen.huge_present}"
    return Finding(
        not seen.present_at_first and not seen.huge_present, "0 pages, 0 of the gibibyte", observed
    )


def _page_tables(seen: Seen) -> Finding:
    direct = all(state in ("shared", "sole") for state in seen.touched)
    frames = {None: "", True: ", the same frames in both mappings", False: ", different frames"}
    return Finding(
        direct and seen.same_frames is not False,
        "every entry points to the page cache's own page",
        f"{', '.join(sorted(set(seen.touched)))}{frames[seen.same_frames]}",
    )


def _array(seen: Seen) -> Finding:
    return Finding(
        seen.as_array, "loads give the file's bytes", "they do" if seen.as_array else "they differ"
    )


def _zero_then_own(seen: Seen) -> Finding:
    wanted = ("absent", "zero", "copied")
    if "unknown" in seen.anonymous_states:
        return Finding(None, ", ".join(wanted), ", ".join(seen.anonymous_states), ZEROS_UNTOLD)
    return Finding(seen.anonymous_states == wanted, ", ".join(wanted), ", ".join(seen.anonymous_states))


def _steps(seen: Seen) -> Finding:
    both = {*seen.from_pwrite} == {b"written"} and {*seen.by_store} == {b"stored"}
    observed = " ".join(map(repr, (*seen.from_pwrite, *seen.by_store)))
    return Finding(both, "what one writes the other reads, both ways", observed)


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


CHAPTER = Chapter(
    id="mapping",
    number=1,
    title="Mapping files, devices and memory",
    claim="mmap makes room in the page tables for a file, a device or memory, to be read like an array.",
    surprise="The call itself loads nothing: a gibibyte is mapped in microseconds.",
    claims=(
        Statement("file-mapped", "A file is mapped into the address space", _file),
        Statement("device-mapped", "A device is mapped: /dev/zero", _device),
        Statement("anonymous-mapped", "Memory without a file is mapped", _anonymous),
        Statement("nothing-loaded", "The call loads nothing", _nothing_loaded, "flags"),
        Statement("page-tables", "The page table points directly at the page cache", _page_tables, "flags"),
        Statement("like-an-array", "The mapping is read like an array", _array),
        Statement("zero-then-own", "Anonymous memory gets a frame when written", _zero_then_own, "flags"),
        Statement("in-step", "The kernel keeps mapping and file in step", _steps),
    ),
    question=Question(
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
    ),
    run=_run,
)
