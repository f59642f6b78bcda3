"""The plugin in a run of pytest: its example works, its processes end, who does not use it pays nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import miniloader.testing
from fixtures import build
from tests.lab import conftest as lab

ordinary = lab.ordinary

ROOT = build.ROOT
WITH_PLUGIN = ["-p", "miniloader.testing", "-p", "no:cacheprovider", "-W", "error"]


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


ERRORS = """
import miniloader
import pytest

def test_refused():
    miniloader.load("libnosuch.so.9")

def test_missing():
    with miniloader.load("libz.so.1") as library:
        library.crc33()

def test_fault(monkeypatch):
    monkeypatch.setattr("miniloader.elf.image.read_header", lambda source: 1 / 0)
    miniloader.inspect("libz.so.1")
"""


def test_our_source_shows_only_where_the_fault_is_ours(inner: Callable[..., pytest.RunResult]) -> None:
    done = inner({"test_errors.py": ERRORS})
    done.assert_outcomes(failed=3)
    text = done.stdout.str()
    ours = re.findall(r"^.*miniloader/\w+/\w+\.py:\d+", text, re.MULTILINE)
    assert ours
    assert all(text.index(place) > text.index("test_fault") for place in ours), text
    shown = inner({"test_errors.py": ERRORS}, "--full-trace", "-k", "refused")
    shown.stdout.fnmatch_lines(["*miniloader/loader/*.py:*"])


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


LIMITED = """
import mmap, pytest
KEPT = []

def keep(mebibytes):
    block = mmap.mmap(-1, mebibytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    KEPT.append(block)

@pytest.mark.limit_private("4 MiB")
def test_within():
    keep(3)

@pytest.mark.limit_private("4 MiB")
def test_beyond():
    keep(7)

@pytest.fixture
def full():
    keep(7)
    yield
    KEPT.pop().close()

@pytest.mark.limit_private(limit=4 << 20)
def test_a_fixture_counts(full):
    pass

@pytest.mark.limit_private("4 MiB")
def test_what_is_given_back_does_not():
    keep(7)
    KEPT.pop().close()

@pytest.mark.limit_private("4 MiB")
def test_its_own_failure_comes_first():
    keep(7)
    assert KEPT == 1

@pytest.mark.limit_private("a lot")
def test_no_limit():
    pass

@pytest.mark.limit_private("1 GiB")
class TestClosest:
    @pytest.mark.limit_private("4 MB")
    def test_of_two(self):
        keep(7)
"""


def test_a_marker_limits_what_a_test_leaves(inner: Callable[..., pytest.RunResult]) -> None:
    """What is mapped and written is known to the page; the message is a table, and none of our source."""
    done = inner({"test_limited.py": LIMITED}, "--strict-markers")
    done.assert_outcomes(passed=2, failed=4, errors=1)
    for name in ("test_beyond", "test_a_fixture_counts", "TestClosest::test_of_two"):
        done.stdout.fnmatch_lines([f"FAILED test_limited.py::{name} - Failed: *"])
    lines = done.stdout.str().splitlines()
    # Python may give back a page or two of its own meanwhile.
    seven = r"(6\.9\d|7(\.\d+)?) MiB"
    grown = [line for line in lines if re.match(rf"private memory \(USS\) grew by {seven}, from ", line)]
    assert len(set(grown)) == 3
    assert all(line.endswith("; at most 4 MiB allowed") for line in grown)
    tables = [line for line in lines if re.match(rf"anonymous .* \+{seven}", line)]
    assert len(set(tables)) == 3  # told twice each where CI is set: pytest's summary has them whole
    done.stdout.fnmatch_lines(["*UsageError: 'a lot': no number of bytes, such as 4096 or '2 MiB'"])
    done.stdout.no_fnmatch_line("*miniloader/testing/*")


GROWING = """
import mmap
import pytest
KEPT = []
class Invoice:
    __slots__ = ("number",)

@pytest.mark.limit_private("1 MiB")
def test_keeps_invoices():
    KEPT.extend(Invoice() for _ in range(50_000))
    KEPT.extend({number} for number in range(10_000))

@pytest.mark.limit_private("1 MiB")
def test_keeps_no_objects():
    # of its own: malloc may have room left that is counted already
    KEPT.append(pages := mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE))
    for at in range(0, len(pages), mmap.PAGESIZE):
        pages[at] = 1
"""


def test_a_failing_marker_shows_the_objects(inner: Callable[..., pytest.RunResult]) -> None:
    """Those on pages that came while the test ran; what was made by another one is not told again."""
    done = inner({"test_growing.py": GROWING}, "--strict-markers")
    done.assert_outcomes(failed=2)
    lines = [line for line in done.stdout.lines if line.startswith("objects on the pages that came: ")]
    made = re.findall(r"([\d,]+) (test_growing\.Invoice|set)\b", lines[0])
    numbers = {name: int(number.replace(",", "")) for number, name in made}
    assert 40_000 <= numbers["test_growing.Invoice"] <= 50_000  # others lie where pages were already
    assert 8_000 <= numbers["set"] <= 10_100
    assert len({line for line in lines if "Invoice" in line}) == 1  # once more where CI is set, but not anew


ERODING = """
import gc
DATA = {number: {"name": "user%d" % number, "tags": ["a%d" % number]} for number in range(50_000)}
def handle(request):
    gc.collect()
    return request
"""

BUDGET = """
from miniloader.testing import assert_memory

def test_each_worker_stays_small(crew):
    workers = crew(1, module="pool").fork(2)
    assert_memory(workers.snapshot("forked"), own_at_most="4 MiB")
    workers.call("handle", 1)
    assert_memory(workers.snapshot("collected"), own_at_most="4 MiB")
"""


def test_a_pool_that_erodes_is_beyond_its_budget(inner: Callable[..., pytest.RunResult]) -> None:
    """The collector writes to what was forked full, which no page of a library shows; the table says what."""
    done = inner({"pool.py": ERODING, "test_pool.py": BUDGET})
    done.assert_outcomes(failed=1)
    done.stdout.re_match_lines(
        [
            r"E +AssertionError: collected: memory of its own: \d+.* MiB in pid \d+, .*; at most 4 MiB allo",
            r"E +kind +name +in +resident +own ",
            r"E +(anonymous|heap) ",
            r"E +evidence: ",
        ]
    )


def test_the_marker_is_declared(inner: Callable[..., pytest.RunResult]) -> None:
    done = inner({}, "--markers")
    done.stdout.fnmatch_lines(["@pytest.mark.limit_private(limit): *"])


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
    modules = json.loads(line.partition("modules ")[2])
    assert modules == ["miniloader", "miniloader.forking", "miniloader.testing"]


def test_pytest_under_run_does_not_mind_that_we_are_imported(tmp_path: Path) -> None:
    """It warns of a package that has a plugin and is there already, which is an error for many suites."""
    (tmp_path / "conftest.py").write_text("import pytest\npytest.register_assert_rewrite('miniloader')\n")
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    command = [sys.executable, "-m", "miniloader", "run", "-m", "pytest", *WITH_PLUGIN[2:], str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


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
