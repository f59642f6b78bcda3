"""``pagemap`` against ``smaps``, against its raw words, and against what we did to a page ourselves."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from miniloader.errors import ProcessGone, UsageError
from miniloader.kernel import scan, syscalls
from miniloader.kernel.pagemap import PageMap, PageTable, read_pagemap
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import map_anonymous, map_file, needs_scan, still_child, store, touch

MADV_GUARD_INSTALL = 102  # include/uapi/asm-generic/mman-common.h, 6.15


def table(address: int, pages: int = 1, pid: int | None = None) -> PageTable:
    with PageMap(pid) as pagemap:
        return pagemap.table(address, address + pages * PAGE_SIZE)


def compare_with_smaps(pid: int) -> tuple[int, int]:
    """Compare each mapping's entries with the kernel's sums; how many pages, how many copies."""
    pages = copies = 0
    with PageMap(pid) as pagemap:
        for one in read_smaps(pid):
            vma = one.vma
            if vma.path.startswith("[v"):  # vdso, vvar, vsyscall: frames of the kernel, not accounted
                continue
            entries = pagemap.table(vma.start, vma.end)
            zero = scan.scan(pagemap, vma.start, vma.end, required=scan.IS_ZERO)
            real = entries.present & ~scan.lie_in(zero, entries.addresses)
            assert np.count_nonzero(real) * PAGE_SIZE == one.sizes["Rss"], vma
            assert np.count_nonzero(real & ~entries.file) * PAGE_SIZE == one.sizes["Anonymous"], vma
            assert np.count_nonzero(entries.swapped) * PAGE_SIZE == one.sizes["Swap"], vma
            pages += np.count_nonzero(real)
            copies += np.count_nonzero(real & ~entries.file) if vma.is_file else 0
    return pages, copies


@needs_scan
def test_sums_equal_smaps(varied: tuple[int, dict[str, int]]) -> None:
    pages, copies = compare_with_smaps(varied[0])
    assert pages > 500
    assert copies > 20


@needs_scan
def test_sums_equal_smaps_unprivileged(as_nobody) -> None:
    def look() -> tuple[int, int]:
        with still_child(syscalls.prctl, syscalls.PR_SET_DUMPABLE, 1) as (pid, _):
            return compare_with_smaps(pid)

    pages, copies = as_nobody(look)
    assert pages > 500
    assert copies > 20


def test_words_are_the_kernels(varied: tuple[int, dict[str, int]]) -> None:
    pid, addresses = varied
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for address in addresses.values():
            expected = struct.unpack("8Q", os.pread(file.fileno(), 64, address // PAGE_SIZE * 8))
            assert tuple(read_pagemap(pid, address, address + 8 * PAGE_SIZE)) == expected


def test_addresses() -> None:
    assert PageTable(0x7000_0000_0000, np.zeros(2, np.uint64)).addresses.tolist() == [
        0x7000_0000_0000,
        0x7000_0000_0000 + PAGE_SIZE,
    ]


def test_long_ranges_are_read_whole() -> None:
    """Longer than one read: 2 MiB of words are 2**18 pages."""
    pages = 3 * 2**18 + 5
    start = map_anonymous(pages)
    written = [*sorted(random.Random(1).sample(range(pages), 50)), pages - 1]
    try:
        for page in written:
            store(start + page * PAGE_SIZE)
        assert np.flatnonzero(table(start, pages).present).tolist() == written
    finally:
        syscalls.munmap(start, pages * PAGE_SIZE)


def test_a_store_copies_its_page_alone(file8: Path) -> None:
    address = map_file(file8, 8)
    touch(address, 8)
    before = table(address, 8)
    assert before.present.all()
    assert before.file.all()
    store(address + 3 * PAGE_SIZE)
    after = table(address, 8)
    assert after.present.all()
    assert np.flatnonzero(~after.file).tolist() == [3]
    assert after.exclusive[3]
    if os.geteuid() == 0:
        assert np.flatnonzero(after.frame != before.frame).tolist() == [3]


def test_storing_the_same_byte_copies_too(file8: Path) -> None:
    address = map_file(file8, 8)
    store(address, file8.read_bytes()[0])
    assert not table(address).file[0]


def test_mprotect_alone_copies_nothing(file8: Path) -> None:
    address = map_file(file8, 8, protection=syscalls.PROT_READ)
    touch(address, 8)
    syscalls.mprotect(address, 8 * PAGE_SIZE, syscalls.PROT_READ | syscalls.PROT_WRITE)
    assert table(address, 8).file.all()


def test_fork_shares_until_written() -> None:
    address = map_anonymous(2)
    store(address)
    store(address + PAGE_SIZE)
    assert table(address, 2).exclusive.all()

    with still_child(store, address) as (pid, _):
        ours, theirs = table(address, 2), table(address, 2, pid)
        assert ours.present.all()
        assert theirs.present.all()
        assert theirs.exclusive.tolist() == ours.exclusive.tolist() == [True, False]
        if os.geteuid() == 0:
            assert (ours.frame == theirs.frame).tolist() == [False, True]


@needs_scan
def test_reading_anonymous_memory_maps_zeros() -> None:
    address = map_anonymous(1)
    touch(address)
    entry = table(address)
    assert entry.present[0]
    assert not entry.file[0]
    assert not entry.exclusive[0]
    with PageMap() as pagemap:
        [region] = scan.scan(pagemap, address, address + PAGE_SIZE, required=scan.IS_ZERO)
    assert (region["start"], region["end"]) == (address, address + PAGE_SIZE)


def test_guard_pages_are_not_swapped() -> None:
    address = map_anonymous(2)
    store(address)
    try:
        syscalls.madvise(address, PAGE_SIZE, MADV_GUARD_INSTALL)
    except OSError:
        pytest.skip("this kernel lacks guard pages (6.13)")
    entries = table(address, 2)
    if not entries.guard[0]:
        pytest.skip("this kernel lacks bit 58 of pagemap (6.15)")
    assert entries.guard.tolist() == [True, False]
    assert not entries.present.any()
    assert not entries.swapped.any()


def test_prot_none_keeps_a_touched_page() -> None:
    address = map_anonymous(1)
    store(address)
    syscalls.mprotect(address, PAGE_SIZE, syscalls.PROT_NONE)
    assert table(address).present[0]


def test_frames_are_hidden_from_an_ordinary_user(as_nobody) -> None:
    def look() -> tuple[bool, int]:
        address = map_anonymous(1)
        store(address)
        entry = table(address)
        return bool(entry.present[0]), int(entry.frame[0])

    assert as_nobody(look) == (True, 0)


def test_beyond_the_address_space_is_nothing() -> None:
    top = 2**64 - 2 * PAGE_SIZE
    assert read_pagemap(None, top, top + PAGE_SIZE).tolist() == [0]
    assert read_pagemap(None, 0, 0).shape == (0,)


@pytest.mark.parametrize(("start", "end"), [(1, PAGE_SIZE), (0, 5), (2 * PAGE_SIZE, PAGE_SIZE)])
def test_odd_ranges_are_refused(start: int, end: int) -> None:
    with pytest.raises(UsageError):
        read_pagemap(None, start, end)


def test_a_process_that_ends_is_gone() -> None:
    with still_child(map_anonymous, 1) as (pid, address):
        pagemap = PageMap(pid)
        assert len(pagemap.read(address, address + PAGE_SIZE)) == 1
    with pagemap, pytest.raises(ProcessGone, match=f"process {pid}: has no memory"):
        pagemap.read(address, address + PAGE_SIZE)


def test_a_process_that_executes_is_gone() -> None:
    child = subprocess.Popen(["sh", "-c", "read x; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    with child, PageMap(child.pid) as pagemap:
        pagemap.read(0, PAGE_SIZE)
        child.stdin.write(b"go\n")
        child.stdin.flush()
        child.stdin.write(b"here\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"here\n"
        with pytest.raises(ProcessGone):
            read_until_gone(pagemap)


def read_until_gone(pagemap: PageMap) -> None:
    """Its old memory is there as long as somebody else looks at it."""
    for _ in range(100):
        pagemap.read(0, PAGE_SIZE)
        time.sleep(0.05)
