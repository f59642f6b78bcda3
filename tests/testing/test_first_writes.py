"""Who writes first to each page of a worker: what the worker was told to write is known to the byte."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.writers import FirstWrites
from miniloader.testing import StartCrew, Workers

_SHOP = """
import ctypes, gc, mmap
class Item:
    def __init__(self, number): self.number = number
DATA = [Item(number) for number in range(1_000, 31_000)]
SIZE = 64 * 4096
array = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
array.write(bytes([1]) * SIZE)
view = ctypes.c_char.from_buffer(array)
start = ctypes.addressof(view)
MAP_DROPPABLE = 8  # Linux 6.11: memory that is not watched, which every process has from glibc 2.41 on
ctypes.CDLL(None).mmap(None, 4096, 3, MAP_DROPPABLE | mmap.MAP_ANONYMOUS, -1, 0)
gc.collect()
def place(): return start
def places(): return [id(item) for item in DATA]
def read():
    for item in DATA: pass
def collect(): gc.collect()
def store(offset):
    for page in range(64): ctypes.memset(start + page * 4096 + offset, 2, 8)
def read_a_file():
    with open("/proc/self/exe", "rb", buffering=0) as file: file.readinto(memoryview(array)[:4096])
"""


@pytest.fixture
def server(crew: StartCrew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    try:
        os.close(syscalls.userfaultfd(os.O_CLOEXEC))
    except OSError:
        pytest.skip("needs root: userfaultfd for writes of the kernel's, too")
    (tmp_path / "written_shop.py").write_text(_SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    return crew(1, module="written_shop")


def dense(places: list[int]) -> set[int]:
    """The pages where hardly anything but these objects is: what else is there is written, too."""
    counts = Counter(place & -PAGE_SIZE for place in places)
    return {page for page, number in counts.items() if number >= 0.9 * max(counts.values())}


def first_in(found: FirstWrites) -> dict[int, tuple[int, str]]:
    """The address and the cause of the first write to each page."""
    pairs = zip(found.writes, found.causes, strict=True)
    return {write.address & -PAGE_SIZE: (write.address, cause) for write, cause in pairs}


def test_who_writes_first(server: Workers) -> None:
    """At least 99 % are right: objects that are read, a collection, and an array, to the byte."""
    (start,), (places,) = server.call("place"), server.call("places")
    worker = server.fork(1)
    (stores,) = worker.first_writes("store", 40)
    array = {write.address: cause for write, cause in zip(stores.writes, stores.causes, strict=True)}
    for page in range(64):
        assert array[start + page * PAGE_SIZE + 40] == "other-write"
    pages = dense(places)
    (reads,) = server.fork(1).first_writes("read")
    by_page = first_in(reads)
    counted = [page for page in pages if by_page.get(page, (0, ""))[1] == "reference-count"]
    assert len(counted) >= 0.99 * len(pages) > 300
    assert sum(by_page[page][0] in {*places} for page in counted) >= 0.99 * len(counted)
    assert reads.pages("reference-count") >= len(counted)
    (collected,) = server.fork(1).first_writes("collect")
    by_page = first_in(collected)
    collector = [page for page in pages if by_page.get(page, (0, ""))[1] == "collector"]
    assert len(collector) >= 0.99 * len(pages)


def test_functions_and_the_kernel(server: Workers) -> None:
    (start,) = server.call("place")
    (writes,) = server.fork(1).first_writes("read_a_file")
    kernel = [write for write in writes.writes if start <= write.address < start + PAGE_SIZE]
    assert [write.instruction for write in kernel] == [0]
    assert writes.functions["the kernel"] >= 1
    (reads,) = server.fork(1).first_writes("collect")
    assert sum(reads.functions.values()) == len(reads.writes) == len(reads.causes)
    assert all(name == name.strip() for name in reads.functions)


def test_the_worker_goes_on(server: Workers) -> None:
    """Whoever was held up is let go, also where what was called raises; and it can be asked again."""
    worker = server.fork(1)
    with pytest.raises(Exception, match="no module"):
        worker.first_writes("nothing:there")
    (again,) = worker.first_writes("store", 0)
    assert len(again.writes) >= 64
    assert worker.call("place")


def test_what_is_not_to_be_had() -> None:
    from miniloader.testing.workers import _taken

    with pytest.raises(EvidenceError, match="not to be had"):
        _taken(1 << 22, 0)
