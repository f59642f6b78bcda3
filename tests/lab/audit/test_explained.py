"""What is found once for copies that relatives have in common is what each process shows when asked alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import miniloader
from miniloader.evidence import cause
from miniloader.kernel.probe import best_level
from miniloader.lab.audit import explain
from miniloader.lab.audit.result import Audit
from tests.lab.audit.told_processes import AT_SYMBOLS, LOADED_BY, told, told_children

needs_frames = pytest.mark.skipif(best_level() != "frames", reason="needs root: frames")

_CHILD_WRITES = """
def child_that_writes():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        store("demo_counters", 5); store("demo_current", 0)
        os.write(writing, b"x")
        while True: signal.pause()
    os.close(writing)
    os.read(reading, 1)
    return child
"""


def _told_of_pages(audit: Audit) -> dict[tuple[str, int, int], tuple[object, ...]]:
    """What is told of each private page in each process."""
    return {
        (library.path, page.vaddr, pid): (page.causes, page.written, page.symbols, page.kinds, page.reason)
        for library in audit.libraries
        for page in library.private_pages
        for pid in page.pids
    }


@needs_frames
def test_a_family_is_told_as_each_of_it_alone(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = list[int]()

    def counting(*arguments: object, **options: object) -> cause.Classified:
        looked_at.append(len(arguments[3]))  # type: ignore[arg-type]
        return cause.classify(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(explain, "classify", counting)
    by = "the system's loader"
    lines = LOADED_BY[by].format(path=str(demo)), AT_SYMBOLS.format(by=by), _CHILD_WRITES
    with told(*lines, "lib.demo_next()") as parent, told_children(parent, 2) as children:
        writer = parent("answer = child_that_writes()")
        pids = [parent.pid, *children, writer]
        together = miniloader.audit(pids)
        seen_together = sum(looked_at)
        alone = [miniloader.audit([pid]) for pid in pids]
        parent(f"os.kill({writer}, 9); os.waitpid({writer}, 0)")
    one_by_one = {place: said for audit in alone for place, said in _told_of_pages(audit).items()}
    assert _told_of_pages(together) == one_by_one
    (page,) = [
        page
        for page in together.library(str(demo)).private_pages
        if "demo_current" in page.written and page.pids == (writer,)
    ]
    assert "overwritten" in page.causes
    assert seen_together < sum(looked_at[: len(looked_at)]) - seen_together  # and not each page four times


@needs_frames
def test_a_page_in_doubt_is_not_remembered(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed while one process was looked at is asked again in the next."""
    original, changed = explain.Pages.changed, list[bool]()

    def everything_changes_once(self: explain.Pages) -> object:
        changed.append(True)
        return original(self) if len(changed) > 1 else self.entries == self.entries

    monkeypatch.setattr(explain.Pages, "changed", everything_changes_once)
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as parent, told_children(parent, 1) as (child,):
        found = miniloader.audit([parent.pid, child]).library(str(demo))
    causes = {pid: set[str]() for pid in (parent.pid, child)}
    for page in found.private_pages:
        for pid in page.pids:
            causes[pid] |= {*page.causes}
    assert causes[parent.pid] == {"unknown"}
    assert causes[child] == {"relocation", "loader", "bss"}
