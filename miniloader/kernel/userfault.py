"""Write protection by userfaultfd: which pages were written since, or who is about to write.

:class:`WriteWatch` is asynchronous (6.7), for this process: the kernel marks a page written by itself,
without a thread that answers faults, and an unprivileged process may have it (``UFFD_USER_MODE_ONLY``).
``PAGEMAP_SCAN`` reports the marks.  While it is armed, fault-around is off in the range.
:class:`WriteTrap` is synchronous, and needs privilege, since the kernel's own writes are held up as well.
Source: Documentation/admin-guide/mm/userfaultfd.rst, ``include/uapi/linux/userfaultfd.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from contextlib import suppress
from typing import Final, Self

from numpy import void
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.scan import IS_WRITTEN, scan

__all__ = ["WriteTrap", "WriteWatch"]

_USER_MODE_ONLY: Final = 1
_API: Final = 0xAA
_FEATURE_WP_ASYNC: Final = 1 << 15  # includes pages that are not there yet (WP_UNPOPULATED)
_MODE_WP: Final = 1 << 1
_PROTECT: Final = 1
_FEATURES: Final = 1 << 0 | 1 << 8 | 1 << 11  # write protection, thread ids, exact addresses
_PAGEFAULT: Final = 0x12
_MESSAGE: Final = struct.Struct("<B7xQQI4x")  # struct uffd_msg: event, flags, address, thread


def _words(*words: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(words))(*words)


def _request(number: int, words: int) -> int:
    """_IOWR(0xAA, number, a struct of so many 64-bit words)."""
    return 3 << 30 | words * 8 << 16 | _API << 8 | number


def _reading(number: int, words: int) -> int:
    """_IOR(0xAA, number, a struct of so many 64-bit words)."""
    return 2 << 30 | words * 8 << 16 | _API << 8 | number


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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; the marks go with it."""
        os.close(self._fd)

    def written(self) -> NDArray[void]:
        """The runs of pages written since the start, as ``scan.REGION_DTYPE``."""
        with PageMap() as pagemap:
            return scan(pagemap, self.start, self.end, required=IS_WRITTEN)


class WriteTrap:
    """Holds up whoever writes to a page of some process, until it is let go: synchronous (5.7).

    ``descriptor`` is a userfaultfd of that process, which may be another one than this: it is taken over here
    and closed in the end.  The whole address that is written is told, since 5.18.  Raises EvidenceError where
    the kernel does not allow it.
    """

    def __init__(self, descriptor: int) -> None:
        self._fd, self._armed = descriptor, list[tuple[int, int]]()
        try:
            self._ask("UFFDIO_API", _request(0x3F, 3), _API, _FEATURES, 0)
            os.set_blocking(descriptor, False)
        except EvidenceError:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor, for poll(2)."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor of this process; the other one's stays."""
        os.close(self._fd)

    def arm(self, start: int, end: int) -> bool:
        """Protect the pages in [``start``, ``end``), private anonymous memory; whether the kernel does.

        It does not watch memory that it may drop (``VM_DROPPABLE``, 6.11), where glibc 2.41 keeps the state
        of getrandom(3).
        """
        length = end - start
        try:
            self._ask("UFFDIO_REGISTER", _request(0x00, 4), start, length, _MODE_WP, 0)
        except EvidenceError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
                return False
            raise
        self._armed.append((start, length))
        self._ask("UFFDIO_WRITEPROTECT", _request(0x06, 3), start, length, _PROTECT)
        return True

    def read(self) -> list[tuple[int, int]]:
        """Who waits: the address that is to be written, and the thread; none where nobody does."""
        try:
            messages = os.read(self._fd, 64 * _MESSAGE.size)
        except BlockingIOError:
            return []
        faults = (_MESSAGE.unpack_from(messages, at) for at in range(0, len(messages), _MESSAGE.size))
        return [(address, thread) for event, _, address, thread in faults if event == _PAGEFAULT]

    def release(self, page: int) -> None:
        """Let go whoever waits for the page at this address; it may be written to from now on."""
        try:
            self._ask("UFFDIO_WRITEPROTECT", _request(0x06, 3), page, syscalls.PAGE_SIZE, 0)
        except EvidenceError:  # unmapped meanwhile, or disarmed: then nobody waits there
            self._wake(page, syscalls.PAGE_SIZE)

    def disarm(self) -> None:
        """Let everybody go, and protect nothing any more."""
        while self._armed:
            start, length = self._armed.pop()
            with suppress(EvidenceError):  # part of it is unmapped
                self._ask("UFFDIO_WRITEPROTECT", _request(0x06, 3), start, length, 0)
            with suppress(EvidenceError):
                self._ask("UFFDIO_UNREGISTER", _reading(0x01, 2), start, length)
            self._wake(start, length)

    def _wake(self, start: int, length: int) -> None:
        with suppress(EvidenceError):
            self._ask("UFFDIO_WAKE", _reading(0x02, 2), start, length)

    def _ask(self, name: str, request: int, *words: int) -> None:
        argument = _words(*words)
        try:
            syscalls.ioctl(self._fd, request, ctypes.addressof(argument))
        except OSError as error:
            raise EvidenceError(f"userfaultfd: {name}: {error.strerror}") from error
