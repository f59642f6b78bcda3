"""Chapter 3: MAP_PRIVATE, and what a write to it does."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any, Final

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import MAP_PRIVATE, PAGE_SIZE, PROT_READ, PROT_WRITE
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, copied_pages, in_words
from miniloader.walkthrough.step import ChangedWord, ChapterStep, OfPages, PageBytes
from miniloader.walkthrough.traced_calls import Calls, Mapping, page_slice, quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "CowPages"]

_PAGES, _WRITTEN, _LATER = 8, 3, 5
_LETTER = bytes([ord("A") + _WRITTEN])
_LARGE, _EDITS = 512, (7, 130, 131, 400)
_IN_CACHE = ("shared", "sole")


@dataclass(frozen=True)
class CowPages:
    """What was seen; states and frames are of this process's pages, before the store and after it."""

    states_before: tuple[str, ...]
    states_after: tuple[str, ...]
    frames_before: tuple[int, ...]
    frames_after: tuple[int, ...]
    read_here: bytes  # on the page written
    read_there: bytes  # by the other process
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


def _run(bench: Workbench) -> Generator[ChapterStep, None, CowPages]:
    path = bench.file("letters", _letters(_PAGES))
    fd = bench.opened(path)
    memory = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd)

    def read_along(calls: Calls) -> Generator[Any, None, None]:
        inherited = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_PRIVATE, calls.open(path, os.O_RDONLY))
        _touch_all(calls, inherited)
        yield inherited.address
        yield calls.load(inherited.page(_WRITTEN), 1, f"p[{_WRITTEN * PAGE_SIZE}]")

    reader = bench.child("other", read_along)
    rows = [("this process", os.getpid(), memory.address), ("other", reader.pid, bench.resume(reader))]
    _touch_all(bench, memory)
    before = bench.look(rows, _PAGES, "touched")[0]
    bytes_before = bench.load(memory.page(_WRITTEN), 32, page_slice(_WRITTEN, 32))
    yield ChapterStep(
        "touched",
        f"Two processes map the same file of {_PAGES} pages with MAP_PRIVATE, and read every page. "
        "The descriptor is read-only, yet the mapping may be writable: no write will reach the file.",
        bench.taken(),
        ("Both page tables point to the page cache: one copy of the file, two readers.",),
        grid=before.grid,
    )

    bench.store(memory.page(_WRITTEN), b"hello", f"p[{_WRITTEN * PAGE_SIZE}]")
    after = bench.look(rows, _PAGES, "written")[0]
    in_file = bench.pread(fd, 5, _WRITTEN * PAGE_SIZE)
    read_there = bench.resume(reader)
    bytes_after = bench.load(memory.page(_WRITTEN), 32, page_slice(_WRITTEN, 32))
    store = ChangedWord(0, 5, "the store: in this process's copy only")
    title = f"page {_WRITTEN}, as this process sees it"
    yield ChapterStep(
        "written",
        f"This process stores five bytes into page {_WRITTEN}. Then we ask the file and the other process.",
        bench.taken(),
        (
            f"The store faulted; the kernel copied page {_WRITTEN} to a new frame and let the store go on.",
            f"Here: {quoted(bytes_after[:5])}. In the file: {quoted(in_file)}. "
            f"In the other process: {quoted(read_there)}.",
        ),
        evidence=(before_and_after("Pages of this process", before, after, range(_PAGES)),),
        grid=after.grid,
        bytes=(PageBytes(title, _WRITTEN * PAGE_SIZE, bytes_before, bytes_after, (store,)),),
    )

    later_in_copy, later_elsewhere = yield from _file_changed(bench, path, memory)
    on_tmpfs = yield from _on_tmpfs(bench)
    copied, file_same = yield from _working_copy(bench)
    return CowPages(
        states_before=before.states,
        states_after=after.states,
        frames_before=before.frames,
        frames_after=after.frames,
        read_here=bytes_after[:5],
        read_there=read_there,
        in_file=in_file,
        on_tmpfs=on_tmpfs,
        later_elsewhere=later_elsewhere,
        later_in_copy=later_in_copy,
        edited=_EDITS,
        copied=copied,
        file_same=file_same,
        read_only=(yield from _store_into_read_only(bench, path)),
        past_end=(yield from _beyond_the_end(bench)),
    )


