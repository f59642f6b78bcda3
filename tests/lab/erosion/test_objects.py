"""Which objects lie on eroded pages, told from outside: the process itself says where it has put them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniloader.errors import EvidenceError, UnsupportedError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.pagemap import FRAME, PRESENT, read_pagemap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.result import Audit
from miniloader.lab.audit.survey import Memo, survey
from miniloader.lab.erosion import census, object_loop
from miniloader.lab.erosion.causes import causes_of
from miniloader.lab.erosion.census import objects_at
from miniloader.lab.erosion.interpreter import interpreter_in
from miniloader.lab.erosion.object_loop import ObjectLoop
from miniloader.lab.erosion.objects import Objects, objects_on
from miniloader.lab.erosion.pools import POOL, Pools, is_chunk, pools_in
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.result import Erosion, pages_in
from miniloader.lab.erosion.types import Types, _filtered
from miniloader.report.audit import lines
from miniloader.report.text import laid_out, plain
from tests.failing_calls import failing
from tests.lab.audit.told_processes import told
from tests.lab.erosion.pools import Pool, needs_frames, pool

_OBJECTS = """
class Invoice:
    def __init__(self, number): self.number = number
class Slim:
    __slots__ = ("number",)
    def __init__(self, number): self.number = number
Invoice.__module__ = Slim.__module__ = "shop"
data = [{"id": 300 + number, "name": f"user{number}", "tags": [f"a{number}"]} for number in range(4_000)]
data += [Invoice(number * 1.5) for number in range(3_000)]
data += [Slim((number, f"b{number}")) for number in range(3_000)]
data += [bytes(1000 + number) for number in range(100)]
gone = [Slim(None) for _ in range(2_000)]
del gone[::2]
def everything():
    for thing in data + gone:
        yield thing
        if isinstance(thing, dict): yield from thing.values(); yield thing["tags"][0]
        elif isinstance(thing, (Invoice, Slim)): yield thing.number
def read(): return sum(thing is None for thing in everything())
"""
_WHERE = "answer = [(id(thing), type(thing).__name__) for thing in everything()]"
_MORE = ("3.12", "3.13", "3.14")


def pythons() -> Iterator[str]:
    """This one, the system's, and others where there are any."""
    yield sys.executable
    yield "/usr/bin/python3"
    for version in _MORE:
        kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        yield str(kept[-1]) if kept else f"python{version}"


def row_of(found: Audit, pid: int) -> Erosion:
    assert found.erosion is not None
    return next(row for row in found.erosion if row.pid == pid)


def look(workers: Pool) -> Audit:
    return audit(workers.pids, library="nothing")


@needs_frames
@pytest.mark.parametrize("python", [*pythons()])
def test_the_types_are_right(python: str) -> None:
    """All objects on the eroded pages are counted by their types, and none that has been freed."""
    if shutil.which(python) is None:
        pytest.skip(f"this machine lacks {python}")
    with pool(_OBJECTS, python=python) as workers:
        child = workers.fork()
        workers.ask(child, "read()")
        row = row_of(look(workers), child)
        version = workers.parent("answer = sys.version_info[:2]")
        places = dict(workers.parent(_WHERE))
    assert row.runtime == f"cpython-{version[0]}.{version[1]}"
    eroded = {*pages_in(row.pages.proven).tolist(), *pages_in(row.pages.possible).tolist()}
    really = Counter(kind for address, kind in places.items() if address & -PAGE_SIZE in eroded)
    found = {kind.type: kind for kind in row.objects}
    for kind in ("Invoice", "Slim"):
        assert found[f"shop.{kind}"].count == really[kind] >= 2_500
    for kind in ("dict", "str", "list", "int", "float", "tuple", "bytes"):
        assert found[kind].count >= 0.98 * really[kind]
        assert 0 < found[kind].pages <= len(eroded)
    assert found["list"].count <= 1.2 * really["list"]
    assert row.objects[0].count == max(kind.count for kind in row.objects)
    assert "None" not in {kind.type for kind in row.objects}


