"""Chapter 14: prepared pages: relocate once, share the result."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.prepare import prepare
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim
from miniloader.walkthrough.mapping_views import copied_pages
from miniloader.walkthrough.proof_steps import LibraryInProcesses, in_processes, told_steps
from miniloader.walkthrough.step import ChapterStep, Figures
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "PlainAndPrepared"]


@dataclass(frozen=True)
class PlainAndPrepared:
    """The library in several processes, each relocating it for itself, and then all with prepared pages."""

    plain: LibraryInProcesses
    shared: LibraryInProcesses
    address: int  # that it was prepared for
    cached: int  # pages
    filled: int  # of them with words that each process writes


def _run(bench: Workbench) -> Generator[ChapterStep, None, PlainAndPrepared]:
    path = bench.copy(shipped("demo"))
    _, plain = in_processes(bench, path)
    yield ChapterStep(
        "plain",
        f"{len(plain.states)} processes load the library, each for itself.",
        (),
        (
            f"Load biases: {', '.join(map(hex, plain.bases))}.",
            f"Relocated pages: {len(plain.relocated)}, each with the same words plus another bias.",
        ),
    )
    with _cache(bench.place().directory):
        entry = prepare(path)
        yield ChapterStep(
            "prepared",
            "miniloader prepare loads it once, at an address chosen for it, and keeps the relocated pages.",
            (),
            (
                f"Address: {entry.address:#x}, for every process of this user until the machine boots.",
                f"Kept: {entry.pages} pages, {entry.filled} of them with words that differ in each process.",
            ),
        )
        proof, shared = in_processes(bench, path, prepared=True)
    yield from told_steps(
        proof,
        {
            "relocated": ("Nothing is computed: the pages are mapped from the file that prepare wrote.",),
            "written": ("What is written is copied as ever.",),
        },
        {"written": (_table(plain, shared),)},
    )
    return PlainAndPrepared(plain, shared, address=entry.address, cached=entry.pages, filled=entry.filled)


@contextmanager
def _cache(directory: str) -> Iterator[None]:
    """A cache of the chapter's own, for this process and those it starts."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = os.path.join(directory, "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def _table(plain: LibraryInProcesses, shared: LibraryInProcesses) -> Figures:
    rows = (
        ("each for itself", str(len(plain.states)), f"{plain.used // 1024} KiB"),
        ("prepared", str(len(shared.states)), f"{shared.used // 1024} KiB"),
    )
    return Figures("What the library takes", ("relocated", ">processes", ">memory"), rows)


# ---------------------------------------------------------------------------------------- claims
@claim("private-otherwise", "Relocating for oneself copies each page", "flags")
def _private(seen: PlainAndPrepared) -> Finding:
    pages, copied = len(seen.plain.relocated), seen.plain.own_copies(seen.plain.relocated)
    processes = len(seen.plain.states)
    expected = f"{pages} relocated pages, each a copy of its own in each of {processes} processes"
    return Finding(copied == pages > 0, expected, f"{copied} of {pages}")


@claim("relocated-one-copy", "Relocated beforehand, a page is one frame for all", "flags")
def _one_frame(seen: PlainAndPrepared) -> Finding:
    pages = len(seen.shared.relocated) - seen.filled
    shared = seen.shared.one_copy(seen.shared.relocated)
    expected = f"{pages} relocated pages, each one frame in all {len(seen.shared.states)} processes"
    return Finding(shared == pages > 0, expected, f"{shared} of {pages}")


@claim("same-address", "All have the library at one address")
def _same_address(seen: PlainAndPrepared) -> Finding:
    expected = f"every process has its first page at {seen.address:#x}"
    bases = {*seen.shared.bases}
    return Finding(bases == {seen.address}, expected, ", ".join(sorted(map(hex, bases))))


@claim("saved", "The copies of all processes but one are saved", "flags")
def _saved(seen: PlainAndPrepared) -> Finding:
    copies = (len(seen.shared.states) - 1) * (seen.cached - seen.filled)
    expected = f"at least {copies} pages of {PAGE_SIZE // 1024} KiB less"
    less = (seen.plain.used - seen.shared.used) // PAGE_SIZE
    return Finding(less >= copies > 0, expected, f"{less} pages less")


@claim("isolated", "What a process writes is still its own")
def _isolated(seen: PlainAndPrepared) -> Finding:
    return seen.shared.proven("writes-isolated", "each process reads back what it wrote itself")


