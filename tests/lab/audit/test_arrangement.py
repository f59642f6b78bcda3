"""Where the files that a process has mapped lie in it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import miniloader
from miniloader.kernel.maps import read_maps
from miniloader.lab.audit.arrangement import Arrangements
from miniloader.lab.audit.mapped_files import MappedFiles
from tests.lab.audit.told_processes import vaddr_of
from tests.memory import map_file


def test_a_library_lies_at_its_load_bias(demo: Path) -> None:
    """Loaded by us and by the system's loader it is two images, each with mappings of its own."""
    counters = ctypes.c_long.in_dll(ctypes.CDLL(str(demo)), "demo_counters")
    bias_of_ld_so = ctypes.addressof(counters) - vaddr_of(demo, "demo_counters")
    with miniloader.load(demo) as library:
        files, arrangements, vmas = MappedFiles(), Arrangements(), read_maps()
        for _ in range(2):  # what is kept for the next process says the same
            images = [
                image
                for image in arrangements.of_process(os.getpid(), files, vmas)
                if image.file.identity.path == str(demo)
            ]
            assert {image.bias for image in images} == {library.base, bias_of_ld_so}
            indices = [index for image in images for index in image.indices]
            assert len(set(indices)) == len(indices)


def test_a_file_that_is_no_image_lies_where_its_first_byte_is(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * 4096))
    start = map_file(path, 8)
    found = Arrangements().of_process(os.getpid(), MappedFiles(), read_maps())
    assert [one.bias for one in found if one.file.identity.path == str(path)] == [start]
