"""Chapter 3: MAP_PRIVATE, and what a write to it does."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import MAP_PRIVATE, PAGE_SIZE, PROT_READ, PROT_WRITE
from miniloader.values import dataclass
from miniloader.walkthrough.exercises import copied_pages
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    PageBytes,
    Question,
    Statement,
    Step,
    Word,
)
from miniloader.walkthrough.recorded_calls import Calls
from miniloader.walkthrough.workbench import Bench, rows_of

__all__ = ["CHAPTER", "Seen"]

_PAGES, _WRITTEN, _LATER = 8, 3, 5
_LARGE, _EDITS = 512, (7, 130, 131, 400)


@dataclass(frozen=True)
class Seen:
    """What was seen; states and frames are of this process's pages, before the store and after it."""

    states_before: tuple[str, ...]
    states_after: tuple[str, ...]
    frames_before: tuple[int, ...]
    frames_after: tuple[int, ...]
    mine: bytes
    others: bytes
    in_file: bytes
    on_tmpfs: tuple[str, ...] | None  # states after the same store; None: no tmpfs here
    later_elsewhere: bytes
    later_in_copy: bytes
    edited: tuple[int, ...]
    copied: tuple[int, ...]
    file_same: bool
    read_only: str  # the signal that ended the child
    past_end: str


def _letters(pages: int) -> bytes:
    """Page 0 full of A, page 1 of B, and so on."""
    return b"".join(bytes([ord("A") + page % 26]) * PAGE_SIZE for page in range(pages))


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.file("letters", _letters(_PAGES))
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    mine = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd))

    def read_along(calls: Calls) -> Generator[Any, None, None]:
        own = calls.open(path, os.O_RDONLY)
        theirs = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_PRIVATE, own)
        for page in range(_PAGES):
            calls.load(theirs.page(page), 1, f"p[{page} * {PAGE_SIZE}]")
        yield theirs.address
        yield calls.load(theirs.page(_WRITTEN), 1, f"p[{_WRITTEN} * {PAGE_SIZE}]")

    other = bench.child("another process", read_along)
    address, made = other.next()
    bench.record(made, "other")
    for page in range(_PAGES):
        bench.load(mine.page(page), 1, f"p[{page} * {PAGE_SIZE}]")
    rows = [("this process", os.getpid(), mine.address), ("other", other.pid, address)]
    before = bench.look(rows, _PAGES, "touched")[0]
    bytes_before = bench.load(mine.page(_WRITTEN), 32, f"p[{_WRITTEN} * {PAGE_SIZE}:+32]")
    yield Step(
        "touched",
        f"Two processes map the same file of {_PAGES} pages with MAP_PRIVATE, and read every page. "
        "The descriptor is read-only, yet the mapping may be writable: no write will reach the file.",
        bench.calls(),
        ("Both page tables point to the page cache: one copy of the file, two readers.",),
        grid=before.grid,
    )

    bench.store(mine.page(_WRITTEN), b"hello", f"p[{_WRITTEN} * {PAGE_SIZE}]")
    after = bench.look(rows, _PAGES, "written")[0]
    in_file = bench.pread(fd, 5, _WRITTEN * PAGE_SIZE)
    others, made = other.next()
    bench.record(made, "other")
    bytes_after = bench.load(mine.page(_WRITTEN), 32, f"p[{_WRITTEN} * {PAGE_SIZE}:+32]")
    yield Step(
        "written",
        f"This process stores five bytes into page {_WRITTEN}. Then we ask the file and the other process.",
        bench.calls(),
        (
            f"The store faulted; the kernel copied page {_WRITTEN} to a new frame and let the store go on.",
            f"Here: {bytes_after[:5]!r}. In the file: {in_file!r}. In the other process: {others!r}.",
        ),
        evidence=(
            Evidence("Pages of this process", "/proc/self/pagemap", rows_of(before, after, range(_PAGES))),
        ),
        grid=after.grid,
        bytes=(
            PageBytes(
                f"page {_WRITTEN}, as this process sees it",
                _WRITTEN * PAGE_SIZE,
                bytes_before,
                bytes_after,
                (Word(0, 5, "the store: in this process's copy only"),),
            ),
        ),
    )

    writer = bench.keep_open(bench.open(path, os.O_RDWR))
    for page in (_WRITTEN, _LATER):
        bench.pwrite(writer, b"later", page * PAGE_SIZE)
    later_copy = bench.load(mine.page(_WRITTEN), 5, f"p[{_WRITTEN} * {PAGE_SIZE}:+5]")
    later_elsewhere = bench.load(mine.page(_LATER), 5, f"p[{_LATER} * {PAGE_SIZE}:+5]")
    yield Step(
        "file changed",
        f"Now somebody changes the file itself, with pwrite, in page {_WRITTEN} and in page {_LATER}.",
        bench.calls(),
        (
            f"Page {_LATER}, not copied, shows it: {later_elsewhere!r}. Private does not mean frozen.",
            f"Page {_WRITTEN} keeps our copy: {later_copy!r}. (POSIX leaves this open; Linux does this.)",
        ),
    )

    on_tmpfs = yield from _on_tmpfs(bench)
    copied, same = yield from _working_copy(bench)
    read_only = yield from _store_into_read_only(bench, path)
    past_end = yield from _beyond_the_end(bench)
    return Seen(
        before.states,
        after.states,
        before.frames,
        after.frames,
        bytes_after[:5],
        others,
        in_file,
        on_tmpfs,
        later_elsewhere,
        later_copy,
        _EDITS,
        copied,
        same,
        read_only,
        past_end,
    )


