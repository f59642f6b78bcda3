"""Too little address space, too few mappings: what that explains, and what is not begun then."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import build
from miniloader import shortage
from miniloader.errors import MEMORY_LIMITS, MiniloaderError
from miniloader.lab.audit.audit import _unreadable
from miniloader.loader.from_inside import for_host
from miniloader.loader.from_inside.caller import Caller
from miniloader.loader.from_inside.for_host import Rules
from miniloader.loader.policy import Policy

#: A command where ``argv[1]`` more mappings may be made.
CROWDED = """
import ctypes, mmap, os, sys
from miniloader import cli
from miniloader.shortage import mappings_left
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
most, left = int(open("/proc/sys/vm/max_map_count").read()), int(sys.argv.pop(1))
room = mmap.mmap(-1, 2 * most * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
start, done = ctypes.addressof(ctypes.c_char.from_buffer(room)), 0
while (still := mappings_left()) > left + 1:
    for _ in range((still - left) // 2):
        libc.mprotect(start + 2 * page * done + page, page, mmap.PROT_READ)
        done += 1
sys.exit(cli.main(sys.argv[1:]))
"""


def run(words: list[str], size: int | None = None) -> subprocess.CompletedProcess[str]:
    def be_small() -> None:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, preexec_fn=be_small,
        cwd=build.ROOT,
    )  # fmt: skip


def test_what_is_left_is_what_the_kernel_has_been_told(tmp_path: Path) -> None:
    limit = tmp_path / "limit"
    limit.write_text("100000\n")
    assert 90_000 < shortage.mappings_left(str(limit)) < 100_000
    assert shortage.mappings_left(str(tmp_path / "none")) == sys.maxsize
    assert shortage.space_left(str(tmp_path / "none")) == (sys.maxsize, "")
    script = "from miniloader.shortage import space_left; print(*space_left())"
    left, said = run(["-c", script], 500 << 20).stdout.split(maxsplit=1)
    assert said.strip() == "ulimit -v"
    assert 400 << 20 < int(left) < 495 << 20
    assert run(["-c", script]).stdout.split()[0] == str(sys.maxsize)


def test_what_the_kernel_promises_is_counted_where_it_keeps_its_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, memory, none = tmp_path / "mode", tmp_path / "memory", str(tmp_path / "none")
    memory.write_text("MemTotal: 9000000 kB\nCommitLimit:  1048576 kB\nCommitted_AS:   1000000 kB\nHuge: 0\n")
    left = {}
    for setting in ("0", "1", "2"):
        mode.write_text(f"{setting}\n")
        left[setting] = shortage.space_left(none, none, str(mode), str(memory))
    assert left == {
        "0": (sys.maxsize, ""),
        "1": (sys.maxsize, ""),
        "2": (48576 << 10, "vm.overcommit_memory=2"),
    }
    assert shortage.space_left(none, none, str(mode), none) == (sys.maxsize, "vm.overcommit_memory=2")
    monkeypatch.setattr(shortage, "space_left", lambda: left["2"])
    said = shortage.fault(SyntaxError("expected ':'"))
    assert said.startswith("too little memory, 47 MiB are left (vm.overcommit_memory=2): SyntaxError: ")
    with pytest.raises(MiniloaderError, match=r"^numpy: too little memory, 47 MiB are left"):
        shortage.Room().find_spec("numpy")


@pytest.mark.parametrize(("megabytes", "said"), [(40, "too little address space, "), (900, "a fault of ")])
def test_an_error_with_little_left_is_no_fault_of_ours(megabytes: int, said: str) -> None:
    """As Python's own compiler raises it where it has no memory, of code that is right."""
    script = (
        "from miniloader import cli\n"
        "def fail(*_): raise SyntaxError(\"expected ':'\")\n"
        "cli._dispatch = fail\n"
        "raise SystemExit(cli.main(['version']))"
    )
    done = run(["-c", script], megabytes << 20)
    assert done.returncode == 1
    assert done.stderr.startswith(f"miniloader: {said}")
    assert "SyntaxError: expected ':'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "check", "prove", "doctor"])
def test_numpy_is_not_begun_where_it_has_no_room(command: str) -> None:
    """OpenBLAS would have ended the process in its own words, or by a signal, or never."""
    words = [command, *([] if command == "doctor" else [str(build.build("demo"))])]
    for megabytes in (60, 95):
        done = run(["-m", "miniloader", *words], megabytes << 20)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("miniloader: numpy: too little address space, ")
        assert line.endswith(" MiB and 16 mappings are needed")


@pytest.mark.parametrize("left", [20, 45, 60])
def test_hashlib_prints_no_traceback_of_its_own(left: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CROWDED, str(left), "prepare", str(build.build("demo"))],
        capture_output=True, text=True, check=False, cwd=build.ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("miniloader: ")
    assert "vm.max_map_count" in line  # too few mappings, or what Python makes of it: too little memory


def test_pickle_without_its_c_part_is_not_begun_with(demo: Path) -> None:
    """Python passes over an extension module that it cannot map; a child ended without a word of why."""
    script = (
        "import sys; sys.modules['_pickle'] = None; from miniloader import cli\n"
        "raise SystemExit(cli.main(['load', sys.argv[1]]))"
    )
    done = run(["-c", script, str(demo)], 40 << 20)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("miniloader: too little address space, ")


def test_who_lacks_even_the_memory_to_say_so_says_it() -> None:
    script = (
        "from miniloader import cli\n"
        "def fail(*_, **__): raise MemoryError\n"
        "cli._report = cli.reported = fail\n"
        "raise SystemExit(cli.main(['version']))"
    )
    done = run(["-c", script])
    assert (done.returncode, done.stderr) == (1, "miniloader: too little memory\n")


def test_a_program_that_no_memory_was_left_to_begin_with_is_no_traceback() -> None:
    script = (
        "from miniloader import cli\n"
        "from miniloader.loader.running import program\n"
        "def fail(*_): raise MemoryError\n"
        "program.ModuleType = fail\n"
        "raise SystemExit(cli.main(['run', '--no-bill', '-c', 'print(1)']))"
    )
    done = run(["-c", script])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"miniloader: too little memory ({MEMORY_LIMITS})\n"


def test_a_process_that_no_memory_was_left_for_is_told_so() -> None:
    said = _unreadable(1, MemoryError())
    assert said.reason.startswith("too little memory (")
    assert not said.needed


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_what_is_forbidden_is_no_fault_of_ours(number: int) -> None:
    """As where a filter answers readlink(2) so, in a program that is run or while a process is audited."""
    reason = os.strerror(number)
    where = OSError(number, reason, "/proc/self")
    said = shortage.fault(where)
    assert said.startswith(f"/proc/self: {reason}")
    assert _unreadable(1, where).reason == said
    assert ("seccomp" in said) == (number == errno.ENOSYS)  # a file may be another's, or be immutable
    assert shortage.fault(OSError(number, reason)) == f"{reason}: a system call is forbidden here (seccomp?)"


def test_a_library_that_no_memory_was_left_for_falls_back_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    told: list[str] = []
    rules = Rules(Policy(), lambda _: True, False, lambda name, error: told.append(f"{name}, {error}"))
    monkeypatch.setattr(for_host, "in_force", [rules])
    monkeypatch.setattr(for_host, "open_library", fail)
    monkeypatch.setattr(for_host.dynamic_linker, "open_host", lambda *_, **__: 1)
    assert for_host.open_for_host(b"x.so", 1, Caller("here", None, None, Policy(), None, None)) == 1
    assert told[0].startswith("x.so, x.so: too little memory (")
