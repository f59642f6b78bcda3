"""Chapter 2: pages enter memory when they are touched."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from miniloader.kernel.frames import KPF
from miniloader.kernel.syscalls import MAP_PRIVATE, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE, mincore
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
    Row,
    Statement,
    Step,
    Table,
)
from miniloader.walkthrough.recorded_calls import Mapping
from miniloader.walkthrough.workbench import Bench, View

__all__ = ["CHAPTER", "Faults", "Seen"]

_PAGES = 1024
_TOUCHED = 300


class Faults(NamedTuple):
    """How often a touch had to wait for the kernel: without the disk (minor), and for it (major)."""

    minor: int
    major: int


@dataclass(frozen=True)
class Seen:
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


def _faults() -> Faults:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Faults(usage.ru_minflt, usage.ru_majflt)


def _touch_all(bench: Bench, mapping: Mapping) -> Faults:
    """Read a byte of each page, in order; the faults that took."""
    import ctypes

    array = (ctypes.c_char * mapping.length).from_address(mapping.address)
    before = _faults()
    for offset in range(0, mapping.length, PAGE_SIZE):
        array[offset]
    after = _faults()
    found = Faults(after.minor - before.minor, after.major - before.major)
    what = f"load 1 byte of each of {mapping.pages:,} pages"
    bench.note(what, f"{found.minor} minor, {found.major} major faults", access=True)
    return found


def _cached(bench: Bench, fd: int) -> int:
    """How many pages of the file are in the page cache."""
    memory = bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
    text = f"mincore({memory.address:#x}, {memory.length}, …)"
    found = sum(bench.do(text, lambda: mincore(*memory), lambda pages: f"0: {sum(pages)} pages"))
    bench.munmap(memory)
    return found


def _large(view: View) -> str:
    """How many of the frames belong to large folios, where that is told."""
    pages = view.grid.snapshot.processes[0].pages
    known = pages["flags"] != 0
    if not known.any():
        return "whether they are large folios, only root may know"
    mask = KPF["thp"].mask | KPF["compound_head"].mask | KPF["compound_tail"].mask
    return f"{np.count_nonzero(pages['flags'][known] & mask)} of them in large folios"


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.file("large", os.urandom(_PAGES * PAGE_SIZE))
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    memory = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd))
    before = bench.look_at(memory, title="mapped")
    bench.load(memory.page(_TOUCHED), 1, f"p[{_TOUCHED} * {PAGE_SIZE}]")
    after = bench.look_at(memory, title="one touch")
    pages = after.pages("shared", "sole")
    around = f"{pages[0]} to {pages[-1]}" if pages else "none"
    yield Step(
        "one touch",
        f"A file of {_PAGES:,} pages, all in the page cache, is mapped; one byte of page {_TOUCHED} is read.",
        bench.calls(),
        (
            f"One fault brought {len(pages)} pages: {around}. The kernel maps what is at hand around the "
            f"one that was asked for; {_large(after)}.",
            "So a page that is present need not have been touched.",
        ),
        evidence=(
            Evidence(
                "Pages of the mapping",
                "/proc/self/pagemap",
                (
                    Row("present", f"{before.present}", f"{after.present} of {_PAGES:,}"),
                    Row(f"page {_TOUCHED}", before.words(_TOUCHED), after.words(_TOUCHED)),
                    Row("page 0", before.words(0), after.words(0)),
                ),
            ),
        ),
        grid=after.grid,
    )

    private = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd))
    bench.store(private.page(_TOUCHED), b"x", f"q[{_TOUCHED} * {PAGE_SIZE}]")
    written = bench.look_at(private, title="one write")
    yield Step(
        "one write",
        "The same file in a private mapping; this time the first touch is a store.",
        bench.calls(),
        (f"One fault brought {written.present}: a write needs a copy, and copies are made one at a time.",),
        grid=written.grid,
    )

    cold_path = bench.file("cold", os.urandom(_PAGES * PAGE_SIZE))
    cold_fd = bench.keep_open(bench.open(cold_path, os.O_RDONLY))
    bench.drop_cache(cold_fd)
    cached = _cached(bench, cold_fd)
    runs = []
    for _ in range(2):
        mapping = bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, cold_fd)
        runs.append(_touch_all(bench, mapping))
        everything = bench.look_at(mapping).present
        bench.munmap(mapping)
    cold, warm = runs
    yield Step(
        "cold and warm",
        "A file that the page cache has let go of is mapped and read page by page, and then once more.",
        bench.calls(),
        (
            f"Cold: {cold.major} faults waited for the disk; read-ahead brought the rest in time.",
            f"Warm: {warm.major} did. And {warm.minor} faults were enough for {_PAGES:,} pages.",
        ),
        tables=(
            Table(
                "getrusage(2)",
                ("file", ">pages touched", ">minor faults", ">major faults"),
                (
                    ("cold", f"{_PAGES:,}", f"{cold.minor}", f"{cold.major}"),
                    ("warm", f"{_PAGES:,}", f"{warm.minor}", f"{warm.major}"),
                ),
            ),
        ),
    )

    yield from _one_at_a_time(bench)
    return Seen(
        before.present,
        before.states[_TOUCHED],
        after.states[_TOUCHED],
        len(pages),
        written.present,
        cached,
        cold,
        warm,
        everything,
    )


def _one_at_a_time(bench: Bench) -> Generator[Step, None, None]:
    path = bench.file("random", os.urandom(_PAGES * PAGE_SIZE))
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    bench.calls()
    bench.drop_cache(fd)
    memory = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd))
    bench.madvise(memory, "MADV_RANDOM")
    bench.load(memory.page(_TOUCHED), 1, f"p[{_TOUCHED} * {PAGE_SIZE}]")
    view = bench.look_at(memory, title="cold, at random")
    yield Step(
        "one at a time",
        "A cold file again, and the kernel is told that we read at random: no read-ahead.",
        bench.calls(),
        (f"One touch brought {view.present} of {_PAGES:,} pages: there was nothing else to bring.",),
        grid=view.grid,
    )


# ---------------------------------------------------------------------------------------- claims
def _on_demand(seen: Seen) -> Finding:
    good = (
        seen.before == 0
        and seen.touched_before == "absent"
        and seen.touched_after in ("shared", "sole")
        and seen.by_one_touch < _PAGES
    )
    return Finding(
        good,
        "0 pages when mapped; the page when it is touched, and not the whole file",
        f"{seen.before} pages, then {seen.by_one_touch} of {_PAGES:,}; the page is {seen.touched_after}",
    )


def _at_least_one(seen: Seen) -> Finding:
    return Finding(seen.by_one_touch >= 1, "1 page or more by one touch", f"{seen.by_one_touch}")


def _write_one(seen: Seen) -> Finding:
    return Finding(seen.by_one_write == 1, "1 page by one write", f"{seen.by_one_write}")


def _by_fault(seen: Seen) -> Finding:
    faults = sum(seen.warm)
    return Finding(
        1 <= faults <= _PAGES + 64 and seen.everything == _PAGES,
        f"all {_PAGES:,} pages, by at least one fault and at most one each",
        f"{seen.everything:,} pages by {faults} faults",
    )


def _cold_major(seen: Seen) -> Finding:
    expected = "cold: at least one fault waits for the disk; warm: none"
    observed = f"cold: {seen.cold.major}, warm: {seen.warm.major}"
    if seen.cached:
        reason = f"the page cache would not let go of {seen.cached:,} pages of the file"
        return Finding(None, expected, observed, reason)
    return Finding(seen.cold.major >= 1 and seen.warm.major == 0, expected, observed)


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
    present = sum(state != "absent" for state in states_of(names["memory"]))
    if present == 1:
        return Answer(True, "one fault brought exactly one page")
    return Answer(False, f"{present} pages are in the page table, 1 was asked for; what if you do not read?")


CHAPTER = Chapter(
    id="lazy",
    number=2,
    title="Lazy loading",
    claim="A page enters memory when it is first touched, and not before.",
    surprise="One read brings 1, 16 or 256 pages; one write brings exactly 1.",
    claims=(
        Statement("on-demand", "Pages are mapped when they are touched", _on_demand, "flags"),
        Statement(
            "one-fault-many", "One fault brings the page, and may bring neighbours", _at_least_one, "flags"
        ),
        Statement("write-one", "A write to a private page brings that page alone", _write_one, "flags"),
        Statement("by-fault", "Every page comes by a page fault", _by_fault, "flags"),
        Statement("cold-and-warm", "A cold file waits for the disk, a warm one does not", _cold_major),
    ),
    question=Question(
        f"A file of {_PAGES:,} pages is in the page cache. A program maps it and reads one byte. "
        "How many pages has its page table then?",
        (
            Choice("1", "It could be, and for a write it is. For a read the kernel is more generous."),
            Choice(
                "1 or more", "At least the one; as a rule its neighbours, and a whole large folio at once."
            ),
            Choice(f"{_PAGES:,}", "That is what MAP_POPULATE asks for. Without it, only what is near."),
        ),
        1,
    ),
    explanation=(
        "Touching a page that has no entry raises a page fault. The kernel looks up the mapping, finds the "
        "page in the page cache or reads it from the disk (a major fault), fills in the entry, and lets the "
        "instruction run again. The program notices nothing but the time.",
        "Since a fault costs more than an entry, a read fault maps the pages around it, too, if they are in "
        "the page cache: up to 64 KiB (fault-around), or the whole large folio that the page is part of. "
        "Present is not the same as touched.",
    ),
    sources=(
        "mm/memory.c, do_fault_around() and filemap_map_pages()",
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
    ),
    run=_run,
)