def _on_tmpfs(bench: Bench) -> Generator[Step, None, tuple[str, ...] | None]:
    try:
        path = bench.file("letters", _letters(_PAGES), "tmpfs")
    except EvidenceError as error:
        yield Step("on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
        return None
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    mine = bench.keep(bench.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd))
    for page in range(_PAGES):
        bench.load(mine.page(page), 1, f"p[{page} * {PAGE_SIZE}]")
    before = bench.look_at(mine)
    bench.store(mine.page(_WRITTEN), b"hello", f"p[{_WRITTEN} * {PAGE_SIZE}]")
    after = bench.look_at(mine, title="written, on tmpfs")
    yield Step(
        "on tmpfs",
        "The same on tmpfs, a file system without a disk: its page cache is the file.",
        bench.calls(),
        (f"Copied: page {', '.join(map(str, after.pages('copied'))) or 'none'}. It makes no difference.",),
        evidence=(
            Evidence("Pages of this process", "/proc/self/pagemap", rows_of(before, after, range(2, 5))),
        ),
    )
    return after.states


def _working_copy(bench: Bench) -> Generator[Step, None, tuple[tuple[int, ...], bool]]:
    content = _letters(_LARGE)
    path = bench.file("document", content)
    fd = bench.keep_open(bench.open(path, os.O_RDONLY))
    copy = bench.keep(bench.mmap(_LARGE * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd))
    for page in _EDITS:
        bench.store(copy.page(page), b"edited", f"p[{page} * {PAGE_SIZE}]")
    view = bench.look_at(copy, title="a working copy")
    copied = view.pages("copied", "copied-shared")
    with open(path, "rb") as file:
        same = file.read() == content
    size = _LARGE * PAGE_SIZE // 1024
    yield Step(
        "working copy",
        f"A private mapping is a working copy of a whole file: here {size:,} KiB, edited in four places.",
        bench.calls(),
        (
            f"Copied: {len(copied)} of {_LARGE} pages ({', '.join(map(str, copied))}), "
            f"{len(copied) * PAGE_SIZE // 1024} KiB instead of {size:,}.",
            f"The file is {'as it was' if same else 'changed'}; munmap throws the edits away.",
        ),
        grid=view.grid,
    )
    return copied, same


