"""Chapter 4: MAP_SHARED, between processes and with the file."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import MAP_SHARED, PAGE_SIZE, PROT_READ
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
from miniloader.walkthrough.workbench import Bench, View, rows_of

__all__ = ["CHAPTER", "Seen", "Talk"]

_PAGES = 4
_QUESTION, _ANSWER = "are you there?", "yes, I am"
_AT, _REPLY_AT = 0, 2 * PAGE_SIZE


@dataclass(frozen=True)
class Talk:
    """What was seen on one file system of two programs, A and B, with one file mapped."""

    file_system: str
    related: bool  # one of them started the other
    heard_by_b: str
    heard_by_a: str
    by_pread: str  # before anything was synced
    after_both: str  # read from the file when both had ended
    from_disk: str | None  # and when the page cache had let go of it; None: there is no disk
    states: tuple[str, ...]  # of A's pages, then of B's, at the end
    same_frames: bool | None
    moved: bool | None  # whether a store moved a page to another frame; None: not known


@dataclass(frozen=True)
class Seen:
    """What was seen, on each file system that there is."""

    talks: tuple[Talk, ...]


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    talks = [(yield from _talk(bench, "disk"))]
    try:
        bench.place("tmpfs")
    except EvidenceError as error:
        yield Step("on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
    else:
        talks.append((yield from _talk(bench, "tmpfs")))
    return Seen(tuple(talks))


def _frames(view: View, pages: tuple[int, ...]) -> tuple[int, ...] | None:
    frames = tuple(view.frames[page] for page in pages)
    return frames if all(frames) else None


def _talk(bench: Bench, kind: str) -> Generator[Step, None, Talk]:
    where = bench.place(kind).file_system
    path = bench.file("board", b"." * (_PAGES * PAGE_SIZE), kind)
    a, b = bench.program("A"), bench.program("B")
    rows = []
    for program in (a, b):
        address, made = program.ask("map", path=path, length=_PAGES * PAGE_SIZE)
        bench.record(made, program.name)
        rows.append((f"{program.name} {program.pid}", program.pid, address))
    related = a.pid in b.ask("parents")[0] or b.pid in a.ask("parents")[0]
    used = (_AT // PAGE_SIZE, _REPLY_AT // PAGE_SIZE)
    for program in (a, b):
        for page in range(_PAGES):
            bench.record(program.ask("load", offset=page * PAGE_SIZE, length=1)[1], program.name)
    before_a = bench.look(rows, _PAGES, f"mapped on {where}")[0]
    yield Step(
        f"two programs on {where}",
        "Two programs are started; neither has started the other. Each opens the same file, maps it "
        "with MAP_SHARED, and reads every page.",
        bench.calls(),
        (f"A is process {a.pid}, B is process {b.pid}. Their addresses differ, their frames do not.",),
        grid=before_a.grid,
    )

    bench.record(a.ask("store", offset=_AT, text=_QUESTION)[1], "A")
    heard_by_b, made = b.ask("load", offset=_AT, length=len(_QUESTION))
    bench.record(made, "B")
    bench.record(b.ask("store", offset=_REPLY_AT, text=_ANSWER)[1], "B")
    heard_by_a, made = a.ask("load", offset=_REPLY_AT, length=len(_ANSWER))
    bench.record(made, "A")
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    by_pread = bench.pread(fd, len(_QUESTION), _AT).decode()
    after_a, after_b = bench.look(rows, _PAGES, f"written on {where}")
    first, then = _frames(before_a, used), _frames(after_a, used)
    others = _frames(after_b, used)
    yield Step(
        f"a conversation on {where}",
        "A stores a question, B loads it, and answers. Then the file is read, before any msync.",
        bench.calls(),
        (
            f"B read {heard_by_b!r}, A read {heard_by_a!r}: no pipe, no system call, only loads and stores.",
            f"pread gave {by_pread!r}: the store was in the file at once. msync is for the disk.",
        ),
        evidence=(
            Evidence("Pages of A", f"/proc/{a.pid}/pagemap", rows_of(before_a, after_a, range(_PAGES))),
        ),
        grid=after_a.grid,
    )

    a.end()
    b.end()
    bench.note("A and B are ended", access=True)
    after_both = bench.pread(fd, len(_ANSWER), _REPLY_AT).decode()
    from_disk = None
    if kind == "disk":
        memory = bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
        bench.msync(memory)
        bench.munmap(memory)
        bench.fsync(fd)
        bench.drop_cache(fd)
        from_disk = bench.pread(fd, len(_ANSWER), _REPLY_AT).decode()
    yield Step(
        f"afterwards on {where}",
        "Both programs are ended. Who still knows what they said?",
        bench.calls(),
        (
            f"The file does: {after_both!r}."
            + ("" if from_disk is None else f" Synced, and read again from the disk: {from_disk!r}."),
        ),
    )
    return Talk(
        where,
        related,
        heard_by_b,
        heard_by_a,
        by_pread,
        after_both,
        from_disk,
        after_a.states + after_b.states,
        None if then is None or others is None else then == others,
        None if first is None or then is None else first != then,
    )


# ---------------------------------------------------------------------------------------- claims
def _on_each(seen: Seen, good: Any, expected: str, observed: Any) -> Finding:
    """One finding for all file systems: ``good`` and ``observed`` are functions of a talk."""
    return Finding(
        bool(seen.talks) and all(good(talk) for talk in seen.talks),
        expected,
        "; ".join(f"{talk.file_system}: {observed(talk)}" for talk in seen.talks),
    )


def _unrelated(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: not talk.related,
        "neither program is an ancestor of the other",
        lambda talk: "related" if talk.related else "unrelated",
    )


def _visible(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: talk.heard_by_b == _QUESTION,
        f"B reads {_QUESTION!r}",
        lambda talk: repr(talk.heard_by_b),
    )


def _both_ways(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: (talk.heard_by_b, talk.heard_by_a) == (_QUESTION, _ANSWER),
        f"{_QUESTION!r} there, {_ANSWER!r} back",
        lambda talk: f"{talk.heard_by_b!r} there, {talk.heard_by_a!r} back",
    )


def _one_frame(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: set(talk.states) == {"shared"} and talk.same_frames is not False,
        "the page cache's own page, the same in both",
        lambda talk: (
            ", ".join(sorted(set(talk.states))) + (", other frames" if talk.same_frames is False else "")
        ),
    )


def _not_copied(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: not any("copied" in state for state in talk.states) and not talk.moved,
        "no page copied by a store",
        lambda talk: f"{sum('copied' in state for state in talk.states)} copied",
    )


def _in_file(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: talk.by_pread == _QUESTION,
        f"pread gives {_QUESTION!r} before msync",
        lambda talk: repr(talk.by_pread),
    )


def _persistent(seen: Seen) -> Finding:
    return _on_each(
        seen,
        lambda talk: talk.after_both == _ANSWER and talk.from_disk in (None, _ANSWER),
        f"{_ANSWER!r} in the file, and on the disk where there is one",
        lambda talk: repr(talk.after_both) + (f", {talk.from_disk!r}" if talk.from_disk is not None else ""),
    )


_SNIPPET = """\
import mmap, os, tempfile

