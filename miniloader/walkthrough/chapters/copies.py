"""Chapter 5: read and write against mmap, with frames and with a clock."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.syscalls import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
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
from miniloader.walkthrough.workbench import Bench, rows_of

__all__ = ["CHAPTER", "Race", "Seen"]

_PAGES = 8
_BUFFER = 64 << 10
_SIZES = (256 << 10, 4 << 20, 32 << 20)
_READS = 20_000
_ROUNDS = 5


@dataclass(frozen=True)
class Race:
    """One pattern, done both ways: the best of some rounds, in microseconds, and why who won."""

    pattern: str
    by_read: float
    by_mmap: float
    why: str

    @property
    def winner(self) -> str:
        """Who was faster, and how much."""
        fast, slow = sorted((self.by_read, self.by_mmap))
        name = "read" if self.by_read < self.by_mmap else "mmap"
        return f"{name}, {slow / fast:.1f} times"


@dataclass(frozen=True)
class Seen:
    """What was seen: states and frames of mapping and buffer, and what a change of the file did."""

    mapping: tuple[str, ...]
    buffer: tuple[str, ...]
    mapping_frames: tuple[int, ...]
    buffer_frames: tuple[int, ...]
    in_mapping: bytes
    in_buffer: bytes
    in_other_buffer: bytes  # what was written from it, after the buffer had changed
    once: Race
    random: Race
    others: tuple[Race, ...]


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.file("file", b"old " * (_PAGES * PAGE_SIZE // 4))
    fd = bench.keep_open(bench.open(path, os.O_RDWR))
    mapping = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd))
    buffer = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
    rows = [("mapping", os.getpid(), mapping.address), ("buffer", os.getpid(), buffer.address)]
    empty = bench.look(rows, _PAGES, "before")[1]
    memory = memoryview((ctypes.c_char * buffer.length).from_address(buffer.address))
    bench.do(f"pread({fd}, buffer, {buffer.length}, 0)", lambda: os.preadv(fd, [memory], 0))
    for page in range(_PAGES):
        bench.load(mapping.page(page), 1, f"mapping[{page} * {PAGE_SIZE}]")
    mapped, filled = bench.look(rows, _PAGES, "read both ways")
    yield Step(
        "two ways to the bytes",
        "The same file is mapped, and read into a buffer. Both now hold the same bytes.",
        bench.calls(),
        (f"The mapping is {mapped.words(0)}. The buffer is {filled.words(0)}: other frames, with a copy.",),
        evidence=(
            Evidence("Pages of the buffer", "/proc/self/pagemap", rows_of(empty, filled, range(_PAGES))),
        ),
        grid=mapped.grid,
    )

    bench.pwrite(fd, b"new ", 0)
    in_mapping = bench.load(mapping.address, 4, "mapping[0:4]")
    in_buffer = bench.load(buffer.address, 4, "buffer[0:4]")
    bench.store(buffer.address, b"mine", "buffer[0]")
    in_file = bench.pread(fd, 4, 0)
    yield Step(
        "then the file changes",
        "The file is changed with pwrite; then the buffer is changed.",
        bench.calls(),
        (
            f"Mapping: {in_mapping!r}. Buffer: {in_buffer!r}. File, once the buffer changed: {in_file!r}.",
            "A buffer is a snapshot. A mapping is the file.",
        ),
    )
    once, random, others = yield from _races(bench)
    return Seen(
        mapped.states,
        filled.states,
        mapped.frames,
        filled.frames,
        in_mapping,
        in_buffer,
        in_file,
        once,
        random,
        others,
    )


# ----------------------------------------------------------------------------------------- clocks
def _best(work: Callable[[], int]) -> tuple[float, int]:
    """The shortest of some rounds, in µs, and the result."""
    best, result = float("inf"), 0
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        result = work()
        best = min(best, (time.perf_counter_ns() - start) / 1000)
    return best, result


def _array(address: int, length: int) -> NDArray[np.uint64]:
    view = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
    return np.frombuffer(view, np.uint64)


def _race(pattern: str, why: tuple[str, str], by_read: Callable[[], int], by_mmap: Callable[[], int]) -> Race:
    """Run both; ``why`` explains a win of read, and one of mmap."""
    (read, result), (mapped, same) = _best(by_read), _best(by_mmap)
    assert result == same, f"{pattern}: {result} by read, {same} by mmap"
    return Race(pattern, read, mapped, why[0] if read < mapped else why[1])


def _races(bench: Bench) -> Generator[Step, None, tuple[Race, Race, tuple[Race, ...]]]:
    path = bench.file("race", np.random.default_rng(1).bytes(_SIZES[-1]))
    fd = bench.keep_open(os.open(path, os.O_RDONLY))
    buffer = bytearray(_BUFFER)
    whole = memoryview(buffer)
    words = np.frombuffer(buffer, np.uint64)

    def read_all(size: int) -> int:
        total = 0
        for offset in range(0, size, _BUFFER):
            os.preadv(fd, [whole], offset)
            total += int(words.sum())
        return total % 2**64

    def map_all(size: int) -> int:
        address = mmap(0, size, PROT_READ, MAP_SHARED, fd, 0)
        try:
            return int(_array(address, size).sum())
        finally:
            munmap(address, size)

    mapped = bench.keep(Mapping(mmap(0, _SIZES[-1], PROT_READ, MAP_SHARED, fd, 0), _SIZES[-1]))
    values = _array(*mapped)
    places = np.random.default_rng(2).integers(0, len(values), _READS)
    offsets = (places * 8).tolist()
    eight = bytearray(8)
    small = memoryview(buffer)[:PAGE_SIZE]
    page = np.frombuffer(small, np.uint64)

    def read_places() -> int:
        views, total = [memoryview(eight)], 0
        for offset in offsets:
            os.preadv(fd, views, offset)
            total += int.from_bytes(eight, "little")
        return total % 2**64

    def read_page() -> int:
        total = 0
        for offset in range(0, 64 * PAGE_SIZE, PAGE_SIZE):
            os.preadv(fd, [small], offset)
            total += int(page[0])
        return total

    def map_page() -> int:
        total = 0
        for offset in range(0, 64 * PAGE_SIZE, PAGE_SIZE):
            address = mmap(0, PAGE_SIZE, PROT_READ, MAP_SHARED, fd, offset)
            total += int.from_bytes(ctypes.string_at(address, 8), "little")
            munmap(address, PAGE_SIZE)
        return total

    once = _race(
        "64 pages, each once, one by one",
        ("a page costs mmap two calls and a fault", "the copy cost more than two calls and a fault"),
        read_page,
        map_page,
    )
    random = _race(
        f"{_READS:,} random words, mapped before",
        ("a call cost less than a load", "a read is a system call, a load is a load"),
        read_places,
        lambda: int(values[places].sum()),
    )
    others = tuple(
        _race(
            f"{size >> 10:,} KiB summed in order",
            (
                f"its {_BUFFER >> 10} KiB buffer stays in the processor's cache; mmap faults",
                "few faults map many pages; read copies every byte",
            ),
            lambda size=size: read_all(size),  # type: ignore[misc]  # a default binds it now
            lambda size=size: map_all(size),  # type: ignore[misc]
        )
        for size in _SIZES
    )
    others += (_written(bench, buffer),)
    races = (once, random, *others)
    yield Step(
        "with a clock",
        f"The same work is done with read and with mmap, on a file in the page cache; best of {_ROUNDS}.",
        bench.calls(),
        ("Neither always wins: see what each has to do for the pattern.",),
        tables=(
            Table(
                "Who is faster",
                ("pattern", ">read µs", ">mmap µs", "faster", "why"),
                tuple(
                    (one.pattern, f"{one.by_read:,.0f}", f"{one.by_mmap:,.0f}", one.winner, one.why)
                    for one in races
                ),
            ),
        ),
    )
    return once, random, others


def _written(bench: Bench, buffer: bytearray) -> Race:
    path = bench.file("written", bytes(_SIZES[1]))
    fd = bench.keep_open(os.open(path, os.O_RDWR))
    target = bench.keep(Mapping(mmap(0, _SIZES[1], PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), _SIZES[1]))
    source = (ctypes.c_char * _BUFFER).from_buffer(buffer)

    def write_all() -> int:
        return sum(os.pwrite(fd, buffer, offset) for offset in range(0, _SIZES[1], _BUFFER))

    def store_all() -> int:
        for offset in range(0, _SIZES[1], _BUFFER):
            ctypes.memmove(target.address + offset, source, _BUFFER)
        return _SIZES[1]

    return _race(
        f"{_SIZES[1] >> 10:,} KiB written in order, mapped before",
        ("stores fault for every page that is to be marked dirty", "a store is no system call"),
        write_all,
        store_all,
    )


# ---------------------------------------------------------------------------------------- claims
def _mapping_is_cache(seen: Seen) -> Finding:
    good = all(state in ("shared", "sole") for state in seen.mapping)
    return Finding(good, "the page cache's own pages", ", ".join(sorted(set(seen.mapping))))


def _read_copies(seen: Seen) -> Finding:
    good = all(state == "copied" for state in seen.buffer)
    return Finding(good, "anonymous pages of our own", ", ".join(sorted(set(seen.buffer))))


def _distinct(seen: Seen) -> Finding:
    both = {*seen.mapping_frames} & {*seen.buffer_frames}
    known = all(seen.mapping_frames) and all(seen.buffer_frames)
    observed = f"{len(seen.mapping_frames)} and {len(seen.buffer_frames)} frames, {len(both)} in both"
    return Finding(known and not both, "no frame in both", observed)


def _snapshot(seen: Seen) -> Finding:
    good = (seen.in_buffer, seen.in_other_buffer) == (b"old ", b"new ")
    return Finding(
        good,
        "the buffer keeps the old bytes, and the file does not follow the buffer",
        f"buffer {seen.in_buffer!r}, file {seen.in_other_buffer!r}",
    )


def _follows(seen: Seen) -> Finding:
    return Finding(seen.in_mapping == b"new ", "b'new ' in the mapping", repr(seen.in_mapping))


def _read_wins(seen: Seen) -> Finding:
    observed = f"read {seen.once.by_read:,.0f} µs, mmap {seen.once.by_mmap:,.0f} µs"
    return Finding(seen.once.by_read < seen.once.by_mmap, "read is faster", observed)


def _mmap_wins(seen: Seen) -> Finding:
    observed = f"read {seen.random.by_read:,.0f} µs, mmap {seen.random.by_mmap:,.0f} µs"
    return Finding(seen.random.by_mmap < seen.random.by_read, "mmap is faster", observed)


_SNIPPET = """\
import mmap, tempfile

