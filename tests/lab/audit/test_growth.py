"""What grew between two audits of a pool, against the kernel's own sums."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.growth import AmountChange, Growth, family_of, growth
from miniloader.report.audit import lines
from miniloader.report.audit_growth import changes_view, growth_view, live_view, tick
from miniloader.report.text import laid_out, plain
from tests.lab.audit.told_processes import ANONYMOUS, KB, rollup_of, told, told_children

_SIZE = 16 << 20


def uss_of(pids: Iterable[int]) -> int:
    sums = [rollup_of(pid) for pid in pids]
    return sum(one["Private_Clean"] + one["Private_Dirty"] for one in sums) * KB


def text_of(growth: Growth) -> str:
    return "\n".join(plain(line) for line in laid_out(growth_view(growth), None))


def test_growth_is_the_kernel_s() -> None:
    """A pool erodes in memory that is no file's: within 5 % of what smaps_rollup says, and told first."""
    write = f"shared = mapped({_SIZE}); ctypes.memset(shared, 1, {_SIZE})"
    with told(ANONYMOUS, write) as parent, told_children(parent, 3) as children:
        pids = [parent.pid, *children]
        before, kernel_before = audit(pids), uss_of(pids)
        parent(f"ctypes.memset(shared, 1, {_SIZE})")  # the same bytes: a copy all the same
        after, kernel_after = audit(pids), uss_of(pids)
    grown, really = growth(before, after), kernel_after - kernel_before
    assert really >= _SIZE
    assert abs(grown.uss.change - really) < 0.05 * really
    anonymous = next(row for row in grown.mappings if (row.kind, row.name) == ("anonymous", ""))
    assert grown.mappings[0] == anonymous
    assert abs(anonymous.own.change - _SIZE) < 0.05 * _SIZE
    assert all(process.state == "stayed" for process in grown.processes)
    assert grown.processes[0].pid == parent.pid
    assert "anonymous +16" in text_of(grown)
    assert "anonymous +16" in plain(tick(after, before))


def test_who_came_and_who_went() -> None:
    with told(ANONYMOUS) as parent:
        with told_children(parent, 1) as first:
            before = audit([parent.pid, *first], causes=False)
        with told_children(parent, 1) as second:
            after = audit([parent.pid, *second], causes=False)
    states = {process.pid: process.state for process in growth(before, after).processes}
    assert states == {parent.pid: "stayed", first[0]: "went", second[0]: "came"}
    went = next(process for process in growth(before, after).processes if process.state == "went")
    assert went.uss.after is None
    assert went.uss.before is not None
    family = family_of(before, after)
    assert [process.pid for process in family.forked] == second
    assert [process.pid for process in family.ended] == first
    assert not family.came
    (said,) = changes_view((), growth(before, after), before.page_size)
    assert plain(said) == "no page went private, was rewritten, or returned, of processes that stayed"
    restarted = replace(before, processes=tuple(replace(row, started=0) for row in before.processes))
    (said,) = changes_view((), growth(before, restarted), before.page_size)  # all of both are compared
    assert plain(said) == "no page went private, was rewritten, or returned"
    assert f"forked {second[0]}, ended {first[0]}" in plain(tick(after, before))


_WAITS = "import os, sys, ctypes; os.write(1, b'x'); os.read(0, 1)"
_EXECUTES = f"{_WAITS}; os.execv(sys.executable, [sys.executable, '-c', {_WAITS!r}])"
_IS_RENAMED = f"{_WAITS}; ctypes.CDLL(None).prctl(15, b'worker 1'); os.write(1, b'x'); os.read(0, 1)"


def test_who_executed_a_program_and_who_changed_its_name() -> None:
    """A server may execute itself once more, and call its workers by other names."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, bufsize=0))
            for program in (_EXECUTES, _IS_RENAMED)
        ]
        pids = [process.pid for process in processes]
        looks = []
        for _ in range(2):
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.read(1) == b"x"
            looks.append(audit(pids, causes=False))
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"x")
    assert [process.pid for process, _ in family_of(*looks).replaced] == pids[:1]
    assert [process.name for process in looks[1].processes] == [looks[0].processes[0].name, "worker 1"]
    assert f"{pids[0]} executed {looks[0].processes[0].name} (once more)" in plain(tick(looks[1], looks[0]))
    grown = growth(*looks)
    assert f"{pids[0]} executed {looks[0].processes[0].name} (once more)" in text_of(grown)
    assert grown.to_json()["executed"] == pids[:1]


def test_a_library_that_is_written() -> None:
    with told("lib = ctypes.CDLL(None)") as process:
        before = audit([process.pid], causes=False)
        process("import ssl")
        after = audit([process.pid], causes=False)
    grown = growth(before, after)
    crypto = next(row for row in grown.libraries if "libcrypto" in row.path)
    assert crypto.own.before is None
    assert (crypto.own.after or 0) >= PAGE_SIZE
    assert crypto.inherited == AmountChange(None, 0)


def test_files_that_are_no_libraries_have_rows_of_their_own(tmp_path: Path) -> None:
    """A database maps its data shared: it is in no table of libraries, and may be the most of all."""
    data = tmp_path / "data.mdb"
    data.write_bytes(b"x" * _SIZE)
    grow = "import mmap\ndef grow():\n    global pages\n    pages = mmap.mmap(file, 0)\n    pages.read()\n"
    with told(f"file = os.open({str(data)!r}, os.O_RDWR)", grow) as process:
        before = audit([process.pid], causes=False)
        process("grow()")
        after = audit([process.pid], causes=False)
    rows = [plain(line).split() for line in laid_out(lines(after), None)]
    assert any(row[:3] == ["file", str(data), "1"] and row[3:5] == ["16", "MiB"] for row in rows)
    assert ["file", f"{len(after.libraries)}", "files,", "below"] in [row[:4] for row in rows]
    assert f"file {data} – → 16 MiB (+16 MiB)" in " ".join(text_of(growth(before, after)).split())


def test_a_live_table_fits_a_terminal() -> None:
    """In 80 columns a row is a line: half of the libraries were beyond the last one."""
    with told() as process, told_children(process, 2) as children:
        looks = [audit([process.pid, *children], causes=False) for _ in range(2)]
    shown = [plain(line) for line in laid_out(live_view(looks[1], looks[0], looks[0]), 80)]
    assert any(line.startswith("library ") and line.endswith(" since start") for line in shown)
    assert not [line for line in shown if "since start:" in line]
    assert "apart" in "\n".join(plain(line) for line in laid_out(lines(looks[1]), 80))


def test_what_is_swapped_out_has_not_gone() -> None:
    """It is in none of the three sums: a pool that is swapped out would seem to shrink."""
    with told(ANONYMOUS) as process:
        resident = audit([process.pid], causes=False)
    (was,) = resident.processes
    pages = 1 << 20
    out = replace(was, rss=was.rss - (pages << 10), uss=was.uss - (pages << 10), swapped=was.swapped + pages)
    swapped = replace(resident, processes=(out,))
    grown = growth(resident, swapped)
    size = pages * PAGE_SIZE
    assert grown.swapped.change == grown.processes[0].swapped.change == size
    assert grown.to_json()["processes"][0]["swapped"] == {"before": 0, "after": size}
    assert "swapped out 0 bytes → 4 GiB (+4 GiB)" in text_of(grown)
    assert "swapped out 0 bytes → 4 GiB (+4 GiB)" in plain(tick(swapped, resident))
    assert "swapped" not in text_of(growth(resident, resident))