@needs_frames
def test_nothing_is_mapped_copied_or_moved() -> None:
    """The page tables are the same afterwards: not a page more, none unshared, none in another frame."""

    def entries(pid: int) -> dict[int, np.ndarray]:
        return {
            vma.start: read_pagemap(pid, vma.start, vma.end) & (PRESENT | FRAME)
            for vma in read_maps(pid)
            if vma.start < 1 << 63
        }

    def moved() -> list[str]:
        with pool(_OBJECTS) as workers:
            first, second = workers.fork(), workers.fork()
            workers.ask(first, "read()")
            workers.parent("read()")  # then what it wrote is one frame for the two others, and nobody's alone
            workers.ask(second, "import gc; gc.collect()")
            before = [entries(pid) for pid in workers.pids]
            found = look(workers)
            after = [entries(pid) for pid in workers.pids]
        assert row_of(found, first).objects
        assert list(map(list, before)) == list(map(list, after))
        pairs = zip(before, after, strict=True)
        return [hex(at) for earlier, later in pairs for at in earlier if (earlier[at] != later[at]).any()]

    # The kernel moves pages by itself, but not each time; what a look did would be done in each new pool.
    assert [] in (moved() for _ in range(3))


@needs_frames
def test_without_the_loop_the_same_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UnsupportedError("the loader's own loops are missing")

    with pool(_OBJECTS) as workers:
        child = workers.fork()
        workers.ask(child, "read(); data[0]['id'] = 7; held = data[:100]")
        by_loop = row_of(look(workers), child)
        with monkeypatch.context() as without:
            without.setattr(object_loop, "functions", missing)
            object_loop.has_loop.cache_clear()
            by_numpy = row_of(look(workers), child)
            assert not object_loop.has_loop()
        object_loop.has_loop.cache_clear()
    assert object_loop.has_loop()
    assert {kind.type: kind for kind in by_loop.objects} == {kind.type: kind for kind in by_numpy.objects}
    assert (by_loop.same, by_loop.causes) == (by_numpy.same, by_numpy.causes)
    assert by_loop.causes["reference-count"] > 0


@needs_frames
def test_sentences_say_what_to_do() -> None:
    with pool(_OBJECTS) as workers:
        child = workers.fork()
        workers.ask(child, "read()")
        found = look(workers)
        row = row_of(found, child)
        possible = "\n".join(plain(line) for line in laid_out(lines(audit(workers.pids)), None))
    with pool(_OBJECTS) as workers:
        workers.fork()  # has the parent's frames still, which were the younger one's, too
        child = workers.fork()
        workers.ask(child, "read()")
        proven = row_of(look(workers), child)
        told_of = "\n".join(plain(line) for line in laid_out(lines(audit(workers.pids)), None))
    assert row.same is not None
    assert row.same > row.apart // 2
    assert sum(row.causes.values()) == row.apart - row.changed
    assert row.causes["unknown"] == row.same
    assert not row.proven_same
    assert "touched them" not in possible
    assert "that it no longer shares with" not in possible
    assert f"that it and {row.relative} have a frame of their own for hold the same bytes in both" in possible
    assert "if it was shared, reference counts or the garbage collector touched it" in possible
    assert "if it was shared: gc.freeze() before the fork would help only against the collector" in possible
    assert proven.proven_same > row.apart // 2
    assert "if it was shared: gc" not in told_of
    assert "hold the same bytes as there: reference counts or the garbage collector touched them" in told_of
    assert re.search(r"Objects there: [\d,]+ \w+, .*shop\.Slim", told_of)
    assert "gc.freeze() before the fork would help only against the collector" in told_of


@needs_frames
def test_workers_that_are_alike_are_told_of_together() -> None:
    """Eight workers that do the same were eight paragraphs; who differs has a sentence of its own."""
    write = f"array = mapped({2 << 20}); ctypes.memset(array, 1, {2 << 20})"
    with pool(_OBJECTS, write) as workers:
        alike = [workers.fork() for _ in range(3)]
        for child in alike:
            workers.ask(child, "read()")
        other = workers.fork()
        workers.ask(other, f"ctypes.memset(array, 2, {2 << 20})")
        found = look(workers)
        shown = [plain(line) for line in laid_out(lines(found), None)]
    first, *others = sorted(alike, key=lambda pid: (-row_of(found, pid).apart, pid))
    (told_of,) = [line for line in shown if line.startswith(f"{first}: ")]
    assert "Objects there: " in told_of
    assert f"{others[0]}, {others[1]}: like {first}, to within 5 %" in shown
    assert any(line.startswith(f"{other}: ") and "written otherwise" in line for line in shown)


