"""Chapter 16: what a pool of workers shares erodes, though nobody changes a byte."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any, Final

import numpy as np

from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import EXCLUSIVE, PRESENT, read_pagemap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, in_words
from miniloader.walkthrough.object_pool import PAGES, Item, ObjectPool, built
from miniloader.walkthrough.step import ChapterStep, Figures, OfPages
from miniloader.walkthrough.traced_calls import Calls
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "PoolPages"]

_SHOWN: Final = 4  # pages
_UNTOLD: Final = "a page is swapped out, or not told"
_WORKERS: Final = ("idle", "reads", "collects", "frozen, collects", "frozen, reads")


@dataclass(frozen=True)
class PoolPages:
    """The pages of the parent's objects in each worker: their states by the worker's name, and what is there.

    ``forked`` is as the first three were forked, ``worked`` when each has done what it is called after.
    ``equal`` is how many pages hold the same bytes as the parent's then; ``frames`` are the parent's, and
    those of who has read.  ``late`` are the states of as many pages of a worker that has built such objects
    itself, after the fork.
    """

    forked: dict[str, tuple[str, ...]]
    worked: dict[str, tuple[str, ...]]
    equal: dict[str, int]
    frames: tuple[tuple[int, ...], tuple[int, ...]]
    late: tuple[str, ...]


def _read(items: list[Item]) -> None:
    for _ in items:
        pass


def _collect(items: list[Item]) -> None:
    gc.collect()


def _run(bench: Workbench) -> Generator[ChapterStep, None, PoolPages]:
    enabled = gc.isenabled()
    gc.disable()  # or the parent would collect as well, when it likes
    try:
        pool = ObjectPool(bench)
        gc.collect()
        return (yield from _told(bench, pool))
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _told(bench: Workbench, pool: ObjectPool) -> Generator[ChapterStep, None, PoolPages]:
    pool.fork("idle", lambda items: None, "nothing")
    pool.fork("reads", _read, "for item in items: pass")
    pool.fork("collects", _collect, "gc.collect()")
    first = ("idle", "reads", "collects")
    forked = pool.look(first, "forked")
    yield ChapterStep(
        "forked",
        f"A parent has {len(pool.items):,} small objects, and forks three workers. Seen are {PAGES} of "
        "their pages.",
        bench.taken(),
        (
            OfPages(
                f"In every worker: {in_words(forked['idle'].states)}. A worker more costs none of these "
                "pages."
            ),
        ),
        grid=forked["parent"].grid,
    )
    pool.work("reads")
    read = pool.look(first, "read")
    yield _worked(bench, pool, "read", "One worker goes through the objects, and changes none.", forked, read)
    pool.work("collects")
    collected = pool.look(first, "collected")
    did = "Another one calls gc.collect(). There is no garbage."
    yield _worked(bench, pool, "collects", did, read, collected)
    gc.freeze()
    bench.note("gc.freeze()", access=True)
    pool.fork("frozen, collects", _collect, "gc.collect()")
    pool.fork("frozen, reads", _read, "for item in items: pass")
    for name in _WORKERS[3:]:
        pool.work(name)
    seen = pool.look(_WORKERS, "frozen")
    late = _late(bench)
    yield ChapterStep(
        "frozen",
        "The parent calls gc.freeze(), and forks two more: one collects, one reads. A last one builds such "
        "objects for itself.",
        bench.taken(),
        (
            OfPages(
                f"Who collects after gc.freeze(): {in_words(seen['frozen, collects'].states)}. The collector "
                "leaves alone what is frozen."
            ),
            OfPages(
                f"Who reads after gc.freeze(): {in_words(seen['frozen, reads'].states)}. It counts "
                "references all the same."
            ),
            OfPages(f"Who builds them after the fork: {in_words(late)}, each page its own from the start."),
        ),
        grid=seen["parent"].grid,
        tables=(_table(pool, seen, late),),
    )
    return PoolPages(
        forked={name: forked[name].states for name in first},
        worked={name: seen[name].states for name in _WORKERS},
        equal={name: pool.equal(name) for name in _WORKERS},
        frames=(seen["parent"].frames, seen["reads"].frames),
        late=late,
    )


def _worked(
    bench: Workbench,
    pool: ObjectPool,
    name: str,
    did: str,
    before: dict[str, MappingView],
    after: dict[str, MappingView],
) -> ChapterStep:
    """The step in which a worker has done its work."""
    worker = next(candidate for candidate in pool.children if candidate.startswith(name))
    equal = pool.equal(worker)
    return ChapterStep(
        name,
        did,
        bench.taken(),
        (
            OfPages(f"It has {len(after[worker].pages('copied'))} of the {PAGES} pages for itself now."),
            f"{equal} of the {PAGES} pages hold the same bytes as the parent's.",
        ),
        evidence=(
            before_and_after(
                f"Pages of who {worker}",
                before[worker],
                after[worker],
                range(_SHOWN),
                pool.children[worker].pid,
            ),
        ),
        grid=after["parent"].grid,
    )


def _late(bench: Workbench) -> tuple[str, ...]:
    """The states of pages of a worker that builds objects itself."""

    def body(calls: Calls) -> Generator[Any, None, None]:
        items, start = built()
        calls.note(f"items = [Item() for _ in range({len(items)})]", access=True)
        yield start

    child = bench.child("builds its own", body)
    start = bench.resume(child)
    return bench.look([("builds its own", child.pid, start)], PAGES, "built late")[0].states


def _table(pool: ObjectPool, seen: dict[str, MappingView], late: tuple[str, ...]) -> Figures:
    """What each worker's share of the objects costs."""
    rows = [(name, seen[name].states, str(pool.equal(name))) for name in _WORKERS]
    rows.append(("builds its own", late, "–"))
    return Figures(
        f"{PAGES} pages of objects in each worker",
        ("worker", ">its own", ">shared", ">same bytes as the parent's"),
        tuple(
            (name, str(states.count("copied")), str(states.count("copied-shared")), equal)
            for name, states, equal in rows
        ),
    )