_SNIPPET = """\
import mmap, tempfile

PAGES, PAGE, USERS, BIAS = 16, mmap.PAGESIZE, 4, 0x10000
file = tempfile.TemporaryFile()
for page in range(PAGES):                      # in each page a word that wants the bias added
    file.write(page.to_bytes(8, "little").ljust(PAGE, b"\\0"))
file.flush()

users = []
for user in range(USERS):
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    for page in range(PAGES):                  # every user relocates for itself
        word = int.from_bytes(memory[page * PAGE : page * PAGE + 8], "little")
        memory[page * PAGE : page * PAGE + 8] = (word + BIAS).to_bytes(8, "little")
    users.append(memory)
"""

_SOLUTION = """\
import mmap, tempfile

PAGES, PAGE, USERS, BIAS = 16, mmap.PAGESIZE, 4, 0x10000
file = tempfile.TemporaryFile()
for page in range(PAGES):                      # relocated once, in the file
    file.write((page + BIAS).to_bytes(8, "little").ljust(PAGE, b"\\0"))
file.flush()

users = []
for user in range(USERS):
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    users.append(memory)
"""


def _check(names: dict[str, Any]) -> Answer:
    users, page_size = names["users"], names["PAGE"]
    if len(users) != 4:
        return Answer(False, f"there are {len(users)} users, 4 are asked for")
    for memory in users:
        for page in range(names["PAGES"]):
            word = int.from_bytes(memory[page * page_size : page * page_size + 8], "little")
            if word != page + names["BIAS"]:
                return Answer(False, f"page {page} has {word:#x}, expected {page + names['BIAS']:#x}")
    total = sum(len(copied_pages(memory)) for memory in users)
    if total:
        return Answer(False, f"the words are right, and {total} pages were copied; none need be")
    return Answer(True, "every user has its words, and nobody has a copy")


CHAPTER: Final[Chapter[PlainAndPrepared]] = Chapter(
    id="prepared",
    number=14,
    title="Prepared pages",
    claim="Relocated pages differ only because addresses do: at one address they are one copy, too.",
    surprise="A write that every process would make the same way need be made only once.",
    claims=(_private, _one_frame, _same_address, _saved, _isolated),
    question=Quiz(
        "Relocated pages are private copies in every process. What makes them differ?",
        (
            Choice("Each process has another library", "It is one file; its pages start out as one copy."),
            Choice(
                "The address that each has the library at",
                "A relocated word is that address plus a number from the file. One address: equal words.",
            ),
            Choice(
                "Nothing, the kernel could merge them", "Equal pages KSM could merge; these are not equal."
            ),
        ),
        1,
    ),
    explanation=(
        "Relocation writes the load bias plus a constant into thousands of words. With the same bias the "
        "words are the same, so they may be written once, into a file that all others map privately.",
        "Words that refer to other libraries differ still, since those are at random addresses: each "
        "process writes them itself, and copies the few pages they are on.",
        "What is given up is an address of one's own in each process. It is random for each user and boot; "
        "but who can read one process of yours knows the address in the others.",
    ),
    sources=("mmap(2), MAP_PRIVATE, MAP_FIXED_NOREPLACE", "android_dlextinfo, ANDROID_DLEXT_WRITE_RELRO"),
    exercise=Exercise(
        "Four users relocate 16 pages, each for itself: 64 copies. Change it so that every user reads the "
        "same words as before, and no page is copied.",
        _SNIPPET,
        _SOLUTION,
        _check,
        hints=(
            "Who adds the bias, and how often need that be done?",
            "Write page + BIAS into the file; then no user has to write.",
        ),
    ),
    source_of={
        "private-otherwise": "mmap(2), MAP_PRIVATE",
        "relocated-one-copy": (
            "android/dlext.h, ANDROID_DLEXT_USE_RELRO: for processes that load a library at the same "
            "address; Documentation/admin-guide/mm/pagemap.rst, page frame number"
        ),
        "same-address": "mmap(2), MAP_FIXED_NOREPLACE",
        "saved": "Documentation/filesystems/proc.rst, PSS; proc_pid_smaps(5), Pss",
        "isolated": "mmap(2), MAP_PRIVATE: not visible to other processes",
    },
    run=_run,
    later=(
        Quiz(
            "What must all processes have in common, to share relocated pages?",
            (
                Choice("The address of the library", "Then the words are equal."),
                Choice("A parent", "That would do, by fork. Here they need none."),
                Choice(
                    "The user's permission", "That, too; but with other addresses there is nothing to share."
                ),
            ),
            0,
            step="prepared",
        ),
        Quiz(
            "A process writes to a page of a prepared library. Who sees that?",
            (
                Choice("All that have prepared it", "They map the file of prepared pages privately."),
                Choice("Nobody else", "The write is given a copy, as ever."),
                Choice("It is refused", "Data stays writable."),
            ),
            1,
            step="written",
        ),
    ),
)
