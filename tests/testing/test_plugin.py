"""The pytest plugin: crews that are led and ended, assertions that hold, fail in pictures, or refuse."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import miniloader.testing
from fixtures import build
from miniloader.errors import EvidenceError, LoadError, ProcessGone, SymbolError, UsageError, WorkerError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.testing import (
    StartCrew,
    Workers,
    assert_copied_only,
    assert_private,
    assert_private_pages,
    assert_shared,
    snapshot,
)
from tests.lab import conftest as lab

ordinary = lab.ordinary

ROOT = build.ROOT
WITH_PLUGIN = ["-p", "miniloader.testing", "-p", "no:cacheprovider", "-W", "error"]
RELOCATED = 4  # three of relro, one of data: see fixtures/demo.c

needs_frames = pytest.mark.needs_root("with whom a copy is shared, only frames tell")


@pytest.fixture
def workers(crew: StartCrew, demo: Path, request: pytest.FixtureRequest) -> Workers:
    """Three workers with the demonstration library, loaded by the system unless a test asks for both."""
    return crew(3, library=demo, by=getattr(request, "param", "dlopen"))


by_both = pytest.mark.parametrize("workers", ["miniloader", "dlopen"], indirect=True)


@pytest.fixture
def server(crew: StartCrew, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """A process that has imported a module, which has opened the library."""
    (tmp_path / "served.py").write_text(
        f"import ctypes, time\nlibrary = ctypes.CDLL({str(demo)!r})\n"
        "def handle(number):\n    return library.demo_next() + number\n"
        "def refuse():\n    raise ValueError('no such item')\n"
        "class Shop:\n    @staticmethod\n    def handle():\n        return {1}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return crew(1, module="served")


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


# ------------------------------------------------------------------------------------------ leading a crew
@by_both
def test_workers_call_write_and_are_looked_at(workers: Workers, demo: Path) -> None:
    assert len(workers) == len({os.getpid(), *workers.pids}) - 1 == 3
    assert workers.call("demo_add(2, 3)->long") == [5, 5, 5]
    assert workers[1].call("demo_next()->long") == [100]
    assert workers.call("demo_next()->long") == [100, 101, 100]
    assert workers.call("demo_message()->str")[0] == "hello from a library that was mapped by hand"
    workers[1:].write("demo_counters", 7)
    assert workers.call("demo_next()->long") == [101, 7, 7]
    workers.write("demo_counters", b"\1\2", offset=1)
    assert [number & 0xFFFF00 for number in workers.call("demo_next()->long")] == [0x20100] * 3
    looked = workers.snapshot("looked")
    assert looked.paths == (os.path.realpath(demo),)
    assert looked.pids == workers.pids
    assert looked.level in repr(looked)


def test_a_module_is_led_too_and_its_forks(server: Workers) -> None:
    assert server.call("handle", 1) == [101]
    children = server.fork(2)
    assert children.call("handle", 1) == [102, 102]  # as their parent left it, each for itself
    grandchildren = children.fork(2)
    assert len({*server.pids, *children.pids, *grandchildren.pids}) == 7
    assert grandchildren[0].call("handle", 0) == [102]
    assert (server + children + grandchildren).call("handle", 0) == [101, 102, 102, 103, 102, 102, 102]
    for pid in grandchildren.pids:  # none has its relatives' connections
        ends = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert len([end for end in ends if end.startswith("socket:")]) == 1
    assert grandchildren.call("os:getppid") == [pid for pid in children.pids for _ in range(2)]
    assert server.call("Shop.handle") == ["{1}"]  # no JSON: its repr
    children[0].write("demo_counters", 7, library="libdemo")
    assert (server + children).call("handle", 0) == [102, 7, 103]


def test_any_processes_can_be_looked_at(server: Workers) -> None:
    looked = snapshot([os.getpid(), *server.pids], library="libc.so.6")
    assert len(looked.library().look.processes) == 2
    assert_shared(looked, section=".text")
    everything = snapshot(server.pids)
    assert len(everything.paths) > 4
    with pytest.raises(UsageError, match="several libraries in this snapshot"):
        assert_shared(everything)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ({"library": "libz.so.1", "module": "json"}, UsageError, "give one of library= and module="),
        ({}, UsageError, "give one of library= and module="),
        ({"module": "json", "by": "magic"}, UsageError, "by='magic'"),
        ({"module": "no_such_module"}, WorkerError, "ModuleNotFoundError: No module named 'no_such_module'"),
        ({"library": "libnosuch.so.1"}, LoadError, "libnosuch.so.1: no library of that name"),
        ({"library": "pyproject.toml", "by": "dlopen"}, LoadError, "libnosuch|invalid ELF header"),
    ],
)
def test_it_cannot_start(
    crew: StartCrew,
    start: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(error, match=message):
        crew(1, **start)


def test_what_a_crew_cannot_do(crew: StartCrew, workers: Workers) -> None:
    for what, message in (
        (lambda: workers.write("demo_none", 1), "no symbol demo_none"),
        (lambda: workers.write("demo_current", b"123456789"), "it has 8 bytes, none for 9 at 0"),
        (lambda: workers.write("demo_current", 1, offset=8), "it has 8 bytes"),
        (lambda: workers.snapshot(library="libnosuch"), "'libnosuch': none of these processes has one"),
        (lambda: crew(1, module="json").write("x", 1), "of which library"),
        (lambda: workers + crew(1, module="json"), "of two crews"),
    ):
        with pytest.raises(UsageError, match=message):
            what()
    with pytest.raises(SymbolError, match="no symbol demo_none"):
        workers.call("demo_none()->int")


def test_a_death_is_reported_and_nobody_is_left(crew: StartCrew, demo: Path) -> None:
    workers = crew(2, library=demo, by="dlopen")
    with pytest.raises(WorkerError, match=r"^step write demo_greeting: .* was killed by SIGSEGV"):
        workers.write("demo_greeting", 1)
    others = crew(2, library=demo, by="dlopen")
    os.kill(others.pids[1], signal.SIGKILL)
    os.waitid(os.P_PID, others.pids[1], os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerError, match=r"^step looked: worker 2 of 2 .* was killed by SIGKILL"):
        others.snapshot("looked")


def test_the_death_of_a_fork(server: Workers) -> None:
    children = server.fork(2)
    with pytest.raises(
        WorkerError,
        match=rf"process {children.pids[0]}, forked by {server.pids[0]}, ended with exit status 3$",
    ):
        children[0].call("sys:exit", 3)
    with pytest.raises(ProcessGone):
        children.snapshot(library="libdemo")


def test_forks_are_reaped_as_well(crew: StartCrew) -> None:
    """By their parents, at the end: nothing waits for whoever reaps orphans here."""
    adopt_orphans = 36  # PR_SET_CHILD_SUBREAPER
    libc = ctypes.CDLL(None)
    assert libc.prctl(adopt_orphans, 1, 0, 0, 0) == 0
    try:
        workers = crew(2, module="json")
        children = workers.fork(2)
        workers._crew.close()
        for pid in children.pids:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, 0)
    finally:
        libc.prctl(adopt_orphans, 0, 0, 0, 0)


def test_what_a_function_raises(server: Workers) -> None:
    with pytest.raises(WorkerError, match=r"worker 1 of 1 .*: ValueError: no such item$"):
        server.fork().call("refuse")


def test_a_step_that_hangs(crew: StartCrew, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = crew(1, module="time", timeout=50)
    child = workers.fork()
    monkeypatch.setattr(workers._crew, "_timeout", 0.2)
    with pytest.raises(WorkerError, match=r"^step call sleep: .* has not answered within 0\.2 s"):
        child.call("sleep", 60)


# ------------------------------------------------------------------------------------------- what they claim
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


# --------------------------------------------------------------------------------------- within a test run
def example() -> dict[str, str]:
    """The two files of the module's documentation."""
    tree = ast.parse(Path(miniloader.testing.__file__).read_text())
    text = ast.get_docstring(tree, clean=False) or ""
    blocks = [textwrap.dedent(block) for block in re.findall(r"::\n\n((?: {4}.*\n|\n)+)", text)]
    return dict(zip(("shop.py", "test_shop.py"), blocks, strict=True))


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """A run of pytest in a process of its own, with our plugin and all warnings as errors."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)

    def run(files: dict[str, str], *options: str) -> pytest.RunResult:
        for name, text in files.items():
            (pytester.path / name).write_text(text)
        return pytester.runpytest_subprocess(*WITH_PLUGIN, *options)

    return run


def test_the_example_of_the_documentation(inner: Callable[..., pytest.RunResult]) -> None:
    inner(example(), "--junitxml=report.xml").assert_outcomes(passed=1)
    report = Path("report.xml").read_text()
    assert re.search('<property name="miniloader_level" value="(frames|flags)" ?/>', report)


def test_the_example_notices_erosion(inner: Callable[..., pytest.RunResult]) -> None:
    """Somebody has every request written down, in a global of the library."""
    files = example()
    eroding = "    library.demo_next()\n    ctypes.c_long.in_dll(library, 'demo_spare').value += 1\n"
    files["shop.py"] = re.sub(" +library.demo_next.*\n", eroding, files["shop.py"])
    done = inner(files)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            ">       assert_copied_only(*",
            "E       AssertionError: ten requests later: libdemo-*.so: more than demo_counters was written",
            "E         0x*  demo_spare was written by 4 of 4 processes (pid *",
            "E       *pid base *r-- *r-x*",
            "E       * █* A*A*",
            "E       * █* B*B*",
            "E       evidence: *",
        ]
    )
    done.stdout.no_fnmatch_line("*miniloader/testing/*")  # the test is of interest, not our insides


INSIDE = """
import os, pytest
from pathlib import Path