def _touch_all(calls: Calls, mapping: Mapping) -> None:
    for page in range(_PAGES):
        calls.load(mapping.page(page), 1, f"p[{page * PAGE_SIZE}]")


def _file_changed(
    bench: Workbench, path: str, memory: Mapping
) -> Generator[ChapterStep, None, tuple[bytes, bytes]]:
    """Change the file behind the copied page and behind another; what both then show."""
    writer = bench.opened(path, os.O_RDWR)
    for page in (_WRITTEN, _LATER):
        bench.pwrite(writer, b"later", page * PAGE_SIZE)
    in_copy = bench.load(memory.page(_WRITTEN), 5, page_slice(_WRITTEN, 5))
    elsewhere = bench.load(memory.page(_LATER), 5, page_slice(_LATER, 5))
    yield ChapterStep(
        "file changed",
        f"Now somebody changes the file itself, with pwrite, in page {_WRITTEN} and in page {_LATER}.",
        bench.taken(),
        (
            f"Page {_LATER}, not copied, shows it: {quoted(elsewhere)}. Private does not mean frozen.",
            f"Page {_WRITTEN} keeps our copy: {quoted(in_copy)}. (POSIX leaves this open; Linux does this.)",
        ),
    )
    return in_copy, elsewhere


def _on_tmpfs(bench: Workbench) -> Generator[ChapterStep, None, tuple[str, ...] | None]:
    try:
        path = bench.file("letters", _letters(_PAGES), "tmpfs")
    except EvidenceError as error:
        yield ChapterStep("on tmpfs", "The same on tmpfs.", saw=(f"Not here: {error}.",))
        return None
    memory = bench.mapped(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, bench.opened(path))
    _touch_all(bench, memory)
    before = bench.look_at(memory)
    bench.store(memory.page(_WRITTEN), b"hello", f"p[{_WRITTEN * PAGE_SIZE}]")
    after = bench.look_at(memory, title="written, on tmpfs")
    yield ChapterStep(
        "on tmpfs",
        "The same on tmpfs, a file system without a disk: its page cache is the file.",
        bench.taken(),
        (OfPages(f"Copied: page {', '.join(map(str, after.pages('copied'))) or 'none'}. No difference."),),
        evidence=(before_and_after("Pages of this process", before, after, range(2, 5)),),
    )
    return after.states


def _working_copy(bench: Workbench) -> Generator[ChapterStep, None, tuple[tuple[int, ...], bool]]:
    content = _letters(_LARGE)
    path = bench.file("document", content)
    copy = bench.mapped(_LARGE * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, bench.opened(path))
    for page in _EDITS:
        bench.store(copy.page(page), b"edited", f"p[{page * PAGE_SIZE}]")
    view: MappingView = bench.look_at(copy, title="a working copy")
    copied = view.pages("copied", "copied-shared")
    with open(path, "rb") as file:
        same = file.read() == content
    size, kib = (pages * PAGE_SIZE // 1024 for pages in (_LARGE, len(copied)))
    yield ChapterStep(
        "working copy",
        f"A private mapping is a working copy of a whole file: here {size:,} KiB, edited in four places.",
        bench.taken(),
        (
            OfPages(f"Copied: {len(copied)} of {_LARGE} pages, {', '.join(map(str, copied))}: {kib} KiB."),
            f"The file is {'as it was' if same else 'changed'}; munmap throws the edits away.",
        ),
        grid=view.grid,
    )
    return copied, same


def _store_into_read_only(bench: Workbench, path: str) -> Generator[ChapterStep, None, str]:
    def store(calls: Calls) -> Generator[Any, None, None]:
        memory = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ, MAP_PRIVATE, calls.open(path, os.O_RDONLY))
        yield memory.address
        calls.store(memory.address, b"x")

    child = bench.child("child", store)
    signal = bench.fatal(child, f'store at {bench.resume(child):#x} = "x"')
    yield ChapterStep(
        "a store that is refused",
        "A child maps the file with PROT_READ only, and stores all the same. This is what it dies of.",
        bench.taken(),
        (
            f"{signal or 'Nothing'}: there is a mapping at that address, but its protection forbids stores. "
            "No copy is made: copy-on-write is for pages that one may write.",
        ),
    )
    return signal


