"""Linking at once what is ordinary, against linking step by step, which others hold to ld.so."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from array import array
from itertools import chain
from pathlib import Path

import pytest

import miniloader
from fixtures.build import build
from miniloader.errors import SymbolError
from miniloader.kernel.maps import read_maps
from miniloader.loader import Loading, link, link_ordinary, unload
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.graph import Graph
from miniloader.loader.surroundings import find_path
from miniloader.machine.relocation import KINDS


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each library that is linked from now on, whether that was done at once."""
    done: list[bool] = []

    def noted(*arguments: object) -> bool:
        done.append(link_ordinary.link_ordinary(*arguments))  # type: ignore[arg-type]
        return done[-1]

    monkeypatch.setattr(link, "link_ordinary", noted)
    return done


def _linked(path: str, address: int | None, *, at_once: bool) -> tuple[int, dict[str, object]]:
    """Where the library is, and what linking has made of it: its words, its names, and who it is bound to."""
    events: list[miniloader.Event] = []
    with Loading(path, init=False, on_event=events.append, address=address) as steps:
        steps._graph.keeps_bindings, steps._graph.brief = not at_once, at_once
        steps.map()
        steps.link()
        loaded = steps.mapped[0]
        memory, image = loaded.mapped, loaded.image
        words = {vaddr: bytes(memory.read(vaddr, 8)) for vaddr in image.relocations.targets().tolist()}
        kinds, rows = KINDS[image.header.machine], [table.rows.tolist() for table in image.relocations.tables]
        described = {vaddr for vaddr, code, *_ in chain(*rows) if kinds[code].formula == "descriptor"}
        # Which of its functions ld.so puts there depends on the room that is left in static storage.
        functions = [int.from_bytes(words.pop(vaddr), sys.byteorder) for vaddr in sorted(described)]
        dynamic = image.segment("PT_DYNAMIC")
        assert dynamic is not None
        made = {
            "words": words,
            "described by": [vma.path for function in functions for vma in read_maps() if function in vma],
            "dynamic": bytes(memory.read(dynamic.vaddr, dynamic.memsz)),
            "symbols": len(loaded.names),
            "names": [loaded.names.name(symbol) for symbol in range(len(loaded.names))],
            "pages": [event.data["pages"] for event in events if event.stage == "relocate"],
            "holds": list(loaded.holds),
            "held": [Path(library.name).name for library in loaded.holds],
            "start": memory.start,
        }
        return memory.start, made


ORDINARY = (
    *(
        "demo",
        "demo_relr",
        "demo_norelro",
        "demo_sysv_hash",
        "demo_gnu_hash",
        "demo_base",
        "init_fini",
        "symbols",
    ),
    *("relocations", "bss", "overaligned_64k", "opens", "unique", "libz.so.1"),
    *("tls_general", "tls_local", "tls_initial", "tls_descriptors", "tls_large"),
)


@pytest.mark.parametrize("name", ORDINARY)
def test_both_ways_make_the_same(name: str, ways: list[bool]) -> None:
    path = find_path(name) if ".so" in name else str(build(name))
    start, at_once = _linked(path, None, at_once=True)
    assert ways == [True]
    ways.clear()
    assert _linked(path, start, at_once=False)[1] == at_once
    assert ways == [False]


def compiled(path: Path, source: str, *options: str, suffix: str = ".c") -> Path:
    """The library that gcc makes of ``source``."""
    text = path.with_suffix(suffix)
    text.write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", text, "-o", path, *options], check=True)
    return path


#: Words of more symbols than linking at once keeps room for, and a segment of more than two megabytes.
LARGE = """
    .altmacro
    .macro word number
    .globl symbol_\\number
symbol_\\number:
    .quad symbol_\\number
    .endm
    .data
    .set count, 0
    .rept 17000
    word %count
    .set count, count + 1
    .endr
    .section .rodata
    .zero 3 << 20
    .section .note.GNU-stack, "", %progbits
"""


def without_zeroes(path: Path, sparse: Path) -> Path:
    """A copy of ``path`` that has holes for its pages of zeros."""
    data = path.read_bytes()
    with sparse.open("wb") as file:
        for start in range(0, len(data), 4096):
            page = data[start : start + 4096]
            if page.count(0) == len(page):
                file.seek(start + len(page))
            else:
                file.write(page)
        file.truncate(len(data))
    return sparse


