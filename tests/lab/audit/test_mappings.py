"""What every mapping costs, against the kernel's own sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from miniloader.kernel.maps import parse_vma, read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.probe import best_level
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.mappings import (
    MappingName,
    MappingProcess,
    mappings_over,
    name_of,
    pss_by_frames,
    pss_by_sums,
)
from miniloader.lab.audit.page_words import view_page
from miniloader.lab.audit.survey import Memo, locate, mappings_in
from tests.lab.audit.older_kernels import KERNELS
from tests.lab.audit.told_processes import (
    ANONYMOUS,
    KB,
    Told,
    agreed,
    huge_pages_in_reserve,
    page_of,
    rollup_of,
    told,
    told_children,
    wait_until_at_rest,
)

_PAGES = 8
_VARIED = f"""
import mmap, threading
size = {_PAGES * PAGE_SIZE}
memory = os.memfd_create("pool"); os.ftruncate(memory, size)
twice = [mmap.mmap(memory, size) for _ in range(2)]
for one in twice: one.write(bytes(size))
read = mapped(size + {PAGE_SIZE}); [ctypes.string_at(read + at, 1) for at in range(0, size, {PAGE_SIZE})]
ctypes.memset(read + size, 1, 1)  # fork copies page tables of mappings that have a page of their own
written = mapped(2 * size); ctypes.memset(written, 1, 2 * size)
shared = mmap.mmap(-1, size); shared.write(bytes(size))
thread = threading.Thread(target=signal.pause, daemon=True); thread.start()
"""


def look(pid: int, *, frames: bool) -> dict[MappingName, MappingProcess]:
    memo = Memo()
    with PageMap(pid) as pagemap:
        vmas, pages, files = locate(pid, pagemap, memo, frames=frames)
    pss = pss_by_frames([(pages.copies, pages.originals)])[0] if frames else pss_by_sums(pid, vmas)
    return mappings_in(pid, vmas, pages, files, memo).rows(pid, pss)


@pytest.fixture
def family() -> Iterator[tuple[Told, int]]:
    """A process with a bit of everything, and a child that has it, too; the parent wrote a part since."""
    with told(ANONYMOUS, _VARIED) as parent, told_children(parent, 1) as (child,):
        parent("ctypes.memset(written, 2, size)")
        yield parent, child


@KERNELS
@pytest.mark.parametrize("level", ["frames", "flags"])
def test_own_is_uss_and_resident_is_rss(
    family: tuple[Told, int], level: str, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """To the byte.  Others may map a page of a file meanwhile: so the sums are those of before and after."""
    if level == "frames" and best_level() != "frames":
        pytest.skip("needs root: frames")
    for pid in (family[0].pid, family[1]):
        for _ in range(30):
            before = rollup_of(pid)
            with kernel():
                found = look(pid, frames=level == "frames").values()
            if rollup_of(pid) == before:
                break
        else:
            raise AssertionError("the kernel never said the same twice")
        assert sum(one.resident for one in found) == before["Rss"] * KB
        assert sum(one.own for one in found) == (before["Private_Clean"] + before["Private_Dirty"]) * KB
        pss = [one.pss for one in found if one.pss is not None]
        assert len(pss) == len(found)
        assert abs(sum(pss) - before["Pss"] * KB) <= KB * 200  # smaps cuts off part of a KiB of each mapping
        for one in found:
            assert one.resident == one.own + one.inherited + one.shared


def test_each_mapping_is_what_it_is(family: tuple[Told, int]) -> None:
    parent, child = family
    size = _PAGES * PAGE_SIZE
    ours, theirs = look(parent.pid, frames=False), look(child, frames=False)
    pool, zero = (MappingName("shared-memory", name) for name in ("/memfd:pool", "/dev/zero"))
    mapped_twice = ours[pool]
    assert (mapped_twice.own, mapped_twice.inherited, mapped_twice.shared) == (0, 0, 2 * size)
    assert (ours[zero].own, ours[zero].shared) == (size, 0)  # a child maps shared memory when it touches it
    assert theirs[pool].resident == theirs[zero].resident == 0
    for found in (ours, theirs):
        nameless = found[MappingName("anonymous", "")]
        assert nameless.zero >= size
        assert nameless.inherited >= size
        assert MappingName("heap", "[heap]") in found
        assert MappingName("stack", "[stack]") in found
        assert found[MappingName("special", "[vdso]")].own == 0
    parent("ctypes.memset(written + size, 3, size)")
    after = look(parent.pid, frames=False)
    anonymous = MappingName("anonymous", "")
    assert after[anonymous].own - ours[anonymous].own >= size
    assert ours[anonymous].inherited - after[anonymous].inherited >= size
    assert after[anonymous].resident == ours[anonymous].resident


@pytest.mark.parametrize("what", ["text", "the first part"])
def test_memory_over_a_library_s_place_has_its_name(demo: Path, what: str) -> None:
    """bss, and what the program has replaced by anonymous memory: its own, not the file's."""
    load = f"lib = ctypes.CDLL({str(demo)!r}); lib.demo_next()"
    replace = f"""
with open("/proc/self/maps") as maps: lines = [line.split() for line in maps if {str(demo)!r} in line]
chosen = lines if {what != "text"} else [line for line in lines if line[1] == "r-xp"]
start, end = (int(at, 16) for at in chosen[0][0].split("-"))
libc.mmap(start, end - start, 3, 0x32, -1, 0); ctypes.memset(start, 1, {PAGE_SIZE})
"""
    with told(ANONYMOUS, load) as process:
        before = look(process.pid, frames=False)
        start = next(vma.start for vma in read_maps(process.pid) if vma.path == str(demo))
        process(replace)
        after = look(process.pid, frames=False)
        text = page_of(demo, "demo_add")
        pages = [view_page(process.pid, vaddr, str(demo)) for vaddr in range(0, text + 1, PAGE_SIZE)]
        assert {page.base for page in pages} == {start}
        assert pages[-1 if what == "text" else 0].state in ("anonymous", "absent")
        assert "anonymous" in {page.state for page in pages}
    place, file = MappingName("anonymous", str(demo)), MappingName("file", str(demo))
    bss = before[place].own if place in before else 0  # it may go on into memory of no name
    assert after[place].own - bss == PAGE_SIZE
    assert before[file].resident > after[file].resident


