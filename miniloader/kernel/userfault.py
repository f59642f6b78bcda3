"""Asynchronous userfaultfd write protection (6.7): which pages of our own were written since.

The kernel marks a page written by itself, without a thread that answers faults, and an unprivileged
process may have it (``UFFD_USER_MODE_ONLY``).  ``PAGEMAP_SCAN`` reports the marks.  While it is armed,
fault-around is off in the range.  Source: Documentation/admin-guide/mm/userfaultfd.rst,
``include/uapi/linux/userfaultfd.h``.
"""

from __future__ import annotations

import ctypes
import os
from types import TracebackType
from typing import Final, Self

from numpy import void
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.scan import IS_WRITTEN, scan

__all__ = ["WriteWatch"]

_USER_MODE_ONLY: Final = 1
_API: Final = 0xAA
_FEATURE_WP_ASYNC: Final = 1 << 15  # includes pages that are not there yet (WP_UNPOPULATED)
_MODE_WP: Final = 1 << 1
_PROTECT: Final = 1


def _words(*words: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(words))(*words)


def _request(number: int, words: int) -> int:
    """_IOWR(0xAA, number, a struct of so many 64-bit words)."""
    return 3 << 30 | words * 8 << 16 | _API << 8 | number


class WriteWatch:
    """Watches the pages of [``start``, ``end``) of this process for writes while the block runs.

    Raises EvidenceError where the kernel, or its settings, do not allow it.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        try:
            self._fd = syscalls.userfaultfd(os.O_CLOEXEC | _USER_MODE_ONLY)
        except OSError as error:
            raise EvidenceError(f"userfaultfd: {error.strerror}") from error
        length = end - start
        try:
            self._ask("UFFDIO_API", 0x3F, _API, _FEATURE_WP_ASYNC, 0)
            self._ask("UFFDIO_REGISTER", 0x00, start, length, _MODE_WP, 0)
            self._ask("UFFDIO_WRITEPROTECT", 0x06, start, length, _PROTECT)
        except EvidenceError:
            self.close()
            raise

    def _ask(self, name: str, number: int, *words: int) -> None:
        argument = _words(*words)
        try:
            syscalls.ioctl(self._fd, _request(number, len(words)), ctypes.addressof(argument))
        except OSError as error:
            raise EvidenceError(f"userfaultfd: {name}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; the marks go with it."""
        os.close(self._fd)

    def written(self) -> NDArray[void]:
        """The runs of pages written since the start, as ``scan.REGION_DTYPE``."""
        with PageMap() as pagemap:
            return scan(pagemap, self.start, self.end, required=IS_WRITTEN)
