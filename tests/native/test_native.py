"""The loops in C: names against dlsym(3), words against the psABI's formulas, and what ends a loop."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.build import build_loops
from miniloader import native
from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf import dynamic as dt
from miniloader.elf.symbols import STB_GNU_UNIQUE, STT_GNU_IFUNC, STT_TLS
from miniloader.elf.tables import RELOCATION, decode_relr
from miniloader.kernel import syscalls
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.beside_glibc import dynamic_linker, host
from miniloader.loader.memory import Memory, map_plan
from miniloader.loader.relocation_job import RelocationJob, kinds_table
from miniloader.loader.scope import Bindings
from miniloader.loader.spans import readable
from miniloader.loader.symbol_lookup import (
    DEFINITION,
    MappedSymbols,
    column,
    look_name_up,
    look_up,
    places_of,
)
from miniloader.machine.relocation import KINDS
from miniloader.native import INDIRECT_FUNCTION, UNBOUND, UNIQUE, Reason, Stopped, copy, functions

Opened = tuple[Memory, ElfImage]


# ----------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["libc.so.6", "libm.so.6", "libz.so.1", "libcrypto.so.3", "libstdc++.so.6"])
def test_every_name_is_found_where_dlsym_finds_it(name: str) -> None:
    handle = ctypes.CDLL(name)._handle
    library = host.listing().by_name[name]
    table, compared = library.symbols, 0
    defined = np.flatnonzero(table.defined)
    several = Counter(table.names(defined))
    for index in defined.tolist():
        text, kind = table.name_bytes(index), int(table.type[index])
        # Of its versions a reference without one means the oldest, even hidden; dlsym(3) the default.
        if several[text] > 1 or table.hidden(index) or kind in (STT_TLS, STT_GNU_IFUNC):
            continue
        found = look_name_up(text, [library.names], [library.bias])
        # A version's own symbol is absolute, and 0: found, though dlsym(3) cannot say so.
        assert column(found, "address")[0] == (dynamic_linker.symbol_address(handle, text) or 0), text
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("name", ["libc.so.6", "libcrypto.so.3", "libstdc++.so.6"])
def test_a_version_is_found_where_dlvsym_finds_it(name: str) -> None:
    """Each of its own symbols with its own version, hidden ones too."""
    handle = ctypes.CDLL(name)._handle
    library = host.listing().by_name[name]
    table = library.symbols
    plain = table.defined & ~np.isin(table.type, (STT_TLS, STT_GNU_IFUNC)) & (table.rows["value"] != 0)
    wanted = np.flatnonzero(plain)
    rows, _, owners, _ = look_up(library.names, wanted, [library.names], [library.bias], None)
    assert owners == [0]
    compared = 0
    for index, address in zip(wanted.tolist(), column(rows, "address"), strict=True):
        version = table.version(index)
        if version is not None:
            theirs = dynamic_linker.symbol_address(handle, table.name_bytes(index), version.name)
            assert address == theirs, (table.name(index), version)
            compared += 1
    assert compared > 100


def test_what_is_looked_for_is_said() -> None:
    """A strong need without a definition, an IFUNC, a unique symbol: none of these goes by unseen."""
    libc, cxx = (host.listing().by_name[name] for name in ("libc.so.6", "libstdc++.so.6"))

    def met(library: Any, kind: Callable[[Any], Any], scope: list[Any]) -> int:
        wanted = np.flatnonzero(kind(library.symbols))
        assert len(wanted)
        names = [one.names for one in scope]
        return look_up(library.names, wanted, names, [one.bias for one in scope], None).met

    assert met(libc, lambda table: table.type == STT_GNU_IFUNC, [libc]) == INDIRECT_FUNCTION
    assert met(cxx, lambda table: table.bind == 10, [cxx]) == UNIQUE
    assert met(cxx, lambda table: table.undefined & (table.bind == 1), [cxx]) & UNBOUND
    weak = met(cxx, lambda table: table.undefined & (table.bind == 2) & (table.rows["name"] != 0), [])
    assert weak == 0


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], tuple[Path, Opened]]]:
    """Maps a copy of a library: its path, its memory, and its dynamic section."""
    made: list[Memory] = []

    def make(name: str) -> tuple[Path, Opened]:
        path = Path(shutil.copy(name, tmp_path))
        image = read_image(Source.open(path))
        made.append(map_plan(image.plan(PAGE_SIZE), image.source))
        assert image.dynamic.tags  # read now: the file may not be there later
        return path, (made[-1], image)

    yield make
    for memory in made:
        memory.unmap()


def names_of(opened: Opened, **changed: int) -> MappedSymbols:
    memory, image = opened
    tags = {**image.dynamic.tags, **{getattr(dt, f"DT_{tag}"): value for tag, value in changed.items()}}
    return MappedSymbols(memory.bias, readable(image, memory.plan), tags, check=True)


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        *((tag, value) for tag in ("STRTAB", "SYMTAB", "GNU_HASH", "HASH", "VERSYM", "VERNEED", "VERDEF")
          for value in (0x7FFF_F000, 0x7FFF_FFFF_FFFF_F000, (1 << 64) - 8)),
        ("STRSZ", 1 << 62), ("STRSZ", 1), ("SYMENT", 16), ("VERNEEDNUM", 1 << 40), ("VERDEFNUM", 1 << 40),
    ],
)  # fmt: skip
def test_a_table_that_is_elsewhere_is_not_read(
    opened: Callable[[str], tuple[Path, Opened]], tag: str, value: int
) -> None:
    _, library = opened(host.listing().by_name["libz.so.1"].path)
    assert len(names_of(library)) > 50
    with pytest.raises(Stopped) as stopped:
        names_of(library, **{tag: value})
    assert stopped.value.reason is Reason.NO_TABLE


def test_a_hash_table_with_a_gap_within_is_not_read(opened: Callable[[str], tuple[Path, Opened]]) -> None:
    """Wherever the gap is: also among the chains before the last one."""
    _, (memory, image) = opened(host.listing().by_name["libz.so.1"].path)
    vaddr = image.dynamic.tags[dt.DT_GNU_HASH]
    buckets, first, words, _ = struct.unpack("<4I", bytes(memory.read(vaddr, 16)))
    chains = vaddr + 16 + 8 * words + 4 * buckets
    end = chains + 4 * (len(names_of((memory, image))) - first)
    ((start, past),) = (span for span in readable(image, memory.plan) if span[0] <= vaddr < span[1])
    for gap in range(vaddr, end, 8):
        spans = [(start, gap), (gap + 8, past)]
        with pytest.raises(Stopped) as stopped:
            MappedSymbols(memory.bias, spans, image.dynamic.tags, check=True)
        assert stopped.value.reason is Reason.NO_TABLE, hex(gap)


def bus_error_handler() -> bytes:
    """What sigaction(2) says of SIGBUS."""
    before = ctypes.create_string_buffer(152)  # struct sigaction of glibc on x86-64
    assert ctypes.CDLL(None).sigaction(signal.SIGBUS, None, before) == 0
    return before.raw[:16] + before.raw[136:140]  # the handler, what the kernel knows of the mask, the flags


def test_a_file_that_is_cut_short_ends_the_loop_and_nothing_else(
    opened: Callable[[str], tuple[Path, Opened]],
) -> None:
    path, library = opened(host.listing().by_name["libz.so.1"].path)
    before = bus_error_handler()
    os.truncate(path, PAGE_SIZE)
    for _ in range(3):
        with pytest.raises(Stopped) as stopped:
            names_of(library)
        assert stopped.value.reason is Reason.GONE
        assert bus_error_handler() == before

    def touch() -> None:
        ctypes.string_at(library[0].start + PAGE_SIZE, 8)

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        touch()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS


def hashed(text: bytes) -> int:
    value = 5381
    for octet in text:
        value = (value * 33 + octet) & 0xFFFFFFFF
    return value


def made(
    names: list[bytes], sections: list[int], buckets: int = 1
) -> tuple[MappedSymbols, dict[bytes, int], bytearray]:
    """A table of symbols in a buffer, in the order of their buckets; the index of each name; the buffer."""
    order = sorted(range(len(names)), key=lambda at: hashed(names[at]) % buckets)
    strings, offsets = bytearray(b"\0"), {}
    for name in names:
        offsets.setdefault(name, len(strings))
        strings += name + b"\0"
    rows = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", offsets[names[at]], 0x12, 0, sections[at], 0x1000 + at, 8) for at in order
    )
    chosen = [hashed(names[at]) % buckets for at in order]
    first = [chosen.index(bucket) + 1 if bucket in chosen else 0 for bucket in range(buckets)]
    chains = [hashed(names[at]) & ~1 for at in order]
    for place, bucket in enumerate(chosen):
        chains[place] |= chosen[place + 1 : place + 2] != [bucket]
    table = struct.pack(f"<4IQ{buckets}I", buckets, 1, 1, 0, (1 << 64) - 1, *first)
    table += np.array(chains, np.uint32).tobytes()
    padding = bytes(-(len(rows) + len(strings)) % 8)
    memory = bytearray(rows + strings + padding + table)
    bias = ctypes.addressof(ctypes.c_char.from_buffer(memory)) - 0x1000
    tags = {
        dt.DT_SYMTAB: 0x1000,
        dt.DT_STRTAB: 0x1000 + len(rows),
        dt.DT_STRSZ: len(strings),
        dt.DT_GNU_HASH: 0x1000 + len(rows) + len(strings) + len(padding),
    }
    found = MappedSymbols(bias, [(0x1000, 0x1000 + len(memory))], tags, check=True)
    assert len(found) == len(names) + 1
    return found, {names[at]: place + 1 for place, at in enumerate(order)}, memory


@pytest.mark.parametrize("buckets", [1, 2, 3, 7])
@pytest.mark.parametrize("theirs", [1, 2, 5])
def test_what_an_earlier_library_defines_comes_first(buckets: int, theirs: int) -> None:
    """However few buckets there are, and whatever the lowest bit of a hash is."""
    names = [b"malloc", b"free", b"puts", b"memchr", b"a", b"b", b"own_1", b"own_2", b"own_3"]
    assert {hashed(name) & 1 for name in names[:6]} == {0, 1}
    mine, places, _kept = made(names, [1] * len(names), buckets)
    other, _, _also = made(names[:6], [1] * 6, theirs)
    wanted = np.array([places[name] for name in names])
    found = look_up(mine, wanted, [other, mine], [0, 0], 1)
    assert column(found.rows, "owner").tolist() == [0] * 6 + [1] * 3
    assert [other.name(index) for index in column(found.rows, "symbol")[:6]] == names[:6]


def test_names_that_take_too_long_are_not_looked_up() -> None:
    """One chain, one hash, and long names that differ at their ends: each would be compared with each."""
    count, text = 3000, b"a" * 3000
    assert hashed(text + b"ab") == hashed(text + b"bA")
    mine, _, _kept = made([text + b"ab", text + b"bA"] * count, [0, 1] * count)
    with pytest.raises(Stopped) as stopped:
        look_up(mine, np.arange(1, 2 * count, 2), [mine], [0], None)
    assert stopped.value.reason is Reason.TOO_MUCH


# ----------------------------------------------------------------------------------------------- words
BASE, LENGTH = 0x1000, 4 * PAGE_SIZE
CODE = (0x10_0000, 0x10_1000)
FORMULAS: dict[int, Callable[[int, int, int, int, int], int]] = {  # S, A, B, P, Z
    1: lambda s, a, b, p, z: s + a,
    2: lambda s, a, b, p, z: s + a - p,
    6: lambda s, a, b, p, z: s,
    7: lambda s, a, b, p, z: s,
    8: lambda s, a, b, p, z: b + a,
    10: lambda s, a, b, p, z: s + a,
    11: lambda s, a, b, p, z: s + a,
    24: lambda s, a, b, p, z: s + a - p,
    32: lambda s, a, b, p, z: z + a,
    33: lambda s, a, b, p, z: z + a,
    38: lambda s, a, b, p, z: b + a,
}
FOUR = {2, 10, 11, 32}


class Bench:
    """A library in a buffer: rows in its first page, words in the other three; all may be the head's."""

    def __init__(
        self,
        rows: list[tuple[int, int, int, int]],
        pointers: tuple[int, int] = (0, 0),
        *,
        all_in_head: bool = False,
    ) -> None:
        self.memory = bytearray(os.urandom(LENGTH))
        self.bias = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) - BASE
        table = np.array(rows, RELOCATION)
        self.memory[: table.nbytes] = table.tobytes()
        self.words = (BASE + PAGE_SIZE, BASE + LENGTH)
        self.job = RelocationJob(
            self.bias,
            kinds_table(KINDS["X86_64"]),
            writable=[self.words],
            code=[CODE],
            pointers=[pointers],
            parts=[] if all_in_head else [(BASE, len(rows))],
            pages=(BASE & -PAGE_SIZE, BASE + LENGTH),
            page_size=PAGE_SIZE,
        )

    def apply(
        self,
        addresses: list[int],
        sizes: list[int],
        head: tuple[int, int] = (0, 0),
        packed: tuple[int, int] = (0, 0),
    ) -> None:
        count = len(addresses)
        found = np.zeros(count, DEFINITION)
        found["size"] = sizes
        places, late = array("q", range(count)), bytearray(count)
        words, definitions = array("Q", addresses), array("q", found.tobytes())
        self.job.relocate(array("Q"), packed, array("Q"), head, places, places, words, definitions, late)


