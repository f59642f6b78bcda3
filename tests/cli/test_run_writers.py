"""``miniloader run --writers``: who was first to write to the pages that forked processes have inherited."""

from __future__ import annotations

import itertools
import json
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fixtures import build
from miniloader.cli import run_writers
from miniloader.errors import EvidenceError
from miniloader.kernel import page_faults
from miniloader.kernel.page_faults import FaultLog
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.report.schemas import SCHEMAS
from tests.conftest import RunAsNobody
from tests.first_writes import INHERITED, STATIC, dense

RUN = ("-m", "miniloader", "run", "--no-bill")
PATH = os.pathsep.join((str(build.ROOT), *site.getsitepackages()))

#: Forks processes that each do what they are told, and prints where things are and how each has ended.
PROGRAM = (
    f"import json, os, signal, sys, time{INHERITED}"
    + """
def store():
    for page in range(64): ctypes.memset(start + page * 4096 + 40, 2, 8)
def mark():
    ctypes.CDLL(sys.argv[1]).mark_all(ctypes.c_void_p(start))
def die():
    store()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
def execute():
    store()
    os.execv("/bin/sh", ["sh", "-c", "exit 4"])
def again():
    child = os.fork()
    if not child:
        store()
        os._exit(6)
    os.waitpid(child, 0)
pids = {}
for work in (read, gc.collect, store, mark, die, execute, again):
    child = os.fork()
    if not child:
        work()
        os._exit(3)
    pids[work.__name__] = child
    os.waitpid(child, 0)
try:
    os.wait()
except ChildProcessError:
    others = "no child but those that were forked"
print(json.dumps({"pids": pids, "start": start, "places": [id(item) for item in DATA], "others": others}))
print("and on standard error", len(os.listdir("/proc/self/fd")), file=sys.stderr)
sys.exit(5)
"""
)


@pytest.fixture(autouse=True)
def _needs_page_faults() -> None:
    try:
        with FaultLog(os.getpid()):
            return
    except EvidenceError:
        pytest.skip("this kernel lacks page faults by perf_event_open(2) for this user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory where anybody may write."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        (directory / "program.py").write_text(PROGRAM)
        (directory / "mark.c").write_text(STATIC)
        command = ["gcc", "-O1", "-shared", "-fPIC", "-o", "libmark.so", "mark.c"]
        subprocess.run(command, check=True, cwd=directory)
        yield directory


def python(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": PATH} | environment,
        timeout=100,
    )


def told(place: Path) -> Mapping[int, Mapping[str, Any]]:
    """What was written to ``found.json``, by pid."""
    found = json.loads((place / "found.json").read_text())
    jsonschema.validate(found, SCHEMAS["run"])
    assert not found["refused"]
    return {process["pid"]: process for process in found["processes"]}


def pages_of(process: Mapping[str, Any], cause: str, function: str | None = None) -> set[int]:
    """The pages that were first written to for that cause, by a function or by any."""
    return {
        page
        for part in process["written"]
        if part["cause"] == cause and function in (None, part["function"])
        for start, end in part["spans"]
        for page in range(start, end, PAGE_SIZE)
    }


def check(place: Path, output: str) -> None:
    """At least 99 % are right, whatever became of who wrote; all of the array are."""
    said, processes = json.loads(output), told(place)
    pids = said["pids"]
    array = {said["start"] + page * PAGE_SIZE for page in range(64)}
    objects = dense(said["places"])
    assert len(objects) > 300
    read, collect = processes[pids["read"]], processes[pids["collect"]]
    assert len(pages_of(read, "reference-count") & objects) >= 0.99 * len(objects)
    assert len(pages_of(collect, "collector") & objects) >= 0.99 * len(objects)
    (grandchild,) = (process for process in processes.values() if process["parent"] == pids["again"])
    for process in (processes[pids[name]] for name in ("store", "die", "execute")):
        assert pages_of(process, "other-write") >= array
        assert not array & (pages_of(process, "reference-count") | pages_of(process, "collector"))
    assert pages_of(grandchild, "other-write") >= array
    # A library that was loaded after the fork, by a process that has ended.
    assert pages_of(processes[pids["mark"]], "other-write", "mark") == array
    assert {*processes} == {*pids.values(), grandchild["pid"]}
    ends = {name: (processes[pid]["end"], processes[pid]["status"]) for name, pid in pids.items()}
    assert ends.pop("execute") == ("executed", None)
    for name, end in ends.items():  # where the kernel tells it
        assert end in [("killed", 9) if name == "die" else ("exited", 3), ("ended", None)]
    for process in processes.values():
        parts = process["written"]
        assert sum(part["pages"] for part in parts) <= process["inherited"]
        for part in parts:
            assert part["pages"] == sum(end - start for start, end in part["spans"]) // PAGE_SIZE
        runs = sorted(tuple(span) for part in parts for span in part["spans"])
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))


