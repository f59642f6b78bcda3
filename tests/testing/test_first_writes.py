"""Who writes first to each page of a worker: what the worker was told to write is known to the byte."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import subprocess
from pathlib import Path

import pytest

from miniloader.errors import EvidenceError
from miniloader.kernel import page_faults, syscalls
from miniloader.kernel.page_faults import FaultLog
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.writers import FirstWrites, explain
from miniloader.lab.erosion.writers_by_faults import WritersByFaults
from miniloader.testing import StartCrew, Workers, workers
from tests.conftest import AsNobody
from tests.first_writes import INHERITED, STATIC, dense

_SHOP = (
    INHERITED
    + """
MAP_DROPPABLE = 8  # Linux 6.11: memory that is not watched, which every process has from glibc 2.41 on
ctypes.CDLL(None).mmap(None, 4096, 3, MAP_DROPPABLE | mmap.MAP_ANONYMOUS, -1, 0)
def place(): return start
def places(): return [id(item) for item in DATA]
def collect(): gc.collect()
def store(offset):
    for page in range(64): ctypes.memset(start + page * 4096 + offset, 2, 8)
def read_a_file():
    with open("/proc/self/exe", "rb", buffering=0) as file: file.readinto(memoryview(array)[:4096])
"""
)


def _refused(*_: object) -> int:
    raise PermissionError(errno.EPERM, "refused")


def _skip_without_faults() -> bool:
    """Whether page faults of the kernel's own are told; skips the test where those of programs are not."""
    try:
        with FaultLog(os.getpid()) as log:
            return log.sees_kernel
    except EvidenceError:
        pytest.skip("this kernel lacks page faults by perf_event_open(2) for this user")


@pytest.fixture(params=["userfaultfd", "page faults"])
def server(
    request: pytest.FixtureRequest, crew: StartCrew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workers:
    """A crew whose writers are held up, and one whose are not."""
    if request.param == "page faults":
        _skip_without_faults()
        monkeypatch.setattr(workers, "take_descriptor", _refused)
    else:
        try:
            os.close(syscalls.userfaultfd(os.O_CLOEXEC))
        except OSError:
            pytest.skip("needs root: userfaultfd for writes of the kernel's, too")
    (tmp_path / "written_shop.py").write_text(_SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    return crew(1, module="written_shop")


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
    if writes.unseen:
        assert writes.unseen.startswith("what the kernel writes to in system calls")
        assert not kernel
    else:
        assert [write.instruction for write in kernel] == [0]
        assert writes.functions["the kernel"] >= 1
    (reads,) = server.fork(1).first_writes("collect")
    assert sum(reads.functions.values()) == len(reads.writes) == len(reads.causes)
    assert all(name == name.strip() for name in reads.functions)


@pytest.mark.parametrize("apart", [False, True])
def test_static_functions_are_told(server: Workers, tmp_path: Path, apart: bool) -> None:
    """By the symbols of a library, or those that were split off it to a debug file."""
    library, debug = tmp_path / "libmark.so", tmp_path / "libmark.debug"
    (tmp_path / "mark.c").write_text(STATIC)
    commands = [["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "mark.c")]]
    if apart:
        commands.append(["objcopy", "--only-keep-debug", str(library), str(debug)])
        commands.append(["strip", "--strip-unneeded", str(library)])
        commands.append(["objcopy", f"--add-gnu-debuglink={debug}", str(library)])
    for command in commands:
        subprocess.run(command, check=True)
    (tmp_path / "marking.py").write_text(
        f"import ctypes, written_shop\nlibrary = ctypes.CDLL({str(library)!r})\n"
        "def mark(): library.mark_all(ctypes.c_void_p(written_shop.start))\n"
    )
    server.call("importlib:import_module", "marking")
    (writes,) = server.fork(1).first_writes("marking:mark")
    assert writes.functions["mark"] == 64
    assert writes.pages("other-write") >= 64


def test_the_worker_goes_on(server: Workers) -> None:
    """Whoever was held up is let go, also where what was called raises; and it can be asked again."""
    worker = server.fork(1)
    with pytest.raises(Exception, match="no module"):
        worker.first_writes("nothing:there")
    (again,) = worker.first_writes("store", 0)
    assert len(again.writes) >= 64
    assert worker.call("place")


def _of_ordinary_user() -> tuple[set[int], str]:
    """Where a child writes to its parent's array, counted from that, and what is not seen."""
    array = mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array.write(bytes([1]) * len(array))
    start = ctypes.addressof(ctypes.c_char.from_buffer(array))
    (reading, asking), (hearing, answering) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.read(reading, 1)
        for page in range(64):
            array[page * PAGE_SIZE + 40] = 2
        os.write(answering, b"x")
        os.read(reading, 1)
        os._exit(0)
    with WritersByFaults(child) as writers:
        os.write(asking, b"x")
        os.read(hearing, 1)
    found = explain(child, writers.writes, os.getpid(), writers.unseen)
    os.write(asking, b"x")
    os.waitpid(child, 0)
    places = {write.address - start for write in found.writes if write.instruction}
    return {place for place in places if 0 <= place < len(array)}, found.unseen


def test_an_ordinary_user_is_told(as_nobody: AsNobody) -> None:
    """By page faults, which nobody has to allow: of each page, to the byte; and what is not seen."""
    sees_kernel = as_nobody(_skip_without_faults)
    places, unseen = as_nobody(_of_ordinary_user)
    assert places == {page * PAGE_SIZE + 40 for page in range(64)}
    assert bool(unseen) is not sees_kernel
    assert sees_kernel or unseen.startswith("what the kernel writes to in system calls")


def test_what_is_said_where_nobody_tells(server: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is allowed, as in a container: one line says what was tried, and what it takes."""

    def no_events(*_: object) -> int:
        raise OSError(errno.EACCES, "perf_event_open: Permission denied (EACCES)")

    monkeypatch.setattr(workers, "take_descriptor", _refused)
    monkeypatch.setattr(page_faults.syscalls, "open_events", no_events)
    worker = server.fork(1)
    with pytest.raises(EvidenceError) as refused:
        worker.first_writes("store", 0)
    said = str(refused.value)
    assert "who writes first is unknown here" in said
    # An ordinary user's worker is not given one to hand over.
    assert re.search("userfaultfd( is not to be had: refused|: Operation not permitted)", said)
    assert "perf_event_open: Permission denied" in said
    assert "EFAULT" in said
    assert "\n" not in said
    assert worker.call("place"), "and the worker goes on"


def test_mprotect_would_break_a_worker() -> None:
    """Why that is not what is done where neither is allowed: read(2) fails there, and asks no handler."""
    array = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(array))
    syscalls.mprotect(address, PAGE_SIZE, syscalls.PROT_READ)
    with open("/proc/self/exe", "rb", buffering=0) as file, pytest.raises(OSError, match="Bad address"):
        file.readinto(memoryview(array))


def test_what_is_not_to_be_had() -> None:
    with pytest.raises(EvidenceError, match="not to be had"):
        workers._taken(1 << 22, 0)
