"""A process whose first thread has ended has its memory while another lives, whose files tell it."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import miniloader
from miniloader.errors import ProcessGone
from miniloader.kernel.maps import read_maps
from miniloader.kernel.procfs import read_stat
from miniloader.lab.audit.select import choose

_EXIT = {"x86_64": 60, "aarch64": 93}  # exit(2), of one thread
_PROGRAM = f"""
import ctypes, threading
libc = ctypes.CDLL(None)
data = bytearray(b"x" * (8 << 20))
threading.Thread(target=input).start()
libc.syscall({_EXIT.get(platform.machine())}, 0)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while b"State:\tZ" not in Path(f"/proc/{process.pid}/status").read_bytes():
            assert process.poll() is None
        yield process
        process.kill()


def _kernels_sums(thread: str) -> dict[str, int]:
    lines = Path(f"/proc/{thread}/smaps_rollup").read_text().splitlines()[1:]
    sums = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
    return {"own": sums["Private_Clean"] + sums["Private_Dirty"], "resident": sums["Rss"]}


def test_its_memory_is_audited(process: subprocess.Popen[bytes]) -> None:
    """To the byte, but for pages of files that somebody else maps meanwhile."""
    tasks = Path(f"/proc/{process.pid}/task")
    (thread,) = (task.name for task in tasks.iterdir() if task.name != str(process.pid))
    before = _kernels_sums(thread)
    told = miniloader.audit([process.pid]).to_json()
    after = _kernels_sums(thread)
    assert [row["pid"] for row in told["processes"]] == [process.pid]
    for key, expected in before.items():
        found = sum(row[key] for mapping in told["mappings"] for row in mapping["processes"])
        assert found >= 8 << 20
        assert abs(found - expected) <= max(abs(expected - after[key]), 64 << 10)


def test_it_is_chosen_as_others_are(process: subprocess.Popen[bytes]) -> None:
    assert choose(tree=process.pid) == choose(command="threading.Thread(target=input)") == (process.pid,)


def test_it_is_gone_when_its_last_thread_is(process: subprocess.Popen[bytes]) -> None:
    assert read_maps(process.pid)
    process.kill()
    process.wait()
    with pytest.raises(ProcessGone, match="there is none"):
        read_maps(process.pid)
    with pytest.raises(ProcessGone, match="there is none"):
        read_stat(process.pid)
