"""Snapshots against what the kernel says page by page, and of processes that do not hold still."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from miniloader.errors import EvidenceError, ProcessGone, UsageError
from miniloader.evidence import snapshot
from miniloader.evidence.snapshot import PAGE_DTYPE, ProcessPages, ProcessRange, Snapshot, take
from miniloader.kernel import syscalls
from miniloader.kernel.frames import KPF
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.probe import best_level
from miniloader.kernel.query import query_vma
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import (
    READ_WRITE,
    failing,
    map_anonymous,
    map_file,
    still_child,
    store,
    synced_file,
    touch,
)

BASE = 3 * PAGE_SIZE  # the image begins at this vaddr: base and address are not the same
PAGES = 12


def image(path: Path) -> ProcessRange:
    """An image of ours: six file pages from page 2 of the file on, a hole, three anonymous pages, a hole."""
    start = map_anonymous(PAGES, syscalls.PROT_NONE)
    fixed = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED
    with path.open("rb") as file:
        syscalls.mmap(start, 6 * PAGE_SIZE, READ_WRITE, fixed, file.fileno(), 2 * PAGE_SIZE)
    anonymous = start + 7 * PAGE_SIZE
    syscalls.mmap(anonymous, 3 * PAGE_SIZE, READ_WRITE, fixed | syscalls.MAP_ANONYMOUS)
    syscalls.munmap(start + 11 * PAGE_SIZE, PAGE_SIZE)
    touch(start, 5)
    store(start + PAGE_SIZE)
    store(start + 5 * PAGE_SIZE)
    store(anonymous)
    touch(anonymous + PAGE_SIZE)
    return ProcessRange(os.getpid(), start - BASE, BASE, BASE + PAGES * PAGE_SIZE)


def start_of(target: ProcessRange) -> int:
    return target.base + target.vaddr_start


def only(taken: Snapshot) -> ProcessPages:
    [process] = taken.processes
    return process


def pages(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_what_each_page_is(file8: Path) -> None:
    target = image(file8)
    taken = take([target], step="here")
    process = only(taken)
    found = process.pages
    assert (taken.step, process.reason, process.gone, process.totals) == ("here", "", False, None)
    assert found.dtype == PAGE_DTYPE
    assert found["vaddr"].tolist() == [BASE + page * PAGE_SIZE for page in range(PAGES)]
    assert process.addresses[0] == start_of(target)
    assert pages(found["present"]) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert pages(found["file"]) == [0, 2, 3, 4]
    assert pages(found["zero"]) == [8]
    assert found["zero_known"].all()
    assert not found["changed"].any()
    assert found["file_offset"].tolist() == [page * PAGE_SIZE for page in (2, 3, 4, 5, 6, 7)] + [0] * 6
    vmas = [process.mappings[index].vma if index >= 0 else None for index in found["mapping"]]
    assert [vma.protection if vma else "" for vma in vmas] == ["rw-"] * 6 + ["---"] + ["rw-"] * 3 + [
        "---",
        "",
    ]
    assert all(vma and vma.path == str(file8) for vma in vmas[:6])


def test_frames_counts_and_flags_are_the_kernels(file8: Path) -> None:
    target = image(file8)
    found = only(take([target])).pages
    with PageMap() as pagemap:
        table = pagemap.table(start_of(target), start_of(target) + PAGES * PAGE_SIZE)
    if os.geteuid() == 0:
        assert found["frame"].tolist() == table.frame.tolist()
        copies = found[[1, 5, 7]]
        assert copies["map_count"].tolist() == [1, 1, 1]
        assert ((copies["flags"] & KPF["anonymous"].mask) != 0).all()
        assert found["flags"][8] & KPF["zero_page"].mask
        assert found["map_count"][8] == 0
        assert found["map_count"][6] == -1
    else:
        assert not found["frame"].any()
        assert (found["map_count"] == -1).all()
        assert not found["flags"].any()
    assert found["exclusive"].tolist() == table.exclusive.tolist()


def test_a_lower_level_asks_for_no_more(file8: Path) -> None:
    target = image(file8)
    best = only(take([target])).pages
    taken = take([target], level="flags")
    found = only(taken).pages
    assert taken.level == "flags"
    assert not found["frame"].any()
    assert not found["flags"].any()
    assert (found["map_count"] == -1).all()
    for name in ("present", "file", "exclusive", "zero", "file_offset", "mapping"):
        assert (found[name] == best[name]).all(), name


def test_totals_are_those_of_smaps(file8: Path) -> None:
    target = image(file8)
    process = only(take([target], level="totals"))
    inside = [one for one in read_smaps() if one.vma in [backing.vma for backing in process.mappings]]
    assert len(inside) >= 4
    assert process.totals is not None
    assert process.totals["Anonymous"] == sum(one.sizes["Anonymous"] for one in inside)
    assert process.totals["Anonymous"] >= 3 * PAGE_SIZE
    assert process.reason
    assert not process.pages["present"].any()


def test_level_none_knows_nothing(file8: Path) -> None:
    process = only(take([image(file8)], level="none"))
    assert process.reason
    assert (process.pages["mapping"] == -1).all()


def test_a_level_that_does_not_work_is_refused(as_nobody) -> None:
    with pytest.raises(EvidenceError, match=r"level frames: only flags works here; run as root"):
        as_nobody(lambda: take([], level="frames"))


def test_the_range_is_widened_to_pages(file8: Path) -> None:
    target = image(file8)
    odd = ProcessRange(target.pid, target.base, target.vaddr_start + 5, target.vaddr_end - 5)
    assert (only(take([odd])).pages["vaddr"] == only(take([target])).pages["vaddr"]).all()
    with pytest.raises(UsageError, match="load bias 0x1"):
        take([ProcessRange(os.getpid(), 1, 0, PAGE_SIZE)])
    assert len(only(take([ProcessRange(os.getpid(), 0, 0, 0)])).pages) == 0


def test_pages_are_read_only(file8: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        only(take([image(file8)])).pages["frame"] = 1


def test_where_nothing_is_mapped(file8: Path) -> None:
    target = image(file8)
    syscalls.munmap(start_of(target), PAGES * PAGE_SIZE)
    process = only(take([target]))
    assert process.mappings == ()
    assert not process.pages["present"].any()
    assert not process.reason


# ------------------------------------------------------------------------------ what does not hold still
def meanwhile(monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Do something between the first reading of the entries and the second."""
    facts = snapshot._frame_facts

    def then(*arguments, **options):
        act()
        return facts(*arguments, **options)

    monkeypatch.setattr(snapshot, "_frame_facts", then)


