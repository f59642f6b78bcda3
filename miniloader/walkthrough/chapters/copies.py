"""Chapter 6: read and write against mmap, with frames and with a clock."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Generator
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import read_maps
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
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.compiled_races import Times, compiled_races
from miniloader.walkthrough.mapping_views import address_of, before_and_after, in_words, states_of
from miniloader.walkthrough.step import ChapterStep, Figures, OfPages
from miniloader.walkthrough.traced_calls import quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "Race", "ReadAndMapped"]

_PAGES = 8
_BUFFER = 64 << 10
_SIZES = (256 << 10, 4 << 20, 32 << 20)
_READS = 20_000
_ROUNDS = 7
_pread = ctypes.CDLL(None).pread
_pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)


@dataclass(frozen=True)
class Race:
    """One pattern, done both ways: what each round took, in microseconds, and why who won."""

    pattern: str
    by_read: tuple[float, ...]
    by_mmap: tuple[float, ...]
    why: str

    @property
    def winner(self) -> str:
        """Who was faster, and how much, by the medians.

        >>> Race("", (1.0, 2.0, 3.0), (4.0, 5.0, 9.0), "").winner
        'read, 2.5×'
        """
        read, mapped = median(self.by_read), median(self.by_mmap)
        return f"read, {mapped / read:.1f}×" if read < mapped else f"mmap, {read / mapped:.1f}×"

    @property
    def spread(self) -> tuple[str, str]:
        """The shortest and the longest round of each side, read first."""
        read, mapped = (
            f"{min(rounds):,.0f} to {max(rounds):,.0f}" for rounds in (self.by_read, self.by_mmap)
        )
        return read, mapped


@dataclass(frozen=True)
class ReadAndMapped:
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
    in_order: tuple[Race, ...]


def _run(bench: Workbench) -> Generator[ChapterStep, None, ReadAndMapped]:
    fd = bench.opened(bench.file("file", b"old " * (_PAGES * PAGE_SIZE // 4)), os.O_RDWR)
    mapping = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    buffer = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    rows = [("mapping", os.getpid(), mapping.address), ("buffer", os.getpid(), buffer.address)]
    empty = bench.look(rows, _PAGES, "before")[1]
    memory = memoryview((ctypes.c_char * buffer.length).from_address(buffer.address))
    bench.do(f"pread({fd}, buffer, {buffer.length}, 0)", lambda: os.preadv(fd, [memory], 0))
    for page in range(_PAGES):
        bench.load(mapping.page(page), 1, f"mapping[{page * PAGE_SIZE}]")
    mapped, filled = bench.look(rows, _PAGES, "read both ways")
    yield ChapterStep(
        "two ways to the bytes",
        "The same file is mapped, and read into a buffer. Both now hold the same bytes.",
        bench.taken(),
        (
            OfPages(
                f"The mapping: {mapped.words(0)}. The buffer: {filled.words(0)}. Other frames, with a copy."
            ),
        ),
        evidence=(before_and_after("Pages of the buffer", empty, filled, range(_PAGES)),),
        grid=mapped.grid,
    )

    bench.pwrite(fd, b"new ", 0)
    in_mapping = bench.load(mapping.address, 4, "mapping[0:4]")
    in_buffer = bench.load(buffer.address, 4, "buffer[0:4]")
    bench.store(buffer.address, b"mine", "buffer[0]")
    in_file = bench.pread(fd, 4, 0)
    yield ChapterStep(
        "then the file changes",
        "The file is changed with pwrite; then the buffer is changed.",
        bench.taken(),
        (
            f"Mapping: {quoted(in_mapping)}. Buffer: {quoted(in_buffer)}. "
            f"File, once the buffer changed: {quoted(in_file)}.",
            "A buffer is a snapshot. A mapping is the file.",
        ),
    )
    once, random, *in_order = yield from _races(bench)
    return ReadAndMapped(
        mapping=mapped.states,
        buffer=filled.states,
        mapping_frames=mapped.frames,
        buffer_frames=filled.frames,
        in_mapping=in_mapping,
        in_buffer=in_buffer,
        in_other_buffer=in_file,
        once=once,
        random=random,
        in_order=tuple(in_order),
    )


# ----------------------------------------------------------------------------------------- clocks
def _races(bench: Workbench) -> Generator[ChapterStep, None, list[Race]]:
    fd = bench.opened(bench.file("race", np.random.default_rng(1).bytes(_SIZES[-1])))
    compiled = compiled_races(bench.place().directory)
    first = _in_c(compiled) if compiled else (_once(fd), _random(bench, fd))
    races = [*first, *(_in_order(fd, size) for size in _SIZES), _written(bench)]
    language = "in C, compiled here" if compiled else "in one language (there is no C compiler here)"
    rows = tuple((race.pattern, *race.spread, race.winner, race.why) for race in races)
    yield ChapterStep(
        "with a clock",
        "The same work is done with read and with mmap, on a file in the page cache, several rounds each; "
        f"single pages and words {language}.",
        bench.taken(),
        ("Neither always wins: see what each has to do for the pattern.",),
        tables=(Figures("Who is faster", ("pattern", ">read µs", ">mmap µs", "faster", "why"), rows),),
    )
    return races


_WHY_ONCE: Final = ("a page costs mmap two calls and a fault", "a copy cost more than two calls and a fault")
_WHY_RANDOM: Final = ("a call cost less than a load", "a read is a system call, a load is a load")


def _in_c(compiled: dict[str, Times]) -> tuple[Race, ...]:
    """The races of single pages, and of single words, as the program in C ran them."""
    races = []
    for pattern, why in (("64 pages, each once", _WHY_ONCE), (f"{_READS:,} random words", _WHY_RANDOM)):
        read, mapped = compiled[pattern]
        races.append(Race(f"{pattern}, in C", read, mapped, why[median(read) > median(mapped)]))
    return tuple(races)


def _race(pattern: str, why: tuple[str, str], by_read: Callable[[], int], by_mmap: Callable[[], int]) -> Race:
    """Run both by turns; ``why`` explains a win of read, and one of mmap."""
    rounds = [(_timed(by_read), _timed(by_mmap)) for _ in range(_ROUNDS)]
    results = {result for pair in rounds for _, result in pair}
    assert len(results) == 1, f"{pattern}: read and mmap came to {results}"
    read, mapped = zip(*(((pair[0][0]), pair[1][0]) for pair in rounds), strict=True)
    return Race(pattern, read, mapped, why[0] if median(read) < median(mapped) else why[1])


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    """How long ``work`` took, in µs, and its result."""
    start = time.perf_counter_ns()
    result = work()
    return (time.perf_counter_ns() - start) / 1000, result


def _words(address: int, length: int) -> NDArray[np.uint64]:
    octets = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
    return np.frombuffer(octets, np.uint64)


def _once(fd: int) -> Race:
    """Pages that are used once, each by calls of the C library."""
    page = ctypes.create_string_buffer(PAGE_SIZE)
    address, offsets = ctypes.addressof(page), range(0, 64 * PAGE_SIZE, PAGE_SIZE)

    def by_read() -> int:
        total = 0
        for offset in offsets:
            _pread(fd, address, PAGE_SIZE, offset)
            total += int.from_bytes(ctypes.string_at(address, 8), "little")
        return total

    def by_mmap() -> int:
        total = 0
        for offset in offsets:
            mapped = mmap(0, PAGE_SIZE, PROT_READ, MAP_SHARED, fd, offset)
            total += int.from_bytes(ctypes.string_at(mapped, 8), "little")
            munmap(mapped, PAGE_SIZE)
        return total

    return _race("64 pages, each once, one by one", _WHY_ONCE, by_read, by_mmap)


def _random(bench: Workbench, fd: int) -> Race:
    """Words at random places, each taken by one line of Python."""
    memory = bench.mapped(_SIZES[-1], PROT_READ, MAP_SHARED, fd)
    mapped = memoryview((ctypes.c_char * memory.length).from_address(memory.address)).cast("B")
    offsets = (np.random.default_rng(2).integers(0, memory.length // 8, _READS) * 8).tolist()

    def by_read() -> int:
        return sum(int.from_bytes(os.pread(fd, 8, offset), "little") for offset in offsets)

    def by_mmap() -> int:
        return sum(int.from_bytes(mapped[offset : offset + 8], "little") for offset in offsets)

    return _race(f"{_READS:,} random words, mapped before", _WHY_RANDOM, by_read, by_mmap)


def _in_order(fd: int, size: int) -> Race:
    """A file from its beginning to its end, summed by numpy."""
    buffer = bytearray(_BUFFER)
    words = np.frombuffer(buffer, np.uint64)

    def by_read() -> int:
        total = 0
        for offset in range(0, size, _BUFFER):
            os.preadv(fd, [buffer], offset)
            total += int(words.sum())
        return total % 2**64

    def by_mmap() -> int:
        address = mmap(0, size, PROT_READ, MAP_SHARED, fd, 0)
        try:
            return int(_words(address, size).sum())
        finally:
            munmap(address, size)

    why = (
        f"its {_BUFFER >> 10} KiB buffer stays in the processor's cache; mmap faults",
        "few faults map many pages; read copies every byte",
    )
    return _race(f"{size >> 10:,} KiB summed in order", why, by_read, by_mmap)


def _written(bench: Workbench) -> Race:
    size, buffer = _SIZES[1], bytearray(_BUFFER)
    fd = bench.opened(bench.file("written", bytes(size)), os.O_RDWR)
    target = bench.mapped(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd)
    source = (ctypes.c_char * _BUFFER).from_buffer(buffer)

    def by_write() -> int:
        return sum(os.pwrite(fd, buffer, offset) for offset in range(0, size, _BUFFER))

    def by_store() -> int:
        for offset in range(0, size, _BUFFER):
            ctypes.memmove(target.address + offset, source, _BUFFER)
        return size

    why = ("stores fault for every page that is to be marked dirty", "a store is no system call")
    return _race(f"{size >> 10:,} KiB written in order, mapped before", why, by_write, by_store)


# ---------------------------------------------------------------------------------------- claims
@claim("mapping-is-the-cache", "A mapping's pages are the page cache's", "flags")
def _mapping_is_cache(seen: ReadAndMapped) -> Finding:
    states = {*seen.mapping}
    return Finding(states <= {"shared", "sole"}, "the page cache's own pages", in_words(states))


@claim("read-copies", "read fills pages of our own", "flags")
def _read_copies(seen: ReadAndMapped) -> Finding:
    states = {*seen.buffer}
    return Finding(states == {"copied"}, "anonymous pages of our own", in_words(states))


@claim("frames-distinct", "Page cache and buffer are different frames", "frames")
def _distinct(seen: ReadAndMapped) -> Finding:
    common = {*seen.mapping_frames} & {*seen.buffer_frames}
    told = all(seen.mapping_frames) and all(seen.buffer_frames)
    observed = f"{len(seen.mapping_frames)} and {len(seen.buffer_frames)} frames, {len(common)} in both"
    return Finding(told and not common, "no frame in both", observed)


@claim("buffer-is-a-snapshot", "A buffer and its file go separate ways")
def _snapshot(seen: ReadAndMapped) -> Finding:
    return Finding(
        (seen.in_buffer, seen.in_other_buffer) == (b"old ", b"new "),
        "the buffer keeps the old bytes, and the file does not follow the buffer",
        f"buffer {quoted(seen.in_buffer)}, file {quoted(seen.in_other_buffer)}",
    )


@equal("mapping-follows", "A mapping shows the file as it is now", b"new ", "{} in the mapping")
def _follows(seen: ReadAndMapped) -> bytes:
    return seen.in_mapping


@claim("read-wins-once", "A page that is read once is cheaper to copy than to map")
def _read_wins(seen: ReadAndMapped) -> Finding:
    faster = median(seen.once.by_read) < median(seen.once.by_mmap)
    return Finding(faster, "read is faster", "read {} µs, mmap {} µs".format(*seen.once.spread))


@claim("mmap-wins-random", "Many random reads are cheaper through a mapping")
def _mmap_wins(seen: ReadAndMapped) -> Finding:
    faster = median(seen.random.by_mmap) < median(seen.random.by_read)
    return Finding(faster, "mmap is faster", "read {} µs, mmap {} µs".format(*seen.random.spread))


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
    if type(names["data"]).__name__ != "mmap":
        return Answer(False, "data should be a mapping")
    address = address_of(names["data"])
    vma = next(vma for vma in read_maps() if address in vma)
    behind = os.fstat(names["file"].fileno()).st_ino
    copied = sum(state.startswith("copied") for state in states_of(names["data"]))
    if vma.inode == behind and not copied:
        return Answer(True, "the sum was made from the page cache's own pages, and nothing was copied")
    return Answer(False, f"data is not the file's own pages ({copied} are copies)")


CHAPTER: Final[Chapter[ReadAndMapped]] = Chapter(
    id="copies",
    number=6,
    title="read and write against mmap",
    claim="read and write copy between the page cache and a buffer; a mapping is the page cache.",
    surprise="Avoiding the copy does not always win: it depends on the pattern.",
    claims=(
        _mapping_is_cache,
        _read_copies,
        _distinct,
        _snapshot,
        _follows,
        _read_wins,
        _mmap_wins,
    ),
    question=Quiz(
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
        "The figures are this machine's, each the shortest and the longest round. Single calls and loads are "
        "raced in C, since Python would add more to each than they take; what is summed in order, numpy sums "
        "on both sides.",
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
        hints=(
            "What is data: the file, or memory into which the file was copied?",
            "mmap.mmap(file.fileno(), 0) is the file's own pages: no seek, no readinto.",
        ),
    ),
    source_of={
        "mapping-is-the-cache": (
            "Documentation/admin-guide/mm/pagemap.rst, bit 61; "
            "Documentation/admin-guide/mm/concepts.rst, Page cache"
        ),
        "read-copies": "read(2): into the buffer; mm/filemap.c, filemap_read()",
        "frames-distinct": "Documentation/admin-guide/mm/pagemap.rst, page frame number",
        "buffer-is-a-snapshot": (
            "read(2): into the buffer starting at buf; mm/filemap.c, filemap_read(): by copying"
        ),
        "mapping-follows": (
            "Documentation/admin-guide/mm/concepts.rst, Page cache: what is written to a file is placed "
            "there; mm/filemap.c, filemap_fault(): and mapped from there"
        ),
        "read-wins-once": "measured here; mm/filemap.c, filemap_read() beside filemap_fault()",
        "mmap-wins-random": "measured here; mm/filemap.c, filemap_read() beside filemap_fault()",
    },
    run=_run,
    later=(
        Quiz(
            "A file was read into a buffer, and is mapped, too. Then it changes. Who sees that?",
            (
                Choice("Both", "The buffer is a copy of what was there."),
                Choice("The mapping", "It is the page cache's page; the buffer is a copy made before."),
                Choice("Neither, until it is opened again", "A mapping does not go through open."),
            ),
            1,
            step="then the",
        ),
        Quiz(
            "20,000 random words of a file in the page cache: what is faster?",
            (
                Choice("pread for each", "Each is a system call, and a word is not worth one."),
                Choice("A mapping", "Once mapped, a word costs a load."),
                Choice("The same: it is all memory", "It is, but one of them asks the kernel 20,000 times."),
            ),
            1,
            step="with a",
        ),
    ),
)
