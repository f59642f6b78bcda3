"""Chapter 11: when sharing breaks: text relocations."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from typing import Any

from miniloader.elf import ElfImage, inspect
from miniloader.errors import EvidenceError, MiniloaderError, WorkerError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import load
from miniloader.values import dataclass
from miniloader.walkthrough.exercises import copied_pages
from miniloader.walkthrough.library_in_processes import (
    PROCESSES,
    Several,
    in_several,
    memory_table,
    shown_steps,
)
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Exercise,
    Finding,
    PageBytes,
    Question,
    Statement,
    Step,
    Word,
)
from miniloader.walkthrough.workbench import Bench, shipped

__all__ = ["CHAPTER", "Seen"]

_WORD = 8
_SHOWN = 32  # bytes


@dataclass(frozen=True)
class Seen:
    """What was seen of the library here, and in several processes."""

    refused: str  # what loading it unasked says, "" for nothing
    changed: tuple[int, ...]  # vaddrs of bytes of code that are not the file's
    words: tuple[int, ...]  # vaddrs of the relocated words in code
    differ: tuple[bool, ...]  # for each page of code, whether its bytes are not the file's
    several: Several | str  # why not


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.copy(shipped("copied_code"))
    image = inspect(path)
    refused = ""
    try:
        load(path).close()
    except MiniloaderError as error:
        refused = str(error).removeprefix(f"{path}: ")
    bench.note('load("libcopied_code.so")', refused or "loaded", access=True)
    yield Step(
        "refused",
        "A library whose code was not compiled to be position-independent: instructions hold addresses.",
        bench.calls(),
        (f"Miniloader says: {refused}." if refused else "It is loaded.", "Here we allow it, to see why not."),
    )

    code = [one for one in image.loads if "x" in one.flags]
    words = tuple(
        vaddr
        for vaddr in sorted(int(one) for one in image.relocations.targets())
        if any(one.vaddr <= vaddr < one.file_end for one in code)
    )
    with load(path, text_relocations=True) as library:
        bench.note('load("libcopied_code.so", text_relocations=True)', hex(library.base), access=True)
        pages = {
            vaddr: (_file_page(image, vaddr), ctypes.string_at(library.base + vaddr, PAGE_SIZE))
            for one in code
            for vaddr in range(one.vaddr & -PAGE_SIZE, one.file_end, PAGE_SIZE)
        }
    changed = tuple(
        page + at
        for page, (before, after) in pages.items()
        for at, (was, became) in enumerate(zip(before, after, strict=False))
        if was != became
    )
    first = words[0] // _SHOWN * _SHOWN if words else code[0].vaddr
    page, at = first & -PAGE_SIZE, first % PAGE_SIZE
    before, after = (one[at : at + _SHOWN] for one in pages[page])
    yield Step(
        "loaded",
        "Loaded all the same: the loader makes the code writable, and fills in the addresses.",
        bench.calls(),
        (
            f"{len(words)} words on {len({one // PAGE_SIZE for one in words})} of {len(pages)} pages of code "
            f"were written: {', '.join(map(hex, words))}.",
        ),
        bytes=(
            PageBytes(
                "code: in the file, and loaded",
                first,
                before,
                after,
                tuple(
                    Word(one - first, _WORD, "an address, inside an instruction")
                    for one in words
                    if first <= one <= first + _SHOWN - _WORD
                ),
            ),
        ),
    )

    several = yield from _in_several(bench, path)
    return Seen(
        refused,
        changed,
        words,
        tuple(after[: len(before)] != before for before, after in pages.values()),
        several,
    )


def _in_several(bench: Bench, path: str) -> Generator[Step, None, Several | str]:
    try:
        proof, several = in_several(bench, path, text_relocations=True)
    except (WorkerError, EvidenceError) as error:
        yield Step("in several processes", "The same in several processes.", saw=(f"Not here: {error}.",))
        return str(error)
    yield from shown_steps(
        proof,
        {
            "touched": ("So far it is like any library: one copy for all of them.",),
            "relocated": ("Each process has written to each page of code: all of them are copies.",),
            "written": (
                f"Used: {several.used // 1024} KiB of {several.unshared // 1024}. "
                "What is still shared are headers and constants.",
            ),
        },
        {"written": (memory_table(several),) if several.text else ()},
    )
    return several


def _file_page(image: ElfImage, page: int) -> bytes:
    """What the file has for the page at vaddr ``page``: less than a page at the end of its segment."""
    one = next(one for one in image.loads if one.vaddr & -PAGE_SIZE <= page < one.file_end)
    start = max(page, one.vaddr)
    assert start == page, "code that begins within a page"
    return bytes(image.read(page, min(one.file_end, page + PAGE_SIZE) - page, "code"))


# ---------------------------------------------------------------------------------------- claims
def _refused(seen: Seen) -> Finding:
    return Finding("DT_TEXTREL" in seen.refused, "an error that names DT_TEXTREL", seen.refused or "loaded")


def _only_words(seen: Seen) -> Finding:
    inside = {vaddr + byte for vaddr in seen.words for byte in range(_WORD)}
    elsewhere = [vaddr for vaddr in seen.changed if vaddr not in inside]
    return Finding(
        bool(seen.changed) and not elsewhere,
        f"other bytes in the {len(seen.words)} relocated words, and nowhere else",
        f"{len(seen.changed)} bytes differ, {len(elsewhere)} of them elsewhere",
    )


def _every_page(seen: Seen) -> Finding:
    return Finding(
        all(seen.differ) and bool(seen.differ),
        f"each of {len(seen.differ)} pages of code differs from the file",
        f"{sum(seen.differ)} do",
    )


def _private(seen: Seen) -> Finding:
    expected = f"every page of code another frame in each of {PROCESSES} processes"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    code, states, groups = seen.several.code, seen.several.states, seen.several.groups
    of_own = [
        page
        for page in code
        if {row[page] for row in states} == {"copied"} and len({row[page] for row in groups}) == len(groups)
    ]
    return Finding(len(of_own) == len(code) > 0, expected, f"{len(of_own)} of {len(code)}")


def _pss(seen: Seen) -> Finding:
    expected = "Pss = Rss in each process"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    text = seen.several.text
    if not text:
        return Finding(None, expected, "nothing", "smaps does not tell")
    good = all(rss == pss > 0 for rss, pss in text)
    return Finding(good, expected, ", ".join(f"{pss // 1024} of {rss // 1024} kB" for rss, pss in text))


def _file(seen: Seen) -> Finding:
    expected = "the file as it was"
    if isinstance(seen.several, str):
        return Finding(None, expected, "nothing", seen.several)
    holds, observed = seen.several.claims["file-unchanged"]
    return Finding(holds, expected, observed, observed)


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
    there = all(library.find(one.to_bytes(8, "little")) >= 0 for one in names["addresses"])
    if len(names["addresses"]) != 8 or not there:
        return Answer(False, "all 8 addresses should be somewhere in the library")
    if copied == (8,):
        return Answer(True, "one page of data was copied; the code is still the page cache's: that is a GOT")
    return Answer(False, f"pages {list(copied)} were copied; only page 8, the data, should be")


CHAPTER = Chapter(
    id="textrel",
    number=11,
    title="When sharing breaks: text relocations",
    claim="Code that is not position-independent is written by the loader, and so copied in each process.",
    surprise="The same matrix as in chapter 9, and all code is private: eight bytes cost a page.",
    claims=(
        Statement("refused-unasked", "Miniloader does not load such a library unasked", _refused),
        Statement(
            "addresses-in-code", "Loading writes into code: addresses, nothing else", _only_words, "none"
        ),
        Statement("every-page-differs", "One address makes a whole page differ from the file", _every_page),
        Statement("code-private", "Each page of code is a frame of each process's own", _private, "flags"),
        Statement("pss", "The text costs each process all of it: Pss = Rss", _pss, "totals"),
        Statement("file-unchanged", "The library's file stays as it was", _file),
    ),
    question=Question(
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
        "to the GOT, a few pages of data (chapter 8).",
    ),
    sources=("System V gABI, chapter 5, DT_TEXTREL", "gcc(1), -fPIC", "ld(1), -z text"),
    exercise=Exercise(
        "A loader writes 8 addresses into 8 pages of code. Place them so that no page of code is copied.",
        _SNIPPET,
        _SNIPPET.replace(
            "library, number * PAGE + 2, address)     # into an instruction",
            "library, CODE * PAGE + 8 * number, address)",
        ),
        _check,
    ),
    run=_run,
)