def test_a_page_written_meanwhile_is_marked(file8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = image(file8)
    meanwhile(monkeypatch, lambda: store(start_of(target) + 3 * PAGE_SIZE))
    for level in ("flags", None):
        syscalls.madvise(start_of(target), 6 * PAGE_SIZE, syscalls.MADV_DONTNEED)
        touch(start_of(target), 6)
        assert pages(only(take([target], level=level)).pages["changed"]) == [3]


def test_a_page_of_another_file_meanwhile_is_marked(
    file8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the mapping tells: present before and after, the file's own page both times."""
    target, other = image(file8), synced_file(tmp_path / "other", 8)
    where = start_of(target) + 3 * PAGE_SIZE

    def replace() -> None:
        fixed = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED
        with other.open("rb") as file:
            syscalls.mmap(where, PAGE_SIZE, READ_WRITE, fixed, file.fileno(), 5 * PAGE_SIZE)
        touch(where)

    meanwhile(monkeypatch, replace)
    assert pages(only(take([target], level="flags")).pages["changed"]) == [3]


def test_a_protection_changed_meanwhile_is_marked(file8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = image(file8)
    meanwhile(
        monkeypatch,
        lambda: syscalls.mprotect(start_of(target) + 2 * PAGE_SIZE, 2 * PAGE_SIZE, syscalls.PROT_READ),
    )
    assert pages(only(take([target])).pages["changed"]) == [2, 3]


def test_neighbours_do_not_count_as_change(file8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel merges and splits mappings; their extent says nothing about a page."""
    target = image(file8)
    meanwhile(monkeypatch, lambda: syscalls.munmap(start_of(target) + 9 * PAGE_SIZE, PAGE_SIZE))
    assert pages(only(take([target])).pages["changed"]) == [9]


@pytest.mark.parametrize("level", ["flags", "totals", None])
def test_a_process_that_ended_is_recorded(file8: Path, level) -> None:
    with still_child(image, file8) as (pid, target):
        pass
    ours = image(file8)
    gone, alive = take([target, ours], level=level).processes
    assert (gone.pid, gone.gone, gone.reason) == (pid, True, f"process {pid}: there is none (any more)")
    assert len(gone.pages) == PAGES
    assert not alive.gone


def test_a_process_that_ends_meanwhile_is_recorded(file8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with still_child(image, file8) as (pid, target):

        def end() -> None:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        meanwhile(monkeypatch, end)
        ended, alive = take([target, image(file8)]).processes
    assert ended.gone
    assert not ended.pages["present"].any()
    assert alive.pages["present"].any()


@pytest.mark.needs_root("it asks as another user than its own")
@pytest.mark.parametrize("level", ["flags", "totals"])
def test_somebody_elses_process_is_recorded(as_nobody, level) -> None:
    process = as_nobody(lambda: _plain(take([ProcessRange(os.getppid(), 0, 0, PAGE_SIZE)], level=level)))
    assert process == (False, f"/proc/{os.getpid()}/{'pagemap' if level == 'flags' else 'smaps'}")


def _plain(taken: Snapshot) -> tuple[bool, str]:
    process = only(taken)
    assert "Permission denied" in process.reason
    return process.gone, process.reason.partition(":")[0]


def test_no_processes() -> None:
    assert take([]).processes == ()


# ----------------------------------------------------------------------------------------- older kernels
def test_without_ioctls(file8: Path, as_nobody) -> None:
    """Before 6.7 zeros are told by the frame's flags, else by sums: not where a mapping has other doubts."""
    zero, shared = 8, 9  # pages of one mapping

    def look(*, forked: bool) -> tuple[list[int], list[int], list[int]]:
        target = image(file8)
        store(start_of(target) + shared * PAGE_SIZE)
        with still_child(int) if forked else nullcontext(), syscalls.injected("ioctl", failing(errno.ENOTTY)):
            found = only(take([target])).pages
        return pages(found["zero"]), pages(~found["zero_known"]), pages(found["present"])[-3:]

    def alone() -> object:
        return look(forked=False)

    def with_child() -> object:
        return look(forked=True)

    assert alone() == as_nobody(alone) == ([zero], [], [7, zero, shared])
    assert as_nobody(with_child) == ([], [7, zero, shared], [7, zero, shared])
    if best_level() == "frames":
        assert with_child() == ([zero], [], [7, zero, shared])


def test_build_ids_are_those_of_the_library() -> None:
    libc = next(vma for vma in read_maps() if "libc" in vma.path and ".so" in vma.path)
    try:
        expected = query_vma(None, libc.start)
    except EvidenceError:
        pytest.skip("this kernel lacks PROCMAP_QUERY (6.11)")
    process = only(take([ProcessRange(os.getpid(), libc.start, 0, libc.size)]))
    assert expected is not None
    assert process.mappings[0].build_id == expected.build_id
    assert process.mappings[0].build_id


def test_whole_files_are_covered(file8: Path) -> None:
    """A mapping longer than the range, and a range longer than the mapping."""
    address = map_file(file8, 8)
    touch(address, 8)
    inner = only(take([ProcessRange(os.getpid(), address, 2 * PAGE_SIZE, 4 * PAGE_SIZE)])).pages
    assert inner["file_offset"].tolist() == [2 * PAGE_SIZE, 3 * PAGE_SIZE]
    assert inner["present"].all()


@pytest.mark.parametrize("scans", [True, False])
def test_of_a_gigabyte_that_nobody_has_only_what_is_there_is_read(
    scans: bool, file8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel's own scan; without it, once to find out what is there, thrice without frames."""
    length = (1 << 30) // PAGE_SIZE
    start = map_anonymous(length)
    with file8.open("rb") as file:
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED
        syscalls.mmap(start + 100 * PAGE_SIZE, 2 * PAGE_SIZE, READ_WRITE, flags, file.fileno(), 0)
    store(start + 1000 * PAGE_SIZE)
    store(start + 1004 * PAGE_SIZE)
    store(start + (length - 1) * PAGE_SIZE)
    read, of_kernel = list[int](), PageMap.read

    def counted(self: PageMap, start: int, end: int) -> np.ndarray:
        read.append((end - start) // PAGE_SIZE)
        return of_kernel(self, start, end)

    monkeypatch.setattr(PageMap, "read", counted)
    target = ProcessRange(os.getpid(), start, 0, length * PAGE_SIZE)
    with nullcontext() if scans else syscalls.injected("ioctl", failing(errno.ENOTTY)):
        process = only(take([target], most_empty=8))
    syscalls.munmap(start, length * PAGE_SIZE)
    places = (process.pages["vaddr"] // PAGE_SIZE).tolist()
    assert places == [100, 101, *range(1000, 1005), length - 1]
    assert pages(process.pages["present"]) == [2, 6, 7]
    whole = 0 if scans else length if best_level() == "frames" else 3 * length
    assert sum(read) - whole < 100


def test_a_process_that_ends_meanwhile_has_the_pages_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start = map_anonymous(64)
    store(start)
    target = ProcessRange(os.getpid(), start, 0, 64 * PAGE_SIZE)
    with still_child(int) as (pid, _):
        other = ProcessRange(pid, start, 0, 64 * PAGE_SIZE)
        of_kernel, calls = PageMap.read, list[int]()

        def ends(self: PageMap, start: int, end: int) -> np.ndarray:
            calls.append(self.pid or 0)
            if calls.count(pid) == 2 and self.pid == pid:
                raise ProcessGone(pid, "it has ended")
            return of_kernel(self, start, end)

        monkeypatch.setattr(PageMap, "read", ends)
        ours, gone = take([target, other], most_empty=8).processes
    syscalls.munmap(start, 64 * PAGE_SIZE)
    assert gone.gone
    assert gone.pages["vaddr"].tolist() == ours.pages["vaddr"].tolist() == [0]