@needs_frames
def test_data_that_is_written_once_more_was_touched_by_no_count() -> None:
    """An array that is filled with what it had holds the same bytes, and no object: no freezing spares it."""
    length = 4 << 20
    fill = f"ctypes.memset(array, 1, {length})"
    with pool(f"array = mapped({length}); {fill}") as workers:
        child = workers.fork()
        workers.ask(child, fill)
        found = look(workers)
        row = row_of(found, child)
        text = "\n".join(plain(line) for line in laid_out(lines(audit(workers.pids)), None))
        (workers_of_older,) = erosion_of_older(found)
    assert row.same is not None
    assert row.same >= length
    assert row.touched is not None
    assert row.spared is not None
    assert row.touched < row.same - length + (64 << 10)
    assert row.spared < length // 2
    assert "the garbage collector touched" not in text
    assert " MiB of the same bytes are where no object begins: data, no counts" in text
    assert workers_of_older.touched is None


def erosion_of_older(found: Audit) -> tuple[Erosion, ...]:
    """The rows as an older version saved them, read again."""
    value = json.loads(json.dumps(found.to_json()))
    for saved in value["erosion"]:
        del saved["touched"]
    return Audit.from_json(value).erosion or ()


@needs_frames
def test_what_differs_is_told_apart() -> None:
    """Objects that are held count up; data that is written is something else."""
    with pool(
        _OBJECTS, f"array = mapped({4 * PAGE_SIZE}); ctypes.memset(array, 1, {4 * PAGE_SIZE})"
    ) as workers:
        child = workers.fork()
        workers.ask(child, f"held = [thing for thing in data]; ctypes.memset(array, 2, {3 * PAGE_SIZE})")
        causes = row_of(look(workers), child).causes
    assert causes["reference-count"] >= 4_000 * 64 // 2
    assert causes["other-write"] >= 3 * PAGE_SIZE


@needs_frames
def test_a_program_without_python() -> None:
    with told("import subprocess") as shell:
        bash = shell(
            "script = 'x=$(seq 20000); (y=${x//1/2}; echo; sleep 60; :) & wait'\n"
            "bash = subprocess.Popen(['bash', '-c', script], stdout=subprocess.PIPE)\n"
            "bash.stdout.readline()\n"
            "answer = bash.pid"
        )
        children = [int(pid) for pid in Path(f"/proc/{bash}/task/{bash}/children").read_text().split()]
        found = audit([bash, *children], library="nothing")
        for pid in (bash, *children):
            os.kill(pid, signal.SIGKILL)
    assert found.erosion
    assert {row.runtime for row in found.erosion} == {None}
    # Which malloc a bash has differs: what is told of its heap is glibc's chunks, or nothing.
    kinds = {kind.type for row in found.erosion for kind in row.objects}
    assert kinds <= {"malloc chunk in use", "malloc chunk free"}
    assert found.erosion[0].same is not None


def test_causes_of_words() -> None:
    """By hand: a count, a collector's word, data, and the gravest of several."""
    objects = Objects(*(np.array(column) for column in ([0, 1, 2, 3], [10, 10, 10, 10], [0] * 4, [2] * 4)))
    differs = np.zeros((5, 512), np.bool_)
    differs[0, 10] = True
    differs[1, [8, 10]] = True
    differs[2, [9, 11]] = True
    differs[4, 0] = True
    told_of = {"reference-count": [0], "collector": [1], "other-write": [2, 4], "unknown": [3]}
    found = causes_of(differs, objects)
    assert {cause: np.flatnonzero(pages).tolist() for cause, pages in found.items()} == told_of
    assert causes_of(differs[:3], None)["other-write"].all()
    assert objects.on(np.array([False, True, False, True, False])).page.tolist() == [0, 1]


