"""Linking at once what is ordinary, against linking step by step, which others hold to ld.so."""

from __future__ import annotations

import ctypes
from array import array

import pytest

import miniloader
from fixtures.build import build
from miniloader.errors import SymbolError
from miniloader.loader import Loading, link, link_ordinary, unload
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.graph import Graph
from miniloader.loader.surroundings import find_path


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
    with Loading(path, init=False, address=address) as steps:
        steps._graph.keeps_bindings = not at_once
        steps.map()
        steps.link()
        loaded = steps.mapped[0]
        memory, image = loaded.mapped, loaded.image
        words = {vaddr: bytes(memory.read(vaddr, 8)) for vaddr in image.relocations.targets().tolist()}
        dynamic = image.segment("PT_DYNAMIC")
        assert dynamic is not None
        made = {
            "words": words,
            "dynamic": bytes(memory.read(dynamic.vaddr, dynamic.memsz)),
            "symbols": len(loaded.names),
            "names": [loaded.names.name(symbol) for symbol in range(len(loaded.names))],
            "holds": loaded.holds,
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
    *("relocations", "bss", "overaligned_64k", "opens", "libz.so.1"),
)


@pytest.mark.parametrize("name", ORDINARY)
def test_both_ways_make_the_same(name: str, ways: list[bool]) -> None:
    path = find_path(name) if ".so" in name else str(build(name))
    start, at_once = _linked(path, None, at_once=True)
    assert ways == [True]
    ways.clear()
    assert _linked(path, start, at_once=False)[1] == at_once
    assert ways == [False]


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
