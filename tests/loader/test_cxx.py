"""C++ inside our mapping: exceptions, static objects, RTTI, symbols of which a process has one."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import miniloader


@pytest.fixture(params=["cxx", "cxx_static_unwinder", "cxx_static"])
def cxx(
    request: pytest.FixtureRequest, fixture_library: Callable[[str], Path]
) -> Iterator[miniloader.Library]:
    """With the process's unwinder and libstdc++, with an unwinder of its own, and with both its own."""
    with miniloader.load(fixture_library(request.param)) as library:
        yield library


def test_an_exception_is_caught_inside(cxx: miniloader.Library) -> None:
    thrown = cxx.function("throw_and_catch", ctypes.c_int, [ctypes.c_int])
    assert [thrown(number) for number in (0, 7, 123)] == [0, 7, 123]


def test_what_the_process_s_libstdcxx_throws_is_caught_inside(cxx: miniloader.Library) -> None:
    assert cxx.function("catch_from_host")() == 1


def test_static_objects_are_constructed(cxx: miniloader.Library) -> None:
    text = cxx.function("static_text", ctypes.c_char_p)()
    assert text == b"constructed before anybody could ask"


def test_exceptions_are_in_flight_while_a_thousand_loads_come_and_go(
    fixture_library: Callable[[str], Path], in_child: Callable[..., Any], tmp_path: Path
) -> None:
    """Who unwinds looks at the tables of whatever is loaded, and those change all the time."""
    names = ("cxx", "cxx_static_unwinder", "demo", "unique")
    copies = [Path(shutil.copy(fixture_library(name), tmp_path / f"lib{name}.so")) for name in names]

    def work() -> tuple[int, int, list[str]]:
        over, loads, thrown, errors = threading.Event(), itertools.count(), itertools.count(), list[str]()

        def throw(function: Callable[[int], int]) -> None:
            while not over.is_set():
                number = next(thrown) % 1000
                if function(number) != number:
                    errors.append(f"{number} was not caught")

        def load_and_close(copy: Path) -> None:
            while next(loads) < 1000:
                with miniloader.load(copy) as library:
                    if "cxx" in copy.name and library.function("throw_and_catch")(7) != 7:
                        errors.append(f"{copy}: 7 was not caught")

        with (
            miniloader.load(fixture_library("cxx")) as first,
            miniloader.load(fixture_library("cxx_static_unwinder")) as second,
            ThreadPoolExecutor(6) as pool,
        ):
            throwing = [
                pool.submit(throw, library.function("throw_and_catch")) for library in (first, second)
            ]
            loading = [pool.submit(load_and_close, copy) for copy in copies]
            try:
                for future in loading:
                    future.result()
            finally:
                over.set()
            for future in throwing:
                future.result()
        return next(loads), next(thrown), errors

    loads, thrown, errors = in_child(work)
    assert not errors
    assert loads >= 1000
    assert thrown > 0


def test_and_destroyed_when_closed(fixture_library: Callable[[str], Path]) -> None:
    destroyed = ctypes.c_int(0)
    library = miniloader.load(fixture_library("cxx"))
    library.function("tell_destruction", None, [ctypes.c_void_p])(ctypes.addressof(destroyed))
    assert destroyed.value == 0
    library.close()
    assert destroyed.value == 1


def test_casts_by_rtti(cxx: miniloader.Library) -> None:
    assert cxx.function("casts")() == 1


def test_a_unique_symbol_is_one_per_process(
    fixture_library: Callable[[str], Path], in_child: Callable[..., Any]
) -> None:
    """Whoever came first: here the system's loader, whose copy ours has to bind to."""
    path = fixture_library("unique")

    def work() -> tuple[bool, bool]:
        theirs = ctypes.CDLL(str(path))
        theirs.unique_counter.restype = ctypes.c_void_p
        with miniloader.load(path) as ours:
            one = ours.function("unique_counter", ctypes.c_void_p)() == theirs.unique_counter()
            other = ctypes.cast(theirs.tell_destruction, ctypes.c_void_p).value
            return one, ours.address("tell_destruction") == other

    assert in_child(work) == (True, False)  # any other symbol is our own


def test_who_defines_a_unique_symbol_stays(
    fixture_library: Callable[[str], Path], in_child: Callable[..., Any]
) -> None:
    """Closing neither unmaps it nor runs its destructors; loading it again finds it as it was."""
    path = str(fixture_library("unique"))

    def story(load: Callable[[], Any], close: Callable[[Any], None], get: Callable[[Any, str], Any]) -> Any:
        destroyed = ctypes.c_int(0)
        library = load()
        get(library, "tell_destruction")(ctypes.c_void_p(ctypes.addressof(destroyed)))
        counter = get(library, "unique_counter")
        counter.restype = ctypes.POINTER(ctypes.c_int)
        counter()[0] = 7
        close(library)
        again = get(load(), "unique_counter")
        again.restype = ctypes.POINTER(ctypes.c_int)
        return destroyed.value, path in Path("/proc/self/maps").read_text(), again()[0]

    def ours() -> Any:
        return story(
            lambda: miniloader.load(path), lambda lib: lib.close(), lambda lib, name: lib.function(name)
        )

    def theirs() -> Any:
        dlclose = ctypes.CDLL(None).dlclose
        return story(
            lambda: ctypes.CDLL(path),
            lambda lib: dlclose(ctypes.c_void_p(lib._handle)),
            lambda lib, name: lib[name],
        )

    assert in_child(ours) == in_child(theirs) == (0, True, 7)


def test_two_of_ours_share_a_unique_symbol(fixture_library: Callable[[str], Path]) -> None:
    """In a process where ld.so never loaded the library, the first of ours is everybody's, and stays."""
    program = (
        "import ctypes, miniloader\n"
        f"data = open({str(fixture_library('unique'))!r}, 'rb').read()\n"
        "one = miniloader.load(miniloader.Source.from_bytes(data))\n"
        "two = miniloader.load(miniloader.Source.from_bytes(data))\n"
        "first, second = (lib.function('unique_counter', ctypes.c_void_p) for lib in (one, two))\n"
        "assert first() == second()\n"
        "assert one.base <= first() < one.base + one.plan.end\n"
        "where = first()\n"
        "one.close()\n"
        "ctypes.c_int.from_address(where).value = 5\n"
        "assert second() == where\n"
        "two.close()\n"
    )
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_exception_out_of_an_unregistered_library_would_end_the_process(
    fixture_library: Callable[[str], Path],
) -> None:
    """What registering is for: without it the same throw finds no handler."""
    program = (
        "import ctypes, miniloader, sys\n"
        "from miniloader.loader.beside_glibc import unwinder\n"
        "if sys.argv[1] == 'without': unwinder.register = lambda *_: False\n"
        f"lib = miniloader.load({str(fixture_library('cxx'))!r})\n"
        "print(lib.function('throw_and_catch', ctypes.c_int, [ctypes.c_int])(7))\n"
    )
    root = Path(miniloader.__file__).parents[1]
    outcomes = [
        subprocess.run(
            [sys.executable, "-c", program, how], cwd=root, capture_output=True, text=True, check=False
        )
        for how in ("with", "without")
    ]
    assert (outcomes[0].returncode, outcomes[0].stdout) == (0, "7\n")
    assert outcomes[1].returncode == -6  # SIGABRT: std::terminate
