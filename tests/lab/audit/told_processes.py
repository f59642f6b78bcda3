"""Processes to be audited: each does what it is told, a line of Python at a time, and holds still between."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

import miniloader
from fixtures import build
from miniloader.kernel.procfs import read_stat
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.conftest import NOBODY

_LISTEN = """
import ctypes, json, os, signal, sys
scope = {"ctypes": ctypes, "os": os, "signal": signal, "sys": sys}
for line in sys.stdin:
    scope["answer"] = None
    exec(json.loads(line), scope)
    print(json.dumps(scope["answer"]), flush=True)
"""


T = TypeVar("T")

KB = 1024  # the unit of smaps

#: Lines for a process that maps memory of no file.
ANONYMOUS = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
number = ctypes.c_int
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def mapped(length): return libc.mmap(None, length, 3, 0x22, -1, 0)
"""


#: Lines for a process that becomes an ordinary user's, where it is root's: it may be looked at by that user.
BECOME_NOBODY = f"""
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE
"""


#: What has a process load the library at ``path``, by whose loader does it.
LOADED_BY = {
    "the system's loader": "lib = ctypes.CDLL({path!r}); base = None",
    "us": "import miniloader; ours = miniloader.load({path!r})",
}

#: Lines that write to the symbols of such a library, by its loader.
AT_SYMBOLS = """
def at(name):
    if {by!r} == "us": return ours.address(name)
    return ctypes.addressof(ctypes.c_char.in_dll(lib, name))
def store(name, value, offset=0, size=8):
    ctypes.memmove(at(name) + offset, value.to_bytes(size, "little"), size)
def word(name, offset=0): return int.from_bytes(ctypes.string_at(at(name) + offset, 8), "little")
"""


def wait_until_at_rest(*pids: int) -> None:
    """Until each process waits for something (or has ended): until then it may touch pages yet."""
    for pid in pids:
        while read_stat(pid)[1][0] not in "SZ":
            time.sleep(0.0005)


def agreed(look: Callable[[], tuple[T, T]], times: int = 30) -> T:
    """What both halves of a look say, which is made anew until they say the same; the last time they must.

    Who else maps a file meanwhile, in a process of another test, changes what a process alone maps of it.
    """
    for _ in range(times):
        ours, theirs = look()
        if ours == theirs:
            break
    assert ours == theirs
    return ours


class Told:
    """A process; ``told("answer = 1 + 1")`` is 2."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid

    def __call__(self, code: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        wait_until_at_rest(self.pid)  # it has answered, and is not yet waiting for the next
        return json.loads(line)


@contextmanager
def told(*lines: str, python: str = sys.executable, **options: Any) -> Iterator[Told]:
    """A fresh Python that has done what ``lines`` say; its children end with it."""
    environment = {**os.environ, "PYTHONPATH": str(build.ROOT)}
    process = subprocess.Popen(
        [python, "-c", _LISTEN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{"env": environment, **options},
    )
    with process:
        try:
            one = Told(process)
            for line in ("answer = 0", *lines):
                one(line)
            yield one
        finally:
            process.kill()


@contextmanager
def told_children(parent: Told, count: int) -> Iterator[list[int]]:
    """Children of ``parent`` by fork, which hold still."""
    pids = parent(
        "answer = []\n"
        f"for _ in range({count}):\n"
        "    reading, writing = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(reading); os.write(writing, b'x')\n"
        "        while True: signal.pause()\n"
        "    os.close(writing); os.read(reading, 1); os.close(reading); answer.append(child)"
    )
    wait_until_at_rest(*pids)
    try:
        yield pids
    finally:
        parent(f"for child in {pids}: os.kill(child, 9), os.waitpid(child, 0)")


def smaps_of(pid: int) -> dict[int, Mapping[str, int]]:
    """The kernel's own counts in kB by start of the mapping (proc_pid_smaps(5)), of all mappings."""
    found: dict[int, dict[str, int]] = {}
    here: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            here = found[int(words[0].partition("-")[0], 16)] = {}
            here["file"] = int(words[4] != "0" and words[1].endswith("p"))
        elif words[-1] == "kB":
            here[words[0][:-1]] = int(words[1])
    return found


def rollup_of(pid: int) -> Mapping[str, int]:
    """The kernel's sums over a process, in kB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {words[0][:-1]: int(words[1]) for words in map(str.split, lines)}


def copy(source: Path, to: Path) -> Path:
    """A file of the test's own, written to the disk."""
    shutil.copy(source, to)
    with to.open("rb") as file:
        os.fsync(file.fileno())
    return to


def own_child(path: str, *, replace: bool = False) -> tuple[str, set[str], set[str]]:
    """What an audit of a child that has the library at ``path`` finds: level, causes, written symbols."""
    import ctypes

    library = ctypes.CDLL(path)
    library.demo_next()
    if replace:
        shutil.copy(path, f"{path}.new")
        os.rename(f"{path}.new", path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")
        while True:
            signal.pause()
    try:
        os.read(reading, 1)
        wait_until_at_rest(child)
        found = miniloader.audit([child], library=path)  # another test may have loaded a copy here
        pages = found.library(path).private_pages
        causes = {cause for page in pages for cause in page.causes}
        return found.level, causes, {name for page in pages for name in page.written}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def vaddr_of(path: Path, name: str) -> int:
    """Where a library defines a symbol."""
    symbols = miniloader.inspect(path).symbols
    number = symbols.find(name)
    assert number is not None
    return int(symbols.rows["value"][number])


def page_of(path: Path, name: str) -> int:
    """The vaddr of the page where a library defines a symbol."""
    return vaddr_of(path, name) & -PAGE_SIZE


@contextmanager
def huge_pages_in_reserve(number: int) -> Iterator[None]:
    """So many more huge pages for hugetlbfs.  Tests that run at once wait: each puts back what it found."""
    path = Path("/proc/sys/vm/nr_hugepages")
    if not path.exists() or os.geteuid():
        pytest.skip("needs root: to have huge pages kept in reserve")
    with path.open("r+") as reserve:
        fcntl.flock(reserve, fcntl.LOCK_EX)
        before = path.read_text()
        path.write_text(str(int(before) + number))
        try:
            if int(path.read_text()) < int(before) + number:
                pytest.skip("this machine lacks free huge pages")
            yield
        finally:
            path.write_text(before)