definitions = st.lists(
    st.tuples(
        st.integers(-1, 2),
        st.integers(0, 9),
        st.integers(1, 9),
        st.just(0),
        st.just(0),
        st.sampled_from([0x12, 0x1A, 0xA1, 0xAA, 0x20]),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(definitions, st.sets(st.integers(1, 9), max_size=4))
def test_what_symbols_are_bound_to_is_noted_in_one_pass(rows: list[tuple[int, ...]], asked: set[int]) -> None:
    """Owner, symbol, address, value, size, info, section; the library 1 is ours."""
    bindings = Bindings(array("q", range(len(rows))), [], array("q", np.array(rows, DEFINITION).tobytes()))
    noted = bindings.noted(bytearray([0, 1, 0]), asked)
    assert noted.addresses.tolist() == [row[2] for row in rows]
    bound = [place for place, row in enumerate(rows) if row[0] >= 0]
    unique = [place for place in bound if rows[place][5] >> 4 == STB_GNU_UNIQUE]
    assert noted.unique == unique
    assert noted.asked == [place for place in bound if place not in unique and rows[place][2] in asked]
    indirect = [place for place in bound if rows[place][5] & 0xF == STT_GNU_IFUNC and rows[place][6]]
    assert noted.resolvers == [place for place in indirect if rows[place][0] != 1]
    places = places_of(sorted(asked), noted.addresses)
    assert places.tolist() == [place for place, row in enumerate(rows) if row[2] in asked]


def test_all_that_is_noted_comes_back_where_there_is_more_than_room_was_made_for() -> None:
    row = (0, 1, 1, 0, 0, 0xAA, 1)  # unique, and an IFUNC of a library that is not ours
    definitions = array("q", np.array([row] * 1000, DEFINITION).tobytes())
    noted = Bindings(array("q", range(1000)), [], definitions).noted(bytearray(1))
    assert noted.unique == noted.resolvers == list(range(1000))


words = st.integers(BASE + PAGE_SIZE, BASE + LENGTH - 8)
addends = st.integers(-(1 << 20), 1 << 20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(words, st.sampled_from(sorted(FORMULAS)), st.integers(0, 3), addends), max_size=60),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4),
    st.lists(st.integers(1 << 21, (1 << 31) - (1 << 21)), min_size=4, max_size=4),
)
def test_words_are_what_the_psabi_says(
    rows: list[tuple[int, int, int, int]], addresses: list[int], sizes: list[int]
) -> None:
    """Anywhere, aligned or not, over each other: what comes later stays."""
    # What is stored in four bytes has to fit; that it is refused otherwise is seen below.
    rows = [row for row in rows if row[1] not in FOUR or row[1] == 32]
    bench = Bench(rows)
    expected = bytearray(bench.memory)
    for vaddr, code, symbol, addend in rows:
        value = FORMULAS[code](addresses[symbol], addend, bench.bias, bench.bias + vaddr, sizes[symbol])
        size = 4 if code in FOUR else 8
        at = vaddr - BASE
        expected[at : at + size] = (value % (1 << 64)).to_bytes(8, "little")[:size]
    counts, highest = bench.job.survey(FORMULAS)
    assert sum(counts.values()) == len(rows)
    assert highest == max((row[2] for row in rows), default=0)
    needed = {symbol for _, code, symbol, _ in rows if code not in (8, 38)}
    assert set(bench.job.used(4).tolist()) == needed
    bench.apply(addresses, sizes)
    assert bench.memory == expected
    touched = {
        (vaddr + end) // PAGE_SIZE for vaddr, code, *_ in rows for end in (0, (3 if code in FOUR else 7))
    }
    assert bench.job.pages == len(touched)


