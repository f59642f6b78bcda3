"""``PAGEMAP_SCAN`` (6.7): runs of pages of one kind, as the kernel itself sums them up.

It needs no privilege for one's own processes, knows the zero page (which ``pagemap`` does not name), and
is the second opinion that tests hold ``pagemap`` against.  Source: Documentation/admin-guide/mm/pagemap.rst
and ``include/uapi/linux/fs.h``.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.pagemap import PageMap

__all__ = [
    "ALL",
    "IS_FILE",
    "IS_GUARD",
    "IS_HUGE",
    "IS_PRESENT",
    "IS_SOFT_DIRTY",
    "IS_SWAPPED",
    "IS_WRITTEN",
    "IS_ZERO",
    "REGION_DTYPE",
    "lie_in",
    "scan",
]

IS_WRITTEN: Final = 1 << 1
"""Written since it was protected; means nothing where userfaultfd is not armed."""
IS_FILE: Final = 1 << 2
IS_PRESENT: Final = 1 << 3
IS_SWAPPED: Final = 1 << 4
IS_ZERO: Final = 1 << 5
"""The kernel's one page of zeros, mapped by reading anonymous memory."""
IS_HUGE: Final = 1 << 6
IS_SOFT_DIRTY: Final = 1 << 7
IS_GUARD: Final = 1 << 8
"""6.15; older kernels refuse to be asked for it, and report guard pages as swapped."""
ALL: Final = (1 << 8) - 1
"""Every category that the first kernel with PAGEMAP_SCAN knows: all but IS_GUARD."""

REGION_DTYPE: Final = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])
"""``struct page_region``: addresses (end exclusive) and a mask of ``IS_*``."""

_REGIONS: Final = 4096  # regions a call


class _ScanArgument(ctypes.Structure):
    """``struct pm_scan_arg``."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    )  # fmt: skip


# _IOWR('f', 16, struct pm_scan_arg): both directions are 3 << 30 on every architecture of Linux.
_PAGEMAP_SCAN: Final = 3 << 30 | ctypes.sizeof(_ScanArgument) << 16 | ord("f") << 8 | 16


def scan(
    pagemap: PageMap,
    start: int,
    end: int,
    *,
    required: int = 0,
    excluded: int = 0,
    any_of: int = 0,
    returned: int = ALL,
) -> NDArray[np.void]:
    """Runs of pages of one kind in [``start``, ``end``) as REGION_DTYPE, by address.

    A page is listed when it has every category in ``required``, none in ``excluded``, and (unless it is
    0) one of ``any_of``; with no condition every page of every mapping is listed.  ``returned`` says which
    categories to report.  A process that has ended has no pages: the answer is empty.  Raises EvidenceError
    where the kernel does not have PAGEMAP_SCAN.
    """
    buffer = np.empty(_REGIONS, dtype=REGION_DTYPE)
    pieces = []
    while start < end:
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            start=start,
            end=end,
            vec=buffer.ctypes.data,
            vec_len=len(buffer),
            category_inverted=excluded,
            category_mask=required | excluded,
            category_anyof_mask=any_of,
            return_mask=returned,
        )
        try:
            count = syscalls.ioctl(pagemap.fileno(), _PAGEMAP_SCAN, ctypes.addressof(argument))
        except OSError as error:
            raise _refused(error) from error
        pieces.append(buffer[:count].copy())
        if count < len(buffer):
            break
        # Not argument.walk_end: after the kernel has refilled its own buffer of 512 regions it may be the
        # place of the last refill, and regions would come twice (fs/proc/task_mmu.c, do_pagemap_scan).
        start = int(buffer["end"][-1])
    return np.concatenate(pieces) if pieces else buffer[:0].copy()


def _refused(error: OSError) -> EvidenceError:
    if error.errno == errno.ENOTTY:
        return EvidenceError("PAGEMAP_SCAN: this kernel does not have it", hint="it came with Linux 6.7")
    return EvidenceError(f"PAGEMAP_SCAN: {error.strerror}")


def lie_in(regions: NDArray[np.void], addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``addresses`` lie in one of the regions, which are by address.

    >>> regions = np.array([(0x1000, 0x3000, 1)], REGION_DTYPE)
    >>> lie_in(regions, np.array([0, 0x1000, 0x2000, 0x3000], np.uint64)).tolist()
    [False, True, True, False]
    """
    before = np.searchsorted(regions["start"], addresses, side="right")
    return addresses < np.append(np.uint64(0), regions["end"])[before]
