"""What a test claims of snapshots holds, fails with a picture, or is refused where nobody can tell."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miniloader.errors import EvidenceError, UsageError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.testing import (
    StartCrew,
    Workers,
    assert_copied_only,
    assert_memory,
    assert_private,
    assert_private_pages,
    assert_shared,
)

needs_frames = pytest.mark.needs_root("with whom a copy is shared, only frames tell")
RELOCATED = 4  # three of relro, one of data: see fixtures/demo.c
by_both = pytest.mark.parametrize("workers", ["miniloader", "dlopen"], indirect=True)


def anonymous_pages(pid: int, library: Path) -> int:
    """The kernel's own sum of copied pages in the library's mappings."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            inside = line.endswith(str(library))
        elif inside and line.startswith("Anonymous:"):
            total += int(line.split()[1]) * 1024
    return total // PAGE_SIZE


def failure(claim: Callable[..., None], *arguments: Any, **options: Any) -> str:
    """What an assertion says that does not hold."""
    with pytest.raises(AssertionError) as caught:
        claim(*arguments, **options)
    return str(caught.value)


@by_both
def test_the_budget_is_the_kernel_s_count(workers: Workers, demo: Path) -> None:
    for step, written in (("loaded", 0), ("written", 1)):
        if written:
            workers[0].write("demo_spare", 1)
            workers[0].write("demo_history", 1, offset=2 * PAGE_SIZE)  # bss was never the file's
        looked = workers.snapshot(step)
        most = RELOCATED + written
        counts = [anonymous_pages(pid, demo.resolve()) for pid in workers.pids]
        assert counts == [most, RELOCATED, RELOCATED]
        assert_private_pages(looked, at_most=most)
        assert_copied_only(looked, symbols=["demo_spare"])
        message = failure(assert_private_pages, looked, at_most=most - 1, library="libdemo")
        who = 1 if written else 3
        assert message.startswith(
            f"{step}: libdemo.so: {most} private pages in {who} of 3 processes (pid {workers.pids[0]}"
        )


def test_what_is_shared_and_what_is_private(workers: Workers) -> None:
    workers.call("demo_apply(0, 1)->long")
    workers[0].write("demo_spare", 1)
    looked = workers.snapshot()
    for level in (None, "flags"):
        assert_shared(looked, section=".text", level=level)
        assert_private(looked, symbols=["demo_operations", "demo_current"], level=level)
    assert_shared(looked, symbols=["demo_apply"])
    assert_private(looked, section=".data.rel.ro")
    message = failure(assert_shared, looked, symbols=["demo_spare"])
    assert message.startswith(
        "demo_spare of libdemo.so is not shared: 1 of 1 page\n  0x8000  .data demo_spare: "
    )
    assert "copied in 1, shared in 2 (write)" in message
    message = failure(assert_private, looked, symbols=["demo_spare"])
    assert message.startswith("demo_spare of libdemo.so is not private: 1 of 1 page")


def test_a_failure_shows_the_grid(workers: Workers) -> None:
    workers[1].write("demo_spare", 1)
    lines = failure(assert_shared, workers.snapshot("s"), symbols=["demo_spare"]).splitlines()
    rows = [line for line in lines if re.match(r" *\d+ [0-9a-f]+ ", line)]
    assert [int(row.split()[0]) for row in rows] == [*workers.pids]
    assert [row.split()[-2][0] for row in rows] == ["█", "B", "█"]  # of data, the first page
    assert any(line.endswith("vaddr 0x8000 ▲") for line in lines)
    assert any("a frame of this process alone: copied on write" in line for line in lines)
    assert re.fullmatch("evidence: (frames|flags): proves which pages .*", lines[-1])


