"""Pools whose memory erodes in known ways, and what the kernel says of it: page tables, read by the test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from miniloader.kernel.frames import KPF, frame_flags
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import FILE, FRAME, PRESENT, read_pagemap
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.lab.audit.told_processes import ANONYMOUS, Told, told, wait_until_at_rest

needs_frames = pytest.mark.skipif(best_level() != "frames", reason="needs root: frames")

_FORK = """
import socket
workers = {}
def fork():
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        there.send(b"begun")
        while code := there.recv(1 << 16):
            scope["answer"] = None
            exec(code, scope)
            there.send(json.dumps(scope["answer"]).encode())
        os._exit(0)
    there.close(); workers[pid] = here; here.recv(5)
    return pid
def ask(pid, code): workers[pid].send(code.encode()); return json.loads(workers[pid].recv(1 << 20))
"""


class Pool:
    """A parent that does what it is told, and workers that it forks, which do so, too."""

    def __init__(self, parent: Told) -> None:
        self.parent, self.pid, self.workers = parent, parent.pid, list[int]()

    def fork(self) -> int:
        """Fork a worker: its pid."""
        self.workers.append(self.parent("answer = fork()"))
        wait_until_at_rest(self.workers[-1])
        return self.workers[-1]

    def ask(self, pid: int, code: str) -> Any:
        """Have a worker do it; what it answers."""
        answer = self.parent(f"answer = ask({pid}, {json.dumps(code)})")
        wait_until_at_rest(pid)
        return answer

    @property
    def pids(self) -> list[int]:
        return [self.pid, *self.workers]


@contextmanager
def pool(*lines: str, python: str = sys.executable, allocator: str = "") -> Iterator[Pool]:
    """A parent that has done what ``lines`` say; ``scope`` is what they share, ``mapped`` gives memory.

    ``allocator`` is what Python is to take memory from, by ``PYTHONMALLOC``.
    """
    options: dict[str, Any] = {} if python == sys.executable else {"env": {"PATH": "/usr/bin:/bin"}}
    if allocator:
        options["env"] = {**options.get("env", os.environ), "PYTHONMALLOC": allocator}
    with told(ANONYMOUS, _FORK, *lines, python=python, **options) as parent:
        parent("import json; scope = globals()")
        yield Pool(parent)


def frames_of(pid: int) -> Mapping[int, tuple[int, bool]]:
    """The frame of each present page of private memory, and whether it is a file's (which must be writable).

    The page of zeros is nobody's.
    """
    frames: dict[int, tuple[int, bool]] = {}
    for vma in read_maps(pid):
        if vma.shared or vma.path.startswith("[v"):
            continue
        words = read_pagemap(pid, vma.start, vma.end)
        present = np.flatnonzero(words & PRESENT)
        zero = frame_flags(words[present] & FRAME) & KPF["zero_page"].mask
        for index in present[zero == 0].tolist():
            of_file = bool(words[index] & FILE)
            if "w" in vma.protection or not of_file:
                frames[vma.start + index * PAGE_SIZE] = int(words[index] & FRAME), of_file
    return frames


def in_common(pid: int, relative: int) -> set[int]:
    """The pages that both have in one frame."""
    ours, theirs = frames_of(pid), frames_of(relative)
    return {address for address, frame in ours.items() if theirs.get(address) == frame}


def in_two_copies(pid: int, relative: int) -> set[int]:
    """The pages that both have in memory, in different frames, of which one at least is no file's."""
    ours, theirs = frames_of(pid), frames_of(relative)
    return {
        address
        for address, (frame, of_file) in ours.items()
        if address in theirs and theirs[address][0] != frame and not (of_file and theirs[address][1])
    }


def bytes_at(pid: int, address: int) -> bytes:
    """The bytes of one page."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(PAGE_SIZE)