def test_one_address_space_is_counted_once() -> None:
    """A child of vfork(2), or of clone(2) with CLONE_VM: two processes, one memory."""
    clone = """
import threading
libc.syscall.restype = ctypes.c_long
stack = mapped(1 << 16)
pause = ctypes.cast(libc.pause, ctypes.c_void_p)
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
answer = libc.clone(pause, stack + (1 << 16), 0x100 | 17, None)
"""
    with told(ANONYMOUS) as parent:
        child = parent(clone)
        wait_until_at_rest(child)

        def own() -> tuple[tuple[int, ...], tuple[int, ...]]:
            together = audit([parent.pid, child], causes=False)
            alone = audit([parent.pid], causes=False).uss
            return (*(process.uss for process in together.processes), together.uss), (alone, alone, alone)

        try:
            found = audit([parent.pid, child], causes=False)
            agreed(own)
        finally:
            parent(f"os.kill({child}, 9); os.waitpid({child}, 0)")
    assert [(process.pid, process.memory_of) for process in found.processes] == [
        (parent.pid, None), (child, parent.pid),
    ]  # fmt: skip
    assert {process.pid for mapping in found.mappings for process in mapping.processes} == {parent.pid}
    assert {process.pid for library in found.libraries for process in library.processes} == {parent.pid}


def test_names() -> None:
    def kind(line: bytes, system: str = "") -> str:
        return name_of(parse_vma(line), file_system=lambda _: system).kind

    assert kind(b"7f0000-7f8000 rw-s 00000000 00:19 8 /run/pool", "tmpfs") == "shared-memory"
    assert kind(b"7f0000-7f8000 rw-p 00000000 00:19 8 /tmp/lib.so", "tmpfs") == "file"
    assert kind(b"7f0000-7f8000 rw-s 00000000 00:1a 8 /dev/shm/pool") == "shared-memory"
    assert kind(b"7f0000-7f8000 rw-s 00000000 00:01 8 /SYSV00000000 (deleted)") == "shared-memory"
    assert kind(b"7f0000-7f8000 rw-p 00000000 00:10 8 /dev/hugepages/pool", "hugetlbfs") == "shared-memory"
    assert kind(b"7f0000-7f8000 rw-s 00000000 00:05 8 /dev/dri/card0", "devtmpfs") == "device"
    assert kind(b"7f0000-7f8000 rw-p 00000000 00:05 8 /dev/zero", "devtmpfs") == "anonymous"
    assert kind(b"7f0000-7f8000 rw-p 00000000 00:00 0 [anon:arena]") == "anonymous"
    assert kind(b"7f0000-7f8000 r--p 00000000 00:00 0 [vvar]") == "special"


def test_rows_over_processes_have_the_most_own_first(family: tuple[Told, int]) -> None:
    parent, child = family
    rows = mappings_over([look(parent.pid, frames=False), look(child, frames=False)])
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    own = [sum(process.own for process in row.processes) for row in rows]
    assert own == sorted(own, reverse=True)
    pool = next(row for row in rows if row.name == "/memfd:pool")
    assert [process.pid for process in pool.processes] == [parent.pid, child]


