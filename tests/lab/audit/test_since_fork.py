"""Who has had a library since the fork, told by what processes have in common."""

from __future__ import annotations

import sys
from pathlib import Path

from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.since_fork import had_at_fork, parents_in
from tests.lab.erosion.pools import Pool, needs_frames, pool


def had(workers: Pool, demo: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Who was forked by whom, and of them who is sure to have had the library then."""
    found = audit(workers.pids, library=demo.name)
    parents = parents_in(found.processes)
    return parents, had_at_fork(found.library(demo.name), parents)


@needs_frames
def test_who_was_forked_with_a_library_has_had_it(demo: Path) -> None:
    with pool(f"lib = ctypes.CDLL({str(demo)!r})") as workers:
        child = workers.fork()
        assert had(workers, demo) == ({child: workers.pid}, {child: workers.pid})


@needs_frames
def test_who_has_loaded_it_for_himself_has_not_though_it_may_be_at_one_place(demo: Path) -> None:
    load = f"lib = ctypes.CDLL({str(demo)!r})"
    with pool() as workers:
        child = workers.fork()
        workers.parent(load)
        workers.ask(child, load)
        (library,) = audit(workers.pids, library=demo.name).libraries
        assert len({process.base for process in library.processes}) == 1
        assert had(workers, demo) == ({child: workers.pid}, {})


def test_who_has_executed_a_program_is_another_than_was_forked() -> None:
    start = f"other = subprocess.Popen([{sys.executable!r}, '-c', 'input()'], stdin=-1); answer = other.pid"
    with pool("import subprocess") as workers:
        child, other = workers.fork(), workers.parent(start)
        found = audit([workers.pid, child, other], causes=False)
    assert parents_in(found.processes) == {child: workers.pid}
