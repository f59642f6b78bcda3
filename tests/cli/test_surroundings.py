"""Where a command runs: without /proc, with one that hides processes; who reads what it prints."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from fixtures import build
from fixtures.surroundings import refuse
from miniloader import cli
from miniloader.walkthrough.scratch_files import scratch_directory
from tests.conftest import become_nobody

COMMAND = [sys.executable, "-m", "miniloader"]
NO_PROC = "miniloader: /proc: not mounted here; mount it: mount -t proc proc /proc\n"
DEMO = "{demo}"

#: What can be said without /proc, and what cannot.
WITHOUT_PROC: tuple[tuple[tuple[str, ...], int], ...] = (
    (("inspect", DEMO), 0),
    (("disasm", DEMO, "demo_add"), 0),
    (("inspect", "libz.so.1"), 3),  # LD_LIBRARY_PATH as it was at the start is in /proc
    (("load", DEMO), 3),
    (("load", DEMO, "--no-init"), 3),
    (("disasm", DEMO, "demo_add", "--loaded"), 3),
    (("prove", DEMO), 3),
    (("audit", "1"), 3),
    (("audit", "--name", "python"), 3),
    (("doctor",), 3),
)


def words(command: Sequence[str]) -> list[str]:
    return [str(build.build("demo")) if word == DEMO else word for word in command]


@pytest.mark.needs_root("it unmounts /proc in a namespace of its own")
@pytest.mark.parametrize(("command", "status"), WITHOUT_PROC, ids=[" ".join(c) for c, _ in WITHOUT_PROC])
def test_without_proc(command: tuple[str, ...], status: int, own_mounts: list[str]) -> None:
    script = [*own_mounts, 'umount -l /proc && exec "$@"', "sh"]
    done = subprocess.run(
        [*script, *COMMAND, *words(command)], capture_output=True, text=True, check=False, cwd=build.ROOT
    )
    assert (done.returncode, done.stderr) == (status, NO_PROC if status else "")
    assert bool(done.stdout) == (status == 0)


@pytest.mark.needs_root("it mounts a file system in a namespace of its own")
@pytest.mark.parametrize(
    "command",
    [("walkthrough", "mapping", "--html"), ("audit", "self", "--html"), ("audit", "self", "--save")],
    ids=" ".join,
)
def test_a_file_system_that_is_read_only_is_named(
    command: tuple[str, ...], tmp_path: Path, own_mounts: list[str]
) -> None:
    script = [*own_mounts, f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"', "sh"]
    filled = [str(os.getpid()) if word == "self" else word for word in command]
    done = subprocess.run(
        [*script, *COMMAND, *filled, f"{tmp_path}/out"],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.endswith(": Read-only file system\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.needs_root("it mounts a /proc of its own")
def test_a_proc_that_hides_processes() -> None:
    """hidepid=invisible: the processes of others are not there; one's own can be audited and proven."""
    with redirect_stdout(io.StringIO()):  # an ordinary user may not be able to import what it needs
        assert cli.main(["audit", str(os.getpid())]) == 0
    reading, writing = os.pipe()
    others = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_hidden(others, writing))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().split("\n")
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77:
        pytest.skip("this kernel lacks hidepid for a mount of its own")
    assert lines[0] == "3", lines
    assert "hides process" in lines[1]
    assert lines[2] == "1 miniloader: no process fits"
    assert lines[3] == "0"


