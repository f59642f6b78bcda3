"""Audits against the kernel's own sums, and of what happens to processes meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miniloader
from miniloader.errors import EvidenceError, ProcessGone, UsageError
from miniloader.kernel import syscalls
from miniloader.kernel.features import LevelName
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.probe import best_level, probe
from miniloader.kernel.scan import IS_FILE, IS_GUARD, IS_PRESENT, IS_ZERO, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import jobs_for
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.lab.audit.result import Audit
from miniloader.lab.audit.select import choose
from miniloader.lab.audit.survey import Memo, survey
from tests.conftest import NOBODY, AsNobody
from tests.lab.audit.told_processes import ANONYMOUS, Told, rollup_of, smaps_of, told, told_children
from tests.memory import failing

KB = 1024
needs_frames = pytest.mark.skipif(best_level() != "frames", reason="needs root: frames")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[int]]:
    """Two Pythons with ssl and sqlite3, one of them with two children, and a bash."""
    with ExitStack() as stack:
        two = [stack.enter_context(told("import ssl, sqlite3")) for _ in range(2)]
        children = stack.enter_context(told_children(two[0], 2))
        bash = stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", "echo ready; read line"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(bash.kill)
        assert bash.stdout is not None
        bash.stdout.readline()
        yield [*(one.pid for one in two), *children, bash.pid]


# ------------------------------------------------------------------------------- the kernel's own sums
@contextmanager
def before_6_7() -> Iterator[None]:
    """As on a kernel without PAGEMAP_SCAN."""
    with syscalls.injected("ioctl", failing(errno.ENOTTY)):
        yield


KERNELS = pytest.mark.parametrize("kernel", [nullcontext, before_6_7], ids=["this kernel", "before 6.7"])


@KERNELS
@pytest.mark.parametrize("level", [None, "flags"])
def test_sums_are_those_of_smaps(
    servers: list[int], level: LevelName | None, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """To the page.  Who maps a file changes what another process alone maps, so nobody may have meanwhile."""

    def sums() -> list[tuple[int, ...]]:
        rollups = map(rollup_of, servers)
        fields = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous", "Swap", "AnonHugePages")
        return [tuple(one[field] * KB for field in fields) for one in rollups]

    for _ in range(30):
        before = sums()
        with kernel():
            found = miniloader.audit(servers, causes=False, level=level)
        if sums() == before:
            break
    else:
        raise AssertionError("the kernel never said the same twice")
    assert found.unreadable == ()
    assert [one.pid for one in found.processes] == servers
    for one, (rss, clean, dirty, anonymous, swapped, huge) in zip(found.processes, before, strict=True):
        assert one.rss == rss
        assert one.uss == clean + dirty
        assert one.anonymous * PAGE_SIZE == anonymous
        assert one.swapped * PAGE_SIZE == swapped
        assert one.huge * PAGE_SIZE >= huge


@pytest.mark.skipif(best_level() != "frames", reason="needs root: map counts")
def test_pss_is_that_of_smaps(servers: list[int]) -> None:
    """To the page.  Who else maps the C library changes it, so it is compared with before and after."""
    for pid in servers:
        for _ in range(30):
            before = rollup_of(pid)["Pss"] * KB
            pss = miniloader.audit([pid], causes=False).processes[0].pss
            after = rollup_of(pid)["Pss"] * KB
            assert pss is not None
            if min(before, after) - PAGE_SIZE < pss < max(before, after) + PAGE_SIZE:
                break
        else:
            raise AssertionError(f"{pss} bytes, between {before} and {after} as the kernel says")


def test_each_library_s_sums_are_those_of_smaps(servers: list[int]) -> None:
    found = miniloader.audit(servers, causes=False)
    for pid in servers:
        mappings = [one for one in smaps_of(pid).values() if one["file"]]
        rows = [row for one in found.libraries for row in one.processes if row.pid == pid]
        assert sum(row.mapped for row in rows) * PAGE_SIZE == sum(one["Size"] for one in mappings) * KB
        assert sum(row.present for row in rows) * PAGE_SIZE == sum(one["Rss"] for one in mappings) * KB
        assert sum(row.private for row in rows) * PAGE_SIZE == sum(one["Anonymous"] for one in mappings) * KB
        assert all(row.shared + row.private == row.present for row in rows)


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


def test_nothing_is_mapped_into_the_audited(servers: list[int]) -> None:
    def populated(pid: int) -> list[tuple[int, int, int]]:
        return [(start, one["Rss"], one["Anonymous"]) for start, one in smaps_of(pid).items()]

    before = {pid: populated(pid) for pid in servers}
    for _ in range(2):
        miniloader.audit(servers)
    assert {pid: populated(pid) for pid in servers} == before


def test_every_private_page_has_causes(servers: list[int]) -> None:
    found = miniloader.audit(servers)
    for library in found.libraries:
        for pid in {row.pid for row in library.processes}:
            mine = [page for page in library.private_pages if pid in page.pids]
            # A file may be there twice (libffi maps a page of its own again), and a page of it private twice.
            images = [row.private for row in library.processes if row.pid == pid]
            assert max(images) <= len(mine) <= sum(images)
            assert all(page.causes and ("unknown" not in page.causes) for page in mine), library.path
    assert Audit.from_json(found.to_json()) == found


# --------------------------------------------------------------------------------------- after a fork
def test_a_family_after_fork(demo: Path) -> None:
    """What relatives still have as one frame, and who has written since."""
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as parent, told_children(parent, 2) as children:
        found = miniloader.audit([parent.pid, *children]).library(str(demo))
        assert all(row.private == row.inherited > 0 for row in found.processes)
        if best_level() == "frames":
            assert {page.groups for page in found.private_pages} == {((parent.pid, *children),)}
        parent("ctypes.c_long.in_dll(lib, 'demo_spare').value = 7")
        found = miniloader.audit([parent.pid, *children]).library(str(demo))
        (page,) = [one for one in found.private_pages if "write" in one.causes]
        assert (page.pids, page.written) == ((parent.pid,), ("demo_spare",))
        parent("ctypes.c_long.in_dll(lib, 'demo_current').value += 8")  # inherited, erased by the parent
        found = miniloader.audit([parent.pid, *children]).library(str(demo))
        (page,) = [one for one in found.private_pages if "demo_current" in one.written]
        assert page.pids == (parent.pid,)
        (still,) = [one for one in found.private_pages if one.vaddr == page.vaddr and one is not page]
        assert still.pids == tuple(children)
        if best_level() == "frames":
            assert still.groups == (tuple(children),)


# ------------------------------------------------------------------------------- which file it really is
def test_a_replaced_file_is_another_of_the_same_build(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "lib.so")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as old:
        os.rename(copy(demo, tmp_path / "new.so"), path)
        with told(f"lib = ctypes.CDLL({str(path)!r})") as new:
            found = miniloader.audit([old.pid, new.pid]).library(str(path))
    assert found.files == 2
    assert found.build_id == miniloader.inspect(demo).build_id
    assert [row.pid for row in found.processes] == [old.pid, new.pid]
    if best_level() == "frames":
        assert found.frames == found.present


def test_two_names_of_one_file_are_one(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "one.so")
    os.link(path, tmp_path / "two.so")
    one = told(f"lib = ctypes.CDLL({str(path)!r})")
    two = told(f"lib = ctypes.CDLL({str(tmp_path / 'two.so')!r})")
    with one as first, two as second:
        (found,) = miniloader.audit([first.pid, second.pid], library=str(tmp_path)).libraries
    assert found.files == 1
    assert len(found.processes) == 2


def test_a_deleted_file(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "gone.so")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as one:
        path.unlink()
        found = miniloader.audit([one.pid]).library("gone.so")
    assert found.build_id == miniloader.inspect(demo).build_id
    causes = {cause for page in found.private_pages for cause in page.causes}
    if best_level() == "frames":  # CAP_SYS_ADMIN opens it through /proc/PID/map_files
        assert causes == {"relocation", "loader", "bss"}
    else:
        assert causes == {"unknown"}
        assert all("deleted" in page.reason for page in found.private_pages)


@pytest.fixture
def overlay(demo: Path) -> Iterator[tuple[Path, Path]]:
    """The demonstration library below an overlay and in it, as in containers, for every user."""
    if os.geteuid():
        pytest.skip("needs root: to mount an overlay")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        here = Path(directory)
        here.chmod(0o755)
        for name in ("lower", "upper", "work", "merged"):
            (here / name).mkdir()
        path = copy(demo, here / "lower" / "lib.so")
        layers = f"lowerdir={here}/lower,upperdir={here}/upper,workdir={here}/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(here / "merged")]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this kernel lacks overlayfs here")
        try:
            yield path, here / "merged" / "lib.so"
        finally:
            subprocess.run(["umount", str(here / "merged")], check=True)


@needs_frames
def test_the_same_file_through_an_overlay(overlay: tuple[Path, Path]) -> None:
    """Whatever device maps tells, the frames are the same."""
    path, merged = overlay
    inside = told(f"lib = ctypes.CDLL({str(merged)!r})")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as outer, inside as inner:
        (found,) = miniloader.audit([outer.pid, inner.pid], library=str(merged.parent.parent)).libraries
    assert found.files == 1
    assert found.frames < found.present


@KERNELS
def test_an_overlay_s_file_is_found_without_privilege(
    overlay: tuple[Path, Path], as_nobody: AsNobody, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """By the kernel's build-id; before 6.11 by the inode.  Not when another file has taken its name."""
    path, merged = overlay

    def look() -> tuple[str, set[str], set[str]]:
        with kernel():
            return _own_child(str(merged))

    assert as_nobody(look) == ("flags", {"relocation", "loader", "bss", "write"}, {"demo_counters"})

    def look_at_replaced() -> tuple[str, set[str], set[str]]:
        with kernel():
            return _own_child(str(merged), replace=True)

    def look_by_the_device_below(inode: int) -> bool:
        """As maps had it until 6.12."""
        import ctypes

        library = ctypes.CDLL(str(merged))
        assert library is not None
        mine = next(vma for vma in read_maps() if vma.path == str(merged))
        below = os.stat(path).st_dev
        vma = dataclasses.replace(mine, device=(os.major(below), os.minor(below)), inode=inode)
        with before_6_7():
            return MappedFiles().of(os.getpid(), vma).facts is not None

    assert as_nobody(look_by_the_device_below, os.stat(path).st_ino)
    assert not as_nobody(look_by_the_device_below, os.stat(path).st_ino + 1)

    os.chown(merged.parent, NOBODY, NOBODY)
    level, causes, written = as_nobody(look_at_replaced)
    assert (level, causes, written) == ("flags", {"unknown"}, set())