# ---------------------------------------------------------------------------------------- claims
def _all(states: Sequence[str], wanted: str, expected: str) -> Finding:
    """Whether all pages are in one state; nothing where the kernel does not tell of one."""
    holds = None if "unknown" in states or "swapped" in states else {*states} == {wanted}
    observed = f"{states.count(wanted)} of {len(states)} pages"
    return Finding(holds, expected, observed, _UNTOLD)


def _still_shared(states: Sequence[str]) -> Finding:
    """Whether nearly all pages are in common: the parent may have put something else on one meanwhile."""
    holds = None if {*states} & {"unknown", "swapped"} else states.count("copied-shared") >= 0.9 * PAGES
    observed = f"{states.count('copied-shared')} of {len(states)} pages"
    return Finding(holds, f"nearly all of {PAGES} pages in common", observed, _UNTOLD)


@claim("forked-shared", "After fork no worker has a page of the objects for itself", "flags")
def _forked(seen: PoolPages) -> Finding:
    states = [state for worker in seen.forked.values() for state in worker]
    return _all(states, "copied-shared", "every page in common, in each of three workers")


@claim("idle-stays", "Who does nothing still shares them in the end", "flags")
def _idle(seen: PoolPages) -> Finding:
    return _still_shared(seen.worked["idle"])


@claim("reading-copies", "To read an object copies its page", "flags")
def _reading(seen: PoolPages) -> Finding:
    return _all(seen.worked["reads"], "copied", f"{PAGES} pages of its own")


@claim("new-frames", "The copies are other frames than the parent's", "frames")
def _frames(seen: PoolPages) -> Finding:
    parent, reader = seen.frames
    moved = sum(first != second and second != 0 for first, second in zip(parent, reader, strict=True))
    return Finding(moved == PAGES, f"{PAGES} pages in other frames", f"{moved} of {len(reader)}")


@claim("nothing-changed", "Yet every byte is as it was: the counts have gone up, and down again")
def _same_read(seen: PoolPages) -> Finding:
    return _equal(seen, "reads")