def _hidden(others: int, writing: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec, ms_private = 0x20000, 1 << 14, 1 << 18
    if libc.unshare(clone_newns) or libc.mount(b"none", b"/", None, ms_rec | ms_private, None):
        return 77
    if libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2"):
        return 77
    own = os.fork()
    if own == 0:
        become_nobody()
        signal.pause()
    become_nobody()
    said = []
    for command in (["audit", str(others)], ["audit", "--name", "init"], ["audit", str(own)]):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main(command)
        said.append((status, out.getvalue(), err.getvalue()))
    os.kill(own, signal.SIGKILL)
    os.waitpid(own, 0)
    hidden = next((line for line in said[0][1].splitlines() if "hides" in line), said[0][1] + said[0][2])
    lines = [str(said[0][0]), hidden, f"{said[1][0]} {said[1][2].strip()}", str(said[2][0])]
    os.write(writing, "\n".join(lines).encode())
    return 0


@pytest.mark.needs_root("it mounts a /proc of its own")
@pytest.mark.parametrize(("command", "status"), [("load", 0), ("check", 0), ("audit", 0), ("prepare", 3)])
def test_a_proc_with_processes_alone(
    command: str, status: int, tmp_path: Path, own_mounts: list[str]
) -> None:
    """subset=pid: what is in /proc/sys is not there, which prepared pages want."""
    script = 'mount -t proc -o subset=pid proc /proc || exit 77; exec "$@"'
    words = str(os.getpid()) if command == "audit" else str(build.build("demo"))
    done = subprocess.run(
        [*own_mounts, script, "sh", *COMMAND, command, words],
        capture_output=True, text=True, check=False, cwd=build.ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this kernel lacks subset=pid (5.8)")
    assert done.returncode == status, done.stderr
    said = (
        "boot_id: No such file or directory; prepared pages hold until the machine boots again; mount /proc"
    )
    assert (said in done.stderr) == bool(status)
    assert done.stderr.count("\n") == bool(status)


# ---------------------------------------------------------------------------- a filter of system calls
_PRCTL, _WAITID, _MUNMAP, _PIDFD_OPEN, _STATFS, _FSTATFS = 157, 247, 11, 434, 137, 138  # of x86-64
_GETRLIMIT, _SETRLIMIT, _PRLIMIT64 = 97, 160, 302
_NO_CHILD = "{demo}: no process can be started that would end with this one: prctl: Operation not permitted"
FILTERS = {
    "waitid": ((_WAITID,), ("load", DEMO), ""),
    "waitid of workers": ((_WAITID,), ("prove", DEMO, "-n", "2"), ""),
    "waitid, pidfd_open": ((_WAITID, _PIDFD_OPEN), ("load", DEMO), ""),
    "statfs": ((_STATFS, _FSTATFS), ("load", DEMO), ""),
    "limits": ((_GETRLIMIT, _SETRLIMIT, _PRLIMIT64), ("audit", str(os.getpid())), ""),
    "prctl": ((_PRCTL,), ("load", DEMO), _NO_CHILD),
    "prctl of workers": ((_PRCTL,), ("prove", DEMO, "-n", "2"), _NO_CHILD.removeprefix("{demo}: ")),
    "munmap": ((_MUNMAP,), ("load", DEMO), "{demo}: munmap: Operation not permitted"),
    "all": ((_PRCTL, _WAITID, _MUNMAP), ("load", DEMO), _NO_CHILD),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="this machine lacks these numbers")
@pytest.mark.parametrize(("numbers", "command", "said"), FILTERS.values(), ids=list(FILTERS))
def test_a_filter_of_system_calls(numbers: tuple[int, ...], command: tuple[str, ...], said: str) -> None:
    """What can do without the call does; else one line has the library, the call, and what to do."""
    done = subprocess.run(
        [*COMMAND, *words(command)], capture_output=True, text=True, check=False, cwd=build.ROOT,
        preexec_fn=partial(refuse, numbers), timeout=60,
    )  # fmt: skip
    assert done.returncode == (1 if said else 0), done.stderr
    if said:
        (line,) = done.stderr.splitlines()
        assert line.startswith("miniloader: " + said.format(demo=build.build("demo")))
        assert line.endswith("(2) in the filter of system calls (seccomp)")
    else:
        assert done.stderr == ""


# ------------------------------------------------------------------------------------------- the output
OUTPUTS = (
    ("inspect", "libcrypto.so.3"),
    ("load", DEMO, "--trace"),
    ("disasm", "libcrypto.so.3", "SHA256"),
    ("prove", DEMO, "-n", "2", "--steps"),
    ("audit", str(os.getpid())),
    ("audit", str(os.getpid()), "--csv"),
    ("doctor", "--json"),
    ("doctor",),
)
NAMES = [" ".join(word for word in command if not word.isdigit()) for command in OUTPUTS]


@pytest.mark.parametrize("command", OUTPUTS, ids=NAMES)
def test_a_reader_that_goes_after_the_first_line(command: tuple[str, ...]) -> None:
    """``| head -1``: nothing on standard error, no traceback, no signal."""
    with subprocess.Popen(
        [*COMMAND, *words(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=build.ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, cli.CLOSED_PIPE)


@pytest.mark.parametrize("command", OUTPUTS, ids=NAMES)
def test_a_full_disk_and_no_output_at_all(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words(command)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=build.ROOT,
        )
    assert (done.returncode, done.stderr) == (1, "miniloader: No space left on device\n")
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *words(command)]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, cwd=build.ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command", [("audit", str(os.getpid())), ("prove", DEMO, "-n", "2")], ids=["audit", "prove"]
)
def test_nobody_to_hear_of_errors(command: tuple[str, ...]) -> None:
    """``2>&-``: what is to be said there is said to nobody, and the rest is done."""
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, *words(command)]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=False, cwd=build.ROOT)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("run", "-m", "zlib"), 1),
        (("run", "--trace", "-c", "import zlib"), 0),
        (("inspect",), 2),
        ((), 2),
        (("load", "/nonexistent/x"), 1),
    ],
    ids=str,
)
def test_what_nobody_can_be_told_is_told_nobody(command: tuple[str, ...], status: int, stderr: str) -> None:
    """Neither on standard output instead, nor does it change how the command ends."""
    closed = ["sh", "-c", f'exec "$@" {stderr}', "sh", *COMMAND, *command]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=False, cwd=build.ROOT)
    assert (done.returncode, done.stdout) == (status, "")


