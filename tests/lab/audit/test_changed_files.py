"""Files that say something else since a process has mapped them: the audit tells of all the rest."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fixtures.hostile import run
from fixtures.pairs import PAIR_STEPS, Held, Pairs
from miniloader import cli
from miniloader.elf import read_image
from miniloader.elf.dynamic import DT_GNU_HASH, DT_RELAENT, DT_VERNEED
from miniloader.elf.layout import DYN, PHDR
from miniloader.elf.source import Source
from miniloader.kernel.syscalls import PAGE_SIZE

_INDEX = 0  # a pair of a library and what it needs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    directory = tmp_path_factory.mktemp("pairs")
    yield Pairs(1, directory)
    shutil.rmtree(directory)


def test_pairs_that_speak_of_each_other(pairs: Pairs) -> None:
    """``tools/fuzz --pairs`` tries more of them, with any seed."""
    found = list(run(5, pairs.make, PAIR_STEPS))
    assert [outcome for outcome in found if not outcome.allowed] == []
    assert len(found) == 5 * len(PAIR_STEPS)


def _cut(data: bytearray) -> None:
    del data[0x400:]


def _much_bss(data: bytearray) -> None:
    """The last segment is said to be 256 TiB long in memory."""
    start, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    places = [start + PHDR.size * index for index in range(count)]
    last = [place for place in places if struct.unpack_from("<I", data, place)[0] == 1][-1]
    struct.pack_into("<Q", data, last + PHDR.offset("memsz"), 1 << 48)


def _entry(tag: int, value: int) -> Callable[[bytearray], None]:
    def spoil(data: bytearray) -> None:
        image = read_image(Source.from_bytes(bytes(data)))
        place = [entry[0] for entry in image.dynamic.entries].index(tag)
        segment = image.segment("PT_DYNAMIC")
        assert segment is not None
        struct.pack_into("<Q", data, segment.file_offset + place * DYN.size + 8, value)

    return spoil


SPOILED = {
    "cut short": _cut,
    "a claim of bss": _much_bss,
    "no hash table": _entry(DT_GNU_HASH, 1 << 40),
    "no versions": _entry(DT_VERNEED, 1 << 40),
    "relocations of another length": _entry(DT_RELAENT, 7),
}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No more memory than so many bytes besides what there is."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    there = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_SIZE
    resource.setrlimit(resource.RLIMIT_AS, (there + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=list(SPOILED))
@pytest.mark.parametrize("words", [("--json",), ("--html",)], ids=" ".join)
def test_the_others_are_told_of(
    spoil: Callable[[bytearray], None],
    words: tuple[str, ...],
    pairs: Pairs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = pairs.make(_INDEX)
    second = bytearray(made.good.data[1])
    spoil(second)
    pair = Held(made.directory, made.holder, made.good, (made.good.data[0], bytes(second)))
    page = tmp_path / "page.html"
    with pair.mapped() as pid, room_for(1 << 30):
        assert cli.main(["audit", str(pid), *words, *([str(page)] if words == ("--html",) else [])]) == 0
    out = capsys.readouterr().out
    if words == ("--json",):
        found = json.loads(out)
        assert found["unreadable"] == []
        assert {library["path"] for library in found["libraries"]} >= set(map(str, pair.paths))
    else:
        assert page.read_text().count(pair.paths[0].name) > 0
