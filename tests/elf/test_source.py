"""Where the bytes of a file come from: a descriptor that need not stay open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fixtures import build
from miniloader.elf import Source
from miniloader.errors import ElfError


def test_who_rests_has_no_descriptor_until_something_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    shutil.copy(build.build("demo"), path)
    source = Source.open(path)
    end = source.size - 8
    expected = path.read_bytes()[end:]
    source.rest()
    assert source.fd == -1
    assert source.read(end, 8, "bytes") == expected
    assert source.fd >= 0
    source.rest()
    source.close()
    with pytest.raises(ElfError, match="Bad file descriptor"):
        source.read(end, 8, "bytes")


def test_another_file_in_its_place_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    shutil.copy(build.build("demo"), path)
    source = Source.open(path)
    source.rest()
    shutil.copy(path, tmp_path / "new")
    (tmp_path / "new").rename(path)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(ElfError, match="another file"):
        source.read(source.size - 8, 8, "bytes")
    assert os.listdir("/proc/self/fd") == descriptors


def test_in_a_directory_that_was_removed_nobody_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory := tmp_path / "removed").mkdir()
    shutil.copy(build.build("demo"), directory / "lib.so")
    monkeypatch.chdir(directory)
    source = Source.open("lib.so")
    shutil.rmtree(directory)
    source.rest()
    assert source.fd >= 0
    assert len(source.read(source.size - 8, 8, "bytes")) == 8
    source.close()


def test_what_no_name_leads_to_does_not_rest(tmp_path: Path) -> None:
    with Path(shutil.copy(build.build("demo"), tmp_path / "lib.so")).open("rb") as file:
        source = Source.from_fd(file.fileno())
        removed = Source.open(tmp_path / "lib.so")
    (tmp_path / "lib.so").unlink()
    for one in source, removed, Source.from_bytes(b"\x7fELF"):
        one.rest()
        assert one.fd >= 0
        one.close()
