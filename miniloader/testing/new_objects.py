"""Which objects lie on pages that came to this process while a test ran, for the message when it failed.

The pages are noted with a byte for each, before and after, without an array: numpy's own memory would be
among what came.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from miniloader.forking import importing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from miniloader.lab.erosion.result import ErodedObjects

__all__ = ["OwnPages", "new_objects", "own_pages", "said_of_objects"]

OwnPages = Mapping[int, bytes]
"""For each mapping of private anonymous memory, by its address, the upper byte of its page table entries."""

_LARGEST: Final = 1 << 30  # bytes: of what a larger mapping got no object is told
_PRESENT, _FILE = 1 << 7, 1 << 5  # of that byte
_MOST_TYPES: Final = 8


def own_pages() -> OwnPages:
    """The pages of this process now; none where the kernel does not tell."""
    with importing:
        from miniloader.errors import EvidenceError
        from miniloader.kernel.procfs import open_process_file
        from miniloader.kernel.syscalls import PAGE_SIZE

    pages = dict[int, bytes]()
    try:
        pagemap = open_process_file(None, "pagemap")
    except EvidenceError:
        return pages
    try:
        with open(open_process_file(None, "maps"), "rb") as lines:
            for line in lines:
                span, protection, _, _, inode, *path = line.split(None, 5)
                start, end = (int(edge, 16) for edge in span.split(b"-"))
                anonymous = inode == b"0" and not any(name.startswith(b"[v") for name in path)
                if anonymous and protection.startswith(b"rw-p") and end - start <= _LARGEST:
                    entries = os.pread(pagemap, (end - start) // PAGE_SIZE * 8, start // PAGE_SIZE * 8)
                    pages[start] = entries[7::8]
    finally:
        os.close(pagemap)
    return pages


def new_objects(before: OwnPages, after: OwnPages) -> tuple[ErodedObjects, ...]:
    """The objects on pages that are in ``after`` and not in ``before``; none where this Python is not known.

    Raises EvidenceError where memory may not be read.
    """
    with importing:
        import numpy as np

        from miniloader.kernel.syscalls import PAGE_SIZE
        from miniloader.lab.audit.survey import Memo, survey
        from miniloader.lab.erosion.census import objects_at

    def addresses(pages: OwnPages) -> NDArray[np.uint64]:
        found = [np.empty(0, np.uint64)]
        for start, entries in sorted(pages.items()):
            present = np.frombuffer(entries, np.uint8) & (_PRESENT | _FILE) == _PRESENT
            found.append(np.flatnonzero(present).astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(start))
        return np.concatenate(found)

    process = survey(os.getpid(), Memo(), frames=False, wanted=lambda _: False)
    return objects_at(process, np.setdiff1d(addresses(after), addresses(before), assume_unique=True))


def said_of_objects(before: OwnPages, after: OwnPages) -> str:
    """A line about them; "" where there are none, or nothing can be known of them."""
    with importing:
        from miniloader.errors import EvidenceError, printable
        from miniloader.report.text import listed

    with suppress(EvidenceError):
        kinds = [f"{kind.count:,} {printable(kind.type)}" for kind in new_objects(before, after)]
        return f"objects on the pages that came: {listed(kinds, _MOST_TYPES)}" if kinds else ""
    return ""
