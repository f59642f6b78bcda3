"""Where the files that a process has mapped lie in it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import miniloader
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangements
from miniloader.lab.audit.library_pages import look
from miniloader.lab.audit.live_bindings import live_bindings
from miniloader.lab.audit.mapped_files import MappedFiles
from tests.lab.audit.told_processes import ANONYMOUS, told, vaddr_of
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


def test_the_end_of_a_file_at_a_low_address_has_a_negative_bias() -> None:
    """Below it there is no room for what comes before it in the file."""
    libc = next(v for v in read_maps() if v.is_file and "w" in v.protection and "libc.so" in v.path)
    with told() as process:
        process(ANONYMOUS)
        process(f"fd = os.open({libc.path!r}, os.O_RDONLY)")
        process(f"at = libc.mmap(0x20000, {PAGE_SIZE}, 3, 0x12, fd, {libc.file_offset})")  # private, fixed
        process("ctypes.memset(at + 8, 1, 1)")
        audit = miniloader.audit([process.pid])
        (library,) = [library for library in audit.libraries if library.path == libc.path]
        assert any({"write", "overwritten"} & {*page.causes} for page in library.private_pages)
        assert len(library.processes) == 2
        (drawn,) = [sight for sight in look(audit) if sight.library is library]
        assert len(drawn.processes) == 1  # where all of it is
        rows = live_bindings(process.pid, os.path.basename(libc.path)).bindings
        assert "bound" in {row.state for row in rows}
