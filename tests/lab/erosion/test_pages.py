"""Which pages relatives have no longer in common, right to the page: the tests read the page tables, too."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miniloader.cli import audit_over_time
from miniloader.errors import ProcessGone
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.procfs import read_stat
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.growth import growth
from miniloader.lab.audit.process_pages import Pages
from miniloader.lab.audit.result import Audit
from miniloader.lab.erosion import contents
from miniloader.lab.erosion.erode import erosion_of
from miniloader.lab.erosion.memory import PrivateMemory, memory_in
from miniloader.lab.erosion.result import Erosion, Spans, pages_in
from miniloader.lab.erosion.since import eroded_since, newly_proven, proven_by
from miniloader.report.audit import lines
from miniloader.report.audit_growth import growth_view, tick
from miniloader.report.numbers import size
from miniloader.report.text import laid_out, plain
from tests.lab.audit.told_processes import KB, rollup_of, wait_until_at_rest
from tests.lab.erosion.pools import Pool, bytes_at, in_common, in_two_copies, needs_frames, pool

pytestmark = needs_frames

_PAGES = 64
_ARRAY = f"size = {_PAGES * PAGE_SIZE}; array = mapped(size); ctypes.memset(array, 7, size)"
_DATA = "data = [{'id': number, 'name': f'user{number}'} for number in range(20_000)]"
_READ = "sum(len(row['name']) for row in data)"


def pages(spans: Spans) -> set[int]:
    return {*pages_in(spans).tolist()}


def row_of(found: Audit, pid: int) -> Erosion:
    assert found.erosion is not None
    return next(row for row in found.erosion if row.pid == pid)


def look(workers: Pool) -> Audit:
    return audit(workers.pids, library="nothing")  # the causes of pages of files are not asked for


def test_what_an_earlier_look_proves() -> None:
    """Objects are read, collected, written to: each page that was one frame is proven, and no other."""
    with pool(_ARRAY, _DATA) as workers:
        reads, collects, writes = (workers.fork() for _ in range(3))
        first = look(workers)
        together = {pid: in_common(pid, workers.pid) for pid in workers.workers}
        for pid in workers.workers:
            assert pages(row_of(first, pid).pages.together) == together[pid]
        workers.ask(reads, _READ)
        workers.ask(collects, "import gc; gc.collect()")
        workers.ask(
            writes,
            f"ctypes.memset(array, 7, {10 * PAGE_SIZE}); ctypes.memset(array + {20 * PAGE_SIZE}, 8, 1)",
        )
        now = look(workers)
        since = eroded_since(first, now)
        assert since is not None
        better = proven_by(first, now)
        for eroded in since:
            apart = in_two_copies(eroded.pid, workers.pid)
            really = together[eroded.pid] & apart
            equal = {page for page in apart if bytes_at(eroded.pid, page) == bytes_at(workers.pid, page)}
            row = row_of(better, eroded.pid)
            assert (row.relative, eroded.relative) == (workers.pid, workers.pid)
            proven = really | (pages(row_of(first, eroded.pid).pages.proven) & apart)
            assert pages(row.pages.proven) == proven
            assert pages(row.pages.possible) == apart - proven
            assert pages(row.pages.same) == equal
            assert eroded.proven == len(really) * PAGE_SIZE
            assert row.proven == len(proven) * PAGE_SIZE
            assert eroded.same == len(really & equal) * PAGE_SIZE
            assert row.changed == 0
        start = workers.parent("answer = array")
        written = pages(row_of(better, writes).pages.proven)
        assert {start + number * PAGE_SIZE for number in (*range(10), 20)} <= written
        assert start + 11 * PAGE_SIZE not in written
        assert row_of(better, collects).same > row_of(better, collects).apart // 2  # type: ignore[operator]
        assert growth(first, now).erosion == since
        assert "no longer shared" in plain(tick(better, first))
        text = "\n".join(plain(line) for line in laid_out(growth_view(growth(first, now)), None))
        assert "one frame at the first look, two copies now" in text


def test_what_a_look_proves_of_whoever_was_forked_since_the_first() -> None:
    """As in a pool whose workers are recycled: the looks between prove, and hand on what they have proven."""
    with pool(_ARRAY) as workers:
        looks = audit_over_time._Looks(argparse.Namespace(), look(workers), 0)
        child = workers.fork()
        start = workers.parent("answer = array")
        looks.previous = second = looks.proven(look(workers))
        workers.ask(child, f"ctypes.memset(array, 1, {10 * PAGE_SIZE})")
        looks.previous = third = looks.proven(look(workers))
        fourth = looks.proven(look(workers))
    written = {start + number * PAGE_SIZE for number in range(10)}
    assert not written & pages(row_of(second, child).pages.proven)
    assert written <= pages(row_of(third, child).pages.proven)
    assert written <= pages(row_of(fourth, child).pages.proven)
    assert newly_proven(second, third) >= 10 * PAGE_SIZE
    assert newly_proven(third, fourth) == 0
    eroded = row_of(fourth, child).proven
    told = f"no longer shared {size(eroded)}, 0 bytes of it since the last look"
    assert told in plain(tick(fourth, looks.first, third))


_WAYS = {
    "mutate": "for row in data: row['more'] = 1",
    "lazy import": "import sqlite3, decimal, asyncio",
    "cache fill": "cache = {number: str(number) * 3 for number in range(20_000)}",
    "numpy views": "views = [numbers[at : at + 10] for at in range(0, 50_000, 10)]; numbers[::2] = 5",
    "arena reuse": "data = None; import gc; gc.collect(); again = [[number] for number in range(40_000)]",
    "freeze, then collect": "import gc; gc.freeze(); gc.collect()",
    "threads": """
