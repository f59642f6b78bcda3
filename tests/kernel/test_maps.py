"""``maps`` against the text it is read from, and against names that try to fool it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.kernel.maps import Vma, mappings_of, parse_vma, read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import map_file, still_child, synced_file


def as_line(vma: Vma) -> bytes:
    """The line the kernel would print for it (``show_map_vma``), written from its documentation."""
    numbers = (
        f"{vma.start:08x}-{vma.end:08x} {vma.protection}{'s' if vma.shared else 'p'} "
        f"{vma.file_offset:08x} {vma.device[0]:02x}:{vma.device[1]:02x} {vma.inode} "
    ).encode()
    name = os.fsencode(vma.path).replace(b"\n", rb"\012") + (b" (deleted)" if vma.deleted else b"")
    return numbers.ljust(73) + name if name else numbers


def test_every_line_reads_back(varied: tuple[int, dict[str, int]]) -> None:
    pid, _ = varied
    lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    assert [as_line(vma) for vma in read_maps(pid)] == lines
    assert len(lines) > 20


@pytest.mark.parametrize(
    "name",
    [
        b"plain.so",
        b"with several  spaces .so",
        b"with\nnewline\n",
        b"\xff\xfe not UTF-8",
        b"\r\v\f\x1c\x85 odd white space",
        b"[heap]",
        b"7f00-7fff r-xp 00000000 00:00 1",
        b"tab\tand trailing ",
    ],
)
def test_names(tmp_path: Path, name: bytes) -> None:
    path = synced_file(tmp_path / os.fsdecode(name), 2)
    with still_child(map_file, path, 1) as (pid, address):
        [vma] = mappings_of(read_maps(pid), path)
        assert vma == Vma(
            start=address,
            end=address + PAGE_SIZE,
            protection="rw-",
            shared=False,
            file_offset=0,
            device=vma.device,
            inode=path.stat().st_ino,
            path=str(path),
            deleted=False,
        )
        path.unlink()
        [vma] = mappings_of(read_maps(pid), path)
        assert vma.deleted


def test_offset_and_protection(tmp_path: Path) -> None:
    path = synced_file(tmp_path / "file", 4)
    with still_child(lambda: map_file(path, 2, page=2, protection=4)) as (pid, address):
        [vma] = mappings_of(read_maps(pid), path)
    assert (vma.file_offset, vma.protection, vma.size) == (2 * PAGE_SIZE, "--x", 2 * PAGE_SIZE)
    assert vma.is_file
    assert address in vma
    assert vma.end not in vma


def test_self_is_us() -> None:
    assert read_maps()
    assert {vma.path for vma in read_maps()} == {vma.path for vma in read_maps(os.getpid())}


def test_process_that_ended() -> None:
    done = subprocess.Popen(["true"])
    os.waitid(os.P_PID, done.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessGone, match=f"process {done.pid}: has no memory") as zombie:
        read_maps(done.pid)
    done.wait()
    with pytest.raises(ProcessGone, match=f"process {done.pid}: there is none"):
        read_maps(done.pid)
    assert (zombie.value.pid, zombie.value.exit_status) == (done.pid, 1)


def test_no_such_number() -> None:
    with pytest.raises(ProcessGone):
        read_maps(10**12)


@pytest.mark.needs_root("it asks as another user than its own")
def test_somebody_elses(as_nobody) -> None:
    with pytest.raises(EvidenceError, match=r"Permission denied; to read it: .*CAP_SYS_PTRACE"):
        as_nobody(read_maps, os.getpid())


@given(st.binary(max_size=80) | st.from_regex(rb"[0-9a-f]{1,20}-[0-9a-f]* r?wxp [0-9a-f]* [0-9:]* \d* .*"))
def test_garbage_is_refused_or_read(line: bytes) -> None:
    with contextlib.suppress(EvidenceError):
        parse_vma(line)


def test_a_part_of_the_maps_is_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only lines near it are read, whose addresses ascend; the answer is that of reading all."""
    text = Path("/proc/self/maps").read_bytes()
    monkeypatch.setattr("miniloader.kernel.maps.read_process_file", lambda pid, name: text)
    every, parsed = read_maps(), []
    monkeypatch.setattr(
        "miniloader.kernel.maps.parse_vma", lambda line: parsed.append(line) or parse_vma(line)
    )
    edges = sorted({edge + step for vma in every for edge in (vma.start, vma.end) for step in (-1, 0, 1)})
    for start, end in [*pairwise(edges), *zip(edges, edges[7:], strict=False), (0, 1), (0, 1 << 64)]:
        parsed.clear()
        expected = tuple(vma for vma in every if vma.start < end and start < vma.end)
        assert read_maps(start=start, end=end) == expected
        assert len(parsed) <= len(expected) + 1