def test_who_writes_first(place: Path) -> None:
    """And the program is what it is without: output, exit status, files that are open, children."""
    plain = python("program.py", "./libmark.so", cwd=place)
    ours = python(*RUN, "--writers", "found.json", "--json", "program.py", "./libmark.so", cwd=place)
    alone = python(*RUN, "program.py", "./libmark.so", cwd=place)
    assert (ours.returncode, ours.stderr) == (plain.returncode, alone.stderr) == (5, ours.stderr)
    assert json.loads(ours.stdout)["others"] == json.loads(plain.stdout)["others"]
    check(place, ours.stdout)


def test_an_ordinary_user_is_told(place: Path, run_as_nobody: RunAsNobody) -> None:
    """By a Python that an ordinary user may run; the same share of pages is right."""
    environment = {"PYTHONPATH": PATH, "PATH": os.environ["PATH"]}
    command = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    for name in command:
        words = [name, *RUN, "--writers", "found.json", "--json", "program.py", "./libmark.so"]
        try:
            done = run_as_nobody(words, cwd=place, env=environment)
        except OSError:
            continue
        if done.returncode == 5:
            break
    else:
        pytest.skip("this Python is not readable for other users")
    check(place, done.stdout)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_for_people(place: Path, width: int) -> None:
    words = (*RUN, "--writers", "-", "program.py", "./libmark.so")
    done = python(*words, cwd=place, COLUMNS=str(width), NO_COLOR="1", TERM="dumb")
    assert done.returncode == 5
    said = json.loads(done.stdout)
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in done.stderr
    text = " ".join(done.stderr.split())
    assert text.startswith("and on standard error")
    assert "8 forked processes wrote to" in text
    assert "reference counts" in text
    for pid in said["pids"].values():
        assert str(pid) in text
    assert "SIGKILL" in text
    assert "executed" in text


PROTECTED = (
    f"import os, sys{INHERITED}"
    + """
libc = ctypes.CDLL(None)
def protect(first, last, protection):
    libc.mprotect(ctypes.c_void_p(start + first * 4096), (last - first) * 4096, protection)
def map_anew(first, last):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    size = ctypes.c_size_t((last - first) * 4096)
    libc.mmap(ctypes.c_void_p(start + first * 4096), size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
def before_the_fork():
    protect(0, 64, mmap.PROT_READ | mmap.PROT_WRITE)
def in_the_child():
    protect(8, 16, mmap.PROT_READ)
    protect(8, 16, mmap.PROT_READ | mmap.PROT_WRITE)
def not_at_all():
    map_anew(0, 8)
work = globals()[sys.argv[1]]
if work is before_the_fork:
    protect(0, 64, mmap.PROT_READ)
child = os.fork()
if not child:
    for page in range(64): ctypes.string_at(start + page * 4096, 1)
    work()
    ctypes.memset(start, 2, SIZE // 2)
    os._exit(0)
os.waitpid(child, 0)
print(start)
"""
)


