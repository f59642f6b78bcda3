"""``/proc/kpagecount`` and ``/proc/kpageflags``: what the kernel knows about a page frame.

Both are tables of 64-bit words, one for each frame number, for root alone.  Frames are sorted and read
in runs, since a read of one word costs as much as a read of hundreds.  Source:
Documentation/admin-guide/mm/pagemap.rst, ``include/uapi/linux/kernel-page-flags.h``,
``tools/mm/page-types.c`` (the letters).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.pagemap import FRAME, PageMap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = [
    "KPF",
    "FrameFlag",
    "distinct",
    "flag_names",
    "frame_flags",
    "has_merged",
    "map_counts",
    "marks_merged",
]

_Number = TypeVar("_Number", bound=np.generic)

_WORD: Final = 8
_CHUNK: Final = (2 << 20) // _WORD  # frames a read
_GAP: Final = 64  # reading that many unwanted frames costs less than another system call


@dataclass(frozen=True)
class FrameFlag:
    """One bit of ``kpageflags``: its letter in page-types(1), its name there, and what it says."""

    name: str
    bit: int
    letter: str
    help: str

    @property
    def mask(self) -> np.uint64:
        """The bit as a mask for an array of words."""
        return np.uint64(1 << self.bit)


KPF: Final = {
    flag.name: flag
    for flag in (
        FrameFlag("locked", 0, "L", "locked, for instance while it is being read from disk"),
        FrameFlag("error", 1, "E", "an input/output error happened on it (before 6.12)"),
        FrameFlag("referenced", 2, "R", "accessed since the last look of reclaim"),
        FrameFlag("uptodate", 3, "U", "its contents are valid"),
        FrameFlag("dirty", 4, "D", "newer than the disk; does not show a copy on write"),
        FrameFlag("lru", 5, "l", "on a list of reclaimable pages"),
        FrameFlag("active", 6, "A", "on the list of pages in use"),
        FrameFlag("slab", 7, "S", "the kernel's own small objects"),
        FrameFlag("writeback", 8, "W", "being written to disk"),
        FrameFlag("reclaim", 9, "I", "to be reclaimed as soon as it is written"),
        FrameFlag("buddy", 10, "B", "free"),
        FrameFlag("mmap", 11, "M", "mapped by a process"),
        FrameFlag("anonymous", 12, "a", "anonymous: no file behind it, or copied from one on write"),
        FrameFlag("swapcache", 13, "s", "has a place in swap"),
        FrameFlag("swapbacked", 14, "b", "would go to swap: anonymous, or shared memory"),
        FrameFlag("compound_head", 15, "H", "the first page of a large folio"),
        FrameFlag("compound_tail", 16, "T", "a further page of a large folio"),
        FrameFlag("huge", 17, "G", "hugetlbfs"),
        FrameFlag("unevictable", 18, "u", "cannot be reclaimed, for instance locked in memory"),
        FrameFlag("hwpoison", 19, "X", "broken memory"),
        FrameFlag("nopage", 20, "n", "no such frame"),
        FrameFlag("ksm", 21, "x", "merged: identical anonymous pages share it (KSM)"),
        FrameFlag("thp", 22, "t", "part of any large folio, not only of a huge page"),
        FrameFlag("offline", 23, "o", "offline"),
        FrameFlag("zero_page", 24, "z", "the kernel's page of zeros"),
        FrameFlag("idle", 25, "i", "not accessed since it was marked idle"),
        FrameFlag("pgtable", 26, "g", "a page table"),
        FrameFlag("reserved", 32, "r", "reserved by the kernel"),
        FrameFlag("mlocked", 33, "m", "locked in memory (mlock)"),
        FrameFlag("owner_2", 34, "d", "the owner's own use (once: mapped to disk)"),
        FrameFlag("private", 35, "P", "a file system keeps something with it"),
        FrameFlag("private_2", 36, "p", "a file system's second mark"),
        FrameFlag("owner_private", 37, "O", "the owner's own use"),
        FrameFlag("arch", 38, "h", "the architecture's own use"),
        FrameFlag("uncached", 39, "c", "not cached by the processor"),
        FrameFlag("softdirty", 40, "f", "soft-dirty"),
        FrameFlag("arch_2", 41, "H", "the architecture's second own use"),
        FrameFlag("arch_3", 42, "H", "the architecture's third own use"),
    )
}
"""Every flag by name; the order is that of the bits."""


def flag_names(word: int) -> tuple[str, ...]:
    """The names of the flags set in one ``kpageflags`` word, lowest bit first.

    >>> flag_names(1 << 12 | 1 << 14)
    ('anonymous', 'swapbacked')
    """
    return tuple(flag.name for flag in KPF.values() if word >> flag.bit & 1)


def map_counts(frames: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How often each of ``frames`` is mapped, over all processes; 0 for frame 0 (not known).

    A folio's average with CONFIG_NO_PAGE_MAPCOUNT (6.15): it corroborates, equal frames prove.
    Raises EvidenceError where ``/proc/kpagecount`` may not be read.
    """
    return _lookup("/proc/kpagecount", frames)


