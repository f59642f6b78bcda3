"""What a page of a process counts as: copied, of zeros, huge, populated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

import miniloader
from miniloader.errors import EvidenceError
from miniloader.kernel.features import LevelName
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.probe import probe
from miniloader.kernel.scan import IS_FILE, IS_GUARD, IS_PRESENT, IS_ZERO, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Memo, survey
from tests.lab.audit.older_kernels import KERNELS, before_6_7
from tests.lab.audit.told_processes import (
    ANONYMOUS,
    KB,
    Told,
    huge_pages_in_reserve,
    rollup_of,
    told,
    told_children,
    wait_until_at_rest,
)


def test_both_readings_of_the_page_table_agree(servers: list[int]) -> None:
    """The copied pages by pagemap's bits, and by PAGEMAP_SCAN."""
    for pid in servers:
        seen = survey(pid, Memo(), causes=False)
        with PageMap(pid) as pagemap:
            for one in seen.files:
                try:
                    regions = scan(
                        pagemap,
                        one.start,
                        one.end,
                        required=IS_PRESENT,
                        excluded=IS_FILE | IS_ZERO | IS_GUARD,
                    )
                except EvidenceError as error:
                    pytest.skip(f"this kernel lacks PAGEMAP_SCAN: {error}")
                pages = [np.arange(start, end, PAGE_SIZE) for start, end, _ in regions.tolist()]
                scanned = np.concatenate([np.empty(0, np.int64), *pages]).astype(np.uint64)
                ours = one.addresses
                within = scanned[np.isin(scanned, ours)]
                bss = one.bss_vaddrs + np.uint64(one.base)
                assert np.array_equal(within, ours)
                assert {*scanned.tolist()} - {*ours.tolist()} <= {*bss.tolist()}


def counted(one: Told) -> miniloader.lab.audit.result.AuditedProcess:
    return miniloader.audit([one.pid], causes=False).processes[0]


@KERNELS
@pytest.mark.parametrize("level", [None, "flags"])
def test_pages_of_zeros_cost_nothing(
    level: LevelName | None, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """Among others that are written, one of which a child has as well: told apart, or at least counted."""

    def look() -> miniloader.lab.audit.result.AuditedProcess:
        with kernel():
            found = miniloader.audit([one.pid], causes=False, level=level).processes[0]
        sums = rollup_of(one.pid)
        assert (found.rss, found.anonymous * PAGE_SIZE) == (sums["Rss"] * KB, sums["Anonymous"] * KB)
        return found

    with told(ANONYMOUS) as one:
        one(f"at = mapped(10 * {PAGE_SIZE}); ctypes.memset(at, 1, 2 * {PAGE_SIZE})")
        one(f"[ctypes.string_at(at + n * {PAGE_SIZE}, 1) for n in range(2, 10)]")
        with told_children(one, 1):
            one(f"ctypes.memset(at, 2, {PAGE_SIZE})")
            before = look()
            one(f"[ctypes.memset(at + n * {PAGE_SIZE}, 1, 1) for n in range(2, 10)]")
            after = look()
    assert before.zero - after.zero == 8
    assert after.anonymous - before.anonymous >= 8
    assert after.anonymous_shared - before.anonymous_shared <= 0


@KERNELS
def test_huge_pages(kernel: Callable[[], AbstractContextManager[None]]) -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel lacks transparent huge pages")
    huge = 2 << 20
    with told(ANONYMOUS) as one:
        one(f"at = -(-mapped(2 * {huge}) // {huge}) * {huge}; libc.madvise(at, {huge}, 14)")
        one("ctypes.memset(at, 1, 1)")
        in_huge = rollup_of(one.pid)["AnonHugePages"] * KB
        if in_huge == 0:
            pytest.skip("this machine lacks a free huge page")
        with kernel():
            assert counted(one).huge * PAGE_SIZE == in_huge


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Two huge pages in reserve, for hugetlbfs."""
    with huge_pages_in_reserve(2):
        yield


@KERNELS
def test_hugetlbfs_is_counted_apart(
    huge_pages: None, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """As in smaps, whose RSS and Anonymous leave it out."""
    with told(ANONYMOUS) as one:
        one(f"at = libc.mmap(None, {2 << 20}, 3, 0x22 | 0x40000, -1, 0); ctypes.memset(at, 1, 1)")
        one(f"fd = os.memfd_create('any name', 4); os.ftruncate(fd, {2 << 20})")
        one(f"shared = libc.mmap(None, {2 << 20}, 3, 1, fd, 0); ctypes.memset(shared, 1, 1)")
        with kernel():
            found = counted(one)
        sums = rollup_of(one.pid)
        assert sums["Private_Hugetlb"] == 4096
        assert (found.rss, found.anonymous * PAGE_SIZE) == (sums["Rss"] * KB, sums["Anonymous"] * KB)


@KERNELS
def test_of_a_mapping_that_is_mostly_empty_little_is_read(
    kernel: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As malloc reserves room for each thread; nothing that is there is left out, wherever it is."""
    lengths, read = list[int](), PageMap.read

    def noting(pagemap: PageMap, start: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        lengths.append(end - start)
        return read(pagemap, start, end)

    monkeypatch.setattr(PageMap, "read", noting)
    with told(
        ANONYMOUS,
        "at = mapped(48 << 20); libc.madvise(at, 48 << 20, 15)",  # MADV_NOHUGEPAGE
        *[f"ctypes.memset(at + ({place} << 12), 1, {PAGE_SIZE})" for place in (0, 1, 3, 3000, 12_287)],
    ) as one:
        wait_until_at_rest(one.pid)
        with kernel():
            anonymous = counted(one).anonymous
        assert anonymous * PAGE_SIZE == rollup_of(one.pid)["Anonymous"] * KB
    if kernel is nullcontext and probe().works("pagemap-scan"):
        assert sum(lengths) < 48 << 20  # with all that Python has mapped


def test_a_mapping_too_large_to_be_read_page_by_page() -> None:
    """As AddressSanitizer makes them; where PAGEMAP_SCAN finds what is populated it does not matter."""
    with told(ANONYMOUS) as one:
        one(f"at = libc.mmap(None, 1 << 34, 3, 0x4022, -1, 0); ctypes.memset(at + (3 << 30), 1, {PAGE_SIZE})")
        for kernel in (nullcontext, before_6_7):
            with kernel():
                assert counted(one).anonymous * PAGE_SIZE == rollup_of(one.pid)["Anonymous"] * KB
        one("libc.mmap(None, 1 << 45, 3, 0x4022, -1, 0)")
        if probe().works("pagemap-scan"):
            assert counted(one).anonymous * PAGE_SIZE == rollup_of(one.pid)["Anonymous"] * KB
        with before_6_7():
            (refused,) = miniloader.audit([one.pid]).unreadable
    assert "a mapping of 32,7" in refused.reason
    assert "6.7" in refused.needed