PLACES = st.integers(0, (LENGTH - PAGE_SIZE) // 8 - 130)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(PLACES.map(lambda place: BASE + PAGE_SIZE + 8 * place), st.just(None)), max_size=9),
       st.lists(st.integers(0, (1 << 63) - 1), min_size=9, max_size=9))  # fmt: skip
def test_a_relr_table_is_what_numpy_makes_of_it(addresses: list[int | None], bits: list[int]) -> None:
    """Vaddrs, and behind each at most one bitmap, as it has to stay inside; one before any is of no words."""
    entries = [bits[0] << 1 | 1]
    for address, bitmap in zip(addresses, bits, strict=False):
        entries += [address, bitmap << 1 | 1] if address is not None else []
    bench = Bench([])
    table = array("Q", entries).tobytes()
    bench.memory[: len(table)] = table
    expected = bytearray(bench.memory)
    for vaddr in decode_relr(table, 64, "<").tolist():
        word = int.from_bytes(expected[vaddr - BASE :][:8], "little") + bench.bias
        expected[vaddr - BASE : vaddr - BASE + 8] = (word % (1 << 64)).to_bytes(8, "little")
    bench.apply([], [], packed=(BASE, len(entries)))
    assert bench.memory == expected


@pytest.mark.parametrize(
    ("code", "value", "fits"),
    [
        (10, 0xFFFF_FFFF, True), (10, 1 << 32, False), (10, -1, False),
        (11, 0x7FFF_FFFF, True), (11, -0x8000_0000, True), (11, 0x8000_0000, False),
        (32, 0xFFFF_FFFF, True), (32, 1 << 32, False),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(code: int, value: int, fits: bool) -> None:
    bench = Bench([(BASE + PAGE_SIZE, code, 0, value)])
    before = bytes(bench.memory)
    if fits:
        bench.apply([0], [0])
        assert bench.memory[PAGE_SIZE : PAGE_SIZE + 4] == (value % (1 << 32)).to_bytes(4, "little")
        return
    with pytest.raises(Stopped) as stopped:
        bench.apply([0], [0])
    assert (stopped.value.reason, stopped.value.where) == (Reason.TOO_FAR, BASE + PAGE_SIZE)
    assert stopped.value.what == value % (1 << 64)
    assert bench.memory == before


@pytest.mark.parametrize("as_head", [False, True])
def test_the_pages_with_words_are_copied_and_no_others(tmp_path: Path, as_head: bool) -> None:
    """Pages are copied many at once: as the kernel has them afterwards."""
    vaddr, written = 0x10000, [1, 2, 3, 6, 9]
    rows = [(vaddr + page * PAGE_SIZE + 8 * word, 8, 0, word) for page in written for word in (0, 7, 511)]
    file = tmp_path / "pages"
    file.write_bytes(np.array(rows, RELOCATION).tobytes().ljust(12 * PAGE_SIZE, b"\1"))
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ends = vaddr, vaddr + 12 * PAGE_SIZE
    job = RelocationJob(
        address - vaddr,
        kinds_table(KINDS["X86_64"]),
        writable=[ends],
        code=[],
        pointers=[],
        parts=[] if as_head else [(vaddr, len(rows))],
        pages=ends,
        page_size=PAGE_SIZE,
    )
    head, nothing = (vaddr, len(rows)) if as_head else (0, 0), array("Q")
    places = array("q", [0])
    job.relocate(
        nothing, (0, 0), nothing, head, places, places, array("Q", [0]), array("q", [0] * 7), bytearray(1)
    )
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE_SIZE * 8)
        entries = struct.unpack("<12Q", pagemap.read(12 * 8))
    copied = [page for page, entry in enumerate(entries) if entry >> 61 == 4]  # present, and not the file's
    assert copied == written
    assert job.pages == len(written)


@pytest.mark.parametrize(
    "vaddr", [0, BASE, BASE + PAGE_SIZE - 1, BASE + LENGTH - 7, BASE + LENGTH, (1 << 64) - 4]
)
@pytest.mark.parametrize("code", [1, 8, 16, 37])
def test_what_lies_outside_is_not_written(vaddr: int, code: int) -> None:
    bench = Bench([(vaddr, code, 0, 0)])
    before = bytes(bench.memory)
    with pytest.raises(Stopped) as stopped:
        bench.job.survey(FORMULAS)
    assert (stopped.value.reason, stopped.value.where) == (Reason.OUTSIDE, vaddr)
    if code in (1, 8):  # the file may have changed since
        with pytest.raises(Stopped) as stopped:
            bench.apply([0], [0])
        assert stopped.value.reason is Reason.OUTSIDE
    if code == 8:
        with pytest.raises(Stopped) as stopped:
            bench.apply([0], [0], head=(BASE, 1))
        assert stopped.value.reason is Reason.OUTSIDE
    assert bench.memory == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((BASE + PAGE_SIZE, 99, 0, 0), Reason.NO_KIND),
        ((BASE + PAGE_SIZE, 255, 0, 0), Reason.NO_KIND),
        ((BASE + PAGE_SIZE, 0xFFFF_FFFF, 0, 0), Reason.NO_KIND),
        ((BASE + PAGE_SIZE, 1, 4, 0), Reason.NO_SYMBOL),
        ((BASE + PAGE_SIZE, 6, 0xFFFF_FFFF, 0), Reason.NO_SYMBOL),
    ],
)
def test_a_kind_or_symbol_that_there_is_not(row: tuple[int, int, int, int], reason: Reason) -> None:
    bench = Bench([row])
    with pytest.raises(Stopped) as stopped:
        bench.job.used(4 + 0 * bench.job.survey(FORMULAS)[1])
    assert stopped.value.reason is reason
    if reason is Reason.NO_SYMBOL:
        with pytest.raises(Stopped) as stopped:
            bench.apply([0] * 4, [0] * 4)
        assert stopped.value.reason is reason