def _beyond_the_end(bench: Workbench) -> Generator[ChapterStep, None, str]:
    path = bench.file("cut", _letters(_PAGES))

    def read_after_cut(calls: Calls) -> Generator[Any, None, None]:
        fd = calls.open(path, os.O_RDONLY)
        memory = calls.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd)
        calls.store(memory.page(6), b"mine", f"p[{6 * PAGE_SIZE}]")
        yield memory.page(6)
        calls.load(memory.page(6))

    child = bench.child("child", read_after_cut)
    address = bench.resume(child)
    bench.ftruncate(bench.opened(path, os.O_RDWR), 4 * PAGE_SIZE)
    signal = bench.fatal(child, f"load 1 at {address:#x}")
    yield ChapterStep(
        "a file cut short",
        "A child writes page 6 of its private mapping. Then the file is cut to 4 pages, and it reads page 6.",
        bench.taken(),
        (
            f"{signal or 'Nothing'}: the mapping is there and allows it, but the file has no page for it any "
            "more. Even the page that had been copied is gone.",
        ),
    )
    return signal


def _listed(pages: Sequence[int]) -> str:
    """Pages by their numbers: ``page 3``, ``pages 7, 130``."""
    return f"page{'s' * (len(pages) != 1)} {', '.join(map(str, pages)) or 'none'}"


# ---------------------------------------------------------------------------------------- claims
@claim("copied", "A write moves the page to a new, anonymous frame", "flags")
def _copied(pages: CowPages) -> Finding:
    before, after = pages.states_before[_WRITTEN], pages.states_after[_WRITTEN]
    frame = pages.frames_before[_WRITTEN]
    moved = not frame or frame != pages.frames_after[_WRITTEN]
    return Finding(
        before in _IN_CACHE and after == "copied" and moved,
        f"page {_WRITTEN}: the page cache's before, anonymous and in another frame after",
        f"{in_words([before])} before, {in_words([after])} after" + ("" if moved else ", in the same frame"),
    )


@claim("only-that-page", "Every other page stays what it was", "flags")
def _only_that_page(pages: CowPages) -> Finding:
    changed = [
        page
        for page in range(_PAGES)
        if (pages.states_before[page] in _IN_CACHE) != (pages.states_after[page] in _IN_CACHE)
        or pages.frames_before[page] != pages.frames_after[page]
    ]
    hidden = "" if any(pages.frames_before) else " (frames not shown here)"
    return Finding(changed == [_WRITTEN], f"page {_WRITTEN} alone{hidden}", f"changed: {_listed(changed)}")


@equal("invisible", "Another process does not see the write", (b"hello", _LETTER), "{} here, {} there")
def _invisible(pages: CowPages) -> tuple[bytes, bytes]:
    return pages.read_here, pages.read_there


@equal("never-in-file", "The write does not reach the file", _LETTER * 5, "pread gives {}")
def _never_in_file(pages: CowPages) -> bytes:
    return pages.in_file


_SHOWN = "{} in a page not copied, {} in the copied one"


@equal(
    "later-change-shows", "A later change of the file shows in pages not copied", (b"later", b"hello"), _SHOWN
)
def _later_change(pages: CowPages) -> tuple[bytes, bytes]:
    return pages.later_elsewhere, pages.later_in_copy


@claim("same-on-tmpfs", "It is the same without a disk", "flags")
def _tmpfs(pages: CowPages) -> Finding:
    expected = f"on tmpfs, too, page {_WRITTEN} alone is copied"
    if pages.on_tmpfs is None:
        return Finding(None, expected, "nothing", "there is no tmpfs here that we may write in")
    copied = [page for page, state in enumerate(pages.on_tmpfs) if state == "copied"]
    return Finding(copied == [_WRITTEN], expected, f"copied: {_listed(copied)}")


