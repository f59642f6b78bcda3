"""What a library opens itself: ld.so and ours are asked the same by the same library, side by side."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniloader
from tests.loader.conftest import InChild

FixtureLibrary = Callable[[str], Path]
POINTER, TEXT, INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
NOW, LAZY, NOLOAD, GLOBAL = os.RTLD_NOW, os.RTLD_LAZY, os.RTLD_NOLOAD, os.RTLD_GLOBAL
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "opens": (POINTER, TEXT, INT),
    "opens_apart": (POINTER, ctypes.c_long, TEXT, INT),
    "symbol": (POINTER, POINTER, TEXT),
    "symbol_by_default": (POINTER, TEXT),
    "symbol_after": (POINTER, TEXT),
    "version": (POINTER, POINTER, TEXT, TEXT),
    "closes": (INT, POINTER),
    "error": (TEXT,),
    "information": (INT, POINTER, INT, POINTER),
    "name_of": (TEXT, POINTER),
    "name_at": (TEXT, POINTER),
    "number": (INT,),
}


class Inside:
    """The functions of ``libopens.so``, which call dlopen and its like."""

    def __init__(self, address: Callable[[str], int]) -> None:
        for name, (result, *arguments) in SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(address(name)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def call(self, handle: int | None, name: bytes) -> int | None:
        address = self.symbol(handle, name)
        return int(ctypes.CFUNCTYPE(INT)(address)()) if address else None


Story = Callable[[Inside, Path], list[Any]]


def _by_ld_so(story: Story, library: Path) -> list[Any]:
    os.environ.pop("OPENED", None)
    opens = ctypes.CDLL(str(library))
    return story(Inside(lambda name: ctypes.cast(opens[name], POINTER).value or 0), library.parent)


def _by_us(story: Story, library: Path) -> list[Any]:
    os.environ.pop("OPENED", None)
    return story(Inside(miniloader.load(library).address), library.parent)


def _notes() -> str | None:
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = TEXT
    text = getenv(b"OPENED")
    return text.decode() if text else None


def _mapped(name: str) -> bool:
    return f"/{name}" in Path("/proc/self/maps").read_text()


def by_name(inside: Inside, at: Path) -> list[Any]:
    """Along the caller's RUNPATH, and the same library by its path and by a link."""
    handle = inside.opens(b"libopened.so", NOW)
    link = at / "libopened_link.so"
    again = [inside.opens(os.fsencode(path), NOW) == handle for path in (at / "libopened.so", link)]
    seen = [inside.name_of(handle), _mapped("libopened_dep.so"), inside.call(handle, b"plug")]
    return [*seen, *again, [inside.closes(handle) for _ in range(3)], _mapped("libopened"), _notes()]


def errors(inside: Inside, at: Path) -> list[Any]:
    """What dlerror(3) says, once."""
    asked: list[Any] = []
    for name in (b"libnone.so", b"/no/such/libnone.so", os.fsencode(at / "empty.so"), os.fsencode(at)):
        asked += [inside.opens(name, NOW), inside.error(), inside.error()]
    asked += [inside.opens(b"libnone.so", NOW | NOLOAD), inside.error()]
    asked += [inside.opens(b"libopened.so", NOW | NOLOAD), inside.error()]
    asked += [inside.opens(b"libopened.so", 0), inside.error()]
    asked += [inside.opens(b"libopened_lazy.so", NOW), inside.error()]
    handle = inside.opens(b"libopened.so", NOW)
    asked += [inside.symbol(handle, b"nothing"), inside.error(), inside.error()]
    inside.symbol(handle, b"nothing")
    asked += [inside.symbol(handle, b"number") is not None, inside.error()]  # as if nothing had been
    asked += [inside.version(handle, b"nothing", b"V1"), inside.error()]
    asked += [inside.symbol_by_default(b"nothing"), inside.error()]
    asked += [inside.symbol_after(b"nothing"), inside.error()]
    libc = inside.opens(b"libc.so.6", NOW)
    asked += [inside.symbol(libc, b"nothing"), inside.error(), inside.error()]
    return [*asked, inside.closes(libc), inside.information(handle, 77, 0), inside.error()]


