"""Memory and processes to look at: mappings of our own, and children that hold still."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from miniloader.kernel import syscalls
from miniloader.kernel.probe import probe
from miniloader.kernel.syscalls import PAGE_SIZE

T = TypeVar("T")
READ_WRITE = syscalls.PROT_READ | syscalls.PROT_WRITE
MADV_NOHUGEPAGE = 15
needs_scan = pytest.mark.skipif(
    not probe().works("pagemap-scan"), reason="this kernel lacks PAGEMAP_SCAN (6.7)"
)


def touch(address: int, pages: int = 1) -> None:
    """Read a byte of each page."""
    for page in range(pages):
        ctypes.string_at(address + page * PAGE_SIZE, 1)


def store(address: int, value: int = 0x5A) -> None:
    """Write one byte."""
    ctypes.memset(address, value, 1)


def failing(number: int) -> Callable[..., int]:
    """For ``syscalls.injected``: a system call that fails with this errno."""

    def fail(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    return fail


def map_anonymous(pages: int, protection: int = READ_WRITE) -> int:
    """Private pages that come in one by one, even where the system makes them huge when it can."""
    length, flags = pages * PAGE_SIZE, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS
    address = syscalls.mmap(0, length, protection, flags)
    with suppress(OSError):  # a kernel without huge pages
        syscalls.madvise(address, length, MADV_NOHUGEPAGE)
    return address


def map_file(path: Path, pages: int, *, page: int = 0, protection: int = READ_WRITE) -> int:
    """A private mapping of ``path`` from its page ``page`` on."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return syscalls.mmap(0, pages * PAGE_SIZE, protection, syscalls.MAP_PRIVATE, fd, page * PAGE_SIZE)
    finally:
        os.close(fd)


def synced_file(path: Path, pages: int) -> Path:
    """A file of random bytes, on the disk: only then do its pages look like a library's."""
    with path.open("wb") as file:
        file.write(os.urandom(pages * PAGE_SIZE))
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def still_child(function: Callable[..., T], *arguments: object) -> Iterator[tuple[int, T]]:
    """A forked child that has called ``function`` and holds still: its pid, and what was returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            message = pickle.dumps(function(*arguments))
            os.write(writing, message)
            os.close(writing)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            message = pipe.read()
        assert message, "the child failed"
        os.kill(pid, signal.SIGSTOP)  # waiting, it might still touch a page
        os.waitpid(pid, os.WUNTRACED)
        yield pid, pickle.loads(message)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
