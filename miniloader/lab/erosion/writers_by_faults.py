"""Who writes first to each page of a worker, where nobody may be held up: by the page faults of its copies.

A page that a process has in common with its relatives is read-only for the kernel's page tables: whoever
writes to it first faults, and the kernel notes where and by which instruction
(:class:`miniloader.kernel.page_faults.FaultLog`).  So this tells the pages that are copied, and not who
writes to what the process had for itself before.

Protecting the pages by mprotect(2) and a handler of SIGSEGV would tell the same, and break the worker: a
system call that writes to such a page (read(2) into a buffer) fails with EFAULT and no handler is asked.
"""

from __future__ import annotations

import os
import select
import threading
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.page_faults import FaultLog
from miniloader.kernel.pagemap import FILE, PRESENT, PageMap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.writers import FirstWrite, written_memory

__all__ = ["BY_KERNEL", "WritersByFaults", "present_pages"]

BY_KERNEL: Final = "what the kernel writes to in system calls (kernel.perf_event_paranoid 1, or CAP_PERFMON)"
"""What is not seen where the kernel's own page faults are not told."""
_LOST: Final = "faults that came too fast to be read"


class WritersByFaults:
    """Notes who writes first to each page of ``pid`` that it shares with relatives, while the block runs.

    ``writes`` are all faults of such pages; ``unseen`` says which are not told, "" where all are.  Raises
    EvidenceError where the kernel does not tell page faults.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.writes, self.unseen = pid, list[FirstWrite](), ""
        self._log = FaultLog(pid)
        self._stop, self._stopping = os.pipe()
        self._thread = threading.Thread(target=self._collect, name=f"page faults of {pid}", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._shared = present_pages(self.pid)
        except BaseException:
            self._close()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._stopping, b"x")
        self._thread.join()
        self._read()
        pages = np.array([write.address & -PAGE_SIZE for write in self.writes], np.uint64)
        self.writes = [self.writes[row] for row in np.flatnonzero(np.isin(pages, self._shared)).tolist()]
        unseen = ([] if self._log.sees_kernel else [BY_KERNEL]) + ([_LOST] if self._log.has_lost else [])
        self.unseen = " and ".join(unseen)
        self._close()

    def _close(self) -> None:
        self._log.close()
        os.close(self._stop)
        os.close(self._stopping)

    def _collect(self) -> None:
        """In the thread: make room in the rings before they are full."""
        poll = select.poll()
        for descriptor in (self._stop, *self._log.descriptors()):
            poll.register(descriptor, select.POLLIN)
        while all(descriptor != self._stop for descriptor, _ in poll.poll()):
            self._read()

    def _read(self) -> None:
        self.writes += [FirstWrite(*fault) for fault in self._log.read()]


def present_pages(pid: int, *, files: bool = False) -> NDArray[np.uint64]:
    """The pages of private memory that ``pid`` has, ascending: a fault there is a write, or meant to be one.

    Those of ``files`` that have been written to before, too.
    """
    pages = [np.empty(0, np.uint64)]
    with PageMap(pid) as pagemap:
        for vma in written_memory(pid, files=files):
            entries = pagemap.read(vma.start, vma.end)
            places = np.flatnonzero((entries & PRESENT != 0) & (entries & FILE == 0))
            pages.append(np.uint64(vma.start) + places.astype(np.uint64) * np.uint64(PAGE_SIZE))
    return np.concatenate(pages)
