"""Chapter 10: fork shares everything until somebody writes."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from miniloader.kernel.syscalls import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
)
from miniloader.values import dataclass
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
)
from miniloader.walkthrough.recorded_calls import Calls
from miniloader.walkthrough.workbench import ZEROS_UNTOLD, Bench, View, rows_of

__all__ = ["CHAPTER", "Seen"]

_PAGES, _BY_CHILD, _BY_PARENT = 8, 2, 5
_BOTH = PROT_READ | PROT_WRITE


@dataclass(frozen=True)
class Seen:
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


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    memory = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, _BOTH, MAP_PRIVATE | MAP_ANONYMOUS))
    board = bench.keep(bench.mmap(PAGE_SIZE, _BOTH, MAP_SHARED | MAP_ANONYMOUS))
    for page in range(_PAGES):
        bench.store(memory.page(page), b"first", f"p[{page} * {PAGE_SIZE}]")
    alone = bench.look_at(memory, "parent", "before fork")

    def child_body(calls: Calls) -> Generator[Any, None, None]:
        yield None
        calls.store(memory.page(_BY_CHILD), b"child", f"p[{_BY_CHILD} * {PAGE_SIZE}]")
        calls.store(board.address, b"hello", "shared[0]")
        yield None
        yield calls.load(memory.page(_BY_PARENT), 5, f"p[{_BY_PARENT} * {PAGE_SIZE}:+5]")

    child = bench.child("child", child_body)
    child.next()
    bench.note("fork()", str(child.pid))
    rows = [("parent", os.getpid(), memory.address), ("child", child.pid, memory.address)]
    forked = bench.look(rows, _PAGES, "forked")
    yield Step(
        "forked",
        f"A process writes {_PAGES} pages of private memory, and forks.",
        bench.calls(),
        (
            f"Parent and child have the same {_PAGES} frames: {_alike(*forked)}. fork copied the page table, "
            "and no page.",
        ),
        evidence=(
            Evidence("Pages of the parent", "/proc/self/pagemap", rows_of(alone, forked[0], range(_PAGES))),
        ),
        grid=forked[0].grid,
    )

    _, made = child.next()
    bench.record(made, "child")
    bench.store(memory.page(_BY_PARENT), b"mine!", f"p[{_BY_PARENT} * {PAGE_SIZE}]")
    written = bench.look(rows, _PAGES, "written")
    parent_reads = bench.load(memory.page(_BY_CHILD), 5, f"p[{_BY_CHILD} * {PAGE_SIZE}:+5]")
    word = bench.load(board.address, 5, "shared[0:5]")
    child_reads, made = child.next()
    bench.record(made, "child")
    yield Step(
        "written",
        f"The child writes page {_BY_CHILD}, the parent page {_BY_PARENT}: each is the first to write there.",
        bench.calls(),
        (
            "Whoever writes first gets the new frame; the other keeps the old one.",
            f"In the child's page the parent still reads {parent_reads!r}; in the shared mapping {word!r}.",
        ),
        evidence=(
            Evidence("Parent", "/proc/self/pagemap", rows_of(forked[0], written[0], (_BY_CHILD, _BY_PARENT))),
            Evidence(
                "Child", f"/proc/{child.pid}/pagemap", rows_of(forked[1], written[1], (_BY_CHILD, _BY_PARENT))
            ),
        ),
        grid=written[0].grid,
    )

    child.end()
    bench.note("the child is gone", access=True)
    for page in range(_PAGES):
        bench.store(memory.page(page), b"again", f"p[{page} * {PAGE_SIZE}]")
    last = bench.look_at(memory, "parent", "the child is gone")
    yield Step(
        "alone again",
        "The child ends, and the parent writes every page.",
        bench.calls(),
        ("Nobody else has these frames any more, so the parent writes where it is: no page is copied.",),
        evidence=(
            Evidence("Pages of the parent", "/proc/self/pagemap", rows_of(written[0], last, range(_PAGES))),
        ),
        grid=last.grid,
    )
    return Seen(
        (forked[0].states, forked[1].states),
        (forked[0].frames, forked[1].frames),
        (written[0].states, written[1].states),
        (written[0].frames, written[1].frames),
        last.states,
        last.frames,
        parent_reads,
        child_reads,
        word,
    )


def _alike(one: View, other: View) -> str:
    if not all(one.frames):
        return "which frames, only root may know, but each is mapped twice"
    return ", ".join(f"{frame:#x}" for frame in one.frames[:3]) + ", …"


# ---------------------------------------------------------------------------------------- claims
def _of_states(states: set[str], holds: bool, expected: str, observed: str) -> Finding:
    """What the states of pages come to; nothing where one could not be told."""
    if "unknown" in states:
        return Finding(None, expected, observed, ZEROS_UNTOLD)
    return Finding(holds, expected, observed)


def _all_shared(seen: Seen) -> Finding:
    parent, child = seen.forked
    frames = seen.forked_frames
    same = frames[0] == frames[1]
    return _of_states(
        {*parent, *child},
        {*parent, *child} == {"copied-shared"} and same,
        f"{_PAGES} pages, each mapped by both",
        f"{', '.join(sorted({*parent, *child}))}; {sum(map(int.__eq__, *frames))} of {_PAGES} frames equal"
        if any(frames[0])
        else ", ".join(sorted({*parent, *child})),
    )


def _first_writer(seen: Seen) -> Finding:
    before, (parent, child) = seen.forked_frames[0], seen.written_frames
    moved = [page for page in range(_PAGES) if parent[page] != before[page]]
    childs = [page for page in range(_PAGES) if child[page] != before[page]]
    return Finding(
        moved == [_BY_PARENT] and childs == [_BY_CHILD],
        f"the parent's page {_BY_PARENT} and the child's page {_BY_CHILD} in new frames",
        f"new frames: parent {moved}, child {childs}",
    )


def _others_stay(seen: Seen) -> Finding:
    parent, child = seen.written
    written = {_BY_CHILD, _BY_PARENT}
    rest = {states[page] for states in (parent, child) for page in range(_PAGES) if page not in written}
    own = {states[page] for states in (parent, child) for page in written}
    return _of_states(
        rest | own,
        rest == {"copied-shared"} and own == {"copied"},
        "the two written pages are each process's own, the others are still shared",
        f"written: {', '.join(sorted(own))}; others: {', '.join(sorted(rest))}",
    )


def _isolated(seen: Seen) -> Finding:
    return Finding(
        (seen.parent_reads, seen.child_reads) == (b"first", b"first"),
        "each still reads b'first' where the other wrote",
        f"{seen.parent_reads!r} and {seen.child_reads!r}",
    )


def _never_moved(seen: Seen) -> Finding:
    before, after = seen.written_frames[0], seen.alone_frames
    moved = [page for page in range(_PAGES) if before[page] != after[page]]
    return Finding(not moved, "every page in the frame it was in", f"moved: {moved or 'none'}")


def _owner(seen: Seen) -> Finding:
    states = {*seen.alone}
    return _of_states(
        states, states == {"copied"}, "the parent's own, all of them", ", ".join(sorted(states))
    )


def _shared_mapping(seen: Seen) -> Finding:
    return Finding(seen.shared_word == b"hello", "b'hello'", repr(seen.shared_word))


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
    import signal

    from miniloader.walkthrough.exercises import states_of

    try:
        states = states_of(names["memory"])
    finally:
        os.kill(names["child"], signal.SIGKILL)
        os.waitpid(names["child"], 0)
    own = states.count("copied")
    if own == 1 and states.count("copied-shared") == len(states) - 1:
        return Answer(
            True, f"one page is the parent's own; {len(states) - 1} are still shared with the child"
        )
    return Answer(False, f"{own} pages are the parent's own, 1 was asked for")


CHAPTER = Chapter(
    id="fork",
    number=10,
    title="fork: shared until written",
    claim="After fork parent and child have every page in common, until one of them writes to it.",
    surprise="Who writes first moves; and when the child has gone, the parent never moves again.",
    claims=(
        Statement("all-shared", "fork copies no page", _all_shared, "flags"),
        Statement(
            "own-when-written", "A written page becomes each one's own, the rest stay", _others_stay, "flags"
        ),
        Statement("first-writer-moves", "The first writer gets the new frame", _first_writer, "frames"),
        Statement("isolated", "Neither sees what the other writes", _isolated),
        Statement("last-owner-stays", "The last owner writes without a copy", _never_moved, "frames"),
        Statement("owner-again", "When the child has gone, all pages are the parent's own", _owner, "flags"),
        Statement("shared-stays-shared", "A shared mapping stays shared over fork", _shared_mapping),
    ),
    question=Question(
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
    ),
    run=_run,
)
