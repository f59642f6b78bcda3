"""Traced calls read as strace(1) writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miniloader.kernel.syscalls import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, PROT_READ
from miniloader.walkthrough.traced_calls import Calls, TracedCall


def test_a_device_is_shown_by_its_path_and_a_fresh_file_by_its_name(tmp_path: Path) -> None:
    calls, file = Calls(), tmp_path / "letters"
    file.write_bytes(b"x")
    fds = [calls.open("/dev/zero", os.O_RDWR), calls.open(str(file), os.O_RDONLY)]
    assert calls.taken() == (
        TracedCall('open("/dev/zero", O_RDWR)', str(fds[0])),
        TracedCall('open("letters", O_RDONLY)', str(fds[1])),
    )
    for fd in fds:
        calls.close(fd)


def test_a_file_in_a_directory_of_dev_is_no_device() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine lacks a tmpfs")
    calls, path = Calls(), f"/dev/shm/miniloader-{os.urandom(8).hex()}"
    os.close(calls.open(path, os.O_RDWR | os.O_CREAT))
    os.unlink(path)
    assert calls.taken()[0].text == f'open("{os.path.basename(path)}", O_RDWR|O_CREAT)'


def test_flags_are_told_where_the_mask_of_the_c_library_has_more_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As musl's, whose O_ACCMODE has O_PATH."""
    monkeypatch.setattr(os, "O_ACCMODE", os.O_ACCMODE | os.O_PATH)
    calls = Calls()
    os.close(calls.open(str(tmp_path), os.O_RDONLY | os.O_PATH))
    assert f'open("{tmp_path.name}", O_RDONLY|O_PATH)' in calls.taken()[0].text


def test_a_refused_call_is_traced_with_its_errno() -> None:
    calls = Calls()
    with pytest.raises(OSError, match="No such"):
        calls.open("/dev/nothing/of/this/name", os.O_RDONLY)
    assert calls.taken() == (TracedCall('open("name", O_RDONLY)', "-1 ENOENT (No such file or directory)"),)


def test_calls_of_others_are_told_apart_and_handed_over_once() -> None:
    calls, other = Calls(), Calls()
    memory = calls.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
    other.load(memory.address, 2, "p[0:2]")
    calls.add(other.taken(), "child")
    calls.munmap(memory)
    first, second, third = calls.taken()
    assert first.text == f"mmap(NULL, {PAGE_SIZE}, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0)"
    assert second == TracedCall("p[0:2]", r'"\0\0"', "child", access=True)
    assert third == TracedCall(f"munmap({memory.address:#x}, {PAGE_SIZE})", "0")
    assert calls.taken() == other.taken() == ()
