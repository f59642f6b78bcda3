"""``PAGEMAP_SCAN`` and ``pagemap`` have to agree on every page."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from miniloader.errors import EvidenceError
from miniloader.kernel import scan, syscalls
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import FILE, PRESENT, SOFT_DIRTY, SWAPPED, PageMap
from miniloader.kernel.scan import REGION_DTYPE
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.kernel.userfault import WriteWatch
from tests.memory import failing, map_anonymous, map_file, needs_scan, still_child, store, touch

SAME = {
    scan.IS_PRESENT: PRESENT,
    scan.IS_FILE: FILE,
    scan.IS_SWAPPED: SWAPPED,
    scan.IS_SOFT_DIRTY: SOFT_DIRTY,
}


def compare(pid: int) -> int:
    """Every page of every mapping, asked both ways; how many were present."""
    present = 0
    with PageMap(pid) as pagemap:
        for vma in read_maps(pid):
            if vma.path.startswith("[v"):
                continue
            words = pagemap.read(vma.start, vma.end)
            regions = scan.scan(pagemap, vma.start, vma.end)
            addresses = np.arange(vma.start, vma.end, PAGE_SIZE, dtype=np.uint64)
            for category, bit in SAME.items():
                of_category = regions[regions["categories"] & np.uint64(category) != 0]
                ours, theirs = words & bit != 0, scan.lie_in(of_category, addresses)
                assert (ours == theirs).all(), (vma, category)
            present += np.count_nonzero(words & PRESENT)
    return present


@needs_scan
def test_agrees_with_pagemap(varied: tuple[int, dict[str, int]]) -> None:
    assert compare(varied[0]) > 500


@needs_scan
def test_agrees_with_pagemap_unprivileged(as_nobody) -> None:
    def look() -> int:
        with still_child(syscalls.prctl, syscalls.PR_SET_DUMPABLE, 1) as (pid, _):
            return compare(pid)

    assert as_nobody(look) > 500


def pages(regions: np.ndarray, start: int) -> list[int]:
    """The page numbers, counted from ``start``, that the regions cover."""
    spans = ((int(one["start"]) - start, int(one["end"]) - start) for one in regions)
    return [page for low, high in spans for page in range(low // PAGE_SIZE, high // PAGE_SIZE)]


@needs_scan
def test_conditions(varied: tuple[int, dict[str, int]]) -> None:
    pid, addresses = varied
    file, end = addresses["file"], addresses["file"] + 8 * PAGE_SIZE
    with PageMap(pid) as pagemap:
        copied = scan.scan(pagemap, file, end, required=scan.IS_PRESENT, excluded=scan.IS_FILE)
        assert pages(copied, file) == [2, 7]
        assert np.flatnonzero(pagemap.table(file, end).file).tolist() == pages(
            scan.scan(pagemap, file, end, required=scan.IS_FILE), file
        )
        zero = addresses["anonymous"]
        both = scan.scan(
            pagemap, zero, zero + 8 * PAGE_SIZE, any_of=scan.IS_ZERO | scan.IS_FILE, returned=scan.IS_ZERO
        )
        assert pages(both, zero) == [1]
        assert both["categories"].tolist() == [scan.IS_ZERO]


@needs_scan
@pytest.mark.parametrize("count", [2 * 511, 2 * 512, 2 * 513, 2 * 4096, 2 * 4097, 12_000])
def test_more_regions_than_a_buffer_holds(count: int) -> None:
    """The kernel's own buffer holds 512, ours 4096; no page may be lost or come twice."""
    start = map_anonymous(count)
    end = start + count * PAGE_SIZE
    try:
        for page in range(0, count, 2):
            store(start + page * PAGE_SIZE)
        with PageMap() as pagemap:
            assert pages(scan.scan(pagemap, start, end, required=scan.IS_PRESENT), start) == list(
                range(0, count, 2)
            )
            assert pages(scan.scan(pagemap, start, end), start) == list(range(count))
    finally:
        syscalls.munmap(start, end - start)


def test_pages_that_lie_in_regions() -> None:
    regions = np.array(
        [(2 * PAGE_SIZE, 4 * PAGE_SIZE, 8), (5 * PAGE_SIZE, 6 * PAGE_SIZE, 8)], dtype=REGION_DTYPE
    )
    addresses = np.arange(PAGE_SIZE, 7 * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64)
    assert scan.lie_in(regions, addresses).tolist() == [False, True, True, False, True, False]
    assert not scan.lie_in(regions[:0], addresses).any()


def test_a_kernel_without_it() -> None:
    with (
        syscalls.injected("ioctl", failing(errno.ENOTTY)),
        PageMap() as pagemap,
        pytest.raises(EvidenceError, match=r"does not have it.*6\.7"),
    ):
        scan.scan(pagemap, 0, PAGE_SIZE)


def test_watching_writes(file8) -> None:
    """Pages copied before the watch began count when they are written again, and only then."""
    address = map_file(file8, 8)
    touch(address, 4)  # the rest may not be in memory yet
    store(address + PAGE_SIZE)
    store(address + 2 * PAGE_SIZE)
    try:
        watch = WriteWatch(address, address + 8 * PAGE_SIZE)
    except EvidenceError as error:
        pytest.skip(f"this kernel lacks userfaultfd WP_ASYNC: {error}")
    with watch:
        assert pages(watch.written(), address) == []
        store(address + 2 * PAGE_SIZE)
        store(address + 5 * PAGE_SIZE)
        touch(address, 8)
        assert pages(watch.written(), address) == [2, 5]


def test_watching_where_it_is_forbidden() -> None:
    with (
        syscalls.injected("syscall", failing(errno.EPERM)),
        pytest.raises(EvidenceError, match="userfaultfd"),
    ):
        WriteWatch(0, PAGE_SIZE)