@claim("collecting-copies", "A collection copies them, too", "flags")
def _collecting(seen: PoolPages) -> Finding:
    return _all(seen.worked["collects"], "copied", f"{PAGES} pages of its own")


@claim("collector-changes-nothing", "What the collector writes on each object is gone afterwards")
def _same_collected(seen: PoolPages) -> Finding:
    return _equal(seen, "collects")


def _equal(seen: PoolPages, name: str) -> Finding:
    equal = seen.equal[name]
    return Finding(equal >= 0.9 * PAGES, f"nearly all of {PAGES} pages with equal bytes", f"{equal}")


@claim("freeze-stops-the-collector", "After gc.freeze() a collection copies none of them", "flags")
def _frozen(seen: PoolPages) -> Finding:
    return _still_shared(seen.worked["frozen, collects"])


@claim("freeze-stops-no-reader", "gc.freeze() does not help against reading", "flags")
def _frozen_read(seen: PoolPages) -> Finding:
    return _all(seen.worked["frozen, reads"], "copied", f"{PAGES} pages of its own")


@claim("preloading-saves", "What is built after the fork is each worker's own from the start", "flags")
def _built_late(seen: PoolPages) -> Finding:
    return _all(seen.late, "copied", f"{PAGES} pages of its own, where the idle worker has none")


_SNIPPET = """\
import gc, os, signal

items = [[None] for _ in range(20_000)]
gc.collect()
gc.disable()
                                       # something is missing here
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    gc.collect()                       # copies the pages of all items
    os.write(writing, b"x")
    while True:
        signal.pause()
os.read(reading, 1)
"""


_LEAST_PAGES: Final = (400 << 10) // PAGE_SIZE  # 20,000 objects take more than that
_TYPE: Final = 8  # where the pointer to its type is in an object
_DENSE: Final = 0.9  # of as many items as a page holds: what else is there is written, too