_LARGE = """
import random, sys
class Text(str): __slots__ = ()
class Row(tuple): __slots__ = ()
class Wide: __slots__ = tuple(f"s{number}" for number in range(80))
class Never: pass
random.seed(1)
data = [Text("x" * random.randrange(600, 6000)) for _ in range(3_000)]
data += [Row(range(random.randrange(70, 600))) for _ in range(3_000)]
data += [Wide() for _ in range(3_000)]
lists = [[Never, thing, Never, Never] * random.randrange(40, 300) for thing in data[::3]]
print("ready", flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("python", [sys.executable, "/usr/bin/python3"])
def test_large_objects_wherever_they_begin_and_no_others(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of chunks that begin on the page before, too; and addresses of a low heap are no lengths of chunks."""
    known = {"Text": 3_000, "Row": 3_000, "Wide": 3_000, "Never": 0}
    with subprocess.Popen([python, "-c", _LARGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        surveyed = survey(process.pid, Memo(), frames=False, wanted=lambda _: False)
        for is_loop in (True, False):
            with monkeypatch.context() as patched:
                if not is_loop:
                    patched.setattr(census, "has_loop", lambda: False)
                counts = {kind.type: kind.count for kind in objects_at(surveyed, surveyed.copies.addresses)}
            assert {name: counts.get(f"__main__.{name}", 0) for name in known} == known


def test_chunks() -> None:
    lengths, needed = np.array([0x411, 0x410, 0x419, 0x31, 1 << 50, 0], np.uint64), np.full(6, 900)
    assert is_chunk(lengths, needed).tolist() == [True, True, False, False, False, False]
    assert not is_chunk(lengths[:1], np.array([0x410])).any()
    assert is_chunk(lengths[:2], needed[:2], space=np.array([0x410, 0x408])).tolist() == [True, False]


@pytest.mark.parametrize("at", [1, 2])
def test_nothing_stays_open_of_memory_that_cannot_be_opened(at: int) -> None:
    """``/proc/PID/maps`` and ``/proc/PID/mem`` are opened, in whichever order."""
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(EvidenceError), failing("open", errno.EACCES, at):
        PresentMemory(os.getpid(), np.empty(0, np.uint64))
    assert os.listdir("/proc/self/fd") == descriptors


class Bytes(PresentMemory):
    """Memory that a test has made up."""

    def __init__(self, memory: dict[int, bytes]) -> None:
        self.memory, self.heap = memory, 0
        self._present = np.array(sorted(memory), np.uint64)

    @property
    def files(self) -> np.ndarray:
        return np.empty(0, np.uint64)

    @property
    def anonymous(self) -> np.ndarray:
        return np.empty(0, np.uint64)

    def pages(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data = [self.memory.get(address, bytes(PAGE_SIZE)) for address in addresses.tolist()]
        pages = np.frombuffer(b"".join(data), np.uint8).reshape(-1, PAGE_SIZE)
        return pages, self.is_present(addresses)

    def words(self, addresses: np.ndarray, number: int) -> np.ndarray:
        return self.pages(addresses)[0].view(np.uint64)[:, :number]

    def read(self, address: int, length: int) -> bytes:
        return self.memory.get(address & -PAGE_SIZE, b"")[address % PAGE_SIZE :][:length]


_AT, _TYPE = 0x7F0000000000, 0x7F0000100000


def a_type(*, of_type: int = _TYPE, name: int = _TYPE + 512, size: int = 32, flags: int = 1 << 12) -> bytes:
    head = struct.pack("<qQqQqq", 1, of_type, 0, name, size, 0)
    return (head.ljust(168, b"\0") + struct.pack("<Q", flags)).ljust(512, b"\0") + b"Invoice\0"


def a_pool(size: int, blocks: int, count: int | None = None) -> bytearray:
    number = size // 16 - 1
    end = 48 + blocks * size
    count = blocks if count is None else count
    return bytearray(
        struct.pack("<QQQQIIII", count, 0, 0, 0, 0, number, end, POOL - size).ljust(PAGE_SIZE, b"\0")
    )


def found_in(page: bytes, type_: bytes) -> list[int]:
    """Where objects are found on a page that begins a pool, by bytes from its start: by numpy, and in C."""
    sight = Bytes({_AT: bytes(page), _TYPE: type_.ljust(PAGE_SIZE, b"\0")})
    addresses = np.array([_AT], np.uint64)
    pools = pools_in(addresses, sight)
    words = np.frombuffer(bytearray(page), np.uint64).reshape(1, -1)
    found = objects_on(addresses, words, pools, Types(sight, pools, _TYPE))
    loop = ObjectLoop(pools, Types(sight, pools, _TYPE))
    for _ in range(2):  # where pointers lead is known the second time
        numbers, pages, listed, holds = loop.count(addresses, words, np.ones(1, np.bool_))
        assert holds.tolist() == [len(found.page) > 0]
        assert [column.tolist() for column in listed] == [column.tolist() for column in found]
        assert numbers.sum() == len(found.page)
        assert pages.max() == min(1, len(found.page))
    return (found.word * 8).tolist()


def test_only_what_fits_in_all_respects_is_an_object() -> None:
    page = a_pool(32, 20)
    place = 48 + 3 * 32
    page[place : place + 16] = struct.pack("<QQ", 1, _TYPE)
    assert found_in(page, a_type()) == [place]
    assert found_in(page, a_type(size=48)) == []  # larger than the block
    assert found_in(page, a_type(flags=0)) == []  # no type that is ready
    assert found_in(page, a_type(flags=1 << 12 | 1 << 14, size=16)) == []  # it would begin before its block
    assert found_in(page, a_type(of_type=_TYPE + 8)) == []  # of no metaclass
    assert found_in(page, a_type(name=_AT)) == []  # its name is none
    assert found_in(page, a_type(name=8)) == []
    page[place : place + 8] = bytes(8)
    assert found_in(page, a_type()) == []  # freed
    page[place : place + 8] = struct.pack("<Q", _AT + 48)
    assert found_in(page, a_type()) == []  # freed, with another free block behind it
    page[place + 16 : place + 32] = struct.pack("<QQ", 1, _TYPE)
    assert found_in(page, a_type()) == []  # not where a block begins
    unused = a_pool(32, 2)
    unused[place : place + 16] = struct.pack("<QQ", 1, _TYPE)
    assert found_in(unused, a_type()) == []  # beyond what the pool has given out
    damaged = a_pool(32, 20)
    damaged[place : place + 16], damaged[44:48] = struct.pack("<QQ", 1, _TYPE), struct.pack("<I", 100)
    assert found_in(damaged, a_type()) == []  # no pool
    immortal = a_pool(32, 20)
    immortal[place : place + 16] = struct.pack("<QQ", 1 << 48 | 3 << 30, _TYPE)
    assert found_in(immortal, a_type()) == [place]  # with flags above the count, as from 3.14 on


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 511), st.sampled_from([0, 1, _AT, _TYPE, _TYPE + 8, 2**64 - 1]))),
    st.binary(max_size=300),
)
def test_garbage_is_no_object_and_no_trouble(stores: list[tuple[int, int]], type_: bytes) -> None:
    page = np.frombuffer(bytes(a_pool(32, 20)), np.uint64).copy()
    for word, value in stores:
        page[word] = value
    for garbage in (type_, a_type()[: len(type_)] + type_, type_ + a_type()[len(type_) :]):
        assert all(place % 32 == 16 for place in found_in(page.tobytes(), garbage))


