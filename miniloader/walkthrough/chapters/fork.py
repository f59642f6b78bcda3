"""Chapter 4: fork shares everything until somebody writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from typing import Any, Final

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
from miniloader.walkthrough.step import ChapterStep, OfPages
from miniloader.walkthrough.traced_calls import Calls, Mapping, page_slice, quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "ForkedPages"]

_PAGES, _BY_CHILD, _BY_PARENT = 8, 2, 5
_READ_WRITE = PROT_READ | PROT_WRITE


@dataclass(frozen=True)
class ForkedPages:
    """States and frames of parent and child: after fork, when each has written, when the child has gone."""

    forked: tuple[tuple[str, ...], tuple[str, ...]]
    forked_frames: tuple[tuple[int, ...], tuple[int, ...]]
    written: tuple[tuple[str, ...], tuple[str, ...]]
    written_frames: tuple[tuple[int, ...], tuple[int, ...]]
    alone: tuple[str, ...]  # the parent, when the child has gone and the parent has written every page
    alone_frames: tuple[int, ...]
    parent_reads: bytes  # of the page that the child wrote
    child_reads: bytes  # of the page that the parent wrote
    shared_word: bytes  # that the child stored in a shared mapping


def _run(bench: Workbench) -> Generator[ChapterStep, None, ForkedPages]:
    memory = bench.mapped(_PAGES * PAGE_SIZE, _READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    board = bench.mapped(PAGE_SIZE, _READ_WRITE, MAP_SHARED | MAP_ANONYMOUS)
    _write_all(bench, memory, b"first")
    alone = bench.look_at(memory, "parent", "before fork")

    def child_body(calls: Calls) -> Generator[Any, None, None]:
        yield None
        calls.store(memory.page(_BY_CHILD), b"child", f"p[{_BY_CHILD * PAGE_SIZE}]")
        calls.store(board.address, b"hello", "shared[0]")
        yield None
        yield calls.load(memory.page(_BY_PARENT), 5, page_slice(_BY_PARENT, 5))

    child = bench.child("child", child_body)
    bench.resume(child)
    bench.note("fork()", str(child.pid))
    rows = [("parent", os.getpid(), memory.address), ("child", child.pid, memory.address)]
    forked = bench.look(rows, _PAGES, "forked")
    yield ChapterStep(
        "forked",
        f"A process writes {_PAGES} pages of private memory, maps one page of shared memory, and forks.",
        bench.taken(),
        (
            OfPages(
                f"Parent and child have the same {_PAGES} frames: {_frames(forked[0])}. fork copied the page "
                "table, and no page."
            ),
        ),
        evidence=(before_and_after("Pages of the parent", alone, forked[0], range(_PAGES)),),
        grid=forked[0].grid,
    )

    bench.resume(child)
    bench.store(memory.page(_BY_PARENT), b"mine!", f"p[{_BY_PARENT * PAGE_SIZE}]")
    written = bench.look(rows, _PAGES, "written")
    parent_reads = bench.load(memory.page(_BY_CHILD), 5, page_slice(_BY_CHILD, 5))
    word = bench.load(board.address, 5, "shared[0:5]")
    child_reads = bench.resume(child)
    pages = (_BY_CHILD, _BY_PARENT)
    yield ChapterStep(
        "written",
        f"The child writes page {_BY_CHILD}, the parent page {_BY_PARENT}: each is the first to write there.",
        bench.taken(),
        (
            "Whoever writes first gets the new frame; the other keeps the old one.",
            f"In the child's page the parent still reads {quoted(parent_reads)}; "
            f"in the shared mapping {quoted(word)}.",
        ),
        evidence=(
            before_and_after("Parent", forked[0], written[0], pages),
            before_and_after("Child", forked[1], written[1], pages, child.pid),
        ),
        grid=written[0].grid,
    )

    child.end()
    bench.note("the child is gone", access=True)
    last = yield from _alone_again(bench, memory, written[0])
    return ForkedPages(
        forked=(forked[0].states, forked[1].states),
        forked_frames=(forked[0].frames, forked[1].frames),
        written=(written[0].states, written[1].states),
        written_frames=(written[0].frames, written[1].frames),
        alone=last.states,
        alone_frames=last.frames,
        parent_reads=parent_reads,
        child_reads=child_reads,
        shared_word=word,
    )


def _write_all(bench: Workbench, memory: Mapping, word: bytes) -> None:
    for page in range(_PAGES):
        bench.store(memory.page(page), word, f"p[{page * PAGE_SIZE}]")


def _frames(view: MappingView) -> str:
    if not all(view.frames):
        return "which frames, only root may know, but each is mapped more than once"
    return ", ".join(f"{frame:#x}" for frame in view.frames[:3]) + ", …"


def _alone_again(
    bench: Workbench, memory: Mapping, before: MappingView
) -> Generator[ChapterStep, None, MappingView]:
    """Write every page when the child is gone."""
    _write_all(bench, memory, b"again")
    after = bench.look_at(memory, "parent", "the child is gone")
    yield ChapterStep(
        "alone again",
        "The child ends, and the parent writes every page.",
        bench.taken(),
        ("Nobody else has these frames any more, so the parent writes where it is: no page is copied.",),
        evidence=(before_and_after("Pages of the parent", before, after, range(_PAGES)),),
        grid=after.grid,
    )
    return after


# ---------------------------------------------------------------------------------------- claims
def _of_states(states: set[str], holds: bool, expected: str, observed: str) -> Finding:
    """What the states of pages come to; nothing where one could not be told."""
    return Finding(None if "unknown" in states else holds, expected, observed, ZEROS_UNTOLD)


@claim("all-shared", "fork copies no page", "flags")
def _all_shared(pages: ForkedPages) -> Finding:
    states, frames = {*pages.forked[0], *pages.forked[1]}, pages.forked_frames
    observed = in_words(states)
    if any(frames[0]):
        observed += f"; {sum(map(int.__eq__, *frames))} of {_PAGES} frames equal"
    holds = states == {"copied-shared"} and frames[0] == frames[1]
    return _of_states(states, holds, f"{_PAGES} pages, each mapped by both", observed)


@claim("own-when-written", "A written page becomes each one's own, the rest stay", "flags")
def _unwritten_stay(pages: ForkedPages) -> Finding:
    written = {states[page] for states in pages.written for page in (_BY_CHILD, _BY_PARENT)}
    unwritten = {
        states[page] for states in pages.written for page in {*range(_PAGES)} - {_BY_CHILD, _BY_PARENT}
    }
    return _of_states(
        written | unwritten,
        unwritten == {"copied-shared"} and written == {"copied"},
        "the two written pages are each process's own, the others are still shared",
        f"written: {in_words(written)}; others: {in_words(unwritten)}",
    )


@claim("first-writer-moves", "The first writer gets the new frame", "frames")
def _first_writer(pages: ForkedPages) -> Finding:
    before = pages.forked_frames[0]
    moved = [
        [page for page in range(_PAGES) if frames[page] != before[page]] for frames in pages.written_frames
    ]
    return Finding(
        moved == [[_BY_PARENT], [_BY_CHILD]],
        f"the parent's page {_BY_PARENT} and the child's page {_BY_CHILD} in new frames",
        f"new frames: the parent's page {_numbers(moved[0])}, the child's page {_numbers(moved[1])}",
    )


def _numbers(pages: list[int]) -> str:
    return ", ".join(map(str, pages)) or "none"


_STILL_READ = "{} where the child wrote, {} where the parent wrote"


@equal("isolated", "Neither sees what the other writes", (b"first", b"first"), _STILL_READ)
def _isolated(pages: ForkedPages) -> tuple[bytes, bytes]:
    return pages.parent_reads, pages.child_reads


@claim("last-owner-stays", "The last owner writes without a copy", "frames")
def _never_moved(pages: ForkedPages) -> Finding:
    before, after = pages.written_frames[0], pages.alone_frames
    moved = [page for page in range(_PAGES) if before[page] != after[page]]
    return Finding(not moved, "every page in the frame it was in", f"moved: {_numbers(moved)}")


@claim("owner-again", "When the child has gone, all pages are the parent's own", "flags")
def _owner(pages: ForkedPages) -> Finding:
    states = {*pages.alone}
    observed = in_words(states)
    return _of_states(states, states == {"copied"}, "the parent's own, all of them", observed)


@equal("shared-stays-shared", "A shared mapping stays shared over fork", b"hello", "the parent reads {}")
def _shared_mapping(pages: ForkedPages) -> bytes:
    return pages.shared_word


_SNIPPET = """\
import mmap, os

