"""``/proc/PID/pagemap``: one 64-bit word for each page of a process's address space.

Words are read in bulk and stay as the kernel gave them; what they mean is asked of the whole array at
once (:class:`PageTable`).  Source: Documentation/admin-guide/mm/pagemap.rst; ``fs/proc/task_mmu.c``.
"""

from __future__ import annotations

import os
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import ProcessGone, UsageError
from miniloader.kernel.procfs import NO_MEMORY, open_process_file, refusal
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = [
    "EXCLUSIVE",
    "FILE",
    "FRAME",
    "GUARD",
    "PRESENT",
    "SOFT_DIRTY",
    "SWAPPED",
    "PageMap",
    "PageTable",
    "read_pagemap",
]

FRAME: Final = np.uint64((1 << 55) - 1)
"""Bits 0-54 of a present page: its page frame number (0 without CAP_SYS_ADMIN)."""
SOFT_DIRTY: Final = np.uint64(1 << 55)
"""Bit 55: written since ``clear_refs``; always clear without CONFIG_MEM_SOFT_DIRTY."""
EXCLUSIVE: Final = np.uint64(1 << 56)
"""Bit 56: mapped once in all processes ("map count is 1"); not the same as private."""
GUARD: Final = np.uint64(1 << 58)
"""Bit 58: a guard page, MADV_GUARD_INSTALL (6.15)."""
FILE: Final = np.uint64(1 << 61)
"""Bit 61: not anonymous: the page cache's own page, or shared memory."""
SWAPPED: Final = np.uint64(1 << 62)
"""Bit 62: swapped out; also set by guard pages, migration and userfaultfd markers."""
PRESENT: Final = np.uint64(1 << 63)
"""Bit 63: the page table entry points to a frame."""

_WORD: Final = 8
_CHUNK: Final = 2 << 20  # bytes a read; larger reads gain nothing


@dataclass(frozen=True, eq=False)
class PageTable:
    """The page table entries of the pages from address ``start`` on; each property is one array.

    ``entries`` are the words of ``pagemap``, one a page; the properties are masks over them, computed
    when they are asked for.
    """

    start: int
    entries: NDArray[np.uint64]
    places: NDArray[np.int64] | None = None  # of the entries that are left, counted from start; None: all

    def __len__(self) -> int:
        return len(self.entries)

    def _has(self, bit: np.uint64) -> NDArray[np.bool_]:
        return (self.entries & bit).astype(np.bool_)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The address of each page."""
        places = np.arange(len(self), dtype=np.int64) if self.places is None else self.places
        return np.uint64(self.start) + places.astype(np.uint64) * np.uint64(PAGE_SIZE)

    @property
    def present(self) -> NDArray[np.bool_]:
        """In memory and mapped.  Not the same as touched: one fault maps many pages."""
        return self._has(PRESENT)

    @property
    def swapped(self) -> NDArray[np.bool_]:
        """Neither in memory nor nowhere: a swap or migration entry, or a userfaultfd marker."""
        return self._has(SWAPPED) & ~self._has(GUARD)

    @property
    def file(self) -> NDArray[np.bool_]:
        """The page cache's own page (or shared memory), where present; clear: anonymous."""
        return self._has(FILE)

    @property
    def exclusive(self) -> NDArray[np.bool_]:
        """Mapped exactly once over all processes."""
        return self._has(EXCLUSIVE)

    @property
    def guard(self) -> NDArray[np.bool_]:
        """A guard page: any access ends in SIGSEGV."""
        return self._has(GUARD)

    @property
    def frame(self) -> NDArray[np.uint64]:
        """The page frame number; 0 where the page is not present, or we may not know."""
        return np.where(self.present, self.entries & FRAME, np.uint64(0))


class PageMap:
    """The ``pagemap`` of one process, opened once and read as often as needed.

    It stays with the memory the process had when it was opened: after the process ends or executes
    another program every read raises ProcessGone, even if the pid lives on.  Use it as a context manager.
    """

    def __init__(self, pid: int | None = None) -> None:
        """Open it for ``pid`` (None: this process); raises ProcessGone or EvidenceError."""
        self.pid = pid
        self._fd = open_process_file(pid, "pagemap")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """Its descriptor, for ``ioctl``."""
        return self._fd

    def read(self, start: int, end: int) -> NDArray[np.uint64]:
        """The words of the pages in [``start``, ``end``), two page-aligned addresses.

        Words beyond the process's own address space (such as ``[vsyscall]``) are 0.  Raises UsageError
        for a range that is not one, ProcessGone, or EvidenceError.
        """
        if start % PAGE_SIZE or end % PAGE_SIZE or not 0 <= start <= end:
            raise UsageError(f"pages {start:#x}-{end:#x}: expected a page-aligned range")
        words = np.empty((end - start) // PAGE_SIZE, dtype=np.uint64)
        self.read_into(words, start)
        return words

    def read_into(self, words: NDArray[np.uint64], start: int) -> None:
        """Fill ``words`` with those of the pages from address ``start`` on; raises as :meth:`read`."""
        view = words.view(np.uint8).data
        where = start // PAGE_SIZE * _WORD
        done = 0
        while done < len(view):
            count = self._read_into(view[done : done + _CHUNK], where + done)
            if count == 0:
                self._check_alive()
                words[done // _WORD :] = 0
                break
            done += count

    def table(self, start: int, end: int) -> PageTable:
        """The words of [``start``, ``end``), with their address and their meaning; raises as :meth:`read`."""
        return PageTable(start, self.read(start, end))

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise refusal(self.pid, "pagemap", error) from error

    def _check_alive(self) -> None:
        """No words: raise ProcessGone unless the first page of all still has one."""
        try:
            alive = len(os.pread(self._fd, _WORD, 0)) == _WORD
        except OSError as error:
            raise refusal(self.pid, "pagemap", error) from error
        if not alive:
            raise ProcessGone(self.pid, NO_MEMORY)


def read_pagemap(pid: int | None, start: int, end: int) -> NDArray[np.uint64]:
    """The ``pagemap`` words of [``start``, ``end``) of process ``pid``; see :meth:`PageMap.read`."""
    with PageMap(pid) as pagemap:
        return pagemap.read(start, end)