@pytest.fixture
def workers(crew, request):
    workers = crew(1, module="os")
    every = workers + workers.fork()
    Path(request.node.name + ".pids").write_text(" ".join(map(str, every.pids)))
    return every

def test_passes(workers):
    assert workers.call("getpid") == [*workers.pids]

def test_crashes_a_worker(workers):
    workers.call("abort")

def test_crashes_a_fork(workers):
    workers[1].call("abort")

def test_is_skipped(workers):
    pytest.skip("half-way")

@pytest.fixture
def broken(workers):
    yield
    raise ValueError("in a teardown")

def test_ends_badly(broken):
    assert False
"""


@pytest.mark.parametrize("processes", ["-n0", "-n2"])
def test_however_a_test_ends_its_processes_do(
    inner: Callable[..., pytest.RunResult], pytester: pytest.Pytester, processes: str
) -> None:
    done = inner({"test_inside.py": INSIDE}, processes)
    done.assert_outcomes(passed=1, failed=3, skipped=1, errors=1)
    for death in ("step call abort: worker 1 of 1 (pid *)", "call: process *, forked by *,"):
        done.stdout.fnmatch_lines_random([f"E *WorkerError: {death} was killed by SIGABRT*"])
    pids = [int(pid) for path in pytester.path.glob("*.pids") for pid in path.read_text().split()]
    assert len(pids) == 5 * 2
    lab.wait_until_gone(pids)


def test_an_interrupted_run_leaves_nobody(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    pytester.makepyfile(
        """