def test_every_type_is_met() -> None:
    """Also one that is met late and has the number, in the table of those that may be types, of another."""
    late = next(
        address
        for address in range(_TYPE + PAGE_SIZE, _TYPE + (1 << 36), PAGE_SIZE)
        if _filtered(np.array([address], np.uint64)) == _filtered(np.array([_TYPE], np.uint64))
    )
    sight = Bytes({
        place: a_type(name=place + 512).ljust(PAGE_SIZE, b"\0") for place in (_TYPE, late)
    })  # fmt: skip
    types = Types(sight, pools_in(np.empty(0, np.uint64), sight), _TYPE)
    for address in (_TYPE, late, _TYPE):
        chosen, rows = types.rows_of(np.array([8, address, late + 16], np.uint64))
        assert chosen.tolist() == [1]
        assert types.addresses[rows].tolist() == [address]


_TIMES = """
import datetime
data = [datetime.time(number % 24, number % 60) for number in range(3_000)]
data += [datetime.datetime(2000 + number % 24, 1, 1) for number in range(3_000)]
class Slim: __slots__ = ("number",)
for number in range(3_000): data.append(Slim()); data[-1].number = (number, str(number))
Slim.__module__ = "shop"
def everything():
    for thing in data:
        yield thing
        if isinstance(thing, Slim): yield thing.number; yield thing.number[1]
def read(): return sum(thing is None for thing in everything())
"""


