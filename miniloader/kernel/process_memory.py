"""``/proc/PID/mem``: the bytes of another process's pages, without stopping it.

Reading a page that is not in its page table would map it there (a file's page and fifteen around it), so
only what ``pagemap`` shows present is to be asked for.  Source: proc_pid_mem(5).
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import ProcessGone
from miniloader.kernel.procfs import NO_MEMORY, open_process_file, refusal
from miniloader.kernel.syscalls import PAGE_SIZE

__all__ = ["ProcessMemory"]

_UNREADABLE: Final = frozenset({errno.EIO, errno.EFAULT})


class ProcessMemory:
    """The memory of one process, opened once; like ``pagemap`` it stays with that memory through an exec.

    Use it as a context manager.
    """

    def __init__(self, pid: int | None = None) -> None:
        """Open it; raises ProcessGone, or EvidenceError where it may not be read (ptrace(2), Yama)."""
        self.pid = pid
        self._fd = open_process_file(pid, "mem")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def pages(
        self, addresses: NDArray[np.uint64], room: NDArray[np.uint8] | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The bytes of the pages at these ascending addresses, shape (pages, PAGE_SIZE), and which were read.

        Neighbours are read at once, into the beginning of ``room`` where that is given.  Raises ProcessGone,
        or EvidenceError.
        """
        data = np.empty((len(addresses), PAGE_SIZE), np.uint8) if room is None else room[: len(addresses)]
        done = np.ones(len(addresses), np.bool_)
        view = data.reshape(-1).data
        edges = np.flatnonzero(np.diff(addresses) != PAGE_SIZE) + 1
        starts = [0, *edges.tolist(), len(addresses)] if len(addresses) else [0]
        for first, last in pairwise(starts):
            while first < last:
                count = self._read(view[first * PAGE_SIZE : last * PAGE_SIZE], int(addresses[first]))
                done[first] = count >= PAGE_SIZE  # a page that cannot be read is left out
                first += max(count // PAGE_SIZE, 1)
        data[~done] = 0
        return data, done

    def read(self, address: int, length: int) -> bytes:
        """The bytes there, fewer where the rest cannot be read; raises ProcessGone, or EvidenceError."""
        try:
            data = os.pread(self._fd, length, address)
        except OSError as error:
            self._check(error)
            return b""
        if not data:
            raise ProcessGone(self.pid, NO_MEMORY)
        return data

    def words(self, addresses: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        """So many words at each address, shape (addresses, number); zeroes where they cannot be read.

        One by one: process_vm_readv(2) would take many at once, but pins pages, and so has the kernel copy
        those that are shared since a fork (``FAULT_FLAG_UNSHARE``, 5.19).  Raises ProcessGone, or
        EvidenceError.
        """
        length = number * 8
        words = [self.read(address, length).ljust(length, b"\0") for address in addresses.tolist()]
        return np.frombuffer(b"".join(words), np.uint64).reshape(-1, number)

    def _read(self, buffer: memoryview, address: int) -> int:
        try:
            count = os.preadv(self._fd, [buffer], address)
        except OSError as error:
            self._check(error)
            return 0
        if count == 0:
            raise ProcessGone(self.pid, NO_MEMORY)
        return count

    def _check(self, error: OSError) -> None:
        """Raise what it stands for, unless it is only that nothing can be read there."""
        if error.errno not in _UNREADABLE:
            raise refusal(self.pid, "mem", error) from error