PAGES, PAGE = 32, mmap.PAGESIZE
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
for page in range(PAGES):
    memory[page * PAGE] = 1

child = os.fork()
if child == 0:
    import signal
    signal.pause()                 # the child is only there

for page in range(PAGES):
    memory[page * PAGE] = 2        # every write takes a new frame
"""


def _check(names: dict[str, Any]) -> Answer:
    try:
        states = states_of(names["memory"])
    finally:
        os.kill(names["child"], signal.SIGKILL)
        os.waitpid(names["child"], 0)
    copied = states.count("copied")
    if copied == 1 and states.count("copied-shared") == len(states) - 1:
        return Answer(
            True, f"one page is the parent's own; {len(states) - 1} are still shared with the child"
        )
    return Answer(False, f"{copied} pages are the parent's own, 1 was asked for")


CHAPTER: Final[Chapter[ForkedPages]] = Chapter(
    id="fork",
    number=4,
    title="fork: shared until written",
    claim="After fork parent and child have every page in common, until one of them writes to it.",
    surprise="Who writes first moves; and when the child has gone, the parent never moves again.",
    claims=(_all_shared, _unwritten_stay, _first_writer, _isolated, _never_moved, _owner, _shared_mapping),
    question=Quiz(
        "A process with 8 private pages forks; then the parent writes one of them. Who gets a new frame?",
        (
            Choice(
                "The child: it is the copy", "The kernel does not know whose it is. It copies for the writer."
            ),
            Choice("The parent: it writes", "Whoever writes first to a shared frame is given a copy."),
            Choice("Nobody", "Then the child would see the write."),
        ),
        1,
    ),
    explanation=(
        "fork copies the page table and makes both processes' private pages read-only there. The frames now "
        "have two owners. A write faults; the kernel sees that the frame is shared and copies it for whoever "
        "wrote.",
        "When only one owner is left, a write faults at most once more: the kernel sees that nobody else has "
        "the frame, makes the entry writable, and copies nothing.",
        "That is why fork is quick, and why a server that forks workers late shares what it set up before.",
    ),
    sources=("fork(2)", "mm/memory.c, copy_present_ptes() and wp_can_reuse_anon_folio()"),
    exercise=Exercise(
        "The parent writes all 32 pages and so takes 32 new frames. Change it so that 31 pages stay shared "
        "with the child.",
        _SNIPPET,
        _SNIPPET.replace(
            "for page in range(PAGES):\n    memory[page * PAGE] = 2        # every write takes a new frame\n",
            "memory[0] = 2\n",
        ),
        _check,
        hints=(
            "Each page that the parent writes takes a new frame. How many may it write?",
            "memory[0] = 2 instead of the loop: one page moves, the others stay.",
        ),
    ),
    source_of={
        "all-shared": "fork(2), NOTES: implemented using copy-on-write pages",
        "own-when-written": "fork(2), NOTES; Documentation/admin-guide/mm/pagemap.rst, bit 56",
        "first-writer-moves": "mm/memory.c, do_wp_page(): the page is copied for whoever writes",
        "isolated": "fork(2): memory writes performed by one of the processes do not affect the other",
        "last-owner-stays": "mm/memory.c, wp_can_reuse_anon_folio()",
        "owner-again": "Documentation/admin-guide/mm/pagemap.rst, bit 56, exclusively mapped",
        "shared-stays-shared": "mmap(2), NOTES: preserved across fork(2), with the same attributes",
    },
    run=_run,
    later=(
        Quiz(
            "The child writes page 2, the parent page 5. Whose frames are new?",
            (
                Choice(
                    "The child's, both times",
                    "The kernel does not prefer the parent: it copies for the writer.",
                ),
                Choice("Each writer's", "Whoever writes first is given the copy, the other keeps the frame."),
                Choice("Both get new frames", "One of them can keep the old one."),
            ),
            1,
            step="written",
        ),
        Quiz(
            "The child has ended. Now the parent writes all 8 pages. How many are copied?",
            (
                Choice(
                    "8: they are marked read-only",
                    "There is a fault, but the kernel sees that nobody else has the frame.",
                ),
                Choice("7", "The one that it has written before is no different."),
                Choice("None", "It is the last owner of each frame, and may write where it is."),
            ),
            2,
            step="alone again",
        ),
    ),
)
