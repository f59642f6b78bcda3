"""Pages that are swapped out, and pages that KSM has merged: counted as the kernel counts them.

Both need what most machines leave off; an administrator's tests turn it on for themselves, and off again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import miniloader
from miniloader.errors import EvidenceError
from miniloader.kernel.frames import has_merged, marks_merged
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.diff import diff
from miniloader.lab.audit.page_words import view_page
from miniloader.lab.audit.result import AuditedLibrary, AuditedProcess, LibraryProcess
from miniloader.lab.erosion.result import pages_in
from miniloader.report.audit import lines
from miniloader.report.audit_growth import tick
from miniloader.report.text import plain
from miniloader.testing import assert_copied_only, assert_private_pages, snapshot
from tests.lab.audit.told_processes import ANONYMOUS, Told, rollup_of, told
from tests.lab.erosion.pools import in_two_copies, needs_frames, pool

KSM = Path("/sys/kernel/mm/ksm")
MERGEABLE, PAGEOUT = 12, 21

_TOOLS = f"""{ANONYMOUS}
def advise(at, length, advice):
    if libc.madvise(at, length, advice): raise OSError(ctypes.get_errno(), "madvise")
"""


def loaded(demo: Path) -> str:
    return (
        f"lib = ctypes.CDLL({str(demo)!r})\ndef at(name): return ctypes.addressof(number.in_dll(lib, name))"
    )


# ---------------------------------------------------------------------------------------------- swapped
@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Swap space: the machine's own, or a file of 16 MiB as long as these tests run."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        yield
        return
    if os.geteuid():
        pytest.skip("needs root: this machine lacks swap space, and only root may add some")
    file = tmp_path_factory.mktemp("swap") / "file"
    file.touch(mode=0o600)
    file.write_bytes(bytes(16 << 20))
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # a user's PATH need not have them
    mkswap, swapon, swapoff = (shutil.which(name, path=search) for name in ("mkswap", "swapon", "swapoff"))
    if mkswap is None or swapon is None or swapoff is None:
        pytest.skip("this machine lacks swap space, and mkswap(8)")
    for command in (mkswap, swapon):
        done = subprocess.run([command, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine lacks swap space, and cannot be given a file: {done.stderr.strip()}")
    yield
    subprocess.run([swapoff, str(file)], check=True)


def in_swap(pid: int) -> int:
    """Pages of all mappings, as the kernel counts them."""
    return rollup_of(pid)["Swap"] * 1024 // PAGE_SIZE


def test_anonymous_pages(swap: None) -> None:
    with told(_TOOLS) as one:
        one(f"at = libc.mmap(None, {64 * PAGE_SIZE}, 3, 0x22, -1, 0)")
        one(f"ctypes.memmove(at, os.urandom({64 * PAGE_SIZE}), {64 * PAGE_SIZE})")
        one(f"advise(at, {64 * PAGE_SIZE}, {PAGEOUT})")
        (found,) = miniloader.audit([one.pid], causes=False).processes
        assert found.swapped == in_swap(one.pid)
        assert found.swapped >= 32  # some may still be on their way


@pytest.fixture
def swapped(swap: None, demo: Path) -> Iterator[tuple[Told, int]]:
    """A process that has written to ``demo_spare``, which is then swapped out; the vaddr of that page."""
    table = miniloader.inspect(demo).symbols
    number = table.find("demo_spare")
    assert number is not None
    with told(_TOOLS, loaded(demo), "number.in_dll(lib, 'demo_spare').value = 5") as one:
        yield one, int(table.rows["value"][number])


def swap_out(one: Told) -> None:
    one(f"advise(at('demo_spare'), {PAGE_SIZE}, {PAGEOUT})")
    if not in_swap(one.pid):
        pytest.skip("this machine lacks a kernel that swaps this page out when it is told to")


def of_demo(one: Told, demo: Path, **options: bool) -> AuditedLibrary:
    return miniloader.audit([one.pid], **options).library(str(demo))


def test_a_copy_that_is_swapped_out_is_told_from_a_shared_page(swapped: tuple[Told, int], demo: Path) -> None:
    one, vaddr = swapped
    before = miniloader.audit([one.pid])
    was = before.library(str(demo))
    swap_out(one)
    after = miniloader.audit([one.pid])
    found = after.library(str(demo))
    assert (found.swapped, found.private) == (1, was.private - 1)
    (page,) = found.swapped_pages
    assert (page.vaddr, page.section, page.pids) == (vaddr, ".data", (one.pid,))
    assert page.causes == ("unknown",)
    assert "swapped out" in page.reason
    assert vaddr not in {page.vaddr for page in found.private_pages}
    assert not of_demo(one, demo, causes=False).swapped_pages

    view = view_page(one.pid, vaddr, str(demo))
    assert (view.state, view.causes, view.reason, view.words) == ("swapped", ("unknown",), page.reason, ())
    # Nobody has brought it in meanwhile, nor become its sharer again.
    assert in_swap(one.pid) == 1
    assert [change for change in diff(before, after) if change.path == str(demo)] == []
    assert "libdemo.so -" in plain(tick(after, before))  # no more in memory
    assert miniloader.audit([one.pid]).from_json(after.to_json()) == after

    said = [plain(line) for line in lines(after) if isinstance(line, tuple)]
    assert any("1 besides are swapped out" in line for line in said if line.startswith("libdemo.so: "))
    assert any("4 KiB of copies besides are swapped out" in line for line in said) or PAGE_SIZE != 4096

    one("number.in_dll(lib, 'demo_spare').value")
    again = miniloader.audit([one.pid])
    assert again.library(str(demo)).private == was.private
    assert [change for change in diff(after, again) if change.path == str(demo)] == []
    assert in_swap(one.pid) == 0


def test_what_was_written_before_it_was_swapped_out_is_not_guessed(
    swapped: tuple[Told, int], demo: Path
) -> None:
    one, _ = swapped
    assert_copied_only(snapshot([one.pid]), symbols=["demo_spare"], library=str(demo))
    most = of_demo(one, demo).private
    swap_out(one)
    looked = snapshot([one.pid])
    assert_private_pages(looked, at_most=most, library=str(demo))
    with pytest.raises(EvidenceError, match="swapped out"):
        assert_copied_only(looked, symbols=["demo_spare"], library=str(demo))
    with pytest.raises(EvidenceError, match="swapped out"):
        assert_private_pages(looked, at_most=most - 1, library=str(demo))


# ----------------------------------------------------------------------------------------------- merged
@pytest.fixture
def merging() -> Iterator[None]:
    """KSM, running as fast as it can for this test; one test at a time.

    Its smart scan (6.7) looks at a page in one of nine rounds: two alike that it sees in different ones never
    meet.
    """
    if not (KSM / "run").exists():
        pytest.skip("this kernel lacks KSM")
    if os.geteuid():
        pytest.skip("needs root: to have KSM run")
    with (KSM / "run").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = {"pages_to_scan": "10000", "sleep_millisecs": "1", "smart_scan": "0", "run": "1"}
        settings = {name: (KSM / name).read_text() for name in wanted if (KSM / name).exists()}
        for name in settings:
            (KSM / name).write_text(wanted[name])
        try:
            yield
        finally:
            if settings["run"].strip() != "1":
                (KSM / "run").write_text("2")  # and what is merged apart again
            for name, value in settings.items():
                (KSM / name).write_text(value)


def merged_by_kernel(pid: int) -> int:
    """How many pages of the process are merged, by the kernel's own sum."""
    sums: Mapping[str, int] = rollup_of(pid)
    if "KSM" in sums:  # 6.6
        return sums["KSM"] * 1024 // PAGE_SIZE
    return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())  # 5.19


