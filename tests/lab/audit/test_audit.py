"""Audits against the kernel's own sums, and of what happens to processes meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest

import miniloader
from miniloader.kernel.features import LevelName
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import jobs_for
from miniloader.lab.audit.result import Audit
from miniloader.lab.audit.select import choose
from miniloader.lab.audit.survey import Survey
from tests.conftest import AsNobody
from tests.lab.audit.older_kernels import KERNELS
from tests.lab.audit.told_processes import (
    KB,
    copy,
    own_child,
    rollup_of,
    smaps_of,
    told,
    told_children,
)


# ------------------------------------------------------------------------------- the kernel's own sums
@KERNELS
@pytest.mark.parametrize("level", [None, "flags"])
def test_sums_are_those_of_smaps(
    servers: list[int], level: LevelName | None, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """To the page.  Who maps a file changes what another process alone maps, so nobody may have meanwhile.

    Who has come and gone between two readings of the kernel's sums is not seen in them: another look tells.
    """

    def sums() -> list[tuple[int, ...]]:
        rollups = map(rollup_of, servers)
        fields = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous", "Swap", "AnonHugePages")
        return [tuple(one[field] * KB for field in fields) for one in rollups]

    for _ in range(30):
        before = sums()
        with kernel():
            found = miniloader.audit(servers, causes=False, level=level)
        assert found.unreadable == ()
        assert [one.pid for one in found.processes] == servers
        ours = [
            (one.rss, one.uss, one.anonymous * PAGE_SIZE, one.swapped * PAGE_SIZE) for one in found.processes
        ]
        theirs = [
            (rss, clean + dirty, anonymous, swapped) for rss, clean, dirty, anonymous, swapped, _ in before
        ]
        if sums() == before and ours == theirs:
            break
    else:
        assert ours == theirs
        raise AssertionError("the kernel never said the same twice")
    for one, (*_, huge) in zip(found.processes, before, strict=True):
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


# ------------------------------------------------------------------------------------ without privilege
def test_an_ordinary_user_on_its_own(demo: Path, as_nobody: AsNobody) -> None:
    level, causes, written = as_nobody(own_child, str(demo))
    assert level == "flags"
    assert causes == {"relocation", "loader", "bss", "write"}
    assert written == {"demo_counters"}


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
    for _ in range(10):  # what others map meanwhile changes the proportions
        best, flags = miniloader.audit(servers[:1]), miniloader.audit(servers[:1], level="flags")
        assert flags.level == "flags"
        assert flags.processes[0].pss is not None
        assert best.processes[0].pss is not None
        if abs(flags.processes[0].pss - best.processes[0].pss) < 64 << 10:
            break
    else:
        pytest.fail("the proportions differ each time")
    assert [(one.path, one.private) for one in flags.libraries] == [
        (one.path, one.private) for one in best.libraries
    ]
    for one, other in zip(flags.libraries, best.libraries, strict=True):
        assert [(page.vaddr, page.causes, page.written) for page in one.private_pages] == [
            (page.vaddr, page.causes, page.written) for page in other.private_pages
        ]


# ---------------------------------------------------------------------------------- while they live on
CROWD = """
import os, random, select, signal, sys, time
random.seed(int(sys.argv[1]))
os.setpgid(0, 0)
print("go", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
living = 0
while not select.select([0], [], [], 0)[0]:
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


def test_a_crowd_that_does_not_hold_still() -> None:
    """Processes that fork, execute and exit at random: no error, nothing is left behind."""
    seconds = float(os.environ.get("MINILOADER_CROWD_SECONDS", "3"))
    crowd = [
        subprocess.Popen([sys.executable, "-c", CROWD, str(seed)], stdin=PIPE, stdout=PIPE, text=True)
        for seed in range(int(os.environ.get("MINILOADER_CROWD", "4")))
    ]
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        for one in crowd:
            assert one.stdout is not None
            one.stdout.readline()
        audits, end = 0, time.monotonic() + seconds
        while not audits or time.monotonic() < end:
            pids = [pid for one in crowd for pid in choose(tree=one.pid)]
            found = miniloader.audit(pids)
            assert {one.pid for one in found.processes} | {one.pid for one in found.unreadable} == {*pids}
            assert all(page.reason for library in found.libraries for page in unknown(library.private_pages))
            audits += 1
        assert len(os.listdir("/proc/self/fd")) == descriptors
        for one in crowd:
            assert one.stdin is not None
            one.stdin.close()
        assert [one.wait() for one in crowd] == [0] * len(crowd)
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
    """A family, some strangers, and in the middle, where only a helper looks, a file that nobody else has."""
    if level == "frames" and best_level() != "frames":
        pytest.skip("needs root: frames")
    path = copy(demo, tmp_path / "other.so")
    load = f"lib = ctypes.CDLL({str(path)!r}); ctypes.c_long.in_dll(lib, 'demo_spare').value = 7"
    with told("import ssl") as parent, told_children(parent, 30) as children, told(load) as other:
        nobody = subprocess.Popen(["true"])
        nobody.wait()
        pids = [parent.pid, *children[:15], other.pid, *children[15:], nobody.pid]
        alone, together = (miniloader.audit(pids, causes=causes, level=level, jobs=jobs) for jobs in (1, 3))
    assert without_pss(together.libraries) == without_pss(alone.libraries)
    assert together.unreadable == alone.unreadable
    # Who else maps a file meanwhile changes what somebody alone maps.
    assert [replace(one, pss=None, uss=0) for one in together.processes] == [
        replace(one, pss=None, uss=0) for one in alone.processes
    ]
    assert [one.pid for one in together.processes] == [pid for pid in pids if pid != nobody.pid]
    assert [one.pid for one in together.unreadable] == [nobody.pid]
    if causes:
        (page,) = [one for one in together.library(str(path)).private_pages if "write" in one.causes]
        assert (page.written, page.pids) == (("demo_spare",), (other.pid,))


def without_pss(
    libraries: Sequence[miniloader.lab.audit.result.AuditedLibrary],
) -> list[miniloader.lab.audit.result.AuditedLibrary]:
    return [
        replace(library, processes=tuple(replace(process, pss=None) for process in library.processes))
        for library in libraries
    ]


def test_several_jobs_find_one_s_own_memory_as_it_is() -> None:
    """Helpers share it, as long as they are there: so this process has none then."""
    with told() as parent, told_children(parent, 29) as children:
        pids = [*children, os.getpid()]
        alone, together = (miniloader.audit(pids, causes=False, jobs=jobs).processes[-1] for jobs in (0, 2))
    assert together.pid == alone.pid == os.getpid()
    assert together.anonymous_shared - alone.anonymous_shared < 100
    assert jobs_for(pids) == 1 < jobs_for(children)


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
    assert told_of[-1][0] == 30


# --------------------------------------------------------------------- what one file says of another
def test_files_of_one_build_id_keep_their_own_symbols(tmp_path: Path) -> None:
    """A library and its stripped copy: the symbols of one are not looked up in the other."""
    whole, stripped = tmp_path / "whole.so", tmp_path / "stripped.so"
    source = tmp_path / "two.c"
    source.write_text(
        "static int secret[5000] = {1}; int visible[3000] = {2};\n"
        "void touch(void) { for (int i = 0; i < 3000; i++) { secret[i]++; visible[i]++; } }\n"
    )
    flags = ["-shared", "-fPIC", "-Wl,--build-id=0x0123456789abcdef"]
    subprocess.run(["gcc", *flags, "-o", whole, source], check=True)
    subprocess.run(["gcc", *flags, "-s", "-o", stripped, source], check=True)

    def touch(path: Path) -> str:
        return f"lib = ctypes.CDLL({str(path)!r}); lib.touch()"

    for first, second in ((whole, stripped), (stripped, whole)):
        with told(touch(first)) as one, told(touch(second)) as two:
            found = miniloader.audit([one.pid, two.pid], library=str(tmp_path))
        written = {
            name: {symbol for library in found.libraries for page in library.private_pages
                   if process.pid in page.pids for symbol in page.written}
            for name, process in ((first.name, one), (second.name, two))
        }  # fmt: skip
        assert written["whole.so"] >= {"secret", "visible"}
        assert "visible" in written["stripped.so"]
        assert "secret" not in written["stripped.so"]
        assert found.unreadable == ()


@pytest.mark.parametrize("part", ["occurrences_of", "_pss", "_merged"])
def test_a_fault_of_ours_in_putting_one_process_with_others_is_told_of_that_one(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditing = sys.modules["miniloader.lab.audit.audit"]
    real = getattr(auditing, part)

    def faulty(surveys: Sequence[Survey], *more: object, **named: object) -> object:
        if {bad.pid, others[0].pid} <= {process.pid for process in surveys}:  # not where it is alone
            raise IndexError("list index out of range")
        return real(surveys, *more, **named)

    with told() as first, told() as second, told() as bad:
        others = (first, second)
        monkeypatch.setattr(auditing, part, faulty)
        found = miniloader.audit([first.pid, second.pid, bad.pid], library="libc.so*")
    assert [process.pid for process in found.processes] == [first.pid, second.pid]
    assert [len(library.processes) for library in found.libraries] == [2]
    (unreadable,) = found.unreadable
    assert unreadable.pid == bad.pid
    assert "a fault of miniloader's own: IndexError: list index out of range" in unreadable.reason


def test_a_fault_of_ours_in_one_process_is_told_of_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from miniloader.lab.audit import known_by

    real = known_by.read_stat

    def faulty(pid: int) -> object:
        if pid == bad.pid:
            raise IndexError("list index out of range")
        return real(pid)

    with told() as good, told() as bad:
        monkeypatch.setattr(known_by, "read_stat", faulty)
        found = miniloader.audit([bad.pid, good.pid], library="libc.so*")
    assert [process.pid for process in found.processes] == [good.pid]
    (unreadable,) = found.unreadable
    assert unreadable.pid == bad.pid
    assert "a fault of miniloader's own: IndexError: list index out of range" in unreadable.reason