import sys
def test_waits(crew):
    workers = crew(2, module="time")
    workers += workers.fork()
    print("pids", *workers.pids, file=sys.stderr, flush=True)
    workers.call("sleep", 60)
"""
    )
    command = [sys.executable, "-m", "pytest", "-s", *WITH_PLUGIN]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        pids = next(line for line in run.stderr if line.startswith("pids")).split()[1:]
        run.send_signal(signal.SIGINT)
        assert run.wait() == pytest.ExitCode.INTERRUPTED
    assert len(pids) == 4
    lab.wait_until_gone(map(int, pids))


@pytest.fixture
def readable_directory() -> Iterator[Path]:
    """A directory that every user may read."""
    with tempfile.TemporaryDirectory(prefix="miniloader-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_an_ordinary_user_has_it_as_well(ordinary: lab.Ordinary, readable_directory: Path) -> None:
    files = example()
    files["test_flags.py"] = """
import pytest
from miniloader.errors import EvidenceError
from miniloader.testing import *

def test_level(crew):
    workers = crew(1, module="shop").fork(2)
    forked = workers.snapshot(library="libdemo")
    assert forked.level == "flags"
    assert_shared(forked, symbols=["demo_operations"], level="flags")
    with pytest.raises(EvidenceError, match="with whom|more than once"):
        assert_shared(forked, symbols=["demo_operations"])
    with pytest.raises(EvidenceError, match="run as root"):
        assert_shared(forked, section=".text", level="frames")

def test_fails(crew):
    workers = crew(2, module="shop")
    workers.call("handle", 1)
    assert_private_pages(workers.snapshot(library="libdemo"), at_most=1)
"""
    for name, text in files.items():
        (readable_directory / name).write_text(text)
    done = ordinary(
        ["-m", "pytest", *WITH_PLUGIN, "--rootdir", str(readable_directory), str(readable_directory)]
    )
    assert "2 passed" in done.stdout
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert re.search("E +AssertionError: libdemo-.*: 5 private pages in 2 of 2 processes", done.stdout)
    assert "E       evidence: flags: proves which pages were copied" in done.stdout


# ------------------------------------------------------------------------------------------ as a plugin
def test_who_does_not_use_it_pays_nothing(inner: Callable[..., pytest.RunResult]) -> None:
    text = """
import json, sys
def test_nothing(crew):
    ours = sorted(name for name in sys.modules if name.startswith("miniloader"))
    others = [name for name in ("numpy", "rich", "elftools", "capstone") if name in sys.modules]
    print("modules", json.dumps(ours + others))
"""
    done = inner({"test_inside.py": text}, "-s")
    done.assert_outcomes(passed=1)
    (line,) = [line for line in done.outlines if "modules" in line]
    assert json.loads(line.partition("modules ")[2]) == ["miniloader", "miniloader.testing"]


def test_pytest_finds_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["pytest11"].items()
    plugin = EntryPoint(name, value, "pytest11").load()
    assert plugin is miniloader.testing
    assert name == value  # else "-p" would register it a second time
    assert plugin.crew
    assert all(getattr(plugin, public) for public in plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'crews'"):
        _ = plugin.crews
