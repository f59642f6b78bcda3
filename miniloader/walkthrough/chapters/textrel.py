"""Chapter 11: when sharing breaks: text relocations."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from typing import Any, Final

from miniloader.elf import ElfImage, inspect
from miniloader.errors import EvidenceError, MiniloaderError, WorkerError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import load
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim
from miniloader.walkthrough.mapping_views import copied_pages
from miniloader.walkthrough.proof_steps import (
    PROCESSES,
    LibraryInProcesses,
    in_processes,
    memory_table,
    told_steps,
)
from miniloader.walkthrough.step import ChangedWord, ChapterStep, PageBytes
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "RelocatedCode"]

_WORD = 8
_SHOWN = 32  # bytes


@dataclass(frozen=True)
class RelocatedCode:
    """What was seen of the library here, and in several processes."""

    refused: str  # what loading it unasked says, "" for nothing
    changed: tuple[int, ...]  # vaddrs of bytes of code that are not the file's
    words: tuple[int, ...]  # vaddrs of the relocated words in code
    differ: tuple[bool, ...]  # for each page of code, whether its bytes are not the file's
    several: LibraryInProcesses | str  # why not


def _run(bench: Workbench) -> Generator[ChapterStep, None, RelocatedCode]:
    path = bench.copy(shipped("copied_code"))
    image = inspect(path)
    refused = yield from _refuse(bench, path)
    targets = sorted(image.relocations.targets().tolist())
    code = [load for load in image.loads if "x" in load.flags]
    words = tuple(vaddr for vaddr in targets if any(load.vaddr <= vaddr < load.file_end for load in code))
    pages = yield from _allow(bench, image, words)
    return RelocatedCode(
        refused=refused,
        changed=tuple(
            page + offset
            for page, (before, after) in pages.items()
            for offset, (old, new) in enumerate(zip(before, after, strict=False))
            if old != new
        ),
        words=words,
        differ=tuple(after[: len(before)] != before for before, after in pages.values()),
        several=(yield from _in_several(bench, path)),
    )


def _refuse(bench: Workbench, path: str) -> Generator[ChapterStep, None, str]:
    refused = ""
    try:
        load(path).close()
    except MiniloaderError as error:
        refused = str(error).removeprefix(f"{path}: ")
    bench.note('load("libcopied_code.so")', refused or "loaded", access=True)
    yield ChapterStep(
        "refused",
        "A library whose code was not compiled to be position-independent: instructions hold addresses.",
        bench.taken(),
        (f"Miniloader says: {refused}." if refused else "It is loaded.", "Here we allow it, to see why not."),
    )
    return refused


def _allow(
    bench: Workbench, image: ElfImage, words: tuple[int, ...]
) -> Generator[ChapterStep, None, dict[int, tuple[bytes, bytes]]]:
    """Load it all the same: each page of code by vaddr, in the file and in memory."""
    code = [load for load in image.loads if "x" in load.flags]
    with load(image.path, text_relocations=True) as library:
        bench.note('load("libcopied_code.so", text_relocations=True)', hex(library.base), access=True)
        pages = {
            vaddr: (_file_page(image, vaddr), ctypes.string_at(library.base + vaddr, PAGE_SIZE))
            for segment in code
            for vaddr in range(segment.vaddr & -PAGE_SIZE, segment.file_end, PAGE_SIZE)
        }
    first = words[0] // _SHOWN * _SHOWN if words else code[0].vaddr
    before, after = (
        octets[first % PAGE_SIZE : first % PAGE_SIZE + _SHOWN] for octets in pages[first & -PAGE_SIZE]
    )
    shown = tuple(
        ChangedWord(vaddr - first, _WORD, "an address, inside an instruction")
        for vaddr in words
        if first <= vaddr <= first + _SHOWN - _WORD
    )
    written = len({vaddr // PAGE_SIZE for vaddr in words})
    yield ChapterStep(
        "loaded",
        "Loaded all the same: the loader makes the code writable, and fills in the addresses.",
        bench.taken(),
        (
            f"{len(words)} words on {written} of {len(pages)} pages of code were written: "
            f"{', '.join(map(hex, words))}.",
        ),
        bytes=(PageBytes("code: in the file, and loaded", first, before, after, shown),),
    )
    return pages


def _file_page(image: ElfImage, page: int) -> bytes:
    """What the file has for the page at vaddr ``page``: less than a page at the end of its segment."""
    segment = next(load for load in image.loads if load.vaddr & -PAGE_SIZE <= page < load.file_end)
    assert segment.vaddr <= page, "code that begins within a page"
    return bytes(image.read(page, min(segment.file_end, page + PAGE_SIZE) - page, "code"))


def _in_several(bench: Workbench, path: str) -> Generator[ChapterStep, None, LibraryInProcesses | str]:
    try:
        proof, several = in_processes(bench, path, text_relocations=True)
    except (WorkerError, EvidenceError) as error:
        yield ChapterStep(
            "in several processes", "The same in several processes.", saw=(f"Not here: {error}.",)
        )
        return str(error)
    yield from told_steps(
        proof,
        {
            "touched": ("So far it is like any library: one copy for all of them.",),
            "relocated": ("Each process has written to each page of code: all of them are copies.",),
            "written": (
                f"Used: {several.used // 1024} KiB of {several.unshared // 1024}. "
                "What is still shared are headers and constants.",
            ),
        },
        {"written": memory_table(several)},
    )
    return several


# ---------------------------------------------------------------------------------------- claims
@claim("refused-unasked", "Miniloader does not load such a library unasked")
def _refused(seen: RelocatedCode) -> Finding:
    return Finding("DT_TEXTREL" in seen.refused, "an error that names DT_TEXTREL", seen.refused or "loaded")


@claim("addresses-in-code", "Loading writes into code: addresses, nothing else")
def _only_words(seen: RelocatedCode) -> Finding:
    inside = {vaddr + byte for vaddr in seen.words for byte in range(_WORD)}
    elsewhere = {*seen.changed} - inside
    return Finding(
        bool(seen.changed) and not elsewhere,
        f"other bytes in the {len(seen.words)} relocated words, and nowhere else",
        f"{len(seen.changed)} bytes differ, {len(elsewhere)} of them elsewhere",
    )


@claim("every-page-differs", "One address makes a whole page differ from the file")
def _every_page(seen: RelocatedCode) -> Finding:
    expected = f"each of {len(seen.differ)} pages of code differs from the file"
    return Finding(
        all(seen.differ) and bool(seen.differ),
        expected,
        f"{sum(seen.differ)} of {len(seen.differ)} pages differ",
    )


@claim("code-private", "Each page of code is a frame of each process's own", "flags")
def _private(seen: RelocatedCode) -> Finding:
    expected = f"every page of code another frame in each of {PROCESSES} processes"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    pages, copied = len(seen.several.code), seen.several.own_copies(seen.several.code)
    return Finding(copied == pages > 0, expected, f"{copied} of {pages}")


@claim("pss", "The text costs each process all of it: Pss = Rss", "totals")
def _pss(seen: RelocatedCode) -> Finding:
    expected = "Pss = Rss in each process"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    text = seen.several.text
    if not text:
        return Finding(None, expected, "nothing", "smaps does not tell")
    observed = ", ".join(f"{pss // 1024} of {rss // 1024} kB" for rss, pss in text)
    return Finding(all(rss == pss > 0 for rss, pss in text), expected, observed)


@claim("file-unchanged", "The library's file stays as it was")
def _file(seen: RelocatedCode) -> Finding:
    expected = "the file as it was"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    return seen.several.proven("file-unchanged", expected)


_SNIPPET = """\
import mmap, struct, tempfile

