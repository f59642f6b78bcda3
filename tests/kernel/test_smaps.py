"""``smaps`` against ``maps`` and against the sums the kernel makes itself."""

from __future__ import annotations

import subprocess

import pytest

from miniloader.errors import ProcessGone
from miniloader.kernel.maps import read_maps
from miniloader.kernel.smaps import read_rollup, read_smaps, sum_sizes
from miniloader.kernel.syscalls import PAGE_SIZE


def test_the_mappings_are_those_of_maps(varied: tuple[int, dict[str, int]]) -> None:
    totals = read_smaps(varied[0])
    in_maps = [vma for vma in read_maps(varied[0]) if vma.path != "[vsyscall]"]
    assert [one.vma for one in totals if one.vma.path != "[vsyscall]"] == in_maps
    for one in totals:
        assert one.sizes["Size"] == one.vma.size
        assert ("ex" in one.flags) == (one.vma.protection[2] == "x")
        assert ("wr" in one.flags) == (one.vma.protection[1] == "w")


def test_sums_equal_the_rollup(varied: tuple[int, dict[str, int]]) -> None:
    rollup, summed = read_rollup(varied[0]), sum_sizes(read_smaps(varied[0]))
    assert rollup["Rss"] > 100 * PAGE_SIZE
    # Pss is rounded down for each mapping, and shared or private is up to other processes meanwhile.
    for name in ("Rss", "Anonymous", "Swap", "Locked", "AnonHugePages"):
        assert summed[name] == rollup[name], name


def test_known_pages(varied: tuple[int, dict[str, int]]) -> None:
    pid, addresses = varied
    [file] = [one for one in read_smaps(pid) if addresses["file"] in one.vma]
    assert file.sizes["Anonymous"] == 2 * PAGE_SIZE
    assert file.sizes["Rss"] >= 7 * PAGE_SIZE


def test_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for ask in (read_smaps, read_rollup):
        with pytest.raises(ProcessGone):
            ask(child.pid)
