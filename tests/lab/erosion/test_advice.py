"""What an audit promises would save memory, against a second run in which that is done."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.result import Audit
from miniloader.lab.audit.since_fork import parents_in
from miniloader.lab.erosion.advice import Advice, advise
from miniloader.report.audit import lines, sentence
from miniloader.report.erosion import advice_view
from miniloader.report.numbers import size
from miniloader.report.text import laid_out, plain
from tests.lab.audit.told_processes import KB, rollup_of, told, wait_until_at_rest
from tests.lab.erosion.pools import needs_frames, pool
from tests.memory import needs_scan

pytestmark = needs_frames

_DATA = "data = [{'id': number, 'name': f'user{number}'} for number in range(20_000)]; import gc"
_COLLECT = "gc.collect()"


def advice(found: Audit, kind: str) -> Advice:
    return next(piece for piece in advise(found) if piece.kind == kind)


def uss_of(pids: list[int]) -> int:
    sums = [rollup_of(pid) for pid in pids]
    return sum(row["Private_Clean"] + row["Private_Dirty"] for row in sums) * KB


def anonymous_pss_of(pids: list[int]) -> int:
    """What they take in all: of a page that three have in three copies, USS counts the first one as well.

    Files are left out: how much of them is theirs depends on who else maps them.
    """
    wait_until_at_rest(*pids)
    return sum(rollup_of(pid)["Pss_Anon"] for pid in pids) * KB


def test_freezing_saves_at_most_what_is_said() -> None:
    """And nearly that, where nothing but the collector has touched it."""
    grown = {}
    for freeze in ("", "gc.collect(); gc.freeze()"):
        with pool(_DATA, freeze) as workers:
            children = [workers.fork() for _ in range(2)]
            before = anonymous_pss_of(workers.pids)
            for child in children:
                workers.ask(child, _COLLECT)
            grown[freeze] = anonymous_pss_of(workers.pids) - before
            if not freeze:
                promised = advice(audit(workers.pids, library="nothing"), "freeze")
                assert promised.pids == tuple(children)
    saved = grown[""] - grown["gc.collect(); gc.freeze()"]
    assert saved > 1 << 20
    assert promised.bound == "at most"
    assert saved <= promised.bytes <= 1.6 * saved


def test_what_freezing_saves_is_counted_once() -> None:
    """The parent collects: its copy is one, however many workers have the pages in common without it."""
    grown = {}
    for freeze in ("", "gc.collect(); gc.freeze()"):
        with pool(_DATA, freeze) as workers:
            for _ in range(4):
                workers.fork()
            before = anonymous_pss_of(workers.pids)
            workers.parent(_COLLECT)
            grown[freeze] = anonymous_pss_of(workers.pids) - before
            if not freeze:
                found = audit(workers.pids, library="nothing")
                promised = advice(found, "freeze")
    saved = grown[""] - grown["gc.collect(); gc.freeze()"]
    assert saved > 1 << 20
    assert saved <= promised.bytes <= 1.6 * saved
    assert all(row.same is not None and row.same > 0.9 * saved for row in found.erosion or ())


def test_one_more_worker_costs_what_is_said() -> None:
    with pool(_DATA, "array = mapped(8 << 20); ctypes.memset(array, 1, 8 << 20)") as workers:
        for _ in range(3):
            workers.ask(workers.fork(), "ctypes.memset(array, 1, 8 << 20)")
        found = audit(workers.pids, library="nothing")
        promised, freed = advice(found, "one-more"), advice(found, "ending-one")
        before = uss_of(workers.pids)
        workers.ask(workers.fork(), "ctypes.memset(array, 1, 8 << 20)")
        really = uss_of(workers.pids) - before
    assert promised.bytes > 8 << 20
    assert abs(promised.bytes - really) < 0.15 * really
    assert 8 << 20 <= freed.bytes <= promised.bytes


def test_of_workers_that_differ_the_largest_is_what_one_more_costs_at_most() -> None:
    """As of a server's helpers and the one that serves: their median is none of them."""
    with pool("array = mapped(8 << 20)") as workers:
        children = [workers.fork() for _ in range(4)]
        workers.ask(children[0], "ctypes.memset(array, 1, 8 << 20)")
        found = audit(workers.pids, library="nothing")
        promised, freed = advice(found, "one-more"), advice(found, "ending-one")
    largest = max(process.uss for process in found.processes if process.pid in children)
    assert (promised.bound, freed.bound) == ("at most", "at least")
    assert promised.bytes == largest > 8 << 20 > freed.bytes


def test_shared_memory_is_not_freed_by_whoever_ends() -> None:
    """A server's pool of buffers is mapped by who touches it: alone, yet it outlives him."""
    length = 16 << 20
    shared = f"array = libc.mmap(None, {length}, 3, 0x21, -1, 0)"  # MAP_SHARED | MAP_ANONYMOUS
    with pool("libc.mmap.restype = ctypes.c_void_p", shared) as workers:
        child = workers.fork()
        workers.ask(child, f"ctypes.memset(array, 1, {length})")
        found = audit(workers.pids, library="nothing")
        costs, freed = advice(found, "one-more"), advice(found, "ending-one")
        assert next(process.uss for process in found.processes if process.pid == child) > length
        workers.parent(f"os.kill({child}, 9); os.waitpid({child}, 0)")
        assert workers.parent("answer = ctypes.string_at(array, 1)[0]") == 1
    assert freed.bytes <= costs.bytes < length // 4