def _store_into_read_only(bench: Bench, path: str) -> Generator[Step, None, str]:
    def store(calls: Calls) -> Generator[Any, None, None]:
        fd = calls.open(path, os.O_RDONLY)
        memory = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_PRIVATE, fd)
        yield memory.address
        calls.store(memory.address, b"x")

    child = bench.child("a child", store)
    address, made = child.next()
    bench.record(made, "child")
    signal = bench.fatal(child, f"store at {address:#x} = 'x'")
    yield Step(
        "a store that is refused",
        "A child maps the file with PROT_READ only, and stores all the same. This is what it dies of.",
        bench.calls(),
        (
            f"{signal or 'Nothing'}: there is a mapping at that address, but its protection forbids stores. "
            "No copy is made: copy-on-write is for pages that one may write.",
        ),
    )
    return signal


def _beyond_the_end(bench: Bench) -> Generator[Step, None, str]:
    path = bench.file("cut", _letters(_PAGES))

    def read_after_cut(calls: Calls) -> Generator[Any, None, None]:
        fd = calls.open(path, os.O_RDONLY)
        memory = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd)
        calls.store(memory.page(6), b"mine", f"p[6 * {PAGE_SIZE}]")
        yield memory.page(6)
        calls.load(memory.page(6))

    child = bench.child("a child", read_after_cut)
    address, made = child.next()
    bench.record(made, "child")
    fd = bench.keep_open(bench.open(path, os.O_RDWR))
    bench.ftruncate(fd, 4 * PAGE_SIZE)
    signal = bench.fatal(child, f"load 1 at {address:#x}")
    yield Step(
        "a file cut short",
        "A child writes page 6 of its private mapping. Then the file is cut to 4 pages, and it reads page 6.",
        bench.calls(),
        (
            f"{signal or 'Nothing'}: the mapping is there and allows it, but the file has no page for it any "
            "more. Even the page that had been copied is gone.",
        ),
    )
    return signal


# ---------------------------------------------------------------------------------------- claims
def _copied(seen: Seen) -> Finding:
    was, became = seen.states_before[_WRITTEN], seen.states_after[_WRITTEN]
    moved = seen.frames_before[_WRITTEN] != seen.frames_after[_WRITTEN] or not seen.frames_before[_WRITTEN]
    return Finding(
        was in ("shared", "sole") and became == "copied" and moved,
        f"page {_WRITTEN}: the page cache's before, anonymous and in another frame after",
        f"{was} before, {became} after" + ("" if moved else ", in the same frame"),
    )


def _only_that_page(seen: Seen) -> Finding:
    changed = [
        page
        for page in range(_PAGES)
        if (seen.states_before[page] in ("shared", "sole")) != (seen.states_after[page] in ("shared", "sole"))
        or seen.frames_before[page] != seen.frames_after[page]
    ]
    none_moved = not any(seen.frames_before)
    wanted = [_WRITTEN]
    return Finding(
        changed == wanted,
        f"page {_WRITTEN} alone" + (" (frames not shown here)" if none_moved else ""),
        f"pages {changed}",
    )


def _invisible(seen: Seen) -> Finding:
    letter = bytes([ord("A") + _WRITTEN])
    return Finding(
        seen.mine == b"hello" and seen.others == letter,
        f"b'hello' here, {letter!r} in the other process",
        f"{seen.mine!r} here, {seen.others!r} there",
    )


def _never_in_file(seen: Seen) -> Finding:
    wanted = bytes([ord("A") + _WRITTEN]) * 5
    return Finding(seen.in_file == wanted, f"pread gives {wanted!r}", f"{seen.in_file!r}")


def _later_change(seen: Seen) -> Finding:
    return Finding(
        seen.later_elsewhere == b"later" and seen.later_in_copy == b"hello",
        "b'later' in a page not copied, b'hello' in the copied one",
        f"{seen.later_elsewhere!r} and {seen.later_in_copy!r}",
    )


def _tmpfs(seen: Seen) -> Finding:
    expected = f"on tmpfs, too, page {_WRITTEN} alone is copied"
    if seen.on_tmpfs is None:
        return Finding(None, expected, "nothing", "there is no tmpfs here that we may write in")
    copied = [page for page, state in enumerate(seen.on_tmpfs) if state == "copied"]
    return Finding(copied == [_WRITTEN], expected, f"copied: {copied}")


def _working(seen: Seen) -> Finding:
    return Finding(
        seen.copied == seen.edited and seen.file_same,
        f"pages {list(seen.edited)} copied, the file as it was",
        f"pages {list(seen.copied)} copied, the file {'as it was' if seen.file_same else 'changed'}",
    )