@claim("working-copy", "A working copy of a file costs the pages that are written", "flags")
def _working(pages: CowPages) -> Finding:
    return Finding(
        pages.copied == pages.edited and pages.file_same,
        f"{_listed(pages.edited)} copied, the file as it was",
        f"{_listed(pages.copied)} copied, the file {'as it was' if pages.file_same else 'changed'}",
    )


@equal("read-only-refused", "A store into a read-only mapping ends in SIGSEGV", "SIGSEGV")
def _refused(pages: CowPages) -> str:
    return pages.read_only or "nothing happened"


@equal("past-the-end", "Touching a page that the file has lost ends in SIGBUS", "SIGBUS")
def _no_page(pages: CowPages) -> str:
    return pages.past_end or "nothing happened"


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
    reason = "storing even the value that is there already copies the page"
    return Answer(False, f"{len(copied)} pages were copied, 1 was asked for; {reason}")


CHAPTER: Final[Chapter[CowPages]] = Chapter(
    id="cow",
    number=3,
    title="MAP_PRIVATE: copy on write",
    claim="A write to a private mapping gets its own copy of the page: seen by nobody, never in the file.",
    surprise="Only the page written is copied; later changes of the file still show through the others.",
    claims=(
        _copied,
        _only_that_page,
        _invisible,
        _never_in_file,
        _later_change,
        _tmpfs,
        _working,
        _refused,
        _no_page,
    ),
    question=Quiz(
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
        hints=(
            "A store copies the page even if the byte is the same. Does a load?",
            "Look at each page with memory[page * PAGE], and store into one of them only.",
        ),
    ),
    source_of={
        "copied": (
            "mmap(2), MAP_PRIVATE: a private copy-on-write mapping; "
            "Documentation/admin-guide/mm/pagemap.rst, bit 61"
        ),
        "only-that-page": "mm/memory.c, do_wp_page() and wp_page_copy(): the page is copied",
        "invisible": "mmap(2), MAP_PRIVATE: not visible to other processes mapping the same file",
        "never-in-file": "mmap(2), MAP_PRIVATE: not carried through to the underlying file",
        "later-change-shows": (
            "mmap(2), MAP_PRIVATE: it is unspecified; mm/memory.c, do_read_fault(): the page cache's own "
            "page is mapped until it is written"
        ),
        "same-on-tmpfs": (
            "Documentation/filesystems/tmpfs.rst: it lives completely in the page cache; mmap(2), MAP_PRIVATE"
        ),
        "working-copy": "mmap(2), MAP_PRIVATE; mm/memory.c, do_cow_fault() and wp_page_copy(): page by page",
        "read-only-refused": "mmap(2), SIGSEGV: attempted write into a region mapped as read-only",
        "past-the-end": "mmap(2), SIGBUS; mm/truncate.c, truncate_pagecache(): private copies go, too",
    },
    run=_run,
    later=(
        Quiz(
            "The file is changed, in a page that was copied and in one that was not. What do we see?",
            (
                Choice("Both changes", "The copied page has nothing to do with the file any more."),
                Choice(
                    "The one in the page that was not copied",
                    "That page is still the page cache's. Private does not mean frozen.",
                ),
                Choice(
                    "Neither: the mapping is private", "Private is about our writes, not about the file's."
                ),
            ),
            1,
            step="file changed",
        ),
        Quiz(
            "A process wrote page 6 of its private mapping. Then the file is cut to 4 pages. What "
            "happens when it reads page 6?",
            (
                Choice("It reads its copy", "Linux takes mappings of what is cut off away, copies as well."),
                Choice("It reads zeros", "There is no page for zeros to be in: the file has ended."),
                Choice("SIGBUS", "The mapping is there, and there is no page behind it."),
            ),
            2,
            step="a file cut",
        ),
    ),
)
