"""Small reads of another process's memory: what is not in memory is read from the file that is mapped."""

from __future__ import annotations

import ctypes
import os
import signal

import numpy as np

from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import PRESENT, PageMap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.present_memory import PresentMemory
from tests.conftest import AsNobody


def _constants() -> tuple[bytes, bytes]:
    """Constants of libc that a forked child has not read yet: as they are there, and as they are here."""
    child = os.fork()
    if not child:
        signal.pause()
    try:
        with PageMap(child) as pagemap:
            for vma in read_maps(child):
                if "libc.so" in vma.path and vma.protection.startswith("r--"):
                    absent = np.flatnonzero(pagemap.read(vma.start, vma.end) & PRESENT == 0)
                    if len(absent):
                        address = vma.start + int(absent[-1]) * PAGE_SIZE
                        with PresentMemory(child, np.empty(0, np.uint64)) as memory:
                            return memory.read(address, 64), ctypes.string_at(address, 64)
        return b"", b""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_ordinary_user_reads_constants_that_are_not_in_memory(as_nobody: AsNobody) -> None:
    """The kernel's own links to mapped files (map_files) lead root alone there."""
    for there, here in (as_nobody(_constants), _constants()):
        assert len(there) == 64
        assert there == here
