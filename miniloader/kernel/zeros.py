"""Which pages are the kernel's one page of zeros, where PAGEMAP_SCAN (6.7) cannot be asked.

In ``pagemap`` such a page looks like a copy that somebody else has as well: present, of no file, not
exclusive.  The sums of ``smaps`` leave it out.  So where a mapping's Rss counts all its present pages none is
the page of zeros, and where it counts none of those that might be, all of them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import EXCLUSIVE, FILE, PRESENT, PageMap
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["NOT_PAGES", "Sums", "doubtful", "zeros_by_sums"]

#: Mappings whose entries are present, yet of no page that anybody counts.
NOT_PAGES: Final = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]"})
_KINDS: Final = PRESENT | FILE | EXCLUSIVE
_MOST: Final = 1 << 30  # bytes; the entries of a larger mapping would take long to read
_HUGE: Final = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


@dataclass(frozen=True, eq=False)
class Sums:
    """What the sums of ``smaps`` tell of each of some mappings.

    ``zeros`` is how many pages of the mapping are the page of zeros; -1 where that is not known, as it
    changed while we looked, or is very large.  ``all_or_none``: of the doubtful ones none (0), all (1), or
    only some, or not known (-1).  ``huge`` is how many pages of each mapping are mapped by huge entries.
    """

    zeros: NDArray[np.int64]
    all_or_none: NDArray[np.int8]
    huge: NDArray[np.int64]


def doubtful(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which words of ``pagemap`` may be those of the page of zeros, if it is in memory of no file."""
    maybe: NDArray[np.bool_] = (entries & _KINDS) == PRESENT
    return maybe


def zeros_by_sums(pagemap: PageMap, vmas: Sequence[Vma]) -> Sums:
    """The sums of these mappings of the process.

    Raises ProcessGone, or EvidenceError where ``smaps`` may not be read.
    """
    chosen = [index for index, vma in enumerate(vmas) if _may_have(vma)]
    small = [index for index in chosen if vmas[index].size <= _MOST]
    before = {index: pagemap.read(vmas[index].start, vmas[index].end) & _KINDS for index in small}
    sums = {mapping.vma: mapping.sizes for mapping in read_smaps(pagemap.pid)}
    zeros, all_or_none = np.zeros(len(vmas), np.int64), np.zeros(len(vmas), np.int8)
    zeros[chosen] = all_or_none[chosen] = -1
    for index, entries in before.items():
        maybe = np.count_nonzero(doubtful(entries))
        vma, number = vmas[index], -1
        if vma in sums and (pagemap.read(vma.start, vma.end) & _KINDS == entries).all():
            number = int(np.count_nonzero(entries & PRESENT)) - sums[vma]["Rss"] // PAGE_SIZE
        zeros[index] = number if 0 <= number <= maybe else -1
        all_or_none[index] = 0 if number == 0 else 1 if number == maybe else -1
    huge = [sum(sums.get(vma, {}).get(name, 0) for name in _HUGE) // PAGE_SIZE for vma in vmas]
    return Sums(zeros, all_or_none, np.array(huge, np.int64))


def _may_have(vma: Vma) -> bool:
    """Reading private memory of no file maps the page of zeros."""
    return not (vma.shared or vma.is_file or vma.path in NOT_PAGES)
