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

from miniloader.elf import Source
from miniloader.elf.image import read_image
from miniloader.evidence.slots import FileFacts, NameNumbers
from miniloader.kernel.maps import Vma
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