def test_a_large_library_is_linked_at_once_but_for_one_with_holes(tmp_path: Path, ways: list[bool]) -> None:
    whole = compiled(tmp_path / "whole.so", LARGE, "-Wl,-z,noseparate-code", suffix=".s")
    start, at_once = _linked(str(whole), None, at_once=True)
    assert ways == [True]
    assert _linked(str(whole), start, at_once=False)[1] == at_once
    ways.clear()
    sparse = without_zeroes(whole, tmp_path / "sparse.so")
    if sparse.stat().st_blocks * 512 > len(sparse.read_bytes()) - (2 << 20):
        pytest.skip("this machine lacks files with holes here")
    assert (
        _linked(str(sparse), start, at_once=True)[1] == at_once
    )  # where nothing is read of it, it is done anew
    assert ways == [False]


def test_many_segments_are_linked_at_once(tmp_path: Path, ways: list[bool]) -> None:
    sections = range(8)
    source = "".join(f'__attribute__((section(".part{n}"))) int *at_{n} = (int *)&at_{n};' for n in sections)
    places = [f"-Wl,--section-start=.part{n}={0x100000 * (n + 1):#x}" for n in sections]
    path = str(compiled(tmp_path / "parts.so", source, *places))
    assert len(miniloader.inspect(path).loads) > 8
    start, at_once = _linked(path, None, at_once=True)
    assert ways == [True]
    assert _linked(path, start, at_once=False)[1] == at_once


def test_whom_it_is_bound_to_is_noted_in_the_order_of_its_words(tmp_path: Path, ways: list[bool]) -> None:
    """As ld.so notes them: that is the order in which they go."""
    names = ("first", "second", "third")
    needed = [compiled(tmp_path / f"{n}.so", f"int {n}(void) {{ return 1; }}") for n in names]
    source = "int first(void), second(void), third(void);" + (
        "int (*pointers[])(void) = {third, first, second};"
    )
    path = str(compiled(tmp_path / "user.so", source))
    with (
        miniloader.load(needed[0]) as one,
        miniloader.load(needed[1]) as two,
        miniloader.load(needed[2]) as three,
    ):
        libraries = [library.loaded for library in (one, two, three)]
        unload.make_global(libraries)
        ways.clear()
        start, at_once = _linked(path, None, at_once=True)
        assert ways == [True]
        assert _linked(path, start, at_once=False)[1] == at_once
        assert at_once["held"] == ["third.so", "first.so", "second.so"]


def test_a_load_that_nobody_looks_at_is_linked_at_once(ways: list[bool]) -> None:
    with miniloader.load("libz.so.1") as libz:
        assert libz.function("zlibVersion", ctypes.c_char_p)().startswith(b"1.")
    assert ways == [True]
    events: list[miniloader.Event] = []
    with miniloader.load("libz.so.1", on_event=events.append):
        bound = next(event for event in events if event.stage == "bind")
    assert ways == [True, False]
    assert bound.data["bindings"].wanted


def test_what_another_library_has_come_between_is_done_again(
    ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver may load a library itself: what was found for the first one is not used for it then."""
    resolve, between = link_ordinary.resolve, []

    def resolved(addresses: array[int], places: array[int]) -> None:
        if not between:
            between.append(True)
            between.append(miniloader.load("libbz2.so.1.0"))
        resolve(addresses, places)

    monkeypatch.setattr(link_ordinary, "resolve", resolved)
    with miniloader.load("libz.so.1") as libz:
        crc32 = libz.function("crc32", ctypes.c_ulong, [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_uint])
        assert crc32(0, b"hello", 5) == 0x3610A686
    assert ways == [True, False]
    between[1].close()


def test_what_is_not_met_is_told_by_the_other_way(ways: list[bool]) -> None:
    present = list(unload.present)
    with pytest.raises(SymbolError, match="undefined symbol cycle_b"):
        miniloader.load(build("cycle_stand_in"))
    assert ways == [False]
    assert unload.present == present


def test_what_the_program_needs_is_opened_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    look = Graph.look
    with monkeypatch.context() as patched:
        patched.setattr(
            Graph, "look", lambda graph, name, *more: asked.append(name) or look(graph, name, *more)
        )
        with miniloader.load("libz.so.1") as libz:
            needed = libz.loaded.needs
            assert asked == []
            assert [library.soname for library in needed if isinstance(library, HostLibrary)] == ["libc.so.6"]