def wait_for_merging(pids: list[int], pages: int) -> None:
    until = time.monotonic() + 60
    while any(merged_by_kernel(pid) < pages for pid in pids):
        assert time.monotonic() < until, [merged_by_kernel(pid) for pid in pids]
        time.sleep(0.05)


def test_merged_pages_are_not_inherited_ones(
    merging: None, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that are not related: 16 anonymous pages alike, and one copied page of a library."""
    code = (
        _TOOLS,
        loaded(demo),
        f"many = libc.mmap(None, {16 * PAGE_SIZE}, 3, 0x22, -1, 0)",
        f"ctypes.memset(many, 0x5b, {16 * PAGE_SIZE}); advise(many, {16 * PAGE_SIZE}, {MERGEABLE})",
        f"ctypes.memset(at('demo_spare'), 0x5a, {PAGE_SIZE})",
        f"advise(at('demo_spare'), {PAGE_SIZE}, {MERGEABLE})",
    )
    with told(*code) as first, told(*code) as second:
        pids = [first.pid, second.pid]
        wait_for_merging(pids, 17)
        assert has_merged()
        audits = [miniloader.audit(pids), miniloader.audit(pids, level="flags")]
        for audit in audits:
            processes: list[AuditedProcess] = [*audit.processes]
            assert [one.ksm for one in processes] == [merged_by_kernel(pid) for pid in pids] == [17, 17]
            for one, pid in zip(processes, pids, strict=True):
                assert one.anonymous * PAGE_SIZE == rollup_of(pid)["Anonymous"] * 1024
        monkeypatch.setattr("miniloader.lab.audit.audit.read_rollup", lambda pid: {})  # as before 6.6
        older = miniloader.audit(pids, level="flags", causes=False)
        assert [one.ksm for one in older.processes] == [17, 17]
        by_frames, by_flags = (audit.library(str(demo)) for audit in audits)
        (page,) = [page for page in by_frames.private_pages if "demo_spare" in page.written]
        if best_level() == "frames":
            assert page.groups == ((*sorted(pids),),) or page.groups == (tuple(pids),)
        expected = (0, 1) if best_level() == "frames" and marks_merged() else (1, None)
        assert [numbers(one) for one in by_frames.processes] == [expected] * 2
        assert [numbers(one) for one in by_flags.processes] == [(1, None)] * 2


@needs_frames
def test_merged_pages_of_relatives_are_no_copies_of_their_own(merging: None) -> None:
    """KSM maps one frame 256 times (max_page_sharing): pages that are all alike are in several frames."""
    if not marks_merged():
        pytest.skip("this kernel does not tell which frames are merged")
    pages = 1024
    with pool(_TOOLS, f"many = libc.mmap(None, {pages * PAGE_SIZE}, 3, 0x22, -1, 0)") as workers:
        workers.parent(
            f"ctypes.memset(many, 0x5b, {pages * PAGE_SIZE}); advise(many, {pages * PAGE_SIZE}, {MERGEABLE})"
        )
        child = workers.fork()
        wait_for_merging([workers.pid, child], pages)
        start = workers.parent("answer = many")
        apart = in_two_copies(child, workers.pid) & {*range(start, start + pages * PAGE_SIZE, PAGE_SIZE)}
        (row,) = miniloader.audit([workers.pid, child], library="nothing").erosion
    assert len(apart) > pages // 2
    assert row.pages.together
    assert not apart & {*pages_in((*row.pages.proven, *row.pages.possible, *row.pages.same)).tolist()}


def numbers(one: LibraryProcess) -> tuple[int, int | None]:
    return one.inherited, one.merged


def test_nothing_is_merged_where_ksm_has_merged_nothing() -> None:
    if has_merged():
        pytest.skip("this machine lacks an idle KSM")
    with told() as one:
        for level in ("flags", None):
            (found,) = miniloader.audit([one.pid], causes=False, level=level).processes
            assert found.ksm == 0
