"""Chapter 10: one library in several processes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim
from miniloader.walkthrough.mapping_views import copied_pages
from miniloader.walkthrough.proof_steps import (
    PROCESSES,
    LibraryInProcesses,
    in_processes,
    memory_table,
    told_steps,
)
from miniloader.walkthrough.step import ChapterStep, OfPages
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER"]


def _run(bench: Workbench) -> Generator[ChapterStep, None, LibraryInProcesses]:
    proof, seen = in_processes(bench, bench.copy(shipped("demo")))
    added = sorted({states.count("copied") for states in seen.states})
    saved = (seen.unshared - seen.used) // 1024
    yield from told_steps(
        proof,
        {
            "mapped": (f"Load biases: {', '.join(map(hex, seen.bases))}.",),
            "touched": ("Whoever reads is given the page cache's own frame: one copy for all of them.",),
            "relocated": ("Copied are pages with addresses in them, and those that the loader zeroes.",),
            "written": (
                f"Used: {seen.used // 1024} KiB. If each had everything to itself: "
                f"{seen.unshared // 1024} KiB. Saved: {saved} KiB.",
                OfPages(f"A further process costs {' or '.join(map(str, added))} pages of its own."),
            ),
            "exited": ("The frames of those who stay have not changed; its own pages are free again.",),
        },
        {"written": memory_table(seen)},
    )
    return seen


# ---------------------------------------------------------------------------------------- claims
@claim("code-one-copy", "Each page of code is one frame for all processes", "flags")
def _code(seen: LibraryInProcesses) -> Finding:
    pages, shared = len(seen.code), seen.one_copy(seen.code)
    expected = f"{pages} pages of code, each one frame in all {len(seen.states)} processes"
    return Finding(shared == pages > 0, expected, f"{shared} of {pages}")


@claim("relocated-own", "Each relocated page is a frame of each one's own", "flags")
def _relocated(seen: LibraryInProcesses) -> Finding:
    pages, copied = len(seen.relocated), seen.own_copies(seen.relocated)
    expected = f"{pages} relocated pages, each another frame in each of {len(seen.groups)} processes"
    return Finding(copied == pages > 0, expected, f"{copied} of {pages}")


@claim("adds-what-it-writes", "A further process adds only what it writes", "flags")
def _adds(seen: LibraryInProcesses) -> Finding:
    """Frames are counted, and copies: two answers of the kernel that need not agree."""
    counted = {group for group in seen.groups[0] if group}
    added, copied = [], []
    for states, groups in zip(seen.states[1:], seen.groups[1:], strict=True):
        new = {group for group, state in zip(groups, states, strict=True) if state != "zero"} - counted - {0}
        counted |= new
        added.append(len(new))
        copied.append(states.count("copied"))
    return Finding(
        added == copied and all(count < len(seen.states[0]) for count in added),
        f"{', '.join(map(str, copied))} frames for processes 2 to {len(seen.states)}: the pages they wrote",
        f"{', '.join(map(str, added))} of {len(seen.states[0])} pages",
    )


@claim("isolated", "No process sees what another writes")
def _isolated(seen: LibraryInProcesses) -> Finding:
    return seen.proven("writes-isolated", "each process reads back what it wrote itself")


@claim("file-unchanged", "The library's file stays as it was")
def _file(seen: LibraryInProcesses) -> Finding:
    return seen.proven("file-unchanged", "the file as it was")


@claim("pss", "The text costs each process its Nth part: Pss = Rss / N", "totals")
def _pss(seen: LibraryInProcesses) -> Finding:
    expected = f"Rss / {PROCESSES} in each process, give or take a kB"
    if not seen.text:
        return Finding(None, expected, "nothing", "smaps does not tell")
    good = all(rss > 0 and abs(pss - rss / PROCESSES) <= 1024 for rss, pss in seen.text)
    return Finding(good, expected, ", ".join(f"{pss // 1024} of {rss // 1024} kB" for rss, pss in seen.text))


@claim("saved", "Sharing saves the code for each process but one", "flags")
def _saved(seen: LibraryInProcesses) -> Finding:
    least = (len(seen.states) - 1) * len(seen.code) * PAGE_SIZE
    saved = seen.unshared - seen.used
    return Finding(
        saved >= least > 0,
        f"at least {least // 1024} KiB: the code, for each process but one",
        f"{saved // 1024} KiB of {seen.unshared // 1024}",
    )


_SNIPPET = """\
import mmap, tempfile

