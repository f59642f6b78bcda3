"""``PROCMAP_QUERY`` against ``maps``, and its build-ids against readelf's."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys

import pytest

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.kernel import syscalls
from miniloader.kernel.maps import read_maps
from miniloader.kernel.probe import probe
from miniloader.kernel.query import query_vma
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import failing, map_file, still_child, synced_file


@pytest.fixture(autouse=True)
def _works() -> None:
    if not probe().works("procmap-query"):
        pytest.skip("this kernel lacks PROCMAP_QUERY (6.11)")


def test_every_mapping_is_that_of_maps(varied: tuple[int, dict[str, int]]) -> None:
    for vma in read_maps(varied[0]):
        if vma.path == "[vsyscall]":  # of the kernel, not of the process
            continue
        for address in (vma.start, vma.end - 1):
            found = query_vma(varied[0], address)
            assert found is not None
            assert (found.vma, found.page_size) == (vma, PAGE_SIZE)


def test_nothing_there() -> None:
    assert query_vma(None, 0) is None


def test_build_ids(varied: tuple[int, dict[str, int]]) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("this machine lacks readelf")
    compared = 0
    for vma in read_maps(varied[0]):
        if not vma.path.startswith("/") or ".so" not in vma.path or vma.file_offset:
            continue
        notes = subprocess.run([readelf, "-n", vma.path], capture_output=True, text=True, check=False).stdout
        expected = re.search(r"Build ID: ([0-9a-f]+)", notes)
        found = query_vma(varied[0], vma.start)
        assert found is not None
        assert found.build_id == (bytes.fromhex(expected[1]) if expected else None), vma.path
        compared += expected is not None
    assert compared, sys.version


def test_an_unlinked_file(tmp_path) -> None:
    path = synced_file(tmp_path / "a b\n.so", 1)
    with still_child(map_file, path, 1) as (pid, address):
        path.unlink()
        found = query_vma(pid, address)
    assert found is not None
    assert (found.vma.path, found.vma.deleted, found.build_id) == (str(path), True, None)


def test_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessGone):
        query_vma(child.pid, 0)


def test_a_kernel_without_it() -> None:
    with (
        syscalls.injected("ioctl", failing(errno.ENOTTY)),
        pytest.raises(EvidenceError, match="does not have it"),
    ):
        query_vma(None, 0)