@pytest.mark.parametrize(
    ("protected", "first"), [("before_the_fork", 0), ("in_the_child", 0), ("not_at_all", 8)]
)
def test_protected_memory_is_written(place: Path, protected: str, first: int) -> None:
    """As code that a program makes is: read-only at the fork, or for a while.  What is mapped anew is not."""
    (place / "protected.py").write_text(PROTECTED)
    done = python(*RUN, "--writers", "found.json", "--json", "protected.py", protected, cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    start = int(done.stdout)
    (process,) = told(place).values()
    array = {start + page * PAGE_SIZE for page in range(64)}
    written = {start + page * PAGE_SIZE for page in range(first, 32)}
    assert pages_of(process, "other-write") & array == written
    assert process["replaced"] >= first


POOL = """
import multiprocessing, os
DATA = [str(number) * 4 for number in range(50_000)]
def work(number):
    for text in DATA: pass
    return number, os.getpid()
if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    with multiprocessing.Pool(2) as pool:
        answers = pool.map(work, range(8), 1)
    print(*sorted({pid for _, pid in answers}), sum(number for number, _ in answers))
"""


def test_a_pool_of_multiprocessing(place: Path) -> None:
    """Its workers are ended by a signal, while threads of the program run."""
    (place / "pool.py").write_text(POOL)
    done = python(*RUN, "--writers", "found.json", "--json", "pool.py", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    *pids, total = map(int, done.stdout.split())
    assert total == 28
    processes = told(place)
    assert {*pids} <= {*processes}
    assert len(processes) == 2
    for pid in pids:
        assert len(pages_of(processes[pid], "reference-count")) > 400


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(7)", "os.kill(os.getpid(), 15)"])
def test_a_program_that_does_not_come_to_its_end(place: Path, end: str) -> None:
    """Nobody waits for what is told then; a worker that still runs is said to."""
    code = f"import os, time\nif not os.fork(): time.sleep(3); os._exit(0)\n{end}"
    plain = python("-c", code, cwd=place)
    done = python(*RUN, "--writers", "found.json", "--json", "-c", code, cwd=place)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, "", "")
    (process,) = told(place).values()
    assert (process["end"], process["status"]) == ("running", None)


def test_what_is_not_forked_by_python_is_not_told(place: Path) -> None:
    code = "import subprocess\nfor _ in range(3): subprocess.run(['true'])"
    done = python(*RUN, "--writers", "-", "-c", code, cwd=place)
    assert done.stderr == "the program has forked no process by Python's own fork: nobody inherited a page\n"


@pytest.mark.parametrize("also", ["", "os.fork() or os._exit(0); os.wait()"])
def test_that_something_is_not_told_is_said(place: Path, also: str) -> None:
    """What a library in C forks has inherited pages, too; who only waits to execute a program has not."""
    code = f"""import ctypes, os, subprocess
subprocess.run(["true"]); {also}
libc = ctypes.CDLL(None)
for _ in range(2):
    libc.fork() or libc._exit(0)
    os.wait()
"""
    done = python(*RUN, "--writers", "found", "--json", "-c", code, cwd=place)
    assert done.returncode == 0
    found = json.loads((place / "found").read_text())
    assert (len(found["processes"]), found["others"]) == (bool(also), 2)
    said = python(*RUN, "--writers", "-", "-c", code, cwd=place).stderr
    assert "not told: 2 more processes, forked by other code than Python's own (os.fork)" in said
    assert "nobody inherited" not in said


def test_where_the_kernel_does_not_allow_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line says so, and the program runs as it does without."""

    def refused(*_: object) -> int:
        raise PermissionError(13, "perf_event_open: Permission denied (EACCES)")

    monkeypatch.setattr(page_faults.syscalls, "open_events", refused)
    monkeypatch.delenv("COLUMNS", raising=False)
    for form, path in (("text", "-"), ("json", str(place / "found.json"))):
        (reading, telling), (end, ending) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            run_writers.main(str(os.getpid()), "nobody-listens", str(telling), path, form)
            os._exit(0)
        os.close(telling)
        os.close(ending)
        assert os.read(reading, 1) == b"", "it does not watch"
        assert os.read(end, 1) == b"", "and has ended"
        os.waitpid(child, 0)
        os.close(reading)
        os.close(end)
    said = capfd.readouterr().err
    assert said.startswith("who writes first is unknown here: ")
    assert "perf_event_open: Permission denied" in said
    assert said.count("\n") == 1
    found = json.loads((place / "found.json").read_text())
    jsonschema.validate(found, SCHEMAS["run"])
    assert "Permission denied" in found["refused"]


def test_a_file_that_cannot_be_written_is_one_line(place: Path) -> None:
    done = python(*RUN, "--writers", "none/found", "-c", "print('out'); raise SystemExit(7)", cwd=place)
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert done.stderr == "miniloader: none/found: No such file or directory\n"
