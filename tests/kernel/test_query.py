"""``PROCMAP_QUERY`` against ``maps``, and its build-ids against readelf's."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.sparse import GIB, sparse
from miniloader.errors import EvidenceError, ProcessGone
from miniloader.kernel import syscalls
from miniloader.kernel.maps import read_maps
from miniloader.kernel.probe import probe
from miniloader.kernel.query import query_vma
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import failing, map_file, still_child, store, synced_file, touch


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


def test_notes_over_a_hole_are_not_looked_through(tmp_path: Path) -> None:
    """The kernel looks at each: 44,739,242 in half a GiB, some ten seconds that no signal ends."""
    path = sparse("notes", GIB // 2, tmp_path / "notes.so")
    with still_child(map_file, path, 1) as (pid, address):
        began = time.process_time()
        found = query_vma(pid, address)
        spent = time.process_time() - began
    assert found is not None
    assert (found.vma.path, found.build_id) == (str(path), None)
    assert spent < 1


@pytest.mark.parametrize("changed", [False, True])
def test_of_a_file_that_is_gone_the_page_tells(changed: bool, demo: Path, tmp_path: Path) -> None:
    """An ordinary user has nothing else.  The process's own copy of it says nothing of the file."""
    path = Path(shutil.copy(demo, tmp_path / "lib.so"))

    def mapped() -> int:
        address = map_file(path, 1)
        (store if changed else touch)(address + 16)
        path.unlink()
        return address

    real = os.open

    def opened(name: str, *more: int) -> int:
        if "map_files" in name:
            raise PermissionError(errno.EPERM, name)
        return real(name, *more)

    with still_child(mapped) as (pid, address), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        found = query_vma(pid, address)
    assert found is not None
    assert found.vma.deleted
    assert (found.build_id is None) == changed


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