@pytest.mark.parametrize("part", ["known", "packed", "added", "head", "rest"])
def test_a_page_that_is_gone_is_never_overlooked(part: str, tmp_path: Path) -> None:
    """Whichever part of the words lies on it."""
    path = tmp_path / "words"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    source = Source.open(path)
    base = syscalls.mmap(0, 4 * PAGE_SIZE, 3, syscalls.MAP_PRIVATE, source.fd, 0)
    there, missing = PAGE_SIZE, 3 * PAGE_SIZE  # vaddrs
    at = {name: missing if name == part else there + 64 * place
          for place, name in enumerate(("known", "packed", "added", "head", "rest"))}  # fmt: skip
    table = np.array([(at["head"], 8, 0, 1), (at["rest"], 8, 0, 1)], RELOCATION).tobytes()
    table += at["packed"].to_bytes(8, "little")
    ctypes.memmove(base, table, len(table))
    job = RelocationJob(
        base,
        kinds_table(KINDS["X86_64"]),
        writable=[(PAGE_SIZE, 4 * PAGE_SIZE)],
        code=[],
        pointers=[],
        parts=[(24, 1)],
        pages=(0, 4 * PAGE_SIZE),
        page_size=PAGE_SIZE,
    )
    os.truncate(path, 2 * PAGE_SIZE)
    nothing, known = array("q"), np.array([(at["known"], 8, 0, 1)], RELOCATION)
    try:
        with pytest.raises(Stopped) as stopped:
            job.relocate(
                array("Q", known.tobytes()),
                *((48, 1), array("Q", [at["added"]]), (0, 1)),
                *(nothing, nothing, array("Q"), nothing, bytearray()),
            )
        assert stopped.value.reason is Reason.GONE
    finally:
        syscalls.munmap(base, 4 * PAGE_SIZE)