def test_what_was_copied_since_the_fork_is_not_saved_by_preparing(demo: Path) -> None:
    """A page that holds what relocation left there may have been written to all the same, with the same."""
    load = f"lib = ctypes.CDLL({str(demo)!r})"
    with pool(load) as workers:
        (library,) = audit([workers.pid], library=demo.name).libraries
        page = next(page for page in library.private_pages if page.only_relocated)
        address = library.processes[0].base + page.vaddr
        write = f"libc.mprotect(ctypes.c_void_p({address}), {PAGE_SIZE}, 3);"
        write += f"ctypes.memmove({address}, ctypes.string_at({address}, {PAGE_SIZE}), {PAGE_SIZE})"
        alone = advise(audit([workers.pid], library=demo.name))
        children = [workers.fork() for _ in range(3)]
        for child in children:
            workers.ask(child, write)
        found = audit(workers.pids, library=demo.name)
        text = plain(sentence(found.library(demo.name), parents_in(found.processes)))
        whole = audit(workers.pids)
    (before,), (after,) = ([row for row in rows if row.kind == "prepared"] for rows in (alone, advise(found)))
    assert after.bytes <= before.bytes
    assert "0 to 1 only relocated, yet copied again since the fork" in text
    named = {
        os.path.basename(path) for row in advise(whole) if row.kind == "prepared" for path in row.libraries
    }
    assert demo.name in named
    assert not {name for name in named if name.startswith(("python", "libc.", "ld-"))}


def test_preloading_saves_at_least_what_is_said() -> None:
    """Two workers import the same, late; then their parent has done it before the fork."""
    late, names = "import ssl, sqlite3", ("libcrypto", "libssl", "libsqlite3")
    with pool() as workers:
        children = [workers.fork() for _ in range(3)]
        for child in children:
            workers.ask(child, late)
        found = audit(workers.pids)
        promised, without = advice(found, "preload"), uss_of(children)
        text = "\n".join(plain(line) for line in laid_out(lines(found), 100))
    with pool(late) as workers:
        children = [workers.fork() for _ in range(3)]
        for child in children:
            workers.ask(child, late)
        preloaded = uss_of(children)
    assert promised.bound == "at least"
    assert any(any(name in path for path in promised.libraries) for name in names)
    assert PAGE_SIZE * 60 < promised.bytes <= without - preloaded
    assert "loading before the fork: at least" in text
    assert "what would help" in text


_ARRAY = """
huge = 2 << 20
array = -(-mapped(5 * huge) // huge) * huge
libc.madvise(array, 4 * huge, 15)  # MADV_NOHUGEPAGE
ctypes.memset(array, 1, 4 * huge)
"""
_COLLAPSE_SOME = "libc.madvise(array, 2 * huge, 14); answer = libc.madvise(array, 2 * huge, 25)"
_COLLAPSE_NONE = "libc.madvise(array, 2 * huge, 15); answer = libc.madvise(array, 2 * huge, 0)"  # alike


@needs_scan
def test_no_huge_pages_save_what_is_said() -> None:
    """A worker writes to a page of each of four huge ones; two of these it has had collapsed."""
    write = "for number in range(4): ctypes.memset(array + number * huge, 7, 1)"
    taken = list[int]()
    for collapse in (_COLLAPSE_SOME, _COLLAPSE_NONE):
        with pool(_ARRAY) as workers:
            child = workers.fork()
            before = anonymous_pss_of(workers.pids)
            if workers.ask(child, collapse) != 0:
                pytest.skip("this kernel lacks MADV_COLLAPSE, or this machine free huge pages")
            workers.ask(child, write)
            taken.append(anonymous_pss_of(workers.pids) - before)
            found = audit(workers.pids, library="nothing")
            pieces = [piece for piece in advise(found) if piece.kind == "huge-pages"]
            text = "\n".join(plain(line) for line in laid_out(lines(found), None))
            assert ("3.99 MiB of the same bytes were collapsed into huge pages" in text) is bool(pieces)
            assert ("the garbage collector touched" in text) is not bool(pieces), "no object lies there"
            if collapse == _COLLAPSE_SOME:
                (promised,) = pieces
                assert (promised.bound, promised.pids) == ("at most", (child,))
            else:
                assert not pieces
    assert promised.bytes == 2 * (2 << 20) - 2 * PAGE_SIZE
    assert abs(taken[0] - taken[1] - promised.bytes) < 0.01 * promised.bytes


