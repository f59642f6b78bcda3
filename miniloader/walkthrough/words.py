"""The words that chapters use, each in a sentence: one table for the terminal, the page and ``--json``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from miniloader.errors import UsageError
from miniloader.suggestions import did_you_mean

__all__ = ["ALIASES", "WORDS", "meaning", "words_in"]

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
    "process's map": "The list of a process's mappings: /proc/PID/maps.",
    "file descriptor": "The number by which a process knows a file that it has open.",
    "MAP_PRIVATE": "Asks mmap for a mapping whose writes are seen by nobody else, and never reach the file.",
    "MAP_SHARED": (
        "Asks mmap for a mapping whose writes everybody sees who maps the file, and which are in the file."
    ),
    "MAP_ANONYMOUS": "Asks mmap for memory that belongs to no file.",
    "MAP_FIXED": "Asks mmap for a mapping at just that address, in place of whatever is there.",
    "PROT_NONE": (
        "The protection of pages that may be neither read nor written nor executed: room that is kept."
    ),
    "pagemap": (
        "/proc/PID/pagemap: where the kernel tells what a process's page table has: 8 bytes a page, the "
        "frame and some bits."
    ),
    "mincore": (
        "The system call that tells which pages of a mapping are in memory, whoever brought them there."
    ),
    "fork": "The system call that makes a second process, a copy of the first: the child of its parent.",
    "signal": "A notice from the kernel to a process. Most end the process that has not asked for them.",
    "anonymous memory": "Memory that belongs to no file: zeros until it is written.",
    "page of zeros": (
        "The one page of zeros that the kernel shows whoever reads untouched anonymous memory. It "
        "takes no memory."
    ),
    "copy on write": (
        "The first write to a page that others have, too, is given a copy of it; the others keep the old one."
    ),
    "page middle directory": (
        "The level above the page tables: an entry leads to a table of 512 entries, or to 2 MiB at once."
    ),
    "TLB": "The processor's memory of page table entries that it has looked up.",
    "KSM": "Kernel samepage merging: the kernel makes equal pages one, for programs that have asked for it.",
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
    "USS": (
        "Unique set size: the pages that no other process has. Ending the process frees them, but for "
        "shared memory and pages of files, which outlive it."
    ),
    "ELF": "The format of programs and libraries on Linux. readelf shows what is in such a file.",
    "segment": "A part of an executable file that is mapped together, with one protection: PT_LOAD.",
    "program header": "The table at the beginning of an ELF file that says what its segments are.",
    "PT_LOAD": "A program header of a segment: map these bytes of the file to these addresses.",
    "dynamic section": (
        "What a library tells the loader, as tags and values: what it needs, and where its tables are."
    ),
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
    "stub": "A few instructions that lead on to a function: those of the PLT jump through a slot of the GOT.",
    "slot": "A word that a relocation fills in.",
    "lazy binding": "A function's slot is filled in when it is first called.",
    "text relocation": "A relocation of code. It makes each process copy that page of code.",
    "position-independent code": (
        "Code that runs wherever it lies, since it refers to its own library by distance."
    ),
    "IFUNC": "A function that is one of several: another function, run by the loader, chooses which.",
    "RELRO": "Relocation read-only: data that is made read-only when the loader has filled it in.",
    "TLS": "Thread-local storage: variables that each thread has for itself.",
    "PT_TLS": (
        "The program header of thread-local variables: their first values, and how much room they take."
    ),
    "PT_GNU_RELRO": "The program header that says what is to be made read-only when it is relocated.",
    "loader": "What makes running code of a file: ld.so on Linux, and miniloader here.",
    "constructor": "A function of a library that the loader calls when it is loaded.",
    "SIGSEGV": "The signal for an address that means nothing, or whose mapping forbids the access.",
    "SIGBUS": (
        "The signal for an address whose mapping is there, but has no page behind it: the file ends before."
    ),
    "ENODEV": "The error of mmap for what cannot be mapped: no such device, it says.",
    "EACCES": "The error of mmap where the file is not open for what the mapping would do.",
    "EPERM": "The error of mmap where something forbids it, such as a seal of the file.",
    "CAP_SYS_ADMIN": "A right of root's. Only with it the kernel tells the numbers of frames.",
    "reference count": (
        "How many references there are to an object of Python; it is a word of the object itself."
    ),
    "garbage collector": (
        "The part of Python that looks for objects which refer to each other, and nobody to them; it "
        "writes on each object that it looks at."
    ),
    "prepared": (
        "Of a library: relocated once, by miniloader prepare, so that processes share those pages as well."
    ),
}
"""Each word, and what it means here."""

ALIASES: Final = {
    "PFN": "frame",
    "page frame number": "frame",
    "map": "process's map",
    "descriptor": "file descriptor",
    "copy-on-write": "copy on write",
    "CoW": "copy on write",
    "global offset table": "GOT",
    "procedure linkage table": "PLT",
    "thread-local storage": "TLS",
    "position-independent": "position-independent code",
    "resident set size": "RSS",
}
"""Names that a word of :data:`WORDS` has, too."""

_PLURALS: Final = {f"{word[:-1]}ies" if word.endswith("y") else f"{word}s": word for word in WORDS}
_NAMES: Final = {word: word for word in WORDS} | _PLURALS | ALIASES
_LINKED: Final = sorted(
    _NAMES.keys() - {"map"}, key=len, reverse=True
)  # in prose it is a verb: they map a file
_ANY: Final = re.compile(r"\b(" + "|".join(map(re.escape, _LINKED)) + r")\b")


def meaning(word: str) -> str:
    """What ``word`` means, in any case and number; UsageError where it is not among :data:`WORDS`.

    >>> meaning("Frames")[:26]
    'A page of physical memory.'
    """
    names = {name.lower(): word for name, word in _NAMES.items()}
    name = names.get(word.lower().strip())
    if name is None:
        hint = did_you_mean(word.lower(), names) or "miniloader walkthrough --words lists them"
        raise UsageError(f"no word {word!r} here", hint=hint)
    return WORDS[name]


def words_in(text: str) -> Iterator[tuple[str, str | None]]:
    """``text`` in pieces, each with the word of the table that it is, at its first appearance, else None.

    >>> list(words_in("Two pages, one page."))
    [('Two ', None), ('pages', 'page'), (', one page.', None)]
    """
    at, seen = 0, set()
    for match in _ANY.finditer(text):
        word = _NAMES[match[0]]
        if word not in seen:
            seen.add(word)
            if match.start() > at:
                yield text[at : match.start()], None
            yield match[0], word
            at = match.end()
    if at < len(text):
        yield text[at:], None
