"""What is on the pages that two processes have at one address: equal bytes, or different ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.scan import IS_HUGE, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.moved_pages import frames_at
from miniloader.lab.erosion.object_loop import equal_pages
from miniloader.lab.erosion.pairs import Pair
from miniloader.values import NamedTuple

__all__ = ["PagePart", "compare", "huge_copies"]

_AT_ONCE: Final = 1024  # pages
#: Bytes of memory that is taken and let go once, untouched: glibc's malloc learns from it that as much comes
#: again, and does not give the kernel back what a part took, to have it cleared page by page (mallopt(3),
#: M_MMAP_THRESHOLD).  More than the largest array of a part, and less than what malloc learns from.
_KEPT: Final = 24 << 20
_HUGE: Final = PAGE_SIZE // 8  # pages of a huge page: the entries of a table


class PagePart(NamedTuple):
    """Some pages of both processes: their ``addresses``, and the ``words`` of each, a row a page.

    ``read`` says of each whether both could be read and were the pages that the audit saw, before and after;
    ``same`` whether all bytes are equal then.
    """

    addresses: NDArray[np.uint64]
    words: NDArray[np.uint64]
    words_of_relative: NDArray[np.uint64]
    read: NDArray[np.bool_]
    same: NDArray[np.bool_]


def compare(pair: Pair) -> Iterator[PagePart]:
    """The pages of ``pair`` that are two frames, a part at a time; the next part takes the place of the last.

    The page tables are read before and after the bytes: what is not in memory any more is not read, since
    that would map it again, and what lies in another frame is not what was seen.
    Raises ProcessGone, or EvidenceError where memory may not be read.
    """
    pids = (pair.pid, pair.relative)
    with ExitStack() as stack:
        maps = [stack.enter_context(PageMap(pid)) for pid in pids]
        memories = [stack.enter_context(ProcessMemory(pid)) for pid in pids]
        np.empty(_KEPT, np.uint8)  # and malloc keeps what is let go after a part for the next one
        rooms = [np.empty((_AT_ONCE, PAGE_SIZE), np.uint8) for _ in pids]
        for start in range(0, len(pair.apart), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            addresses, seen = pair.apart[rows], [frames[rows] for frames in pair.frames]
            read = _still(maps, addresses, seen)
            words = []
            for memory, room in zip(memories, rooms, strict=True):
                live, done = memory.pages(addresses[read], room)
                words.append(_spread(live.view(np.uint64), read))
                read[np.flatnonzero(read)[~done]] = False
            read &= _still(maps, addresses, seen)
            same = read & equal_pages(words[0], words[1])
            yield PagePart(addresses, words[0], words[1], read, same)


def _spread(live: NDArray[np.uint64], read: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """The pages that were read among those that were not, which are zeroes."""
    if read.all():
        return live
    pages = np.zeros((len(read), PAGE_SIZE // 8), np.uint64)
    pages[read] = live
    return pages


def _still(
    maps: list[PageMap], addresses: NDArray[np.uint64], seen: list[NDArray[np.uint64]]
) -> NDArray[np.bool_]:
    """Which of the pages lie in both processes where they were ``seen``."""
    still = np.ones(len(addresses), np.bool_)
    for pagemap, frames in zip(maps, seen, strict=True):
        still &= frames_at(pagemap, addresses) == frames
    return still


def huge_copies(pid: int, apart: NDArray[np.uint64], same: NDArray[np.uint64]) -> NDArray[np.bool_] | None:
    """Which of the pages ``same`` lie in huge pages of process ``pid`` that are ``apart`` as a whole.

    Both are ascending addresses.  A relative that writes has copies of single pages, and the rest of the huge
    page in common; to collapse pages into a huge one is to copy them all.  None where the kernel does not
    tell (before 6.7).  Raises ProcessGone.
    """
    if not len(same):
        return np.zeros(0, np.bool_)
    try:
        with PageMap(pid) as pagemap:
            huge = scan(pagemap, int(same[0]), int(same[-1]) + PAGE_SIZE, any_of=IS_HUGE, returned=IS_HUGE)
    except ProcessGone:
        raise
    except EvidenceError:
        return None
    if not len(huge):
        return np.zeros(len(same), np.bool_)
    numbers, pages = np.unique(apart // np.uint64(_HUGE * PAGE_SIZE), return_counts=True)
    whole = np.isin(same // np.uint64(_HUGE * PAGE_SIZE), numbers[pages == _HUGE])
    at = np.searchsorted(huge["start"], same, "right") - 1
    return np.asarray(whole & (at >= 0) & (same < huge["end"][at]))