file = tempfile.TemporaryFile()
file.truncate(mmap.PAGESIZE)
memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)

if os.fork() == 0:
    memory[:5] = b"hello"
    os._exit(0)
os.wait()
print(memory[:5])                  # the parent hears nothing
"""


def _check(names: dict[str, Any]) -> Answer:
    heard = bytes(names["memory"][:5])
    in_file = os.pread(names["file"].fileno(), 5, 0)
    if heard == in_file == b"hello":
        return Answer(True, "the child's word reached the parent, and the file")
    return Answer(False, f"the parent reads {heard!r} and the file holds {in_file!r}")


CHAPTER = Chapter(
    id="shared",
    number=4,
    title="MAP_SHARED: talking through memory",
    claim="A write to a shared mapping is seen at once by all who map the file, and it is in the file.",
    surprise="pread sees the store before any msync: msync is about the disk, not about being seen.",
    claims=(
        Statement("unrelated", "Two programs that know nothing of each other map one file", _unrelated),
        Statement("visible-at-once", "What one stores the other loads", _visible),
        Statement("both-ways", "A message and its answer: inter-process communication", _both_ways),
        Statement("one-frame", "Both page tables point to the same frames", _one_frame, "flags"),
        Statement("not-copied", "A store copies nothing", _not_copied, "flags"),
        Statement("in-the-file", "pread sees the store before msync", _in_file),
        Statement("persistent", "It is still there when both programs are gone", _persistent),
    ),
    question=Question(
        "A program stores into a shared mapping of a file and calls nothing else. Another program reads the "
        "file with read(2). What does it get?",
        (
            Choice("The old bytes, until msync", "msync writes to the disk. read(2) reads the page cache."),
            Choice("The new bytes", "Store and read(2) meet in the same frame of the page cache."),
            Choice("An error", "There is no lock. Who wants order has to make it."),
        ),
        1,
    ),
    explanation=(
        "There is one page cache, and every file's page is in it at most once. A shared mapping points every "
        "page table at that frame, writable. A store changes the frame, and all who look at it see that: "
        "other mappings, and read(2), which copies out of the same frame.",
        "The kernel writes dirty pages to the disk in its own time, also when the program has ended or "
        "crashed. msync and fsync wait until that is done. They are for power failures, not for readers.",
        "That is inter-process communication at the speed of memory. What it lacks is order: use atomics or "
        "a semaphore.",
    ),
    sources=("mmap(2), MAP_SHARED", "msync(2)", "shm_overview(7)"),
    exercise=Exercise(
        "A child stores a word, and the parent does not hear it. Change one flag so that the word "
        "reaches the parent and the file.",
        _SNIPPET,
        _SNIPPET.replace("MAP_PRIVATE", "MAP_SHARED"),
        _check,
    ),
    run=_run,
)
