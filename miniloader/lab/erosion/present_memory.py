"""Small reads of one process's memory that map nothing there: what is not in memory is read from its file."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable
from operator import attrgetter
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE

__all__ = ["PresentMemory"]

_OFFSET: Final = np.uint64(PAGE_SIZE - 1)


class PresentMemory:
    """The memory of process ``pid``, where ``present`` are the ascending addresses of the pages in memory.

    Constants of a library are often not in the page table of a child: to read them there would map them.  So
    a page that is not present is read from the file that is mapped there, if nobody may write to it.
    ``heap`` is where ``[heap]`` begins, 0 where there is none.  Use it as a context manager.
    """

    def __init__(self, pid: int, present: NDArray[np.uint64]) -> None:
        """Open it; raises ProcessGone, or EvidenceError where memory may not be read."""
        self.pid, self._present = pid, present
        vmas = read_maps(pid)
        self.heap = next((vma.start for vma in vmas if vma.path == "[heap]"), 0)
        of_files = [vma for vma in vmas if vma.is_file]
        self._vmas = [vma for vma in of_files if vma.protection[1] != "w"]
        self._data = [vma for vma in of_files if vma.protection[1] == "w" and not vma.shared]
        #: Where private memory that is no file's and may be written to begins and ends, in turn.
        self.anonymous = _edges(
            vma for vma in vmas if not vma.inode and not vma.shared and vma.protection[1] == "w"
        )
        self._memory = ProcessMemory(pid)  # last: what raises above has opened nothing
        self._files: dict[str, int] = {}
        self._pages: dict[int, bytes] = {}

    @property
    def files(self) -> NDArray[np.uint64]:
        """Where private mappings of files that may be written to begin and end, in turn, ascending."""
        return np.array([edge for vma in self._data for edge in (vma.start, vma.end)], np.uint64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.__exit__()
        for fd in self._files.values():
            os.close(fd)

    def is_present(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether the pages at these addresses were in memory."""
        if not len(self._present):
            return np.zeros(len(addresses), np.bool_)
        at = np.searchsorted(self._present, addresses)
        return np.asarray(self._present[np.minimum(at, len(self._present) - 1)] == addresses)

    def pages(self, addresses: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The bytes of the pages at these ascending addresses, and which were read: only what is present."""
        present = self.is_present(addresses)
        if present.all():
            return self._memory.pages(addresses)
        data = np.zeros((len(addresses), PAGE_SIZE), np.uint8)
        live, done = self._memory.pages(addresses[present])
        data[present] = live
        present[np.flatnonzero(present)[~done]] = False
        return data, present

    def words(self, addresses: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        """So many words at each of these addresses, which may not lie on two pages; zeroes where none are."""
        words = np.zeros((len(addresses), number), np.uint64)
        present = np.flatnonzero(self.is_present(addresses & ~_OFFSET))
        words[present] = self._memory.words(addresses[present], number)
        return words

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes at ``address``; fewer where the rest is not to be had."""
        offset = address & (PAGE_SIZE - 1)
        part = self._page(address - offset)[offset : offset + length]
        if offset + length <= PAGE_SIZE or len(part) < PAGE_SIZE - offset:
            return part
        return part + self.read(address + len(part), length - len(part))

    def _page(self, address: int) -> bytes:
        page = self._pages.get(address)
        if page is None:
            page = self._pages[address] = self._read_page(address)
        return page

    def _read_page(self, address: int) -> bytes:
        if not 0 <= address < 1 << 63:
            return b""
        row = int(self._present.searchsorted(np.uint64(address)))
        if row < len(self._present) and int(self._present[row]) == address:
            return self._memory.read(address, PAGE_SIZE)
        at = bisect_right(self._vmas, address, key=attrgetter("start")) - 1
        if at < 0 or address not in self._vmas[at]:
            return b""
        return self._file_page(self._vmas[at], address)

    def _file_page(self, vma: Vma, address: int) -> bytes:
        """The page of the file that is mapped there; nothing where the file cannot be read."""
        name = f"map_files/{vma.start:x}-{vma.end:x}"
        try:
            if name not in self._files:
                self._files[name] = _opened(process_file(self.pid, name), vma)
            return os.pread(self._files[name], PAGE_SIZE, vma.file_offset + address - vma.start)
        except (OSError, EvidenceError):
            return b""


def _edges(vmas: Iterable[Vma]) -> NDArray[np.uint64]:
    """Where the mappings begin and end; neighbours are one."""
    edges = list[int]()
    for vma in vmas:
        if edges and edges[-1] == vma.start:
            edges.pop()
        else:
            edges.append(vma.start)
        edges.append(vma.end)
    return np.array(edges, np.uint64)


def _opened(link: str, vma: Vma) -> int:
    """The file that is mapped: by the kernel's ``link``, which leads root alone there, or by its path."""
    try:
        return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        file = os.open(vma.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(file)
    if (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) != (*vma.device, vma.inode):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "another file has that path", vma.path)
    return file