def test_a_segment_of_system_v_is_shared_memory() -> None:
    """It is one process's own until a relative touches it: two mappings of one page, as smaps has it, too."""
    size = _PAGES * PAGE_SIZE
    attach = f"""
libc.shmat.restype = ctypes.c_void_p
number = libc.shmget(0, {size}, 0o1600)
segment = libc.shmat(number, None, 0)
libc.shmctl(number, 0, None)  # it goes with the last who has it
ctypes.memset(segment, 1, {size})
def child_that_reads():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.string_at(segment, {size}); os.write(writing, b"x")
        while True: signal.pause()
    os.close(writing); os.read(reading, 1)
    return child
"""
    name = MappingName("shared-memory", "/SYSV00000000")
    with told(ANONYMOUS, attach) as parent:
        alone = look(parent.pid, frames=False)[name]
        assert (alone.resident, alone.own, alone.shared, alone.inherited) == (size, size, 0, 0)
        child = parent("answer = child_that_reads()")
        wait_until_at_rest(child)
        for pid in (parent.pid, child):
            row = look(pid, frames=False)[name]
            assert (row.resident, row.own, row.shared, row.inherited) == (size, 0, size, 0)
            assert row.pss == pytest.approx(size / 2, abs=KB)
        parent(f"os.kill({child}, 9); os.waitpid({child}, 0)")


def test_transparent_huge_pages_are_a_part_of_what_is_own() -> None:
    huge = 2 << 20
    with told(ANONYMOUS) as process:
        process(f"at = -(-mapped(3 * {huge}) // {huge}) * {huge}; libc.madvise(at, 2 * {huge}, 14)")
        process(f"ctypes.memset(at, 1, {huge}); ctypes.memset(at + {huge}, 1, {huge} + {PAGE_SIZE})")
        in_huge = rollup_of(process.pid)["AnonHugePages"] * KB
        if in_huge == 0:
            pytest.skip("this machine lacks a free huge page")
        row = look(process.pid, frames=False)[MappingName("anonymous", "")]
        assert row.huge == in_huge
        assert row.own >= 2 * huge + PAGE_SIZE
        child = process("answer = os.fork()\nif answer == 0:\n    while True: signal.pause()")
        wait_until_at_rest(child)
        row = look(process.pid, frames=False)[MappingName("anonymous", "")]
        assert row.inherited >= in_huge
        assert rollup_of(process.pid)["AnonHugePages"] * KB == row.huge
        process(f"os.kill({child}, 9); os.waitpid({child}, 0)")


@pytest.mark.skipif(best_level() != "frames", reason="needs root: frames")
def test_a_huge_page_that_a_relative_has_a_part_of_is_own_in_part() -> None:
    """Who has written to a part has it in small pages; the other one still in a huge one, of which that part
    is its own: at the beginning or not, as smaps counts it.
    """
    huge = 2 << 20
    with told(ANONYMOUS) as process:
        process(f"at = -(-mapped(3 * {huge}) // {huge}) * {huge}; libc.madvise(at, 2 * {huge}, 14)")
        process(f"ctypes.memset(at, 1, 2 * {huge})")
        with told_children(process, 1) as (child,):
            process(f"ctypes.memset(at, 2, {100 * PAGE_SIZE}); ctypes.memset(at + {2 * huge} - 4096, 2, 1)")
            if rollup_of(child)["AnonHugePages"] * KB < 2 * huge:
                pytest.skip("this machine lacks a free huge page")
            sums = [one.sizes for one in read_smaps(child) if not one.vma.path and not one.vma.inode]
            own = sum(sizes["Private_Clean"] + sizes["Private_Dirty"] for sizes in sums)
            rows = look(child, frames=True).items()
            assert own > 101 * PAGE_SIZE
            assert sum(row.own for name, row in rows if name.kind == "anonymous") == own


def test_pages_of_hugetlbfs_have_a_row_and_are_outside_of_every_sum() -> None:
    """Anonymous, of a memfd, and of System V: as smaps counts them, in Private_Hugetlb alone."""
    huge = 2 << 20
    with huge_pages_in_reserve(3), told(ANONYMOUS, "libc.shmat.restype = ctypes.c_void_p") as process:
        process(f"at = libc.mmap(None, {huge}, 3, 0x22 | 0x40000, -1, 0); ctypes.memset(at, 1, 1)")
        process(f"fd = os.memfd_create('pool', 4); os.ftruncate(fd, {huge})")
        process(f"shared = libc.mmap(None, {huge}, 3, 1, fd, 0); ctypes.memset(shared, 1, 1)")
        process(f"number = libc.shmget(0, {huge}, 0o1600 | 0o4000); segment = libc.shmat(number, None, 0)")
        process("libc.shmctl(number, 0, None); ctypes.memset(segment, 1, 1)")

        def own() -> tuple[int, int]:
            sums = rollup_of(process.pid)
            rows = look(process.pid, frames=False).values()
            return sum(row.own for row in rows), (sums["Private_Clean"] + sums["Private_Dirty"]) * KB

        agreed(own)
        rows, sums = look(process.pid, frames=False), rollup_of(process.pid)
        files = [library.name for library in audit([process.pid], causes=False).libraries]
    assert "anon_hugepage" not in files  # of which nothing would be present
    assert sums["Private_Hugetlb"] * KB == 3 * huge
    for name in ("/anon_hugepage", "/memfd:pool", "/SYSV00000000"):
        row = rows[MappingName("shared-memory", name)]
        assert (row.resident, row.huge, row.hugetlb) == (0, 0, huge)
    assert sum(row.hugetlb for row in rows.values()) == 3 * huge
    assert sum(row.resident for row in rows.values()) == sums["Rss"] * KB