def symbols(inside: Inside, at: Path) -> list[Any]:
    """In a library and what it needs; by default; after the caller."""
    handle = inside.opens(b"libopened.so", NOW)
    found = [inside.call(handle, name) for name in (b"plug", b"dep", b"number", b"asks_number")]
    places = [inside.name_at(inside.symbol(handle, name)) for name in (b"plug", b"dep", b"qsort")]
    places.append(inside.name_at(inside.symbol_after(b"qsort")))
    mine = inside.symbol_by_default(b"number")
    found += [
        ctypes.CFUNCTYPE(INT)(mine)(),
        inside.symbol_by_default(b"plug"),
        inside.symbol_after(b"number"),
    ]
    found.append(inside.version(handle, b"number", b"V9"))
    thread_local = ctypes.c_int.from_address(inside.symbol(handle, b"per_thread"))
    elsewhere: list[int] = []
    thread_local.value += 1

    def look() -> None:
        elsewhere.append(ctypes.c_int.from_address(inside.symbol(handle, b"per_thread")).value)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return [*found, *places, thread_local.value, *elsewhere]


def made_global(inside: Inside, at: Path) -> list[Any]:
    """From RTLD_GLOBAL on everybody finds it, with what it needs; also when it had been opened before."""
    program = inside.opens(None, NOW)
    handle = inside.opens(b"libopened.so", NOW)
    seen = [inside.symbol(program, b"plug"), inside.symbol_by_default(b"plug")]
    again = inside.opens(b"libopened.so", NOW | NOLOAD | GLOBAL)
    seen += [again == handle, inside.call(program, b"plug"), inside.call(program, b"dep")]
    seen.append(ctypes.CFUNCTYPE(INT)(inside.symbol_by_default(b"plug"))())
    more = inside.opens(b"libopens_more.so", NOW)  # which finds its own number in another
    seen += [
        inside.call(more, b"asks_number"),
        inside.closes(more),
        inside.closes(again),
        inside.closes(handle),
    ]
    # By default it was found: so the library that asked needs it from then on, and it stays.
    return [*seen, inside.symbol(program, b"plug") is None, _mapped("libopened")]


def deeply_bound(inside: Inside, at: Path) -> list[Any]:
    """RTLD_DEEPBIND: its own number before the one that is global."""
    inside.opens(b"libopened_dep.so", NOW | GLOBAL)
    plain, deep = (
        inside.opens(b"libopened.so", NOW),
        inside.opens(b"libopens_more.so", NOW | os.RTLD_DEEPBIND),
    )
    return [inside.call(plain, b"asks_number"), inside.call(deep, b"asks_number")]


def lazily(inside: Inside, at: Path) -> list[Any]:
    """RTLD_LAZY: a function that nobody has matters when it is called."""
    handle = inside.opens(b"libopened_lazy.so", LAZY)
    return [
        inside.error(),
        inside.call(handle, b"number"),
        inside.call(handle, b"dep"),
        inside.closes(handle),
    ]


def for_ever(inside: Inside, at: Path) -> list[Any]:
    """RTLD_NODELETE stays, with what it needs; its destructors run when the process ends."""
    handle = inside.opens(b"libopened.so", NOW | os.RTLD_NODELETE)
    closed = [inside.closes(handle), _mapped("libopened.so"), _mapped("libopened_dep.so"), _notes()]
    return [*closed, inside.opens(b"libopened.so", NOW | NOLOAD) == handle]


def nested(inside: Inside, at: Path) -> list[Any]:
    """A constructor opens, a destructor closes: what that needs is there until all have run."""
    handle = inside.opens(b"libopens_more.so", NOW)
    opened = [_notes(), inside.opens(b"libopened.so", NOW | NOLOAD) is not None, inside.error()]
    inside.closes(inside.opens(b"libopened.so", NOW | NOLOAD))
    inside.closes(inside.opens(b"libopened.so", NOW))
    inside.closes(inside.opens(b"libopened.so", NOW | NOLOAD))
    return [*opened, inside.closes(handle), _notes()]


