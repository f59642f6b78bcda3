"""Files of a server that stops to answer between two questions: whichever is the first without an answer."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from miniloader.elf.source import LARGE
from miniloader.errors import ElfError
from miniloader.kernel.maps import read_maps
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.lab.audit.served_files import ServedFile
from miniloader.lab.workers.patient import PatientProcess
from tests.lab.audit.told_processes import copy


def test_a_large_table_is_not_read(tmp_path: Path) -> None:
    """Where holes are is asked first."""
    path = tmp_path / "file.so"
    path.write_bytes(b"x" * LARGE)
    with PatientProcess() as process:
        served = ServedFile(process, str(path))
        source = served.source()
        assert len(source.read(0, LARGE, "table")) == LARGE
        served.silent = True
        with pytest.raises(ElfError, match="whoever serves the file does not answer"):
            source.read(0, LARGE, "table")


def test_whether_a_file_was_deleted_is_not_told(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, asked = copy(demo, tmp_path / "file.so"), ServedFile.fstat, list[str]()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        os.link(path, tmp_path / "kept.so")
        os.unlink(path)
        os.link(tmp_path / "kept.so", path)
        (vma,) = [vma for vma in read_maps(os.getpid()) if vma.path == str(path)]
        assert vma.deleted

        def fstat(served: ServedFile, descriptor: int) -> os.stat_result:
            asked.append(served._path)
            if asked.count(served._path) > 1:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(served, descriptor)

        monkeypatch.setattr(MappedFiles, "_is_served", lambda *_: True)
        monkeypatch.setattr(ServedFile, "fstat", fstat)
        mapped = MappedFiles().of(os.getpid(), vma)
    assert asked.count(str(path)) >= 2  # by who may not ask the kernel for the file once more
    assert (mapped.facts is None) == bool(mapped.trouble)
