"""Rings of page faults: what the kernel sees of who reads them, and what it had no room for."""

from __future__ import annotations

import mmap
import os
import struct

import pytest

from miniloader.errors import EvidenceError
from miniloader.kernel.page_faults import EventRing, FaultLog
from miniloader.kernel.syscalls import PAGE_SIZE

HEAD, TAIL = 1024, 1032
RING = 1 << 18
SAMPLE, LENGTH = 9, 32


def test_who_watches_the_tail_never_sees_it_at_zero() -> None:
    """The kernel takes the tail for what was read so far, at any moment: 0 is room that is not there."""
    memory = mmap.mmap(-1, PAGE_SIZE + RING)
    ring, start = EventRing(memory), RING - LENGTH // 2  # a record that goes over the end
    memory[HEAD : HEAD + 16] = struct.pack("=QQ", start, start)
    record = struct.pack("=IHHQQQ", SAMPLE, 2, LENGTH, 0x1000, 0, 0x2000)
    memory[PAGE_SIZE + start :], memory[PAGE_SIZE : PAGE_SIZE + 16] = record[:16], record[16:]
    watcher = os.fork()
    if not watcher:
        with memoryview(memory).cast("Q") as words:
            while (tail := words[TAIL // 8]) >= start:
                if tail == start + LENGTH:
                    os._exit(0)
        os._exit(1)
    for _ in range(100_000):
        assert ring.read() == []
    memory[HEAD : HEAD + 8] = struct.pack("=Q", start + LENGTH)
    assert ring.read() == [(0x2000, 0x1000)]
    assert os.waitpid(watcher, 0)[1] == 0


@pytest.mark.parametrize(("faults", "lost"), [(100, False), (RING // LENGTH + 1000, True)])
def test_what_there_was_no_room_for_is_told_though_nothing_follows(faults: int, lost: bool) -> None:
    page = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    (reading, asking), (hearing, answering) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one ring
        os.read(reading, 1)
        for _ in range(faults):
            page.madvise(mmap.MADV_DONTNEED)
            page[0] = 1
        os.write(answering, b"x")
        os.read(reading, 1)
        os._exit(0)
    try:
        with FaultLog(child) as log:
            os.write(asking, b"x")
            os.read(hearing, 1)
            read = log.read()
            assert log.has_lost is lost
    except EvidenceError:
        pytest.skip("this kernel lacks page faults by perf_event_open(2) for this user")
    finally:
        os.write(asking, b"xx")
        os.waitpid(child, 0)
    assert lost or len(read) >= faults
