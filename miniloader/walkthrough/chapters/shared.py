"""Chapter 5: MAP_SHARED, between processes and with the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any, Final

from miniloader.errors import EvidenceError
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import MAP_SHARED, PAGE_SIZE, PROT_READ
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, Statement
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, in_words
from miniloader.walkthrough.step import ChapterStep
from miniloader.walkthrough.traced_calls import quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "Talk", "Talks"]

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
class Talks:
    """What was seen, on each file system that there is."""

    talks: tuple[Talk, ...]


def _run(bench: Workbench) -> Generator[ChapterStep, None, Talks]:
    talks = [(yield from _talk(bench, "disk"))]
    try:
        bench.place("tmpfs")
    except EvidenceError as error:
        yield ChapterStep("on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
    else:
        talks.append((yield from _talk(bench, "tmpfs")))
    return Talks(tuple(talks))


def _talk(bench: Workbench, kind: str) -> Generator[ChapterStep, None, Talk]:
    file_system = bench.place(kind).file_system
    path = bench.file("board", b"." * (_PAGES * PAGE_SIZE), kind)
    a, b = bench.program("A"), bench.program("B")
    rows = []
    for program in (a, b):
        address = bench.ask(program, "map", path=path, length=_PAGES * PAGE_SIZE)
        rows.append((f"{program.name} {program.pid}", program.pid, address))
    related = a.pid in b.ask("parents")[0] or b.pid in a.ask("parents")[0]
    for program in (a, b):
        for page in range(_PAGES):
            bench.ask(program, "load", offset=page * PAGE_SIZE, length=1)
    before = bench.look(rows, _PAGES, f"mapped on {file_system}")[0]
    yield ChapterStep(
        f"two programs on {file_system}",
        "Two programs are started; neither has started the other. Each opens the same file, maps it "
        "with MAP_SHARED, and reads every page.",
        bench.taken(),
        (f"A is process {a.pid}, B is process {b.pid}. Their addresses differ, their frames do not.",),
        grid=before.grid,
    )

    bench.ask(a, "store", offset=_AT, text=_QUESTION)
    heard_by_b = bench.ask(b, "load", offset=_AT, length=len(_QUESTION))
    bench.ask(b, "store", offset=_REPLY_AT, text=_ANSWER)
    heard_by_a = bench.ask(a, "load", offset=_REPLY_AT, length=len(_ANSWER))
    fd = bench.opened(path)
    by_pread = bench.pread(fd, len(_QUESTION), _AT).decode()
    after, after_b = bench.look(rows, _PAGES, f"written on {file_system}")
    yield ChapterStep(
        f"a conversation on {file_system}",
        "A stores a question, B loads it, and answers. Then the file is read, before any msync.",
        bench.taken(),
        (
            f"B read {_said(heard_by_b)}, A read {_said(heard_by_a)}: no pipe, no system call, only loads "
            "and stores.",
            f"pread gave {_said(by_pread)}: the store was in the file at once. msync is for the disk.",
        ),
        evidence=(before_and_after("Pages of A", before, after, range(_PAGES), a.pid),),
        grid=after.grid,
    )

    a.end()
    b.end()
    bench.note("A and B are ended", access=True)
    stayed = _same_frames(before, after)
    after_both, from_disk = yield from _afterwards(bench, fd, kind)
    return Talk(
        file_system=file_system,
        related=related,
        heard_by_b=heard_by_b,
        heard_by_a=heard_by_a,
        by_pread=by_pread,
        after_both=after_both,
        from_disk=from_disk,
        states=after.states + after_b.states,
        same_frames=_same_frames(after, after_b),
        moved=None if stayed is None else not stayed,
    )


def _said(text: str) -> str:
    """As the trace shows it."""
    return quoted(text.encode())


def _same_frames(first: MappingView, second: MappingView) -> bool | None:
    """Whether the pages of question and answer have the same frames in both views; None where not told."""
    pages = (_AT // PAGE_SIZE, _REPLY_AT // PAGE_SIZE)
    frames = [tuple(view.frames[page] for page in pages) for view in (first, second)]
    return frames[0] == frames[1] if all(frames[0]) and all(frames[1]) else None


def _afterwards(bench: Workbench, fd: int, kind: str) -> Generator[ChapterStep, None, tuple[str, str | None]]:
    """What the file says when both programs have ended; and what the disk says, where there is one."""
    after_both = bench.pread(fd, len(_ANSWER), _REPLY_AT).decode()
    from_disk = None
    if kind == "disk":
        memory = bench.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, fd)
        bench.msync(memory)
        bench.munmap(memory)
        bench.fsync(fd)
        bench.drop_cache(fd)
        from_disk = bench.pread(fd, len(_ANSWER), _REPLY_AT).decode()
    reread = "" if from_disk is None else f" Synced, and read again from the disk: {_said(from_disk)}."
    yield ChapterStep(
        f"afterwards on {bench.place(kind).file_system}",
        "Both programs are ended. Who still knows what they said?",
        bench.taken(),
        (f"The file does: {_said(after_both)}.{reread}",),
    )
    return after_both, from_disk


# ---------------------------------------------------------------------------------------- claims
def _on_each(
    id: str, text: str, expected: str, level: LevelName = "none"
) -> Callable[[Callable[[Talk], tuple[bool, str]]], Statement[Talks]]:
    """Make the function below it the judge of every talk: whether the claim holds, and what was observed."""

    def statement(judge: Callable[[Talk], tuple[bool, str]]) -> Statement[Talks]:
        def finding(seen: Talks) -> Finding:
            judged = [(talk.file_system, *judge(talk)) for talk in seen.talks]
            observed = "; ".join(f"{file_system}: {text}" for file_system, _, text in judged)
            return Finding(bool(judged) and all(good for _, good, _ in judged), expected, observed)

        return Statement(id, text, finding, level)

    return statement


_NO_ANCESTOR = "neither program is an ancestor of the other"
_ONE_CACHE = "the page cache's own page, the same in both"
_ON_DISK = f"{_said(_ANSWER)} in the file, and on the disk where there is one"


@_on_each("unrelated", "Two programs that know nothing of each other map one file", _NO_ANCESTOR)
def _unrelated(talk: Talk) -> tuple[bool, str]:
    return not talk.related, "related" if talk.related else "unrelated"


@_on_each("visible-at-once", "What one stores the other loads", f"B reads {_said(_QUESTION)}")
def _visible(talk: Talk) -> tuple[bool, str]:
    return talk.heard_by_b == _QUESTION, _said(talk.heard_by_b)


@_on_each(
    "both-ways",
    "A message and its answer: inter-process communication",
    f"{_said(_QUESTION)} there, {_said(_ANSWER)} back",
)
def _both_ways(talk: Talk) -> tuple[bool, str]:
    heard = (talk.heard_by_b, talk.heard_by_a)
    return heard == (_QUESTION, _ANSWER), "{} there, {} back".format(*map(_said, heard))


@_on_each("one-frame", "Both page tables point to the same frames", _ONE_CACHE, "flags")
def _one_frame(talk: Talk) -> tuple[bool, str]:
    moved = ", other frames" if talk.same_frames is False else ""
    return {*talk.states} == {"shared"} and not moved, in_words(talk.states) + moved


@_on_each("not-copied", "A store copies nothing", "no page copied by a store", "flags")
def _not_copied(talk: Talk) -> tuple[bool, str]:
    copied = sum("copied" in state for state in talk.states)
    return not copied and not talk.moved, f"{copied} copied"


@_on_each("in-the-file", "pread sees the store before msync", f"pread gives {_said(_QUESTION)} before msync")
def _in_file(talk: Talk) -> tuple[bool, str]:
    return talk.by_pread == _QUESTION, _said(talk.by_pread)


@_on_each("persistent", "It is still there when both programs are gone", _ON_DISK)
def _persistent(talk: Talk) -> tuple[bool, str]:
    read = [text for text in (talk.after_both, talk.from_disk) if text is not None]
    return {*read} == {_ANSWER}, ", ".join(map(_said, read))


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


CHAPTER: Final[Chapter[Talks]] = Chapter(
    id="shared",
    number=5,
    title="MAP_SHARED: talking through memory",
    claim="A write to a shared mapping is seen at once by all who map the file, and it is in the file.",
    surprise="pread sees the store before any msync: msync is about the disk, not about being seen.",
    claims=(_unrelated, _visible, _both_ways, _one_frame, _not_copied, _in_file, _persistent),
    question=Quiz(
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
        hints=(
            "Which flag decides whether others see a store?",
            "MAP_PRIVATE keeps a store to oneself. MAP_SHARED does not.",
        ),
    ),
    source_of={
        "unrelated": "credentials(7), parent process; proc_pid_stat(5)",
        "visible-at-once": "mmap(2), MAP_SHARED: visible to other processes mapping the same region",
        "both-ways": "shm_overview(7); mmap(2), MAP_SHARED",
        "one-frame": "Documentation/admin-guide/mm/pagemap.rst, page frame number",
        "not-copied": (
            "mm/memory.c, do_shared_fault(): the page cache's own page is made writable; "
            "Documentation/admin-guide/mm/pagemap.rst, bit 61"
        ),
        "in-the-file": (
            "mmap(2), MAP_SHARED: carried through to the underlying file; mm/filemap.c, filemap_read(): "
            "from the page cache; msync(2): it flushes to the filesystem"
        ),
        "persistent": (
            "Documentation/admin-guide/mm/concepts.rst, Page cache: what is written is dirty, and gets "
            "into the storage device; fsync(2)"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "A stores a word into the mapping. What must B call to be told?",
            (
                Choice("msync", "That is for the disk."),
                Choice("read", "It would do, and is not needed."),
                Choice("Nothing: it loads", "Both page tables lead to one frame."),
            ),
            2,
            step="a conversation",
        ),
        Quiz(
            "Both programs end without msync or close. Is what they stored in the file?",
            (
                Choice("Yes", "The frame is the file's page in the page cache; the kernel writes it back."),
                Choice("No", "The store was in the file at once: there is no buffer to lose."),
                Choice(
                    "Only if the machine is idle",
                    "When it reaches the disk is open; what read(2) gives is not.",
                ),
            ),
            0,
            step="afterwards",
        ),
    ),
)
