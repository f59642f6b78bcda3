"""What holds for all inputs: of plans, of RELR, of hash tables."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import hypothesis
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fixtures.build import HERE, build
from miniloader.elf import Source, read_image
from miniloader.elf.header import Segment
from miniloader.elf.plan import plan_segments
from miniloader.elf.relocations import RelrTable
from miniloader.elf.symbols import GnuHash, SymbolTable, SysvHash, gnu_hash, sysv_hash
from miniloader.elf.tables import decode_relr, symbol_dtype
from miniloader.errors import ElfError

# What it learns is not kept, least of all in the checkout; the same examples in every run.
hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())
settings = hypothesis.settings(max_examples=300, database=None, deadline=None, derandomize=True)

PAGES = st.sampled_from([4096, 16384, 65536])
WORDS = st.one_of(
    st.sampled_from([0, 1, 0xFFF, 0x1000, 1 << 32, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)


# ------------------------------------------------------------------------------------------------- plan
@st.composite
def good_segments(draw: st.DrawFn) -> tuple[list[Segment], int]:
    """PT_LOADs as a linker may lay them out, and a page size they suit."""
    page = draw(PAGES)
    vaddr = draw(st.integers(0, 1 << 20))
    segments = []
    for index in range(draw(st.integers(1, 5))):
        filesz = draw(st.integers(0, 5 * page))
        memsz = filesz + draw(st.one_of(st.just(0), st.integers(0, 5 * page)))
        offset = draw(st.integers(0, 20)) * page + vaddr % page
        flags = draw(st.sampled_from(["r--", "r-x", "rw-"]))
        segments.append(Segment(index, "PT_LOAD", flags, offset, vaddr, filesz, memsz, page))
        vaddr = -(-(vaddr + memsz) // page) * page + draw(st.one_of(st.just(0), st.integers(0, 4 * page)))
    return segments, page


@settings
@given(good_segments())
def test_a_plan_covers_every_byte_once_and_congruently(made: tuple[list[Segment], int]) -> None:
    segments, page = made
    loads = [segment for segment in segments if segment.memsz]
    if not loads:
        return
    plan = plan_segments(segments, page)
    assert plan.start == loads[0].vaddr // page * page
    assert plan.end == -(-loads[-1].end // page) * page
    for before, after in zip(plan.mappings, plan.mappings[1:], strict=False):
        assert before.end == after.start  # neither an overlap nor a hole
    for mapping in plan.mappings:
        assert mapping.start < mapping.end
        assert mapping.start % page == mapping.end % page == mapping.file_offset % page == 0
    for load in loads:
        for vaddr in {load.vaddr, load.vaddr + load.memsz // 2, load.end - 1}:
            mapping = plan.at(vaddr)
            assert mapping is not None
            assert mapping.kind != "gap"
            assert mapping.protection == load.flags
        for vaddr in {load.vaddr, load.vaddr + load.filesz // 2, load.file_end - 1} if load.filesz else ():
            mapping = plan.at(vaddr)
            assert mapping is not None
            assert mapping.kind == "file"
            assert mapping.file_offset + vaddr - mapping.start == load.file_offset + vaddr - load.vaddr
    for span in plan.zeroed:
        held = plan.at(span.start)
        assert held is not None
        assert held.kind == "file"
        assert any(load.file_end == span.start for load in loads)


ANY_SEGMENT = st.builds(
    Segment, st.just(0), st.sampled_from(["PT_LOAD", "PT_LOAD", "PT_GNU_RELRO", "PT_TLS"]),
    st.sampled_from(["---", "r-x", "rw-", "rwx"]), WORDS, WORDS, WORDS, WORDS, WORDS,
)  # fmt: skip


@settings
@given(st.lists(ANY_SEGMENT, max_size=6), PAGES)
def test_any_segments_are_planned_or_refused(segments: list[Segment], page: int) -> None:
    try:
        plan = plan_segments(segments, page)
    except ElfError:
        return
    assert all(a.end == b.start for a, b in zip(plan.mappings, plan.mappings[1:], strict=False))
    assert 0 <= plan.start < plan.end <= 1 << 64


# ------------------------------------------------------------------------------------------------- RELR
def slow_relr(entries: Sequence[int], word: int) -> list[int]:
    """As the gABI's own example decodes it."""
    found = []
    where = None
    for entry in entries:
        if entry & 1 == 0:
            found.append(entry)
            where = entry + word
        elif where is not None:
            bits = range(8 * word - 1)
            found += [where + bit * word for bit in bits if entry >> (bit + 1) & 1]
            where += (8 * word - 1) * word
    return found