_THREADS = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
enum { THREADS = 6, CHUNKS = 4000, SIZE = 1000 };
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static void *work(void *pins) {
    static char *chunks[CHUNKS];
    pthread_mutex_lock(&turn);
    for (int i = 0; i < CHUNKS; i++) memset(chunks[i] = malloc(SIZE), 1, SIZE);
    for (int i = 0; i < CHUNKS - 1; i++) free(chunks[i]);   /* the last one stays: nothing is given back */
    pthread_mutex_unlock(&turn);
    write(1, "x", 1);
    for (;;) pause();
}
int main(void) {
    pthread_t thread;
    for (int i = 0; i < THREADS; i++) pthread_create(&thread, 0, work, 0);
    for (;;) pause();
}
"""


def test_one_arena_saves_at_most_what_is_said(tmp_path: Path) -> None:
    """And nearly that, where threads work in turns: all but the first would use again what one has freed."""
    source, program = tmp_path / "threads.c", tmp_path / "threads"
    source.write_text(_THREADS)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, source], check=True)
    taken, found = list[int](), list[Audit]()
    for arenas in dict[str, str](), {"MALLOC_ARENA_MAX": "1"}:
        with subprocess.Popen([program], stdout=subprocess.PIPE, env={**os.environ, **arenas}) as process:
            assert process.stdout is not None
            assert len(process.stdout.read(6)) == 6
            wait_until_at_rest(process.pid)
            taken.append(uss_of([process.pid]))
            found.append(audit([process.pid], library="nothing"))
            process.kill()
    promised, saved = advice(found[0], "arenas"), taken[0] - taken[1]
    assert promised.bound == "at most"
    assert 5 * 3_900_000 < saved <= promised.bytes <= 1.3 * saved
    assert "arenas" not in {piece.kind for piece in advise(found[1])}
    (line,) = [plain(line) for line in laid_out(advice_view(replace(found[0], erosion=None)), None)][2:]
    assert f"one arena of malloc for all threads (MALLOC_ARENA_MAX=1): at most {size(promised.bytes)}" in line


def build(library: Path, mebibytes: int) -> None:
    """A library with so much data, in the place of one that may be there."""
    source = f"const char data[{mebibytes} << 20] = {{1}}; int size = sizeof data;"
    options = ["-shared", "-fPIC", "-Wl,--build-id", "-x", "c", "-"]
    subprocess.run(["gcc", *options, "-o", f"{library}.new"], input=source, text=True, check=True)
    Path(f"{library}.new").rename(library)


def test_one_build_saves_at_most_what_is_said(tmp_path: Path) -> None:
    """A process has a library that has been replaced; then both processes have the new one."""
    library = tmp_path / "libbuilt.so.1"
    load = f"lib = ctypes.CDLL({str(library)!r})"
    read = "at = ctypes.addressof(ctypes.c_char.in_dll(lib, 'data')); len(ctypes.string_at(at, {} << 20))"
    build(library, 1)
    with told(load, read.format(1)) as old:
        build(library, 2)
        with told(load, read.format(2)) as new:
            several = audit([old.pid, new.pid], library=library.name)
            text = "\n".join(plain(line) for line in laid_out(advice_view(several), None))
        with told(load, read.format(2)) as first, told(load, read.format(2)) as second:
            alike = audit([first.pid, second.pid], library=library.name)
        promised = advice(several, "other-build")
        assert (promised.bound, promised.pids, promised.libraries) == ("at most", (old.pid,), (str(library),))
    before, after = (sum(row.takes or 0 for row in found.libraries) for found in (several, alike))
    assert 1 << 20 <= before - after <= promised.bytes
    assert "one build of libbuilt.so.1 instead of several: at most" in text
    assert "other-build" not in {piece.kind for piece in advise(alike)}


def test_nothing_to_say_of_strangers_and_without_frames() -> None:
    with pool() as workers:
        workers.fork()
        kinds = {piece.kind for piece in advise(audit(workers.pids, level="flags"))}
        alone = {piece.kind for piece in advise(audit([workers.pid]))}
    assert kinds | alone <= {"prepared", "twice", "other-build"}


@pytest.mark.parametrize(("paths", "said"), [(["/a/libz.so"], "libz.so leaves"), (["a.so", "b.so"], "leave")])
def test_one_library_leaves_and_several_leave(
    paths: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = Advice("preload", "at least", PAGE_SIZE, (1, 2), tuple(paths))
    monkeypatch.setattr("miniloader.lab.erosion.advice.advise", lambda audit: (piece,))
    shown = [plain(line) for line in laid_out(advice_view(audit([os.getpid()], causes=False)), None)]
    assert f"{said} in the heap" in shown[-1]


def test_of_many_families_the_largest_figures_are_shown() -> None:
    """An audit of a whole machine has a family for every shell that runs a pipe."""
    with pool("array = mapped(1 << 20); ctypes.memset(array, 1, 1 << 20)") as workers:
        workers.ask(workers.fork(), "ctypes.memset(array, 1, 1 << 20)")
        found = audit(workers.pids, library="nothing")
    assert found.erosion
    (row,) = found.erosion
    rows = tuple(replace(row, relative=10_000 + number) for number in range(20))
    shown = [plain(line) for line in laid_out(advice_view(replace(found, erosion=rows)), None)]
    assert sum("costs about" in line or "frees at least" in line for line in shown) <= 8
    assert "more; --json has all" in shown[-1]