PAGES, PAGE, USERS = 16, mmap.PAGESIZE, 4
file = tempfile.TemporaryFile()
file.write(b"library " * (PAGES * PAGE // 8))
file.flush()

users = []
for user in range(USERS):
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    for page in range(PAGES):
        memory[page * PAGE] = user     # each remembers its number, on every page
    users.append(memory)
"""


def _check(names: dict[str, Any]) -> Answer:
    users = names["users"]
    if len(users) != 4:
        return Answer(False, f"there are {len(users)} users, 4 are asked for")
    copied = [copied_pages(memory) for memory in users]
    if [memory[0] for memory in users] != [0, 1, 2, 3]:
        return Answer(False, "the first byte of each user's mapping should be its number")
    total = sum(map(len, copied))
    if all(len(pages) == 1 for pages in copied):
        return Answer(True, f"{total} copies for 4 users; all other pages are one copy, the page cache's")
    return Answer(False, f"{total} pages were copied; one for each user is enough")


CHAPTER: Final[Chapter[LibraryInProcesses]] = Chapter(
    id="processes",
    number=10,
    title="The library in N processes",
    claim="The code of a library is one copy for all processes; each adds only the pages that it writes.",
    surprise="Each process has the library at another address, and yet the same frames of code.",
    claims=(_code, _relocated, _adds, _isolated, _file, _pss, _saved),
    question=Quiz(
        "Four processes load a library with 3 pages of code, and run it. How many frames hold that code?",
        (
            Choice("12: processes are isolated", "Isolated is what they write; nobody writes code."),
            Choice("3", "Every page table points at the page cache's frames: there is one copy."),
            Choice(
                "3 each, until the kernel finds that they are equal",
                "Nothing is compared: they map the same pages of the same file.",
            ),
        ),
        1,
    ),
    explanation=(
        "Each process maps the file privately. Until it writes, a private page is the page cache's frame, "
        "wherever in the address space it appears: the same memory under several addresses.",
        "Rss counts every page that a process has in its page table, also shared ones, so the sum over "
        "processes counts shared pages again and again. Pss divides each page by the number of its users: "
        "summed over all processes it is what the memory really costs.",
        "What differs between processes, addresses and variables, is on pages of data; those are copied when "
        "they are written. So the price of a further process is what it writes.",
    ),
    sources=("mmap(2), MAP_PRIVATE", "proc_pid_smaps(5), Pss", "Documentation/admin-guide/mm/pagemap.rst"),
    exercise=Exercise(
        "Four users map a library, and each notes its number on all 16 pages: 64 copies. Change it so that "
        "each still has its number in its first byte, and adds a single page.",
        _SNIPPET,
        _SNIPPET.replace(
            "    for page in range(PAGES):\n"
            "        memory[page * PAGE] = user     # each remembers its number, on every page\n",
            "    memory[0] = user\n",
        ),
        _check,
        hints=(
            "How many pages does each user write, and how many need it?",
            "memory[0] = user: one page each. The other 15 stay the file's.",
        ),
    ),
    source_of={
        "code-one-copy": "mmap(2), MAP_PRIVATE; Documentation/admin-guide/mm/pagemap.rst, page frame number",
        "relocated-own": "mmap(2), MAP_PRIVATE: a private copy-on-write mapping",
        "adds-what-it-writes": (
            "mmap(2), MAP_PRIVATE: a private copy-on-write mapping; "
            "Documentation/admin-guide/mm/pagemap.rst, bit 61"
        ),
        "isolated": "mmap(2), MAP_PRIVATE: not visible to other processes",
        "file-unchanged": "mmap(2), MAP_PRIVATE: not carried through to the underlying file",
        "pss": (
            "Documentation/filesystems/proc.rst, PSS: each page is divided by the number of processes "
            "sharing it; proc_pid_smaps(5), Pss"
        ),
        "saved": "Documentation/filesystems/proc.rst, PSS; proc_pid_smaps(5), Rss and Pss",
    },
    run=_run,
    later=(
        Quiz(
            "Each process fills in addresses. Will these pages still be one copy?",
            (
                Choice("Yes: it is one library", "The addresses differ from process to process."),
                Choice("No: a copy in each process", "Whoever writes to a private page gets a copy of it."),
                Choice(
                    "Yes, if the kernel merges them",
                    "It does so only when asked (KSM), and only for equal pages.",
                ),
            ),
            1,
            step="relocated",
        ),
        Quiz(
            "What does a fifth process add?",
            (
                Choice("All of the library's pages", "Code and what is only read is there already."),
                Choice("Nothing", "It relocates and writes, as the others do."),
                Choice("The pages that it writes", "The rest is in the page cache, and one copy for all."),
            ),
            2,
            step="written",
        ),
    ),
)