@settings
@given(
    st.lists(
        st.one_of(
            st.integers(0, (1 << 30) - 1).map(lambda number: number & ~1),
            st.integers(0, (1 << 32) - 1).map(lambda number: number | 1),
        ),
        max_size=40,
    ),
    st.sampled_from([4, 8]),
    st.sampled_from(["little", "big"]),
    st.integers(0, 31),
)
def test_relr_as_a_slow_decoder(entries: list[int], word: int, order: str, shift: int) -> None:
    if word == 8:
        entries = [(entry << shift | 1) if entry & 1 else entry for entry in entries]
    data = b"".join(entry.to_bytes(word, order) for entry in entries)  # type: ignore[arg-type]
    sign = "<" if order == "little" else ">"
    assert decode_relr(data, 8 * word, sign).tolist() == slow_relr(entries, word)
    if not data:
        return
    table = RelrTable(0, 0, len(entries), 8 * word, sign, Source.from_bytes(data))
    assert table.total == len(slow_relr(entries, word))


# ------------------------------------------------------------------------------------------ hash tables
NAMES = st.lists(
    st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name), max_size=40, unique=True
)


def table(names: Sequence[bytes], hashing: GnuHash | SysvHash | None) -> SymbolTable:
    """The symbols ``names``, from index 1 on, all of them defined functions."""
    rows = np.zeros(len(names) + 1, symbol_dtype(64, "<"))
    strings = b"\0"
    for index, name in enumerate(names, 1):
        rows[index] = (len(strings), 0x12, 0, 1, index, 1)
        strings += name + b"\0"
    return SymbolTable(rows, strings, hashing, np.empty(0, np.uint16))


def sysv(names: Sequence[bytes], count: int) -> SysvHash:
    buckets, chains = np.zeros(count, np.uint32), np.zeros(len(names) + 1, np.uint32)
    for index, name in enumerate(names, 1):
        bucket = sysv_hash(name) % count
        chains[index], buckets[bucket] = buckets[bucket], index
    return SysvHash(buckets, chains)


def gnu(names: Sequence[bytes], count: int) -> tuple[list[bytes], GnuHash]:
    """The names in the order of their buckets, and their table."""
    ordered = sorted(names, key=lambda name: gnu_hash(name) % count)
    buckets, bloom = np.zeros(count, np.uint32), np.zeros(2, np.uint64)
    chains = np.array([gnu_hash(name) & ~1 for name in ordered], np.uint32)
    for index, name in enumerate(ordered):
        value = gnu_hash(name)
        bits = 1 << value % 64 | 1 << (value >> 6) % 64
        bloom[value // 64 % 2] |= np.uint64(bits)
        bucket = value % count
        buckets[bucket] = buckets[bucket] or index + 1
        if index + 1 == len(ordered) or gnu_hash(ordered[index + 1]) % count != bucket:
            chains[index] |= np.uint32(1)
    return ordered, GnuHash(1, 6, bloom, buckets, chains)


@settings
@given(NAMES, NAMES, st.integers(1, 9))
def test_looking_a_name_up_is_searching_for_it(names: list[bytes], others: list[bytes], count: int) -> None:
    ordered, hashing = gnu(names, count)
    for order, symbols in ((names, table(names, sysv(names, count))), (ordered, table(ordered, hashing)), (
        names, table(names, None))):  # fmt: skip
        for name in (*names, *others, b""):
            assert symbols.find(name) == (order.index(name) + 1 if name in order else None)


@settings
@given(NAMES, st.integers(0, 12))
def test_names_are_those_of_each_symbol_also_where_the_strings_were_cut(names: list[bytes], cut: int) -> None:
    whole = table(names, None)
    symbols = SymbolTable(whole.rows, whole.strings[: len(whole.strings) - cut], None, whole.versym)
    assert symbols.names(np.arange(len(symbols))) == [
        symbols.name_bytes(index) for index in range(len(symbols))
    ]


def test_the_tables_of_linkers_find_what_a_search_finds() -> None:
    compared = 0
    paths = [
        *map(build, ("demo_sysv_hash", "demo_gnu_hash", "versions", "cxx")),
        *(HERE / "prebuilt").glob("*.so"),
    ]
    for path in paths:
        symbols = read_image(Source.open(path)).symbols
        assert symbols.hash is not None
        linear = SymbolTable(symbols.rows, symbols.strings, None, symbols.versym, symbols.versions)
        names = {symbols.name_bytes(index) for index in range(len(symbols))} | {b"nosuchname", b""}
        for name in names:
            assert symbols.find(name) == linear.find(name), (path, name)
            compared += symbols.find(name) is not None
    assert compared > 50