def copy(source: Path, to: Path) -> Path:
    """A file of the test's own, written to the disk."""
    shutil.copy(source, to)
    with to.open("rb") as file:
        os.fsync(file.fileno())
    return to


# -------------------------------------------------------------------------------- what counts as what
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
    reserve = Path("/proc/sys/vm/nr_hugepages")
    if not reserve.exists() or os.geteuid():
        pytest.skip("needs root: to have huge pages kept in reserve")
    before = reserve.read_text()
    reserve.write_text(str(int(before) + 2))
    try:
        if int(reserve.read_text()) < int(before) + 2:
            pytest.skip("this machine lacks free huge pages")
        yield
    finally:
        reserve.write_text(before)


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


# ------------------------------------------------------------------------------------ without privilege
def test_an_ordinary_user_on_its_own(demo: Path, as_nobody: AsNobody) -> None:
    level, causes, written = as_nobody(_own_child, str(demo))
    assert level == "flags"
    assert causes == {"relocation", "loader", "bss", "write"}
    assert written == {"demo_counters"}


def _own_child(path: str, *, replace: bool = False) -> tuple[str, set[str], set[str]]:
    import ctypes

    library = ctypes.CDLL(path)
    library.demo_next()
    if replace:
        shutil.copy(path, f"{path}.new")
        os.rename(f"{path}.new", path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")
        while True:
            signal.pause()
    try:
        os.read(reading, 1)
        found = miniloader.audit([child])
        pages = found.library(path).private_pages
        causes = {cause for page in pages for cause in page.causes}
        return found.level, causes, {name for page in pages for name in page.written}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.needs_root("another user's process")
def test_another_user_s_process_is_listed(servers: list[int], as_nobody: AsNobody) -> None:
    found = as_nobody(_audit, servers[:1])
    assert found.processes == ()
    (one,) = found.unreadable
    assert one.pid == servers[0]
    assert "CAP_SYS_PTRACE" in one.needed


def _audit(pids: Sequence[int]) -> Audit:
    """With one of its own: the rest is still audited."""
    found = miniloader.audit([*pids, os.getpid()])
    assert [one.pid for one in found.processes] == [os.getpid()]
    return Audit.from_json({**found.to_json(), "processes": [], "libraries": []})


def test_level_flags_says_the_same_of_one_process(servers: list[int]) -> None:
    best, flags = miniloader.audit(servers[:1]), miniloader.audit(servers[:1], level="flags")
    assert flags.level == "flags"
    assert flags.processes[0].pss is None
    assert [(one.path, one.private) for one in flags.libraries] == [
        (one.path, one.private) for one in best.libraries
    ]
    for one, other in zip(flags.libraries, best.libraries, strict=True):
        assert [(page.vaddr, page.causes, page.written) for page in one.private_pages] == [
            (page.vaddr, page.causes, page.written) for page in other.private_pages
        ]


# ---------------------------------------------------------------------------------- while they live on
CROWD = """
import os, random, signal, sys, time
random.seed(int(sys.argv[1]))
os.setpgid(0, 0)
end = time.monotonic() + float(sys.argv[2])
print("go", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
living = 0
while time.monotonic() < end:
    if os.fork() == 0:
        what = random.Random(os.getpid()).randrange(4)
        if what == 0: os.execv("/bin/true", ["true"])
        if what == 1: os.execv("/bin/sleep", ["sleep", "0.05"])
        if what == 2:
            if os.fork() == 0:
                import mmap
                for _ in range(20): mmap.mmap(-1, 1 << 16).close()
            os._exit(0)
        junk = bytearray(1 << 20)
        os._exit(0)
    time.sleep(0.01)
"""


_VFORK = """
#include <stdio.h>
#include <unistd.h>
int main(void) {
    char byte;
    if (vfork() == 0) {
        printf("%d\\n", getpid()), fflush(stdout);
        if (read(0, &byte, 1) == 1) execl("/bin/sleep", "sleep", "20", (char *)0);
        _exit(1);
    }
    return pause();
}
"""


def test_a_child_by_vfork_that_executes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of its page table, which is its parent's and lives on, and the reading of maps."""
    (tmp_path / "vfork.c").write_text(_VFORK)
    subprocess.run(["gcc", "-O0", "-o", tmp_path / "vfork", tmp_path / "vfork.c"], check=True)
    original = PageMap.__init__
    with subprocess.Popen(
        [tmp_path / "vfork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child = int(parent.stdout.readline())

        def executes(self: PageMap, pid: int | None = None) -> None:
            original(self, pid)
            assert parent.stdin is not None
            parent.stdin.write(b"x")
            while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
                time.sleep(0.01)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(PageMap, "__init__", executes)
                with pytest.raises(ProcessGone, match="has executed another program"):
                    survey(child, Memo())
            assert survey(child, Memo()).name == "sleep"
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()


def test_a_crowd_that_does_not_hold_still() -> None:
    """Processes that fork, execute and exit at random: no error, nothing is left behind."""
    seconds = float(os.environ.get("MINILOADER_CROWD_SECONDS", "3"))
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, str(seed), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(int(os.environ.get("MINILOADER_CROWD", "4")))
    ]
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        for one in crowd:
            assert one.stdout is not None
            one.stdout.readline()
        audits = 0
        while any(one.poll() is None for one in crowd):
            try:
                pids = [pid for one in crowd if one.poll() is None for pid in choose(tree=one.pid)]
            except UsageError:  # it has just ended
                continue
            found = miniloader.audit(pids)
            assert {one.pid for one in found.processes} | {one.pid for one in found.unreadable} == {*pids}
            assert all(page.reason for library in found.libraries for page in unknown(library.private_pages))
            audits += 1
        assert audits
        assert [one.returncode for one in crowd] == [0] * len(crowd)
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        for one in crowd:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


def unknown(
    pages: Sequence[miniloader.lab.audit.result.PrivatePage],
) -> list[miniloader.lab.audit.result.PrivatePage]:
    return [page for page in pages if "unknown" in page.causes]


def test_a_process_that_has_gone() -> None:
    with told() as one:
        pass
    found = miniloader.audit([one.pid])
    assert found.processes == ()
    assert [(each.pid, each.needed) for each in found.unreadable] == [(one.pid, "")]


def test_progress_is_told(servers: list[int]) -> None:
    told_of: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda done, of: told_of.append((done, of))  # noqa: E731
    miniloader.audit(servers, causes=False, on_progress=progress)
    assert told_of == [(number, len(servers)) for number in range(len(servers) + 1)]


# ---------------------------------------------------------------------------------- several at a time
@pytest.mark.parametrize("level", ["frames", "flags"])
@pytest.mark.parametrize("causes", [True, False])
def test_several_jobs_find_the_same(causes: bool, level: LevelName, demo: Path, tmp_path: Path) -> None:
    """A family, some strangers, and at the end, where only a helper looks, a file that nobody else has."""
    if level == "frames" and best_level() != "frames":
        pytest.skip("needs root: frames")
    path = copy(demo, tmp_path / "last.so")
    load = f"lib = ctypes.CDLL({str(path)!r}); ctypes.c_long.in_dll(lib, 'demo_spare').value = 7"
    with told("import ssl") as parent, told_children(parent, 30) as children, told(load) as last:
        nobody = subprocess.Popen(["true"])
        nobody.wait()
        pids = [parent.pid, *children, nobody.pid, last.pid]
        alone, together = (miniloader.audit(pids, causes=causes, level=level, jobs=jobs) for jobs in (1, 3))
    assert together.libraries == alone.libraries
    assert together.unreadable == alone.unreadable
    # Who else maps a file meanwhile changes what somebody alone maps.
    assert [replace(one, pss=None, uss=0) for one in together.processes] == [
        replace(one, pss=None, uss=0) for one in alone.processes
    ]
    assert [one.pid for one in together.processes] == [parent.pid, *children, last.pid]
    assert [one.pid for one in together.unreadable] == [nobody.pid]
    if causes:
        (page,) = [one for one in together.library(str(path)).private_pages if "write" in one.causes]
        assert (page.written, page.pids) == (("demo_spare",), (last.pid,))


def test_several_jobs_find_one_s_own_memory_as_it_is() -> None:
    """Helpers share it, as long as they are there: so this process has none then."""
    with told() as parent, told_children(parent, 29) as children:
        pids = [*children, os.getpid()]
        alone, together = (miniloader.audit(pids, causes=False, jobs=jobs).processes[-1] for jobs in (0, 2))
    assert together.pid == alone.pid == os.getpid()
    assert together.anonymous_shared - alone.anonymous_shared < 100
    assert jobs_for(pids) == 1 < jobs_for(children)


def test_what_only_a_helper_could_read(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has ended since, and its file is gone: the causes are known, the names are not."""
    path = copy(demo, tmp_path / "gone.so")
    load = f"lib = ctypes.CDLL({str(path)!r}); ctypes.c_long.in_dll(lib, 'demo_spare').value = 7"
    original = miniloader.lab.audit.audit.share_out
    with told() as parent, told_children(parent, 29) as children, told(load) as last:

        def gone_meanwhile(*arguments: Any) -> Any:
            answers = original(*arguments)
            last.process.kill()
            last.process.wait()
            path.unlink()
            return answers

        monkeypatch.setattr("miniloader.lab.audit.audit.share_out", gone_meanwhile)
        found = miniloader.audit([*children, last.pid], jobs=2).library(str(path))
    assert found.build_id == miniloader.inspect(demo).build_id
    assert {cause for page in found.private_pages for cause in page.causes} >= {"relocation", "write"}
    assert all("not to be found" in page.reason for page in found.private_pages)


def test_a_file_that_another_process_offers_a_way_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that has it mapped may not: whoever has met it, it is tried again."""
    libc = next(vma for vma in read_maps() if vma.path.endswith("libc.so.6"))
    files = MappedFiles()
    with monkeypatch.context() as patch:
        patch.setattr(MappedFiles, "_open", lambda *_: None)
        met = pickle.loads(pickle.dumps(files.of(os.getpid(), libc)))
    assert files.same(met).facts is not None


def test_progress_of_several_jobs() -> None:
    """It is told here, and by no helper."""
    reading, writing = os.pipe()
    with told() as parent, told_children(parent, 29) as children:
        miniloader.audit(
            [parent.pid, *children],
            causes=False,
            on_progress=lambda done, of: os.write(writing, f"{done} {of} {os.getpid()}\n".encode()),
            jobs=2,
        )
    os.close(writing)
    with open(reading) as file:
        told_of = [tuple(map(int, line.split())) for line in file]
    assert told_of == sorted(told_of)
    assert {(of, pid) for _, of, pid in told_of} == {(30, os.getpid())}
    assert told_of[-1][0] in range(26, 31)


# ------------------------------------------------------------------------------------ which processes
def test_choosing() -> None:
    with told() as parent, told_children(parent, 2) as children:
        assert choose(tree=parent.pid) == tuple(sorted([parent.pid, *children]))
        assert {parent.pid, *children} <= {*choose(name="*python*")}
        assert parent.pid in choose(user=str(os.geteuid()), tree=parent.pid)
        assert choose(user=str(NOBODY + 1), tree=parent.pid) == ()
    with pytest.raises(UsageError, match="no such user"):
        choose(user="nobody-is-called-so")
    with pytest.raises(UsageError, match="no such process"):
        choose(tree=parent.pid)