@by_both
def test_only_what_was_named_may_be_written(workers: Workers) -> None:
    loaded = workers.snapshot("loaded")
    assert_copied_only(loaded, symbols=[])
    workers.write("demo_counters", 101)
    workers[0].write("demo_history", 5)
    counted = workers.snapshot("counted")
    assert_copied_only(counted, symbols=["demo_counters", "demo_history"])
    assert_copied_only([loaded, counted], symbols=["demo_counters", "demo_history"])
    message = failure(assert_copied_only, counted, symbols=["demo_counters"])
    assert message.startswith("counted: libdemo.so: more than demo_counters was written\n")
    assert f"demo_history was written by 1 of 3 processes (pid {workers.pids[0]})" in message
    assert "demo_counters was written by" not in message

    workers[2].write("demo_counters", 7)  # again, as before: since then, only that
    again = workers.snapshot("again")
    assert_copied_only([loaded, counted, again], symbols=["demo_counters", "demo_history"])
    message = failure(assert_copied_only, [counted, again])
    assert f"demo_counters was written by 1 of 3 processes (pid {workers.pids[2]})" in message
    assert "demo_history" not in message.partition("pid base")[0]
    workers[2].write("demo_counters", 100)  # as it is in the file
    message = failure(assert_copied_only, [again, workers.snapshot()])
    assert "demo_counters was written by 1 of 3" in message


def test_a_relocated_slot_that_is_overwritten_and_a_page_that_looks_untouched(workers: Workers) -> None:
    workers[0].write("demo_current", 8)
    workers[1].write("demo_spare", 1)
    workers[1].write("demo_spare", -1)
    looked = workers.snapshot()
    message = failure(assert_copied_only, looked, symbols=["demo_settings"])
    assert f"demo_current was written by 1 of 3 processes (pid {workers.pids[0]})" in message
    assert f".data: copied by 1 of 3 processes (pid {workers.pids[1]}), yet as in the file" in message
    assert_copied_only(looked, symbols=["demo_current", "demo_spare"])


def test_bytes_that_belong_to_no_symbol(server: Workers) -> None:
    memory = server.snapshot(library="libdemo").library()
    (_, end), (history, _) = memory.symbol("demo_current")[0], memory.symbol("demo_history")[0]
    assert end < history
    server.call("ctypes:memset", memory.look.processes[0].base + end, 1, 1)
    message = failure(assert_copied_only, server.snapshot(library="libdemo"), symbols=["demo_current"])
    assert f"{end:#x}  what has no symbol was written by 1 of 1 process" in message


def test_what_forks_still_share(server: Workers) -> None:
    children = server.fork(3)
    children[0].write("demo_current", 1, library="libdemo")
    for level in ("flags", None):
        looked = children.snapshot(library="libdemo", level=level)
        assert_shared(looked, symbols=["demo_operations"], level="flags")
        message = failure(assert_shared, looked, symbols=["demo_current"], level="flags")
        assert "copied in 1, copied-shared in 2" in message
        assert "not private: 3 of 3 pages" in failure(assert_private, looked, section=".data.rel.ro")
        assert_private_pages(looked, at_most=1)
        # Its sister has it as well, though nobody has looked at her.
        alone = children[1].snapshot(library="libdemo", level=level)
        assert_private_pages(alone, at_most=0)
        failure(assert_private, alone, symbols=["demo_operations"])
        with pytest.raises(UsageError, match="only one process has it"):
            assert_shared(alone, section=".text")