@pytest.mark.parametrize("command", [("help", "load"), ("--help",), ("--completion", "bash")], ids=" ".join)
def test_help_that_is_lost_is_no_success(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=build.ROOT
        )
    assert (done.returncode, done.stderr) == (1, "miniloader: No space left on device\n")


def test_an_error_that_cannot_be_told_is_one_object() -> None:
    full = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *COMMAND, "inspect", "/nonexistent/x", "--json"]
    done = subprocess.run(full, stdout=subprocess.PIPE, text=True, check=False, cwd=build.ROOT)
    assert (done.returncode, json.loads(done.stdout)["error"]["kind"]) == (1, "ElfError")


def test_a_stream_that_is_closed_is_no_files(tmp_path: Path) -> None:
    """The next file that is opened would have its number, and so what is meant for the stream, or its end."""
    snippet = tmp_path / "try.py"
    snippet.write_text("print('it says so')\n")
    done = {
        name: subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *words(command)],
            stdout=subprocess.PIPE, text=True, check=False, cwd=build.ROOT,
        )
        for name, closed, command in (
            ("check", "<&-", ("walkthrough", "cow", "--check", str(snippet))),
            ("gdb", "<&-", ("load", DEMO, "--gdb")),
            ("json", "2>&-", ("load", DEMO, "--json")),
        )
    }  # fmt: skip
    assert "it says so" in done["check"].stdout
    assert done["gdb"].returncode == 0
    assert json.loads(done["json"].stdout)["base"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("run", "-c", "print(5)"), ""),
        (("run", "{program}"), ""),
        (("run", "-m", "platform"), ""),
        (("walkthrough", "mapping"), ""),
        (("walkthrough", "mapping", "--html", "page"), "page: cannot write the page"),
    ],
    ids=str,
)
def test_where_the_process_is_has_been_removed(command: tuple[str, ...], said: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print(5)\n")
    place = tmp_path / "gone"
    place.mkdir()
    removed = ["sh", "-c", 'rmdir "$0" && exec "$@"', str(place), *COMMAND]
    done = subprocess.run(
        [*removed, *(word.format(program=program) for word in command)],
        capture_output=True, text=True, check=False, cwd=place,
        env=os.environ | {"PYTHONPATH": str(build.ROOT)},
    )  # fmt: skip
    if said:
        assert (done.returncode, done.stderr) == (1, f"miniloader: {said}: No such file or directory\n")
    else:
        assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
        assert done.stdout


def test_a_place_for_files_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where TMPDIR is a file that could be executed."""
    file = tmp_path / "file"
    file.touch(0o755)
    monkeypatch.setenv("TMPDIR", str(file))
    assert scratch_directory("disk").directory != str(file)


@pytest.mark.parametrize("command", OUTPUTS, ids=NAMES)
def test_a_locale_that_knows_ascii_only(command: tuple[str, ...]) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*COMMAND, *words(command)], capture_output=True, check=False, cwd=build.ROOT, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert done.stdout


@pytest.mark.parametrize("megabytes", [30, 120])
@pytest.mark.parametrize(
    "command", [("audit", "1"), ("prove", DEMO, "-n", "2"), ("load", DEMO)], ids=" ".join
)
def test_an_address_space_that_is_too_small_is_no_fault_of_ours(
    command: tuple[str, ...], megabytes: int
) -> None:
    """It is said on one line, wherever it is met."""

    def be_small() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    done = subprocess.run(
        [*COMMAND, *words(command)], capture_output=True, text=True, preexec_fn=be_small, check=False
    )
    assert done.returncode in (0, 1, 3)
    assert "a fault of miniloader's own" not in done.stderr
    assert done.stderr.count("\n") <= 1
    assert done.stderr.startswith("miniloader: ") or done.stdout