def test_a_thread_that_blocks_signals_is_guarded_too(opened: Callable[[str], tuple[Path, Opened]]) -> None:
    path, library = opened(host.listing().by_name["libz.so.1"].path)
    os.truncate(path, PAGE_SIZE)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(Stopped) as stopped:
            names_of(library)
        assert stopped.value.reason is Reason.GONE
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked >= {signal.SIGBUS}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("protection", [0, 1])
def test_a_page_that_forbids_it_is_an_error(protection: int) -> None:
    base = syscalls.mmap(0, PAGE_SIZE, protection, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
    room = np.zeros(8, np.uint8)
    try:
        with pytest.raises(Stopped) as stopped:
            copy(base + 16, room.ctypes.data, 8)
        assert (stopped.value.reason, stopped.value.where) == (Reason.GONE, base + 16)
        if protection:
            copy(room.ctypes.data, base + 16, 8)
        else:
            with pytest.raises(Stopped):
                copy(room.ctypes.data, base + 16, 8)
    finally:
        syscalls.munmap(base, PAGE_SIZE)


def test_the_head_is_of_one_kind() -> None:
    bench = Bench([(BASE + PAGE_SIZE, 8, 0, 5), (BASE + PAGE_SIZE + 8, 1, 0, 5)])
    with pytest.raises(Stopped) as stopped:
        bench.apply([0], [0], head=(BASE, 2))
    assert (stopped.value.reason, stopped.value.where) == (Reason.NOT_RELATIVE, BASE + PAGE_SIZE + 8)


@pytest.mark.parametrize("head", [(0, 0), (BASE, 1)])
@pytest.mark.parametrize(
    ("addend", "good"), [(CODE[0], True), (CODE[1] - 1, True), (CODE[1], False), (0, False)]
)
def test_a_constructor_leads_into_code(addend: int, good: bool, head: tuple[int, int]) -> None:
    word = BASE + 2 * PAGE_SIZE
    bench = Bench([(word, 8, 0, addend)], pointers=(word, word + 8))
    if good:
        bench.apply([0], [0], head=head)
        return
    with pytest.raises(Stopped) as stopped:
        bench.apply([0], [0], head=head)
    assert (stopped.value.reason, stopped.value.where) == (Reason.NO_CODE, word)


@pytest.mark.parametrize(
    ("before", "vaddr", "reason"),
    [
        (BASE + PAGE_SIZE, BASE + PAGE_SIZE - 1, Reason.OUTSIDE),
        (BASE + PAGE_SIZE, BASE + PAGE_SIZE - 8, Reason.OUTSIDE),
        (BASE + LENGTH - 8, BASE + LENGTH - 7, Reason.OUTSIDE),
        (BASE + LENGTH - 8, BASE + LENGTH, Reason.OUTSIDE),
        (BASE + 2 * PAGE_SIZE, BASE + 2 * PAGE_SIZE + 8, Reason.NO_CODE),
        (BASE + 2 * PAGE_SIZE + 16, BASE + 2 * PAGE_SIZE + 8, Reason.NO_CODE),
    ],
)
def test_a_row_is_judged_behind_one_beside_it(before: int, vaddr: int, reason: Reason) -> None:
    pointers = BASE + 2 * PAGE_SIZE + 8, BASE + 2 * PAGE_SIZE + 16
    bench = Bench([(before, 8, 0, 1), (vaddr, 8, 0, 0)], pointers, all_in_head=True)
    with pytest.raises(Stopped) as stopped:
        bench.apply([0], [0], head=(BASE, 2))
    assert (stopped.value.reason, stopped.value.where) == (reason, vaddr)


@pytest.mark.parametrize("vaddr", [BASE + 2 * PAGE_SIZE - 8, BASE + 2 * PAGE_SIZE - 4])
def test_both_pages_of_a_word_are_counted(vaddr: int) -> None:
    bench = Bench([(BASE + PAGE_SIZE, 8, 0, 1), (vaddr, 8, 0, 1)], all_in_head=True)
    bench.apply([0], [0], head=(BASE, 2))
    assert bench.job.pages == 1 + (vaddr + 8 > BASE + 2 * PAGE_SIZE)


def test_the_structures_are_as_long_here_as_there() -> None:
    """The fields of the structures are those of loops.h and inside.c, in their order."""
    room = Path(functions()._name).parent
    header = (room / "loops.h").read_text() + (room / "inside.c").read_text()
    twins = {"Table": "SymbolsStructure", "Job": "JobStructure", "Question": "QuestionStructure"}
    for name, ours in twins.items():
        end = header.index(f"}} {name};")
        body = header[header.rindex("typedef struct", 0, end) : end]
        lines = [line.split("/*")[0] for line in body.splitlines()[1:]]
        fields = [
            part.split("*")[-1].split()[-1]
            for line in lines
            for part in line.replace(";", "").split(",")
            if part.strip()
        ]
        assert fields == [field[0] for field in getattr(native, ours)._fields_], name


def test_another_build_of_it_loads(tmp_path: Path) -> None:
    """The sources compile without a word also with what finds mistakes while it runs."""
    if shutil.which("x86_64-linux-gnu-gcc") is None:
        pytest.skip("no compiler: x86_64-linux-gnu-gcc")
    output = tmp_path / "checked.so"
    build_loops(output, "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    assert ctypes.PyDLL(os.fspath(output)).look_up


# ------------------------------------------------------------------------------------- the guard's manners
_INSTALLER = """
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
static volatile int going = 1, lost, installed;
static void handler(int number, siginfo_t *info, void *context)
{ (void)number; (void)info; (void)context; _exit(99); }
static void *run(void *nothing) {
    while (going) {
        struct sigaction own = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
        struct sigaction found, none = {.sa_handler = SIG_DFL};
        sigaction(SIGSEGV, &own, NULL); installed++;
        /* The guard's may be there, or none between two calls of the guard's, however long that takes. */
        int looks = 0;
        do { usleep(20); sigaction(SIGSEGV, NULL, &found); }
        while (found.sa_sigaction != handler && ++looks < 20000);
        lost += found.sa_sigaction != handler;
        sigaction(SIGSEGV, &none, NULL); usleep(50);
    }
    return nothing;
}
static pthread_t thread;
void begin(void) { pthread_create(&thread, 0, run, 0); }
int end(int *count) { going = 0; pthread_join(thread, 0); *count = installed; return lost; }
"""


def test_a_handler_that_a_native_thread_installs_meanwhile_stays(tmp_path: Path) -> None:
    """As the runtimes of Go and Java do when they start, in threads that Python does not know."""
    (tmp_path / "installer.c").write_text(_INSTALLER)
    library = tmp_path / "installer.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "installer.c"], check=True)
    script = f"""
import ctypes, time
from miniloader.native import buffer_address, copy
installer, source, target = ctypes.CDLL({str(library)!r}), bytearray(1 << 20), bytearray(1 << 20)
installer.begin()
end = time.monotonic() + 3
while time.monotonic() < end:
    copy(buffer_address(target), buffer_address(source), len(source))
count = ctypes.c_int()
lost = installer.end(ctypes.byref(count))
print(count.value > 10, lost)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"


class _Stack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_uint), ("size", ctypes.c_size_t))


def test_a_signal_stack_that_is_disarmed_while_in_use_is_armed_again() -> None:
    """SS_AUTODISARM: the kernel arms it when a handler returns, and ours jumps away."""
    sigaltstack, room = ctypes.CDLL(None).sigaltstack, ctypes.create_string_buffer(1 << 16)
    wanted, before, after = _Stack(ctypes.addressof(room), 1 << 31, len(room)), _Stack(), _Stack()
    page = syscalls.mmap(0, PAGE_SIZE, 0, 0x22)  # MAP_PRIVATE | MAP_ANONYMOUS, and no right to read
    assert sigaltstack(ctypes.byref(wanted), ctypes.byref(before)) == 0
    try:
        with pytest.raises(Stopped):
            copy(native.buffer_address(bytearray(8)), page, 8)
        assert sigaltstack(None, ctypes.byref(after)) == 0
    finally:
        sigaltstack(ctypes.byref(before), None)
        syscalls.munmap(page, PAGE_SIZE)
    assert (after.start, after.flags, after.size) == (wanted.start, wanted.flags, wanted.size)


# ------------------------------------------------------------------------------------------- arguments
def test_loops_get_numbers_and_where_buffers_are() -> None:
    """As `copy` has them: addresses, numbers, and buffers, which are released when it is done."""
    where, source = array("Q", [7]), bytearray(b"abc")
    target = np.zeros(3, np.uint8)
    native.run("copy", target, source, 3, where)
    assert bytes(target) == b"abc"
    assert where[0] == 0
    source += b"d"  # which a buffer that is looked at refuses
    where.append(1)
    native.run("copy", target.ctypes.data - (1 << 64), bytearray(b"xyz"), True, where)  # 64 bits of a number
    assert bytes(target) == b"xbc"
    native.run("copy", bytearray(), array("Q"), 0, where)  # an empty one is nowhere


def test_buffers_are_released_where_a_loop_stops() -> None:
    where, target = array("Q", [0]), bytearray(8)
    with pytest.raises(Stopped) as stopped:
        native.run("copy", target, 64, 8, where)
    assert stopped.value.reason is Reason.GONE
    assert where[0] == 64
    target += b"more"


@pytest.mark.parametrize(
    ("value", "error"), [("text", TypeError), (b"bytes", BufferError), (None, TypeError)]
)
def test_what_is_neither_a_number_nor_a_buffer_to_write_to(value: Any, error: type[Exception]) -> None:
    where, target = array("Q", [5]), bytearray(8)
    with pytest.raises(error):
        native.run("copy", target, value, 8, where)
    target += b"more"
    assert where[0] == 5  # nothing has been called


@pytest.mark.parametrize("count", [0, 3, 5, 99])
def test_too_few_values_and_too_many_are_refused(count: int) -> None:
    with pytest.raises(TypeError, match=f"copy gets 4 arguments, not {count}"):
        native.run("copy", *[0] * count)


def test_each_function_gets_as_many_numbers_as_its_source_has() -> None:
    sources = Path(native.__file__).parent.glob("*.c")
    texts = {path.name: path.read_text() for path in sources}
    definitions = re.findall(
        r"^(?:int64_t|void) (\w+)\(([^{;]*?)\)\n\{", "\n".join(texts.values()), re.MULTILINE
    )
    numbers = {name: 0 if given == "void" else given.count(",") + 1 for name, given in definitions}
    assert {name: numbers[name] for name in native._ARGUMENTS} == native._ARGUMENTS
    assert f"MOST = {max(native._ARGUMENTS.values())}" in texts["arguments.c"]  # that call_loop can give