PAGE = mmap.PAGESIZE
file = tempfile.TemporaryFile()
file.write(b"x" * 16 * PAGE)
file.flush()

data = mmap.mmap(-1, 16 * PAGE)    # a buffer, and a copy in it
file.seek(0)
file.readinto(data)

total = sum(data[page * PAGE] for page in range(16))
"""


def _check(names: dict[str, Any]) -> Answer:
    if names["total"] != 16 * ord("x"):
        return Answer(False, "total should be the sum of the first bytes of 16 pages")
    import mmap as python_mmap

    if not isinstance(names["data"], python_mmap.mmap):
        return Answer(False, "data should be a mapping")
    import miniloader.kernel.maps as maps
    from miniloader.walkthrough.exercises import address_of

    address = address_of(names["data"])
    vma = next(vma for vma in maps.read_maps() if address in vma)
    behind = os.fstat(names["file"].fileno()).st_ino
    copied = sum(state.startswith("copied") for state in states_of(names["data"]))
    if vma.inode == behind and not copied:
        return Answer(True, "the sum was made from the page cache's own pages, and nothing was copied")
    return Answer(False, f"data is not the file's own pages ({copied} are copies)")


CHAPTER = Chapter(
    id="copies",
    number=5,
    title="read and write against mmap",
    claim="read and write copy between the page cache and a buffer; a mapping is the page cache.",
    surprise="Avoiding the copy does not always win: it depends on the pattern.",
    claims=(
        Statement(
            "mapping-is-the-cache", "A mapping's pages are the page cache's", _mapping_is_cache, "flags"
        ),
        Statement("read-copies", "read fills pages of our own", _read_copies, "flags"),
        Statement("frames-distinct", "Page cache and buffer are different frames", _distinct, "frames"),
        Statement("buffer-is-a-snapshot", "A buffer and its file go separate ways", _snapshot),
        Statement("mapping-follows", "A mapping shows the file as it is now", _follows),
        Statement("read-wins-once", "A page that is read once is cheaper to copy than to map", _read_wins),
        Statement("mmap-wins-random", "Many random reads are cheaper through a mapping", _mmap_wins),
    ),
    question=Question(
        "A program needs one page of a file, once. What is faster?",
        (
            Choice("mmap: nothing is copied", "But two system calls, a fault and a TLB flush are needed."),
            Choice("read: it is one call", "Copying 4 KiB takes a fraction of a microsecond."),
            Choice("They are the same", "They do different work: a copy here, page table entries there."),
        ),
        1,
    ),
    explanation=(
        "read(2) copies from the page cache to the caller's buffer, and write(2) back: the bytes are in "
        "memory twice. A mapping has them once.",
        "A copy is cheap, though; changing page tables is not: mmap, a fault for every few pages, munmap. "
        "So mmap wins where data is used often, in random order, or by many processes at once; read wins "
        "for data that is used once, through a small buffer that stays in the processor's cache.",
        "The figures are this machine's, and include what Python adds to each call.",
    ),
    sources=("read(2)", "mmap(2)", "mm/filemap.c, filemap_read() and filemap_fault()"),
    exercise=Exercise(
        "The snippet copies a file into a buffer to add up 16 bytes. Make it use the file's own pages.",
        _SNIPPET,
        _SNIPPET.replace(
            "data = mmap.mmap(-1, 16 * PAGE)    # a buffer, and a copy in it\n"
            "file.seek(0)\nfile.readinto(data)\n",
            "data = mmap.mmap(file.fileno(), 0)\n",
        ),
        _check,
    ),
    run=_run,
)