def frame_flags(frames: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The ``KPF`` flags of each of ``frames``; 0 for frame 0 (not known).

    Without ``ksm`` where that means nothing (:func:`marks_merged`).  Raises EvidenceError where
    ``/proc/kpageflags`` may not be read.
    """
    flags, merged = _lookup("/proc/kpageflags", frames), KPF["ksm"].mask
    return flags if not (flags & merged).any() or marks_merged() else flags & ~merged


@lru_cache(maxsize=1)
def marks_merged() -> bool:
    """Whether the flag ``ksm`` means that a page is merged.  Raises EvidenceError as :func:`frame_flags`.

    From 6.10 on ``fs/proc/page.c`` tests one bit too few and sets it on every anonymous page (6.12 does,
    6.18 does not).  So a page that cannot be merged, as it has just been written, is looked at.
    """
    with mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page, PageMap() as pagemap:
        page[:_WORD] = os.urandom(_WORD)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))  # for a moment: closing needs it free
        frame = pagemap.read(address, address + PAGE_SIZE) & FRAME
        return not (_lookup("/proc/kpageflags", frame) & KPF["ksm"].mask).any()


def distinct(values: NDArray[_Number]) -> NDArray[_Number]:
    """The different values, sorted.

    >>> distinct(np.array([7, 3, 7])).tolist()
    [3, 7]

    Sorting beats the hashing of ``np.unique`` tenfold on frames, and does not import ``numpy.ma``.  Numbers
    of four bytes take half the time of those of eight.
    """
    ordered = np.sort(values, axis=None)
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


def has_merged() -> bool:
    """Whether any page of any process is merged (KSM).  Source: Documentation/admin-guide/mm/ksm.rst."""
    try:
        with open("/sys/kernel/mm/ksm/pages_shared", "rb") as file:
            return file.read().strip() != b"0"
    except FileNotFoundError:  # a kernel without
        return False
    except OSError:
        return True


def _lookup(path: str, frames: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The words of ``path`` at the indices ``frames``, in their shape."""
    wanted = distinct(frames)
    skip = int(len(wanted) > 0 and wanted[0] == 0)
    # A run ends where the gap to the next frame is wide, and where it would exceed one read.
    numbers = wanted[skip:]
    ends = (np.diff(numbers) > _GAP) | (np.diff(numbers // _CHUNK) != 0)
    breaks = np.flatnonzero(ends) + 1
    firsts = numbers[np.concatenate([np.zeros(min(len(numbers), 1), np.intp), breaks])]
    lasts = numbers[np.concatenate([breaks - 1, np.full(min(len(numbers), 1), len(numbers) - 1, np.intp)])]
    lengths = (lasts - firsts + np.uint64(1)) * np.uint64(_WORD)
    try:
        with open(path, "rb", buffering=0) as file:
            fd = file.fileno()
            # Frames beyond the end of the table are 0.
            parts = [
                os.pread(fd, length, first * _WORD).ljust(length, b"\0")
                for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True)
            ]
    except OSError as error:
        raise _refused(path, error) from error
    table = np.frombuffer(b"".join(parts), np.uint64)
    run = np.searchsorted(firsts, numbers, side="right") - 1
    before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths // np.uint64(_WORD))]).astype(np.intp)
    words = np.zeros(len(wanted), np.uint64)
    words[skip:] = table[before[run] + (numbers - firsts[run]).astype(np.intp)]
    return words[np.searchsorted(wanted, frames)]


def _refused(path: str, error: OSError) -> EvidenceError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return EvidenceError(f"{path}: {error.strerror}", hint="to read it: be root, with CAP_SYS_ADMIN")
    if error.errno == errno.ENOENT:
        return EvidenceError(f"{path}: this kernel does not have it (CONFIG_PROC_PAGE_MONITOR)")
    return EvidenceError(f"{path}: {error.strerror}")
