"""What every test may ask for: built fixtures, the system's libraries, an ordinary user.

Also which skips are allowed where every test should be able to run.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from fixtures import build

pytest_plugins = ["pytester", "miniloader.testing", "tests.json_schemas"]

# Shells and nohup start what they run in the background with these ignored, and what is ignored is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ignored in (signal.SIGQUIT, signal.SIGHUP):
    signal.signal(_ignored, signal.SIG_DFL)

NOBODY = 65534
T = TypeVar("T")

#: Why a test may be skipped in continuous integration.  Any other skip there is a failure: a test that
#: silently never runs protects nothing.
ALLOWED_SKIPS = re.compile(
    "needs root: "  # the suite runs as an ordinary user
    "|no cross compiler: "  # of another machine
    "|this kernel lacks "  # a feature that was probed for
    "|this machine lacks "  # an optional library or tool that was looked for
    "|this Python is not readable for other users"
)


# ------------------------------------------------------------------------------------------ libraries
@pytest.fixture(scope="session")
def fixture_library() -> Callable[[str], Path]:
    """``fixture_library("demo")``: the built library, by its name in ``fixtures.build.FIXTURES``."""
    return build.build


@pytest.fixture(scope="session")
def own_mounts() -> list[str]:
    """The beginning of a command, before a script for ``sh``, that runs in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("this machine lacks unshare(1)")
    tried = subprocess.run([unshare, "--mount", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:  # as in a chroot whose root is no mount point
        pytest.skip(f"this machine lacks mount namespaces of its own here: {tried.stderr.strip()}")
    return [unshare, "--mount", "sh", "-c"]


@pytest.fixture(scope="session")
def demo(fixture_library: Callable[[str], Path]) -> Path:
    """The demonstration library, built from source."""
    return fixture_library("demo")


@pytest.fixture(scope="session")
def system_libraries() -> list[Path]:
    """Every shared object of the system's library directories once (by its real path), in a stable order."""
    found = set()
    for directory in {os.path.realpath(path) for path in ("/lib", "/usr/lib", "/lib64", "/usr/lib64")}:
        for parent, _, names in os.walk(directory):
            found |= {os.path.realpath(os.path.join(parent, name)) for name in names if ".so" in name}
    return sorted(Path(path) for path in found if _is_shared_object(path))


def _is_shared_object(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(18)
    except OSError:
        return False
    order = "little" if start[5:6] == b"\x01" else "big"
    return start[:4] == b"\x7fELF" and int.from_bytes(start[16:18], order) == 3  # ET_DYN


# --------------------------------------------------------------------------------------- ordinary user
class AsNobody(Protocol):
    def __call__(self, function: Callable[..., T], /, *arguments: Any) -> T: ...


@pytest.fixture(scope="session")
def as_nobody() -> AsNobody:
    """``as_nobody(function, *arguments)``: its result, called in a forked child without any privilege.

    The child starts as this process, so that modules are imported already (an ordinary user may not be
    able to read this Python); where the tests run unprivileged it is just a child.
    """
    return _call_as_nobody


def _call_as_nobody(function: Callable[..., T], /, *arguments: Any) -> T:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            become_nobody()
            answer: tuple[str, Any] = ("returned", function(*arguments))
        except pytest.skip.Exception as skipped:  # which cannot be pickled
            answer = ("skipped", skipped.msg)
        except BaseException as error:  # noqa: BLE001 - handed to the parent, whatever it is
            answer = ("raised", (error, traceback.format_exc()))
        try:
            message = pickle.dumps(answer)
        except Exception as error:  # noqa: BLE001 - likewise
            message = pickle.dumps(("raised", (TypeError(f"cannot hand back {answer!r}: {error}"), "")))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(message)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    assert message, f"the child ended without an answer, status {os.waitstatus_to_exitcode(status)}"
    outcome, result = pickle.loads(message)
    if outcome == "skipped":
        pytest.skip(result)
    if outcome == "raised":
        error, trace = result
        error.add_note(trace)
        raise error
    return result


def become_nobody() -> None:
    """Give up root for good; keep ``/proc/self`` ours, which a change of user would hand to root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc = ctypes.CDLL(None, use_errno=True)
        pr_set_dumpable = 4
        if libc.prctl(pr_set_dumpable, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")
    os.environ["HOME"] = "/nonexistent"


class RunAsNobody(Protocol):
    def __call__(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def run_as_nobody() -> RunAsNobody:
    """``run_as_nobody(["cmd", …])``: a command as an ordinary user, its output as text."""

    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if os.geteuid() == 0:
            options |= {"user": NOBODY, "group": NOBODY, "extra_groups": ()}
        return subprocess.run(list(command), capture_output=True, text=True, check=False, **options)

    return run


@pytest.fixture(scope="session")
def readable_python(run_as_nobody: RunAsNobody) -> str:
    """This interpreter, where an ordinary user can run it; else the test is skipped."""
    try:
        works = (
            run_as_nobody([sys.executable, "-c", "import miniloader, numpy"], cwd=build.ROOT).returncode == 0
        )
    except PermissionError:
        works = False
    if not works:
        pytest.skip("this Python is not readable for other users")
    return sys.executable


# -------------------------------------------------------------------- which come first, and may skip
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes longest first: beside it another process runs the others."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("needs_root")
    if marker is not None and os.geteuid() != 0:
        pytest.skip(f"needs root: {marker.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where every test should be able to run."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not ALLOWED_SKIPS.search(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, for a reason that tests/conftest.py does not allow: {reason}"