def _check(names: dict[str, Any]) -> Answer:
    child, items = names["child"], names["items"]
    try:
        # All of it first: to look at an item here copies its page as well, and leaves the child's to it.
        tables = [
            (vma.start, read_pagemap(child, vma.start, vma.end))
            for vma in read_maps(child)
            if not vma.inode and not vma.shared and vma.protection.startswith("rw")
        ]
        forked = _present_in(child, items)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    counts = Counter(id(item) // PAGE_SIZE * PAGE_SIZE for item in items)
    pages = {page for page, number in counts.items() if number >= _DENSE * max(counts.values())}
    alone = 0
    for start, words in tables:
        own = (words & PRESENT).astype(np.bool_) & (words & EXCLUSIVE).astype(np.bool_)
        alone += len(pages.intersection((start + np.flatnonzero(own) * PAGE_SIZE).tolist()))
    if len(items) != 20_000:
        return Answer(False, f"there are {len(items)} items, 20,000 are asked for")
    if forked < len(items):
        return Answer(False, f"the child was forked with {forked} of its parent's items, not with 20,000")
    if len(pages) < _LEAST_PAGES:
        return Answer(False, f"the items are on {len(pages)} pages: they are not 20,000 objects")
    if alone <= len(pages) // 3:  # some hold other objects as well, which the parent has written to
        return Answer(True, f"the child collects, and has {alone} of {len(pages)} pages of items for itself")
    return Answer(False, f"the collection copied {alone} of {len(pages)} pages of items")


def _present_in(child: int, items: Sequence[object]) -> int:
    """How many of the items a child has, too: where each is here an object of its type is there."""
    with ProcessMemory(child) as memory:
        types = memory.words(np.array([id(item) + _TYPE for item in items], np.uint64), 1)[:, 0]
    return int(np.count_nonzero(types == np.array([id(type(item)) for item in items], np.uint64)))


CHAPTER: Final[Chapter[PoolPages]] = Chapter(
    id="erosion",
    number=16,
    title="Erosion: what a pool no longer shares",
    claim="Workers forked from a full parent share its objects, until one reads them, or collects garbage.",
    surprise="A worker that changes nothing copies page after page, and each copy holds the same bytes.",
    claims=(
        _forked,
        _idle,
        _reading,
        _frames,
        _same_read,
        _collecting,
        _same_collected,
        _frozen,
        _frozen_read,
        _built_late,
    ),
    question=Quiz(
        "A forked worker goes through a list of its parent's objects, and changes none of them. How many of "
        "their pages are copied?",
        (
            Choice("None: it only reads", "The program only reads. The interpreter counts each reference."),
            Choice("All", "To hold an object for a moment is to write to its reference count."),
            Choice("One, with the list itself", "The list has the addresses. The counts are in the objects."),
        ),
        1,
    ),
    explanation=(
        "CPython keeps in each object how many references there are to it. A reader takes a reference and "
        "gives it back: two writes, after which the page holds what it held before. The kernel copies it "
        "at the first one, and never compares.",
        "The garbage collector writes to a head in front of each container that it looks at. gc.freeze() "
        "takes all that is there out of its sight: call it before the fork, after gc.collect(). It does "
        "nothing about reference counts; what is immortal since 3.12, such as small numbers, is not counted.",
        "What the parent has loaded before the fork is there once until somebody touches it; what each "
        "worker loads for itself is there as often as there are workers. miniloader audit --tree PID tells "
        "how much of a pool's memory has eroded, how much of that holds the same bytes, and which objects "
        "lie there.",
    ),
    sources=(
        "gc.freeze(), Python library reference",
        "Include/object.h, Py_INCREF; Python/gc.c, update_refs()",
        "PEP 683, Immortal Objects",
        "mm/memory.c, do_wp_page()",
    ),
    exercise=Exercise(
        "A child collects garbage, which copies the pages of 20,000 items. Have it collect all the same, and "
        "copy at most one page in three.",
        _SNIPPET,
        _SNIPPET.replace(
            "                                       # something is missing here\n", "gc.freeze()\n"
        ),
        _check,
        hints=(
            "The collector writes to each container that it looks at. Which does it not look at?",
            "The gc module has a function for this, to be called before the fork.",
        ),
    ),
    source_of={
        "forked-shared": "fork(2), NOTES: implemented using copy-on-write pages",
        "idle-stays": "Documentation/admin-guide/mm/pagemap.rst, bit 56",
        "reading-copies": (
            "CPython, Include/refcount.h (object.h before 3.14), Py_INCREF(); mm/memory.c, do_wp_page()"
        ),
        "new-frames": "mm/memory.c, do_wp_page(): the page is copied for whoever writes",
        "nothing-changed": "CPython, Include/refcount.h (object.h before 3.14), Py_INCREF() and Py_DECREF()",
        "collecting-copies": (
            "CPython, Python/gc.c (Modules/gcmodule.c before 3.13), update_refs(): it writes to each object"
        ),
        "collector-changes-nothing": (
            "CPython, Include/internal/pycore_gc.h, _gc_prev: holds the count during a collection alone"
        ),
        "freeze-stops-the-collector": (
            "CPython, Doc/library/gc.rst, gc.freeze(): ignored in all the future collections"
        ),
        "freeze-stops-no-reader": (
            "CPython, Doc/library/gc.rst, gc.freeze(): of the collector alone; Include/refcount.h, "
            "Py_INCREF()"
        ),
        "preloading-saves": "fork(2), NOTES; mm/memory.c, do_anonymous_page()",
    },
    run=_run,
    later=(
        Quiz(
            "The next worker calls gc.collect(). Nothing can be freed. How many of the pages are copied?",
            (
                Choice("All", "It notes on every container how many of its references it has met."),
                Choice("None: there is no garbage", "To know that, it has to look at every container."),
                Choice("Those with garbage", "It cannot tell before it has looked at all."),
            ),
            0,
            step="collects",
        ),
        Quiz(
            "The parent calls gc.freeze() and forks two more. One collects, one reads. Who copies the pages?",
            (
                Choice("Neither", "Reading an object still counts a reference."),
                Choice("Who reads", "gc.freeze() hides objects from the collector, and from nobody else."),
                Choice("Both", "The collector does not look at what is frozen."),
            ),
            1,
            step="frozen",
        ),
    ),
)
