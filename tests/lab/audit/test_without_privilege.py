"""What an ordinary user is told of his own processes: all that the kernel tells him, and the true reasons."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from miniloader.errors import UsageError
from miniloader.kernel.procfs import read_stat
from miniloader.kernel.syscalls import PR_SET_DUMPABLE, prctl
from miniloader.lab.audit import select
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.select import choose
from tests.conftest import AsNobody
from tests.lab.audit.told_processes import KB, rollup_of, smaps_of, wait_until_at_rest

pytestmark = pytest.mark.needs_root("to become an ordinary user")


@contextmanager
def child(first: Callable[[], object] = lambda: None) -> Iterator[int]:
    """A child by fork that has called ``first`` and holds still."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        first()
        os.write(writing, b"x")
        while True:
            signal.pause()
    try:
        os.read(reading, 1)
        wait_until_at_rest(pid)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_pss_is_the_kernel_s(as_nobody: AsNobody) -> None:
    """Of the process to the byte, as smaps_rollup has it; of each library as smaps has it."""

    def look() -> tuple[str, bool, set[int]]:
        with child() as pid:
            for _ in range(30):
                before = rollup_of(pid)["Pss"] * KB
                found = audit([pid], causes=False)
                after = rollup_of(pid)["Pss"] * KB  # others map and unmap its files meanwhile
                exact = min(before, after) <= (found.processes[0].pss or 0) <= max(before, after)
                if exact:
                    break
            libc = next(library for library in found.libraries if library.name.startswith("libc.so"))
            wanted = 0
            lines = Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape").splitlines()
            inside = False
            for line in lines:
                if not line.split()[0].endswith(":"):
                    inside = line.endswith(libc.path)
                elif inside and line.startswith("Pss:"):
                    wanted += int(line.split()[1]) * KB
            assert smaps_of(pid)
            return found.level, exact, {abs((libc.takes or 0) - wanted)}

    level, exact, difference = as_nobody(look)
    assert (level, exact) == ("flags", True)
    assert max(difference) <= 64 * KB  # somebody may map libc meanwhile


def test_a_program_that_its_user_may_not_read(as_nobody: AsNobody, tmp_path: Path) -> None:
    """It is not deleted, nor replaced; and the kernel hides its memory from its own user."""
    program = Path("/var/tmp") / f"miniloader-{os.getpid()}"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o111)

    def look() -> tuple[tuple[str, ...], tuple[str, ...]]:
        process = subprocess.Popen([program, "60"])
        try:
            while read_stat(process.pid)[0] != program.name[:15]:
                time.sleep(0.001)
            found = audit([process.pid])
            reasons = {page.reason for library in found.libraries for page in library.private_pages}
            return tuple(sorted(reasons)), tuple(one.reason for one in found.unreadable)
        finally:
            process.kill()
            process.wait()

    try:
        reasons, unreadable = as_nobody(look)
    finally:
        program.unlink()
    said = " ".join([*reasons, *unreadable])
    assert "deleted" not in said
    assert "may not read the file (mode 0111, owner 0)" in said or "not dumpable" in said


def test_a_process_that_is_not_dumpable(as_nobody: AsNobody) -> None:
    def look() -> tuple[str, str]:
        with child(lambda: prctl(PR_SET_DUMPABLE, 0)) as pid:
            (unreadable,) = audit([pid]).unreadable
            return unreadable.reason, unreadable.needed

    reason, needed = as_nobody(look)
    assert "a process of this user, yet not dumpable" in reason
    assert "set-user-ID" in needed


def test_a_kernel_thread_has_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pid namespace of its own has none, so one is made up of what stat says of this process."""
    name, fields = read_stat(os.getpid())
    thread = [*fields]
    thread[6], thread[20] = str(int(fields[6]) | 0x200000), "0"  # PF_KTHREAD, no memory
    monkeypatch.setattr(select, "read_stat", lambda pid: (name, thread if pid == os.getpid() else fields))
    with pytest.raises(UsageError, match="a kernel thread"):
        choose(tree=os.getpid())
