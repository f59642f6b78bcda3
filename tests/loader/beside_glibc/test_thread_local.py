"""Thread-local storage, in every model, beside glibc's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.elf import Source

MODELS = ("tls_general", "tls_local", "tls_initial", "tls_descriptors", "tls_large")


def _in_threads(count: int, function: Callable[[], object]) -> list[object]:
    """What ``function`` returned in each of ``count`` threads that all lived at once."""
    together = threading.Barrier(count)
    results: list[object] = []

    def run() -> None:
        together.wait()
        results.append(function())
        together.wait()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("model", MODELS)
def test_each_thread_has_its_own_initialised_block(
    model: str, fixture_library: Callable[[str], Path]
) -> None:
    with miniloader.load(fixture_library(model)) as library:
        following, local = library.function("tls_next"), library.function("tls_next_local")
        text = library.function("tls_get_text", ctypes.c_char_p)
        aligned = library.function("tls_is_aligned")
        zeroes = library.function("tls_get_zeroes", ctypes.c_void_p)
        where = library.function("tls_address", ctypes.c_void_p)

        def look() -> tuple[object, ...]:
            own = library.address("tls_number") == where()
            return following(), following(), local(), text(), aligned(), ctypes.string_at(zeroes(), 64), own

        expected = (42, 43, 7, b"relocated", 1, bytes(64), True)
        assert look() == expected
        assert _in_threads(3, look) == [expected] * 3
        assert len({*_in_threads(3, where), where()}) == 4  # type: ignore[arg-type]  # addresses


@pytest.mark.parametrize("unfit", ["tls_large_initial", "tls_aligned_initial"])
def test_a_block_that_does_not_fit_the_surplus_is_refused_if_it_has_to_be_static(
    unfit: str, fixture_library: Callable[[str], Path]
) -> None:
    path = str(fixture_library(unfit))
    with pytest.raises(miniloader.LoadError, match=r"static TLS block.*optional_static_tls.*LD_PRELOAD"):
        miniloader.load(path)
    # The same block where it need not be static loads, in the test above; and dlopen refuses likewise.
    with pytest.raises(OSError, match="static TLS"):
        ctypes.CDLL(path)
    problem, *others = miniloader.check(path, within=os.path.realpath(sys.executable)).problems
    assert (problem.kind, others) == ("static-tls", [])
    # What the hint says: as the program starts there is room for any.
    started = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({path!r}).tls_is_aligned())"]
    environment = os.environ | {"LD_PRELOAD": path}
    done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr


def test_blocks_of_a_closed_library_are_given_back(fixture_library: Callable[[str], Path]) -> None:
    """The static surplus is small: only if each block is given back can it be taken this often."""
    path = fixture_library("tls_initial")
    for _ in range(200):
        miniloader.load(path).close()


def test_two_images_from_memory_have_blocks_of_their_own(fixture_library: Callable[[str], Path]) -> None:
    data = fixture_library("tls_general").read_bytes()
    with miniloader.load(Source.from_bytes(data)) as one, miniloader.load(Source.from_bytes(data)) as other:
        assert [one.function("tls_next")(), one.function("tls_next")()] == [42, 43]
        assert other.function("tls_next")() == 42
        assert one.address("tls_number") != other.address("tls_number")


@pytest.mark.parametrize("user", ["tls_user", "tls_user_initial", "tls_user_descriptors"])
def test_a_dependency_s_variable_is_reached_from_who_needs_it(
    user: str, fixture_library: Callable[[str], Path]
) -> None:
    with miniloader.load(fixture_library(user)) as library:
        bump, peek = library.function("user_bump"), library.function("user_peek")

        def look() -> tuple[int, int]:
            return bump(), peek()

        assert look() == (142, 142)
        assert _in_threads(2, look) == [(142, 142)] * 2


def test_a_variable_of_a_library_that_has_not_had_its_turn(
    fixture_library: Callable[[str], Path], in_child: Callable[..., list[int]]
) -> None:
    """It is found by its place in the scope; who uses it does not need it, and yet is linked after it."""
    path = fixture_library("tls_beside")

    def ours() -> list[int]:
        events: list[miniloader.Event] = []
        with miniloader.load(path, on_event=events.append) as library:
            linked = [os.path.basename(event.library) for event in events if event.stage == "bind"]
            assert linked[:2] == ["libtls_general.so", "libtls_user_alone.so"]
            return [library.function(name)() for name in ("user_bump", "user_bump", "user_peek")]

    def theirs() -> list[int]:
        library = ctypes.CDLL(str(path))
        return [library[name]() for name in ("user_bump", "user_bump", "user_peek")]

    assert in_child(ours) == in_child(theirs) == [142, 242, 242]


def test_a_load_that_fails_gives_back_blocks_that_ask_about_each_other(
    fixture_library: Callable[[str], Path],
) -> None:
    """What it needs is linked by then: one library's carrier needs the other's."""

    def held() -> tuple[int, list[str]]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len(os.listdir("/proc/self/fd")), [line for line in lines if "miniloader-tls" in line]

    path = fixture_library("tls_unbound")
    with pytest.raises(miniloader.SymbolError, match="tls_missing"):
        miniloader.load(path)
    before = held()
    for _ in range(3):
        with pytest.raises(miniloader.SymbolError, match="undefined symbol tls_missing"):
            miniloader.load(path)
    assert held() == before
    assert before[1] == []


def test_libc_s_own_thread_local_variable(fixture_library: Callable[[str], Path]) -> None:
    """errno is initial-exec in libc: its place is asked of glibc, too."""
    with miniloader.load("libm.so.6") as libm:
        log = libm.function("log", ctypes.c_double, [ctypes.c_double], use_errno=True)
        ctypes.set_errno(0)
        log(-1.0)
        assert ctypes.get_errno() == 33  # EDOM, set through libm's TPOFF64 of errno


def test_library_waits_for_threads_that_have_its_objects(fixture_library: Callable[[str], Path]) -> None:
    """A thread_local with a destructor: closing must not unmap what the thread's end will run."""
    path = fixture_library("cxx")
    library = miniloader.load(path)
    following, ended = library.function("thread_next"), library.function("threads_that_ended")
    constructed, may_end = threading.Event(), threading.Event()

    def live() -> None:
        following()
        constructed.set()
        may_end.wait()

    thread = threading.Thread(target=live)
    thread.start()
    constructed.wait()
    assert ended() == 0
    start, end = library.base, library.base + library.plan.end
    library.close()
    assert _mapped(start, end), "the thread's destructor would run in unmapped memory"
    may_end.set()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # joined, but its destructors may yet run
        time.sleep(0.001)
    miniloader.load(fixture_library("demo")).close()  # any load or close looks again
    assert not _mapped(start, end)


def _mapped(start: int, end: int) -> bool:
    from miniloader.kernel.maps import read_maps

    return any(vma.start < end and start < vma.end and "cxx" in vma.path for vma in read_maps())