import threading
threads = [threading.Thread(target=lambda: [len(row["name"]) for row in data]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
}


@pytest.mark.parametrize("way", _WAYS)
def test_each_way_to_erode(way: str) -> None:
    """Right to the page, whatever a worker does; and what grew is what the kernel says, within 5 %."""
    numbers = "import numpy; numbers = numpy.arange(100_000) * 1.0" if "numpy" in way else ""
    with pool(_DATA, numbers) as workers:
        child = workers.fork()
        first, together = look(workers), in_common(child, workers.pid)
        before = sum(uss_of(pid) for pid in workers.pids)
        workers.ask(child, _WAYS[way])
        really = sum(uss_of(pid) for pid in workers.pids) - before
        found = proven_by(first, look(workers))
        row, apart = row_of(found, child), in_two_copies(child, workers.pid)
        equal = {page for page in apart if bytes_at(child, page) == bytes_at(workers.pid, page)}
    assert pages(row.pages.proven) == together & apart
    assert pages(row.pages.possible) == apart - together
    assert pages(row.pages.same) == equal
    # Others come and go meanwhile, and with them pages of files that are mapped once by chance.
    assert abs(growth(first, found).uss.change - really) < 0.05 * really + (256 << 10)


def uss_of(pid: int) -> int:
    rollup = rollup_of(pid)
    return (rollup["Private_Clean"] + rollup["Private_Dirty"]) * KB


def test_two_that_allocate_after_the_fork_prove_nothing() -> None:
    """Both map memory at one address and write the same there; a third relative is forked afterwards."""
    with pool("at = mapped(1 << 20); libc.munmap(ctypes.c_void_p(at), 1 << 20)") as workers:
        length = _PAGES * PAGE_SIZE
        same = f"libc.mmap(at, {length}, 3, 0x100032, -1, 0); ctypes.memset(at, 7, {length})"
        child = workers.fork()
        first = look(workers)
        workers.ask(child, same)
        workers.parent(same)
        youngest = workers.fork()
        start = workers.parent("answer = at")
        built = {start + number * PAGE_SIZE for number in range(_PAGES)}
        found = proven_by(first, look(workers))
        row = row_of(found, child)
        assert built <= pages(row.pages.possible) & pages(row.pages.same)
        assert not built & pages(row.pages.proven)
        assert built <= pages(row_of(found, youngest).pages.together)
        assert "look alike" in "\n".join(plain(line) for line in laid_out(lines(found), None))


def test_an_elder_relative_proves() -> None:
    """A worker was forked between two moments at which the parent had the frame: it has had it as well."""
    with pool(_ARRAY) as workers:
        elder, worker, younger = (workers.fork() for _ in range(3))
        start = workers.parent("answer = array")
        workers.ask(worker, f"ctypes.memset(array, 1, {PAGE_SIZE})")
        workers.ask(elder, f"ctypes.memset(array + {PAGE_SIZE}, 1, 1)")
        workers.parent(f"ctypes.memset(array + {2 * PAGE_SIZE}, 7, 1)")
        found = look(workers)
        first, second, third = (start + number * PAGE_SIZE for number in range(3))
        assert first in pages(row_of(found, worker).pages.proven)
        # Before the others were forked, the parent may not have had it.
        assert second in pages(row_of(found, elder).pages.possible)
        for pid in (elder, worker, younger):  # of all three the copy is the one from before the forks
            assert third in pages(row_of(found, pid).pages.proven)
            assert third in pages(row_of(found, pid).pages.same)


def test_who_was_there_before_the_parent_proves() -> None:
    """A worker forks one itself: what it has in common with its own parent it has had before that fork."""
    with pool(_ARRAY) as workers:
        worker = workers.fork()
        time.sleep(0.05)  # the clock of starts ticks every 10 ms
        length = _PAGES * PAGE_SIZE
        start, late = workers.parent("late = mapped(size); answer = array, late")
        workers.ask(worker, f"libc.mmap({late}, size, 3, 0x100032, -1, 0); ctypes.memset({late}, 7, size)")
        grandchild = workers.ask(worker, "answer = fork()")
        wait_until_at_rest(grandchild)
        write = f"ctypes.memset(array, 1, {PAGE_SIZE}); ctypes.memset({late}, 1, 1)"
        workers.ask(worker, f"answer = ask({grandchild}, {write!r})")
        workers.parent(f"ctypes.memset({late}, 7, {length})")  # built twice, after the fork
        wait_until_at_rest(*workers.pids, grandchild)
        found = audit([*workers.pids, grandchild], library="nothing")
        row = row_of(found, grandchild)
        assert row.relative == worker
        assert start in pages(row.pages.proven)
        assert late in pages(row.pages.possible)
        assert not {late + number * PAGE_SIZE for number in range(_PAGES)} & pages(row.pages.proven)


_ORPHANS = f"""
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
(told, tells), (ends, end) = os.pipe(), os.pipe()
middle = os.fork()
if middle == 0:
    ctypes.memset(array, 1, {_PAGES * PAGE_SIZE})
    for _ in range(2):
        if os.fork() == 0:
            os.write(tells, b"%d " % os.getpid())
            while True: signal.pause()
    os.read(ends, 1)
    os._exit(0)
ctypes.memset(array, 2, {_PAGES * PAGE_SIZE})
answer = b""
while answer.count(b" ") < 2: answer += os.read(told, 100)
os.write(end, b"x")
answer = answer.decode()
"""


@pytest.mark.parametrize("waits", [True, False])
def test_who_adopted_orphans_proves_nothing(waits: bool) -> None:
    """Their own parent wrote after its fork, and so did who adopted them: they have never had its frames."""
    with pool(_ARRAY) as workers:
        orphans = workers.parent(_ORPHANS + ("os.waitpid(middle, 0)" if waits else ""))
        pids = [int(pid) for pid in orphans.split()]
        while any(read_stat(pid)[1][1] != str(workers.pid) for pid in pids):
            time.sleep(0.001)
        wait_until_at_rest(*pids)
        start = workers.parent("answer = array")
        found = audit([workers.pid, *pids], library="nothing")
        workers.parent(f"for pid in {pids}: os.kill(pid, 9)")
    apart = {start + number * PAGE_SIZE for number in range(_PAGES)}
    for pid in pids:
        assert apart <= pages(row_of(found, pid).pages.possible)
        assert not pages(row_of(found, pid).pages.proven)


def test_siblings_whose_parent_has_ended_or_is_not_asked_about() -> None:
    with pool(_ARRAY) as workers:
        elder, worker = workers.fork(), workers.fork()
        workers.ask(worker, "ctypes.memset(array, 1, 1)")
        found = audit([elder, worker], library="nothing")
        start = workers.parent("answer = array")
        assert found.erosion is not None
        assert [(row.pid, row.relative) for row in found.erosion] == [(worker, elder)]
        assert start in pages(row_of(found, worker).pages.possible)
        whole = look(workers)
        workers.ask(elder, f"ctypes.memset(array + {PAGE_SIZE}, 1, 1)")
        since = eroded_since(whole, audit([elder, worker]))  # by way of the parent, of the first look only
        assert since is not None
        assert since[0].proven >= PAGE_SIZE
        row = row_of(proven_by(whole, audit([elder, worker])), worker)
        assert start + PAGE_SIZE in pages(row.pages.proven)
        assert start not in pages(row.pages.proven)


def test_strangers_have_nothing_in_common() -> None:
    with pool(_ARRAY) as workers, pool(_ARRAY) as strangers:
        assert audit([workers.pid, strangers.pid]).erosion == ()


def test_what_changes_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page table is read again after the bytes: a page that lies in another frame by then is left out."""
    with pool(_ARRAY) as workers:
        child = workers.fork()
        workers.ask(child, f"ctypes.memset(array, 1, {_PAGES * PAGE_SIZE})")
        start = workers.parent("answer = array")
        read = contents.ProcessMemory.pages

        def meanwhile(
            memory: contents.ProcessMemory, addresses: np.ndarray, room: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray]:
            if memory.pid == workers.pid and start in addresses:
                drop = f"libc.madvise(array, {PAGE_SIZE}, 4)"
                take = "ctypes.memset(mapped(1 << 20), 1, 1 << 20)"  # or it has the old frame again
                workers.ask(child, f"{drop}; {take}; ctypes.memset(array, 1, 1)")
            return read(memory, addresses, room)

        monkeypatch.setattr(contents.ProcessMemory, "pages", meanwhile)
        row = row_of(look(workers), child)
        assert row.changed >= PAGE_SIZE  # the child has done more than that
        assert start not in pages(row.pages.same)
        text = "\n".join(plain(line) for line in laid_out(lines(audit(workers.pids)), None))
        assert "changed while they were read" in text


def test_what_the_kernel_moves_to_another_frame() -> None:
    """The page table of one process is read after a page was moved: it is one page all the same."""
    with pool(_ARRAY) as workers:
        elder, worker, younger = (workers.fork() for _ in range(3))
        start = workers.parent("answer = array")
        workers.ask(worker, f"ctypes.memset(array + {PAGE_SIZE}, 1, 1)")
        memories = {pid: memory_of(pid) for pid in workers.pids}
        moved = memories[worker].frames + (memories[worker].addresses == start).astype(np.uint64)
        memories[worker] = replace(memories[worker], frames=moved)
        rows = erosion_of([*memories.values()], np.empty(0, np.uint64))
    row = next(row for row in rows if row.pid == worker)
    assert start in pages(row.pages.together)
    assert start + PAGE_SIZE in pages(row.pages.proven)
    assert start not in pages(row.pages.proven) | pages(row.pages.possible)
    assert {elder, worker, younger} == {row.pid for row in rows}


def memory_of(pid: int) -> PrivateMemory:
    with PageMap(pid) as pagemap:
        return memory_in(pid, Pages(pagemap, read_maps(pid), frames=True))


def test_who_ends_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool(_ARRAY) as workers:
        child = workers.fork()
        workers.ask(child, "ctypes.memset(array, 1, 1)")

        def gone(memory: object, addresses: object, room: object) -> None:
            raise ProcessGone(child, "has ended")

        monkeypatch.setattr(contents.ProcessMemory, "pages", gone)
        row = row_of(audit(workers.pids, library="nothing"), child)
        assert row.same is None
        assert row.apart >= PAGE_SIZE


def test_without_frames_it_is_unknown(tmp_path: Path) -> None:
    with pool(_ARRAY) as workers:
        workers.fork()
        flags, frames = audit(workers.pids, level="flags"), look(workers)
        assert flags.erosion is None
        assert flags.to_json()["erosion"] is None
        assert eroded_since(frames, flags) is None
        assert proven_by(flags, frames) == frames
        text = "\n".join(plain(line) for line in laid_out(lines(flags), None))
        assert "erosion since fork: unknown" in text


def test_to_json_and_back(tmp_path: Path) -> None:
    with pool(_ARRAY) as workers:
        child = workers.fork()
        workers.ask(child, "ctypes.memset(array, 1, 1)")
        found = look(workers)
    found.save(tmp_path / "audit")
    assert Audit.load(tmp_path / "audit") == found
    assert json.loads((tmp_path / "audit").read_text())["erosion"][0]["pid"] == child


def test_reading_is_cheap() -> None:
    """What is not read is not asked for: to compare takes no more than a few reads of the same pages."""
    with pool("size = 32 << 20; array = mapped(size); ctypes.memset(array, 7, size)") as workers:
        child = workers.fork()
        workers.ask(child, "ctypes.memset(array, 7, size)")
        start = workers.parent("answer = array")
        assert min(_to_compare(workers, start) for _ in range(3)) < 8


def _to_compare(workers: Pool, start: int) -> float:
    """How much time it takes to compare 32 MiB, in the time of reading these plainly."""
    plainly = time.process_time()
    for pid in workers.pids:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            for _ in range(32):
                memory.read(1 << 20)
    plainly = time.process_time() - plainly
    counted = time.process_time()
    audit(workers.pids, causes=False)
    counted = time.process_time() - counted
    told = time.process_time()
    same = row_of(audit(workers.pids, library="nothing"), workers.workers[0]).same
    assert same is not None
    assert same >= 32 << 20
    return (time.process_time() - told - counted) / plainly


_AGAIN = """
import resource, sys
import numpy as np
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Memo, survey
from miniloader.lab.erosion.erode import erosion
memo = Memo()
surveys = [survey(int(pid), memo, wanted=lambda _: False) for pid in sys.argv[1:]]
for _ in range(3):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [row] = erosion(surveys, np.empty(0, np.uint64), contents=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began) / (row.proven + row.possible) * PAGE_SIZE)
"""


def test_what_a_part_took_the_next_one_has() -> None:
    """No memory is had from the kernel for each part, which clears it page by page."""
    with pool(_DATA.replace("20_000", "80_000")) as workers:
        workers.ask(workers.fork(), _READ)
        pids = map(str, workers.pids)
        done = subprocess.run(
            [sys.executable, "-c", _AGAIN, *pids], capture_output=True, text=True, check=True
        )
    assert float(done.stdout) < 0.1, done.stdout