def test_one_path_that_is_two_files(
    crew: StartCrew, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library was replaced between two starts: what looks shared is there twice."""
    library = tmp_path / "libtwice.so"
    shutil.copy(demo, library)
    (tmp_path / "opened.py").write_text(
        f"import ctypes\ndef use():\n    return ctypes.CDLL({str(library)!r}).demo_add(1, 1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    workers = crew(4, module="opened")
    assert workers[:2].call("use") == [2, 2]
    assert_shared(workers[:2].snapshot(library="libtwice"), section=".text")
    shutil.copy(demo, tmp_path / "new")
    (tmp_path / "new").replace(library)
    assert workers[2:].call("use") == [2, 2]
    if os.geteuid() != 0:
        with pytest.raises(EvidenceError, match=r"libtwice\.so: the file is deleted or replaced"):
            workers.snapshot(library="libtwice")
        return
    for level in ("flags", None):
        looked = workers.snapshot(library="libtwice", level=level)
        message = failure(assert_shared, looked, section=".text")
        assert "shared in 4" in message
        assert "▓" in message  # the grid's sign for a second file


@needs_frames
def test_two_families_have_two_copies(crew: StartCrew, server: Workers) -> None:
    """Each is shared, but not by all."""
    looked = crew(2, module="served").fork(2).snapshot(library="libdemo")
    message = failure(assert_shared, looked, symbols=["demo_operations"])
    assert "copied-shared in 4" in message


@needs_frames
def test_what_forks_write_as_it_was_is_no_more_shared(server: Workers) -> None:
    """As reference counts go up and down again: the words are the same, the page is another."""
    server.write("demo_spare", 1, library="libdemo")
    children = server.fork(2)
    before = children.snapshot("before", library="libdemo")
    assert_copied_only([before, children.snapshot("same", library="libdemo")])
    children[1].write("demo_spare", 1, library="libdemo")
    after = children.snapshot("after", library="libdemo")
    assert_copied_only([before, after], symbols=["demo_spare"])
    message = failure(assert_copied_only, [before, after])
    assert f"no more shared with relatives by 1 of 2 processes (pid {children.pids[1]})" in message


@needs_frames
def test_frames_prove_what_flags_suggest(server: Workers) -> None:
    children = server.fork(2)
    assert_shared(children.snapshot(library="libdemo"), symbols=["demo_operations"], level="frames")


# ----------------------------------------------------------------------------------------- what they refuse
def test_what_flags_cannot_tell_does_not_pass(server: Workers) -> None:
    children = server.fork(2)
    looked = children.snapshot("forked", library="libdemo", level="flags")
    with pytest.raises(
        EvidenceError,
        match=r"^forked: demo_operations .*: cannot be told of 3 pages at level flags \(a copy that is "
        r"mapped more than once.* level frames .* or be content with level='flags'$",
    ):
        assert_shared(looked, symbols=["demo_operations"])
    with pytest.raises(EvidenceError, match="level frames is needed, this snapshot has flags; run as root"):
        assert_shared(looked, section=".text", level="frames")


def test_sums_are_for_the_budget_alone_and_only_when_asked_for(workers: Workers) -> None:
    looked = workers.snapshot("summed", level="totals")
    assert_private_pages(looked, at_most=RELOCATED, level="totals")
    message = failure(assert_private_pages, looked, at_most=RELOCATED - 1, level="totals")
    assert f"4 in pid {workers.pids[0]}" in message
    assert "evidence: totals: sums that suggest, and prove nothing" in message
    refused: list[Callable[[], None]] = [
        lambda: assert_private_pages(looked, at_most=RELOCATED),
        lambda: assert_shared(looked, section=".text", level="totals"),
        lambda: assert_private(looked, section=".data.rel.ro"),
        lambda: assert_copied_only(looked),
    ]
    for claim in refused:
        with pytest.raises(
            EvidenceError, match=r"^summed: evidence level flags is needed, this snapshot has"
        ):
            claim()


def test_pages_that_nobody_has_are_no_evidence(workers: Workers) -> None:
    looked = workers.snapshot()  # nothing has been called, and the library has no constructor
    with pytest.raises(
        EvidenceError, match=r"\.text of .*: no page of it is in memory in two processes; have"
    ):
        assert_shared(looked, section=".text")
    with pytest.raises(EvidenceError, match=r"\.text of .*: no page of it is in memory; have"):
        assert_private(looked, section=".text")
    workers[0].call("demo_add(1, 1)->long")
    with pytest.raises(EvidenceError, match="in two processes"):
        assert_shared(workers.snapshot(), section=".text")


def test_a_library_that_cannot_be_told_about(crew: StartCrew, fixture_library: Callable[[str], Path]) -> None:
    bare = fixture_library("demo_no_sections")
    looked = crew(2, library=bare, by="dlopen").snapshot("bare")
    with pytest.raises(UsageError, match=r"no section \.text in memory; it has none at all"):
        assert_shared(looked, section=".text")
    with pytest.raises(UsageError, match="no symbol demo_none in memory"):
        assert_copied_only(looked, symbols=["demo_none"])
    with pytest.raises(
        UsageError, match=r"no library 'libnosuch' in this snapshot, expected one of: /.*demo"
    ):
        assert_private_pages(looked, at_most=1, library="libnosuch")
    with pytest.raises(UsageError, match="no snapshot to judge"):
        assert_shared([])
    others = crew(2, library=bare, by="dlopen").snapshot()
    with pytest.raises(UsageError, match="different processes"):
        assert_copied_only([looked, others])


@pytest.mark.parametrize("given", [int, lambda pid: [pid], lambda pid: audit([pid], causes=False)])
def test_what_is_no_snapshot_is_told(given: Callable[[int], Any]) -> None:
    with pytest.raises(UsageError, match=r"is no snapshot: judge what miniloader\.testing\.snapshot"):
        assert_memory(given(os.getpid()), own_at_most="1 GiB")


def test_a_cause_that_is_not_known_is_not_passed_over(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the processes' memory may not be read, as where ptrace is forbidden."""

    def forbidden(pid: int) -> None:
        raise EvidenceError(f"/proc/{pid}/mem: Permission denied")

    monkeypatch.setattr("miniloader.testing.snapshots.ProcessMemory", forbidden)
    looked = workers.snapshot()
    assert_private_pages(looked, at_most=RELOCATED)
    with pytest.raises(
        EvidenceError, match=r"The cause is unknown at vaddr 0x5000 \(.*mem: Permission denied"
    ):
        assert_copied_only(looked)


def test_every_mapping_of_a_library_counts(crew: StartCrew) -> None:
    """By the kernel's sums: the library is there twice, loaded by miniloader and by the system's loader."""
    workers = crew(3, library="libz.so.1")
    looked = workers.snapshot("loaded", library="libz")
    counts = {anonymous_pages(pid, Path(looked.path(None))) for pid in workers.pids}
    (most,) = counts
    assert_private_pages(looked, at_most=most)
    message = failure(assert_private_pages, looked, at_most=most - 1)
    assert f"{most} private pages in 3 of 3 processes" in message
    assert ("all mappings of it together" in message) == (most > 2)


POOL = """
import ctypes
block = ctypes.create_string_buffer(16 << 20)
ctypes.memset(block, 1, len(block))
def handle(number):
    ctypes.memset(block, 1, number)
"""


def test_the_memory_of_a_pool(crew: StartCrew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bytes written again are a copy all the same: own is smaps' Private_*, and less is shared."""
    (tmp_path / "pool_of_memory.py").write_text(POOL)
    monkeypatch.syspath_prepend(tmp_path)
    server = crew(1, module="pool_of_memory")
    workers = server.fork(2)
    forked = workers.snapshot("forked", library="libc.so.6")
    assert_memory(forked, own_at_most="8 MiB", still_shared_at_least="16 MiB")
    workers.call("handle", 12 << 20)
    wrote = workers.snapshot("wrote", library="libc.so.6")
    assert_memory(wrote, own_at_most="20 MiB", still_shared_at_least="4 MiB")
    message = failure(assert_memory, [forked, wrote], own_at_most="8 MiB")
    assert message.startswith("wrote: memory of its own: ")
    assert "at most 8 MiB allowed (2 of 2 processes)" in message
    assert "anonymous" in message
    message = failure(assert_memory, wrote, still_shared_at_least="16 MiB")
    assert message.startswith("wrote: memory still shared with relatives: ")
    assert "at least 16 MiB expected (2 of 2 processes)" in message
    for pid in workers.pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = sum(int(size) for size in re.findall(r"Private_(?:Clean|Dirty): +(\d+)", text)) * 1024
        assert_memory(wrote, own_at_most=own + (1 << 20))
        failure(assert_memory, wrote, own_at_most=own - (1 << 20))
    with pytest.raises(UsageError, match="no bound"):
        assert_memory(wrote)
    with pytest.raises(UsageError, match="no number of bytes"):
        assert_memory(wrote, own_at_most="much")
