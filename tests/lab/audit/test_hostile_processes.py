"""Processes that have more than anybody needs: they are told of, and spoil no audit of the others."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import miniloader
from fixtures import hostile
from miniloader.elf import Source
from miniloader.elf.image import read_image
from miniloader.elf.layout import PHDR
from miniloader.elf.writer import elf_header
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.kernel.maps import Vma
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit import arrangement
from miniloader.lab.audit.arrangement import Arrangements
from miniloader.lab.audit.mapped_files import MappedFile, MappedFiles

HOLD = "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); print(flush=True); sys.stdin.read()"
#: Maps and writes to as many copies of a library as it is told to.
HOARD = """
import mmap, os, shutil, sys
path, number = sys.argv[1], int(sys.argv[2])
for copy in range(number):
    name = f"{path}.{copy}"
    shutil.copy(path, name)
    fd = os.open(name, os.O_RDONLY)
    kept = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE)
    kept[0] = 1
    globals()[name] = kept
    os.close(fd)
print(flush=True)
sys.stdin.read()
"""
#: Maps a page of a file as often as it is told to, far from each other, and writes to each.
SCATTER = """
import ctypes, os, sys
path, offset, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mmap = ctypes.CDLL(None).mmap
mmap.restype = ctypes.c_void_p
mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
fd = os.open(path, os.O_RDONLY)
for place in range(number):
    ctypes.memset(mmap((1 << 44) + (place << 26), 4096, 3, 0x100002, fd, offset), 1, 1)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def running(program: str, *words: object) -> Iterator[int]:
    command = [sys.executable, "-c", program, *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def test_who_has_more_files_than_may_be_open_leaves_some_for_the_others(
    fixture_library: Callable[[str], Path], demo: Path, tmp_path: Path
) -> None:
    hoarded, held = tmp_path / "hoarded.so", tmp_path / "held.so"
    shutil.copy(demo, hoarded)
    shutil.copy(fixture_library("bss"), held)
    with running(HOARD, hoarded, 120) as hoarder, running(HOLD, held) as holder:
        command = [sys.executable, "-m", "miniloader", "audit", str(hoarder), str(holder), "--json"]
        done = subprocess.run(command, capture_output=True, preexec_fn=few_files, check=True)
    answer = json.loads(done.stdout)
    assert answer["unreadable"] == []
    (pages,) = (lib["private_pages"] for lib in answer["libraries"] if lib["path"] == str(held))
    assert pages
    assert not any("unknown" in page["causes"] for page in pages)
    hoards = (lib["private_pages"] for lib in answer["libraries"] if lib["path"].startswith(str(hoarded)))
    assert any("ulimit -n" in page["reason"] for pages in hoards for page in pages)


def segments(path: Path, number: int, bss: int = PAGE_SIZE) -> int:
    """Write a file with so many segments, each with bss, all of one page; where that is in the file."""
    end = 64 + PHDR.size * number
    offset = end + PAGE_SIZE - 1 & -PAGE_SIZE
    rows = (
        (1, 6, offset, vaddr, vaddr, PAGE_SIZE, PAGE_SIZE + bss, PAGE_SIZE)
        for vaddr in range(0, 3 * PAGE_SIZE * number, 3 * PAGE_SIZE)
    )
    header = elf_header(segments=number, phoff=64, sections=0, shoff=0, names=0)
    path.write_bytes((header + b"".join(PHDR.packing.pack(*row) for row in rows)).ljust(offset + PAGE_SIZE))
    return offset


def test_many_segments_that_are_mapped_often_are_not_gone_through_for_each_mapping(tmp_path: Path) -> None:
    """Bounded as every step of a hostile file is: had each image its list of them, it were a gigabyte."""
    file = tmp_path / "segments.so"
    offset = segments(file, 1100)
    with running(SCATTER, file, offset, 4000) as pid:

        def look(_: object) -> None:
            (library,) = miniloader.audit([pid], library=file.name).libraries
            assert library.private == 4000

        (outcome,) = hostile.run(1, lambda _: None, {"audit": look})
    assert outcome.kind == "result", outcome


#: Has a library, writes to its bss, and maps a page of other files far below it.
WRITES = """
import ctypes, os, sys
offset, library, *files = sys.argv[1:]
held = ctypes.CDLL(library)
ctypes.memset((ctypes.c_char * (1 << 16)).in_dll(held, "large"), 1, 1 << 16)
mmap = ctypes.CDLL(None).mmap
mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
for place, path in enumerate(files):
    mmap((1 << 44) + (place << 26), 4096, 3, 0x100002, os.open(path, os.O_RDONLY), int(offset))
print(flush=True)
sys.stdin.read()
"""


def test_a_page_is_in_one_bss_whoever_claims_it(
    fixture_library: Callable[[str], Path], tmp_path: Path
) -> None:
    """Forty files below a library say that all memory from there on is their bss."""
    library = Path(shutil.copy(fixture_library("bss"), tmp_path / "held.so"))
    files = [tmp_path / f"claims{number}.so" for number in range(40)]
    offsets = {segments(file, 1, bss=(6 << 44) + number * PAGE_SIZE) for number, file in enumerate(files)}
    with running(WRITES, *offsets, library, *files) as pid:
        found = miniloader.audit([pid])
        summed = miniloader.audit([pid], causes=False)
    (held,) = (file for file in found.libraries if file.path == str(library))
    assert held.processes[0].bss == 16
    assert {page.vaddr // PAGE_SIZE for page in held.bss_pages} == {*range(4, 20)}
    everything = sum(process.bss for file in summed.libraries for process in file.processes)
    assert everything <= sum(process.uss for process in summed.processes) // PAGE_SIZE


@pytest.mark.parametrize("apart", [1, 3])
def test_a_file_that_is_mapped_very_often_takes_time_in_proportion(
    apart: int, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, number, compared = 4096, 5_000, 0
    belongs: Callable[..., bool] = arrangement._belongs

    def counted(*words: object) -> bool:
        nonlocal compared
        compared += 1
        return belongs(*words)

    monkeypatch.setattr(arrangement, "_belongs", counted)
    starts = (0x7000_0000_0000 + page * apart * at for at in range(number))
    vmas = [Vma(start, start + page, "r--", False, 0, (8, 1), 7, str(demo), False) for start in starts]
    source = Source.open(demo)
    file = MappedFile(0, 1, vmas[0])
    file.facts = FileFacts(source, read_image(source), NameNumbers())
    files = MappedFiles()
    monkeypatch.setattr(files, "of", lambda *_: file)
    found = list(Arrangements().of_process(1, files, vmas))
    assert len(found) > number / 3
    assert sorted(index for image in found for index in image.indices) == list(range(number))
    assert compared < 20 * number