CODE, PAGE = 8, mmap.PAGESIZE           # pages 0 to 7 are code, page 8 is data
file = tempfile.TemporaryFile()
file.write(bytes((CODE + 1) * PAGE))
file.flush()
library = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
addresses = [0x7F0000001000 + 16 * number for number in range(CODE)]

for number, address in enumerate(addresses):
    struct.pack_into("<Q", library, number * PAGE + 2, address)     # into an instruction
"""


def _check(names: dict[str, Any]) -> Answer:
    library, copied = names["library"], copied_pages(names["library"])
    stored = all(library.find(address.to_bytes(8, "little")) >= 0 for address in names["addresses"])
    if len(names["addresses"]) != 8 or not stored:
        return Answer(False, "all 8 addresses should be somewhere in the library")
    if copied == (8,):
        return Answer(True, "one page of data was copied; the code is still the page cache's: that is a GOT")
    return Answer(False, f"pages {list(copied)} were copied; only page 8, the data, should be")


CHAPTER: Final[Chapter[RelocatedCode]] = Chapter(
    id="textrel",
    number=11,
    title="When sharing breaks: text relocations",
    claim="Code that is not position-independent is written by the loader, and so copied in each process.",
    surprise="The same matrix as in chapter 10, and all code is private: eight bytes cost a page.",
    claims=(_refused, _only_words, _every_page, _private, _pss, _file),
    question=Quiz(
        "Each of 4 pages of code holds one address that the loader must fill in. 4 processes load it. How "
        "many frames hold its code?",
        (
            Choice("4", "They would, if nobody wrote to code. But the addresses differ for each process."),
            Choice("16", "A write copies a whole page; each process writes to each page of code."),
            Choice("4, and 16 words of 8 bytes", "Nothing smaller than a page is copied."),
        ),
        1,
    ),
    explanation=(
        "Compiled without -fPIC, an instruction holds the address of what it uses. Where the library will be "
        "nobody knows before it is loaded, so the linker leaves relocations of the text (DT_TEXTREL).",
        "The loader has to make code writable to apply them. The first write to each page copies it, like "
        "any write to a private mapping; from then on it is this process's own, and cannot be dropped from "
        "memory and read again from the file.",
        "Writable code is a risk as well, so many systems forbid it. The cure is -fPIC: the addresses move "
        "to the GOT, a few pages of data (chapter 9).",
    ),
    sources=("System V gABI, Dynamic Section, DT_TEXTREL", "gcc(1), -fPIC", "ld(1), -z text"),
    exercise=Exercise(
        "A loader writes 8 addresses into 8 pages of code. Place them so that no page of code is copied.",
        _SNIPPET,
        _SNIPPET.replace(
            "library, number * PAGE + 2, address)     # into an instruction",
            "library, CODE * PAGE + 8 * number, address)",
        ),
        _check,
        hints=(
            "A page is copied when something on it is written. Where should the addresses stand?",
            "Page 8 is data: put them all there, 8 bytes apart, at CODE * PAGE + 8 * number.",
        ),
    ),
    source_of={
        "refused-unasked": (
            "System V gABI, Dynamic Section, DT_TEXTREL: relocations might modify a non-writable segment;"
            " ld(1), -z text: an error there"
        ),
        "addresses-in-code": (
            "System V gABI, Dynamic Section, DT_TEXTREL: relocations might modify a non-writable segment"
        ),
        "every-page-differs": (
            "mmap(2), MAP_PRIVATE; mm/memory.c, wp_page_copy(): memory is copied by the page"
        ),
        "code-private": "mmap(2), MAP_PRIVATE; gcc(1), -fPIC",
        "pss": (
            "Documentation/filesystems/proc.rst, PSS: each page is divided by the number of processes "
            "sharing it; proc_pid_smaps(5), Pss"
        ),
        "file-unchanged": "mmap(2), MAP_PRIVATE: not carried through to the underlying file",
    },
    run=_run,
    later=(
        Quiz(
            "The library is mapped, and each process reads it. Is its code shared?",
            (
                Choice(
                    "Yes: it is only read so far",
                    "What is not position-independent about it has not been used yet.",
                ),
                Choice("No: it has text relocations", "They have not been carried out."),
                Choice("Only the first page", "Nothing has been written to any of them."),
            ),
            0,
            step="touched",
        ),
        Quiz(
            "The loader writes 8 bytes into each page of code. What is still shared of it?",
            (
                Choice("All but 8 bytes a page", "Memory is shared by the page."),
                Choice("Nothing", "One byte that is written copies the page."),
                Choice("All: it is code", "It was made writable, and written."),
            ),
            1,
            step="relocated",
        ),
    ),
)
