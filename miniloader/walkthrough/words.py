"""The words that chapters use, each in a sentence: one table for the terminal, the page and ``--json``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from miniloader.errors import UsageError
from miniloader.suggestions import did_you_mean

__all__ = ["WORDS", "meaning", "words_in"]

WORDS: Final = {
    "page": (
        "The unit in which memory is mapped: 4 KiB on most machines. An address is the number of a "
        "page and an offset in it."
    ),
    "frame": (
        "A page of physical memory. Where two processes have the same frame, they have the same "
        "memory. Its number is the PFN."
    ),
    "page table": (
        "The processor's table, one for each process, from pages to frames. The kernel fills it in."
    ),
    "page table entry": (
        "One row of a page table: the frame of one page, and whether it may be read, written and executed."
    ),
    "page cache": (
        "The kernel's memory of files: each page of a file is in it at most once. read, write and "
        "mmap all use it."
    ),
    "page fault": (
        "What the processor raises at an address whose page table entry is missing or forbids the "
        "access. The kernel fills the entry in, copies the page, or sends a signal."
    ),
    "minor fault": "A page fault that needs no disk: the page is in memory already, or is zeros.",
    "major fault": "A page fault that has to wait for the disk.",
    "mapping": (
        "A range of addresses of one process that means something: a part of a file, a device, or "
        "memory of no file. A line of /proc/PID/maps."
    ),
    "map": "The list of a process's mappings: /proc/PID/maps.",
    "anonymous memory": "Memory that belongs to no file: zeros until it is written.",
    "page of zeros": (
        "The one page of zeros that the kernel shows whoever reads untouched anonymous memory. It "
        "takes no memory."
    ),
    "copy on write": (
        "The first write to a page that others have, too, is given a copy of it; the others keep the old one."
    ),
    "folio": "Several pages that the page cache keeps together, as one.",
    "fault-around": (
        "What the kernel does at a read fault of a file: it maps the neighbours that are in the page "
        "cache, too."
    ),
    "read-ahead": "Reading more of a file from the disk than was asked for, since it will be.",
    "tmpfs": "A file system without a disk: its files are only in the page cache.",
    "RSS": "Resident set size: the pages that a process has in its page table, shared ones as well.",
    "PSS": (
        "Proportional set size: each page divided by how many processes have it. Summed over all, it "
        "is what memory costs."
    ),
    "segment": "A part of an executable file that is mapped together, with one protection: PT_LOAD.",
    "program header": "The table at the beginning of an ELF file that says what its segments are.",
    "PT_LOAD": "A program header of a segment: map these bytes of the file to these addresses.",
    "vaddr": "An address as the library was linked. In a process it is the load bias more.",
    "load bias": "How much higher a library lies in a process than it was linked for.",
    "bss": "The end of the data that has no bytes in the file: zeros.",
    "relocation": "An order to the loader: fill in this word, with an address that is known only now.",
    "symbol": "A name in a library with the address that it stands for.",
    "GOT": (
        "Global offset table: words of data with the addresses of what lies in other libraries. The "
        "loader fills them in."
    ),
    "PLT": (
        "Procedure linkage table: a stub for each function of another library, which jumps to the "
        "address in its GOT slot."
    ),
    "slot": "A word that a relocation fills in.",
    "lazy binding": "A function's slot is filled in when it is first called.",
    "text relocation": "A relocation of code. It makes each process copy that page of code.",
    "position-independent code": (
        "Code that runs wherever it lies, since it refers to its own library by distance."
    ),
    "RELRO": "Relocation read-only: data that is made read-only when the loader has filled it in.",
    "TLS": "Thread-local storage: variables that each thread has for itself.",
    "loader": "What makes running code of a file: ld.so on Linux, and miniloader here.",
    "constructor": "A function of a library that the loader calls when it is loaded.",
    "SIGSEGV": "The signal for an address that means nothing, or whose mapping forbids the access.",
    "SIGBUS": (
        "The signal for an address whose mapping is there, but has no page behind it: the file ends before."
    ),
    "prepared": (
        "Of a library: relocated once, by miniloader prepare, so that processes share those pages as well."
    ),
}
"""Each word, and what it means here."""

_PLURALS: Final = {f"{word[:-1]}ies" if word.endswith("y") else f"{word}s": word for word in WORDS}
_ANY: Final = re.compile(
    r"\b(" + "|".join(map(re.escape, sorted([*_PLURALS, *WORDS], key=len, reverse=True))) + r")\b"
)


def meaning(word: str) -> str:
    """What ``word`` means, in any case and number; UsageError where it is not among :data:`WORDS`.

    >>> meaning("Frames")[:26]
    'A page of physical memory.'
    """
    names = {name.lower(): name for name in (*WORDS, *_PLURALS)}
    name = names.get(word.lower().strip())
    if name is None:
        hint = did_you_mean(word.lower(), names) or "miniloader walkthrough --words lists them"
        raise UsageError(f"no word {word!r} here", hint=hint)
    return WORDS[_PLURALS.get(name, name)]


def words_in(text: str) -> Iterator[tuple[str, str | None]]:
    """``text`` in pieces, each with the word of the table that it is, at its first appearance, else None.

    >>> list(words_in("Two pages, one page."))
    [('Two ', None), ('pages', 'page'), (', one page.', None)]
    """
    at, seen = 0, set()
    for match in _ANY.finditer(text):
        word = _PLURALS.get(match[0], match[0])
        if word not in seen:
            seen.add(word)
            if match.start() > at:
                yield text[at : match.start()], None
            yield match[0], word
            at = match.end()
    if at < len(text):
        yield text[at:], None