@needs_frames
@pytest.mark.parametrize("allocator", ["", "malloc", "pymalloc_debug", "malloc_debug"])
def test_whatever_allocates(allocator: str) -> None:
    """Blocks of pools, chunks of malloc, with words of a debugging allocator before them and without; objects
    that are shorter than their type says.
    """
    with pool(_TIMES, allocator=allocator) as workers:
        child = workers.fork()
        workers.ask(child, "read()")
        row = row_of(look(workers), child)
        places = dict(workers.parent(_WHERE))
    eroded = {*pages_in(row.pages.proven).tolist(), *pages_in(row.pages.possible).tolist()}
    really = Counter(kind for address, kind in places.items() if address & -PAGE_SIZE in eroded)
    found = {kind.type.rpartition(".")[2]: kind.count for kind in row.objects}
    for kind in ("time", "datetime", "Slim", "tuple", "str"):
        assert found[kind] >= 0.98 * really[kind] >= 0.98 * 2_800
    assert {"datetime.time", "datetime.datetime", "shop.Slim"} <= {kind.type for kind in row.objects}
    assert all(found[kind] <= 1.02 * really[kind] for kind in ("time", "datetime", "Slim"))


@needs_frames
def test_objects_in_the_data_of_files() -> None:
    """Types that are the interpreter's own, not in any heap: who counts them writes to its data."""
    static = "[id(kind) for kind in object.__subclasses__() if not kind.__flags__ & 1 << 9]"
    with pool("import gc, datetime, socket; gc.collect()") as workers:
        child = workers.fork()
        workers.ask(child, "held = [object.__subclasses__() for _ in range(9)]; gc.collect()")
        row = row_of(look(workers), child)
        places = workers.parent(f"answer = {static}")
    eroded = {*pages_in(row.pages.proven).tolist(), *pages_in(row.pages.possible).tolist()}
    found = {kind.type: kind.count for kind in row.objects}
    written = sum(place & -PAGE_SIZE in eroded for place in places)
    assert found.get("type", 0) >= written
    if sys.version_info < (3, 12):  # from there on nobody counts them
        assert written > 20


def test_no_pools_and_no_types() -> None:
    nothing = np.empty(0, np.uint64)
    pools = Pools(nothing, np.empty(0, np.int64), np.empty(0, np.int64))
    assert not pools.holds(np.array([1], np.uint64)).any()
    assert pools.of(np.array([1], np.uint64)).tolist() == [-1]
    sight = Bytes({})
    assert not len(objects_on(nothing, np.empty((0, 512), np.uint64), pools, Types(sight, pools, 0)).page)


def test_pointers_to_many_pages_are_looked_at_a_part_at_a_time() -> None:
    """Words that lead to as many pages are no types most often; their pages come to 64 MiB."""
    room = np.ones(((1 << 14) + 1, PAGE_SIZE), np.uint8)
    first = -(-room.ctypes.data // PAGE_SIZE) * PAGE_SIZE
    numbers = np.arange(len(room) - 1, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(first)
    pointers = np.sort(np.append(numbers, np.uint64(id(int))))
    name = ctypes.c_uint64.from_address(id(int) + 24).value  # tp_name
    present = np.unique(np.append(pointers, np.uint64(name)) & ~np.uint64(PAGE_SIZE - 1))
    nothing = np.empty(0, np.uint64)
    pools = Pools(nothing, np.empty(0, np.int64), np.empty(0, np.int64))
    with PresentMemory(os.getpid(), present) as memory:
        types = Types(memory, pools, id(type))
        tracemalloc.start()
        try:
            rows = types.met(pointers)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [types.name(int(pointers[row])) for row in np.flatnonzero(rows)] == ["int"]
    assert most < 16 << 20


def test_no_interpreter() -> None:
    assert interpreter_in([("/usr/bin/python3", 0, None), ("/bin/ls", 0, None)]) is None