def information(inside: Inside, at: Path) -> list[Any]:
    """dlinfo(3): what does not depend on where things lie."""
    handle = inside.opens(b"libopened.so", NOW)
    word, text = ctypes.c_uint64(77), ctypes.create_string_buffer(4096)
    answers: list[Any] = [inside.information(handle, 1, ctypes.addressof(word)), word.value]
    answers += [inside.information(handle, 6, ctypes.addressof(text)), text.value]
    answers += [inside.information(handle, 9, ctypes.addressof(word)), word.value > 0]
    inside.information(handle, 10, ctypes.addressof(word))
    variable = inside.symbol(handle, b"per_thread")
    untouched = word.value
    inside.information(handle, 10, ctypes.addressof(word))
    answers += [untouched, word.value <= variable < word.value + 64]
    answers += [inside.information(handle, 11, ctypes.addressof(word))]
    answers += [inside.information(handle, 5, ctypes.addressof(text)), text.raw[:12]]
    answers += [inside.information(handle, 4, ctypes.addressof(text))]
    count = int.from_bytes(text.raw[8:12], "little")
    names = [int.from_bytes(text.raw[16 + 16 * place :][:8], "little") for place in range(count)]
    inside.information(handle, 2, ctypes.addressof(word))
    before = _names_back_from(word.value)
    answers += [before[0], before[-1], sum(name.endswith(b"/libc.so.6") for name in before)]
    return [*answers, [ctypes.string_at(name) for name in names]]


def _names_back_from(link_map: int) -> list[bytes]:
    """What those in the list of ``struct link_map`` are called, from this one back to the program."""
    names = []
    while link_map:
        words = (ctypes.c_uint64 * 5).from_address(link_map)
        names.append(ctypes.string_at(words[1]))
        link_map = words[4]
    return names


@pytest.mark.parametrize(
    "story",
    [by_name, errors, symbols, made_global, deeply_bound, lazily, for_ever, nested, information],
    ids=lambda story: story.__name__,
)
def test_as_ld_so(story: Story, fixture_library: FixtureLibrary, in_child: InChild, tmp_path: Path) -> None:
    for name in ("opens", "opened", "opened_lazy", "opens_more", "opened_dep"):
        shutil.copy(fixture_library(name), tmp_path)
    (tmp_path / "libopened_link.so").symlink_to("libopened.so")
    (tmp_path / "empty.so").write_bytes(b"no ELF file" * 100)
    library = tmp_path / "libopens.so"
    theirs = in_child(_by_ld_so, story, library)
    assert in_child(_by_us, story, library) == theirs
    assert any(theirs)


def test_all_that_it_opens_is_ours(fixture_library: FixtureLibrary, in_child: InChild) -> None:
    """ld.so knows of none of it, and --trace tells who has opened what."""
    fixture_library("opened")
    path, events = fixture_library("opens"), list[miniloader.loader.Event]()

    def story() -> list[Any]:
        inside = Inside(miniloader.load(path, on_event=events.append).address)
        inside.opens(b"libopened.so", NOW)
        opened = [event.text.rpartition("/")[2] for event in events if event.stage == "open"]
        libc = ctypes.CDLL(None)
        libc.dlopen.restype = POINTER
        return [opened, libc.dlopen(b"libopened.so", NOW | NOLOAD), _mapped("libopened.so")]

    assert in_child(story) == [["libopened.so"], None, True]


def test_a_namespace_of_its_own_is_refused_by_name(
    fixture_library: FixtureLibrary, in_child: InChild
) -> None:
    path = fixture_library("opens")

    def story() -> list[Any]:
        inside = Inside(miniloader.load(path).address)
        return [inside.opens_apart(-1, b"libopened.so", NOW), inside.error()]

    handle, text = in_child(story)
    assert handle is None
    assert text.startswith(b"dlmopen: a namespace of its own")


@pytest.mark.parametrize("way", ["ctypes.CDLL", "miniloader.load"])
def test_at_the_end_of_the_process_it_still_closes(way: str, fixture_library: FixtureLibrary) -> None:
    """A library whose destructor lets another one go, and both have yet to be finalised."""
    fixture_library("opened")
    program = f"import ctypes, miniloader, sys; kept = {way}(sys.argv[1]); print('end')"
    command = [sys.executable, "-c", program, str(fixture_library("opens_more"))]
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


FAILS = """
import ctypes, os, sys, miniloader
from miniloader.loader import loading
from miniloader.loader.beside_glibc import stand_ins
def fails(place): raise ZeroDivisionError("on purpose")
stand_ins.answer_with(fails)
opens = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
print(bool(opens(miniloader.load(sys.argv[1]).address("opens"))(b"libc.so.6", os.RTLD_NOW)))
"""


def test_where_the_answer_fails_glibc_answers_and_it_is_told(fixture_library: FixtureLibrary) -> None:
    command = [sys.executable, "-c", FAILS, str(fixture_library("opens"))]
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert done.stderr.count("ZeroDivisionError: on purpose") == 1