def _refused(seen: Seen) -> Finding:
    return Finding(seen.read_only == "SIGSEGV", "SIGSEGV", seen.read_only or "nothing happened")


def _no_page(seen: Seen) -> Finding:
    return Finding(seen.past_end == "SIGBUS", "SIGBUS", seen.past_end or "nothing happened")


_SNIPPET = """\
import mmap, os, tempfile

PAGES, PAGE = 16, mmap.PAGESIZE
with tempfile.TemporaryFile() as file:
    file.write(bytes(PAGES * PAGE))
    file.flush()
    os.fsync(file.fileno())
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)

for page in range(PAGES):
    memory[page * PAGE] = 0        # stores the 0 that is there already
"""


def _check(names: dict[str, Any]) -> Answer:
    copied = copied_pages(names["memory"])
    if len(copied) == 1:
        return Answer(True, f"exactly one page was copied: page {copied[0]}")
    what = "storing even the value that is there already copies the page"
    return Answer(False, f"{len(copied)} pages were copied, 1 was asked for; {what}")


CHAPTER = Chapter(
    id="cow",
    number=3,
    title="MAP_PRIVATE: copy on write",
    claim="A write to a private mapping gets its own copy of the page: seen by nobody, never in the file.",
    surprise="Only the page written is copied; later changes of the file still show through the others.",
    claims=(
        Statement("copied", "A write moves the page to a new, anonymous frame", _copied, "flags"),
        Statement("only-that-page", "Every other page stays what it was", _only_that_page, "flags"),
        Statement("invisible", "Another process does not see the write", _invisible),
        Statement("never-in-file", "The write does not reach the file", _never_in_file),
        Statement(
            "later-change-shows", "A later change of the file shows in pages not copied", _later_change
        ),
        Statement("same-on-tmpfs", "It is the same without a disk", _tmpfs, "flags"),
        Statement(
            "working-copy", "A working copy of a file costs the pages that are written", _working, "flags"
        ),
        Statement("read-only-refused", "A store into a read-only mapping ends in SIGSEGV", _refused),
        Statement("past-the-end", "Touching a page that the file has lost ends in SIGBUS", _no_page),
    ),
    question=Question(
        f"A process has a file of {_PAGES} pages mapped with MAP_PRIVATE and has read all of it. "
        "It stores one byte. How much memory does the kernel copy?",
        (
            Choice("One byte", "The page table knows pages, nothing smaller: a whole page has to move."),
            Choice("One page", "The store faults; the kernel copies the page it is in, and only that one."),
            Choice(
                "The whole file",
                "That would be read(2). The other pages stay in the page cache, shared with everybody.",
            ),
        ),
        1,
    ),
    explanation=(
        "A private mapping starts as the page cache's own pages, mapped read-only in the page table even "
        "where mmap was given PROT_WRITE. The first store to a page faults. The kernel sees that the mapping "
        "allows the store, takes a free frame, copies the page into it, and points our entry there.",
        "From then on the page is anonymous memory: pagemap's bit 61 is clear, and the file has nothing to "
        "do with it any more. Libraries are mapped this way; so are their writable data.",
        "SIGSEGV means: no mapping there, or one that forbids it. SIGBUS means: a mapping that allows it, "
        "with no page to put behind it.",
    ),
    sources=(
        "mmap(2), MAP_PRIVATE and SIGBUS",
        "Documentation/admin-guide/mm/pagemap.rst, bit 61",
        "mm/memory.c, do_wp_page() and do_cow_fault()",
    ),
    exercise=Exercise(
        "The loop stores the zero that is in the file already, and copies all 16 pages. Change it so that "
        "exactly one page is copied, and every page is still looked at.",
        _SNIPPET,
        _SNIPPET.replace(
            "    memory[page * PAGE] = 0        # stores the 0 that is there already\n",
            "    if memory[page * PAGE] != 0 or page == 3:\n        memory[page * PAGE] = 0\n",
        ),
        _check,
    ),
    run=_run,
)
