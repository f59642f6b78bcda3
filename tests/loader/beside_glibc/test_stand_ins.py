"""Libraries that ask about themselves are told what they are told after dlopen."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.loader.beside_glibc import host, stand_ins
from tests.loader.conftest import InChild

FixtureLibrary = Callable[[str], Path]


def _ask(library: miniloader.Library) -> list[str]:
    return library.function("ask", ctypes.c_char_p)().decode().splitlines()  # type: ignore[no-any-return]


def _theirs(path: Path) -> list[str]:
    ask = ctypes.CDLL(str(path)).ask
    ask.restype = ctypes.c_char_p
    return ask().decode().splitlines()  # type: ignore[no-any-return]


def _listed(library: miniloader.Library) -> list[int]:
    numbers = (ctypes.c_longlong * 4)()
    library.function("listed", None, [ctypes.c_void_p])(ctypes.addressof(numbers))
    return list(numbers)


def test_the_answers_are_those_after_dlopen(fixture_library: FixtureLibrary, in_child: InChild) -> None:
    path = fixture_library("asks_itself")

    def ours() -> list[str]:
        with miniloader.load(path) as library:
            return _ask(library)

    answers = in_child(ours)
    assert answers == in_child(_theirs, path)
    assert answers[0] == f"listed 1 {path} headers {len(miniloader.inspect(path).segments)} 1 thread-local 1"
    assert sum(line.startswith("dynamic ") for line in answers) >= 5
    assert f"dladdr 1 {path} 1 asked_about 1" in answers


def test_also_when_it_asks_for_the_first_time_through_a_slot_bound_lazily(
    fixture_library: FixtureLibrary, in_child: InChild
) -> None:
    path = fixture_library("asks_itself_lazy")

    def ours() -> list[str]:
        with miniloader.load(path, bind="lazy") as library:
            return _ask(library)

    assert in_child(ours) == in_child(_theirs, path)


def test_libraries_come_and_go(fixture_library: FixtureLibrary, demo: Path) -> None:
    """The counts change with them: an unwinder keeps what it found until they do."""
    with miniloader.load(fixture_library("asks_itself")) as library:
        count, adds, subs, place = _listed(library)
        assert len(host.libraries()) < place <= count  # behind all of the system's loader
        with miniloader.load(demo):
            assert _listed(library)[:3] == [count + 1, adds + 1, subs]
        assert _listed(library) == [count, adds + 1, subs + 1, place]
        with miniloader.load(demo):  # takes the entry that is free
            assert _listed(library)[:3] == [count + 1, adds + 2, subs + 1]
    with miniloader.load(fixture_library("asks_itself")) as again:
        assert _listed(again)[0] == count


def test_what_does_not_run_is_not_listed(fixture_library: FixtureLibrary, demo: Path) -> None:
    with miniloader.load(fixture_library("asks_itself")) as library:
        before = _listed(library)
        with miniloader.load(demo, init=False):
            assert _listed(library) == before


@pytest.mark.parametrize("flag", ["RTLD_NOLOAD", "RTLD_NODELETE"])
def test_who_holds_itself_stays(flag: str, fixture_library: FixtureLibrary, in_child: InChild) -> None:
    """Until it lets go, with RTLD_NODELETE for ever: unmapping what has patched itself in would crash."""
    path = fixture_library("asks_itself")
    for_ever = flag == "RTLD_NODELETE"

    def story(function: Callable[[str], Callable[..., int]], close: Callable[[], None]) -> list[object]:
        hold, let_go = function("hold"), function("let_go")
        found: list[object] = [hold(getattr(os, flag)), let_go(0) if for_ever else None]
        close()
        return [*found, str(path) in Path("/proc/self/maps").read_text()]

    def ours() -> list[object]:
        library = miniloader.load(path)
        return story(lambda name: library.function(name, ctypes.c_int, [ctypes.c_int]), library.close)

    def theirs() -> list[object]:
        library = ctypes.CDLL(str(path))
        dlclose = ctypes.CDLL(None).dlclose
        return story(lambda name: library[name], lambda: dlclose(ctypes.c_void_p(library._handle)))

    assert in_child(ours) == in_child(theirs) == [1, 0 if for_ever else None, True]


def test_what_was_let_go_goes(fixture_library: FixtureLibrary, demo: Path, in_child: InChild) -> None:
    path = fixture_library("asks_itself")

    def ours() -> list[bool]:
        library = miniloader.load(path)
        hold, let_go = library.function("hold", ctypes.c_int, [ctypes.c_int]), library.function("let_go")
        hold(os.RTLD_NOLOAD)
        library.close()
        let_go()
        miniloader.load(demo).close()  # any load or close looks again
        return [str(path) in Path("/proc/self/maps").read_text()]

    assert in_child(ours) == [False]


def test_in_several_threads_while_libraries_come_and_go(fixture_library: FixtureLibrary, demo: Path) -> None:
    stop = threading.Event()
    with miniloader.load(fixture_library("asks_itself")) as library:
        wanted = _ask(library)

        def work() -> None:
            numbers = (ctypes.c_longlong * 4)()
            listed = library.function("listed", None, [ctypes.c_void_p])
            while not stop.is_set():
                listed(ctypes.addressof(numbers))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            miniloader.load(demo).close()
        stop.set()
        for thread in threads:
            thread.join()
        assert _ask(library) == wanted


def test_where_no_page_may_become_executable(fixture_library: FixtureLibrary) -> None:
    """As in a service with MemoryDenyWriteExecute: it loads, and what it asks is answered all the same."""
    program = (
        "import ctypes, sys, miniloader\n"
        "PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1\n"
        "if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):\n"
        "    sys.exit(3)\n"
        "library = miniloader.load(sys.argv[1])\n"
        "numbers = (ctypes.c_longlong * 4)()\n"
        "library.function('listed', None, [ctypes.c_void_p])(ctypes.addressof(numbers))\n"
        "print(numbers[3])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(fixture_library("asks_itself"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(miniloader.__file__).parents[1],
    )
    if done.returncode == 3:
        pytest.skip("this kernel lacks PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 3  # it is listed, behind all of the system's loader


def test_the_table_grows_and_is_used_again(demo: Path, fixture_library: FixtureLibrary) -> None:
    data = demo.read_bytes()
    with miniloader.load(fixture_library("asks_itself")) as library:
        count = _listed(library)[0]
        for _ in range(2):
            many = [miniloader.load(miniloader.Source.from_bytes(data)) for _ in range(50)]
            assert _listed(library)[0] == count + 50
            for one in many:
                one.close()
            assert _listed(library)[0] == count


def test_every_function_has_a_stand_in() -> None:
    libc = ctypes.CDLL(None)
    named = {
        ctypes.cast(libc[name], ctypes.c_void_p).value for name in ("dladdr", "dl_iterate_phdr", "dlsym")
    }
    assert named <= set(stand_ins.stand_ins())


# ----------------------------------------------------------------- what the system's loader has
def test_room_that_is_too_small_is_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> list[tuple[object, ...]]:
        monkeypatch.setattr(host, "_last", [])
        fields = ("path", "bias", "headers", "tls_module", "soname", "needed", "build_id")
        return [tuple(getattr(library, name) for name in fields) for library in host.libraries()]

    known = looked()
    assert len(known) > 3
    monkeypatch.setattr(host, "_room", [100])
    assert looked() == known


def test_what_it_has_is_called_as_its_files_say() -> None:
    of_files = {
        library.path: miniloader.inspect(library.path) for library in host.libraries() if library.path
    }
    assert len(of_files) > 3
    assert [(image.soname, image.needed, image.build_id) for image in of_files.values()] == [
        (library.soname, library.needed, library.build_id) for library in host.libraries() if library.path
    ]


@pytest.mark.parametrize(("flags", "is_global"), [("RTLD_LOCAL", False), ("RTLD_GLOBAL", True)])
def test_what_is_in_the_global_scope(flags: str, is_global: bool, demo: Path) -> None:
    program = (
        "import ctypes, sys\n"
        "from miniloader.loader.beside_glibc import host\n"
        "library = ctypes.CDLL(sys.argv[1], mode=getattr(ctypes, sys.argv[2]))\n"
        "dlerror = ctypes.CDLL(None).dlerror\n"
        "dlerror.restype = ctypes.c_char_p\n"
        "print([library.is_global for library in host.libraries() if library.path == sys.argv[1]])\n"
        "print(dlerror())\n"
    )
    command = [sys.executable, "-c", program, str(demo), flags]
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == f"[{is_global}]\nNone\n"


def test_while_another_thread_loads_with_the_interpreter_in_hand(demo: Path, tmp_path: Path) -> None:
    """As ``import`` loads extension modules: it holds the interpreter, and waits for glibc's lock."""
    program = (
        "import ctypes, shutil, sys, threading\n"
        "from miniloader.loader.beside_glibc import host\n"
        "sys.setswitchinterval(1e-6)\n"
        "libc, done = ctypes.PyDLL(None), []\n"
        "libc.dlopen.restype, libc.dlclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "def look():\n"
        "    while not done:\n"
        "        host._last.clear()\n"
        "        host.libraries()\n"
        "threads = [threading.Thread(target=look) for _ in range(3)]\n"
        "for thread in threads:\n"
        "    thread.start()\n"
        "for number in range(1500):\n"
        "    libc.dlclose(libc.dlopen(sys.argv[1].encode(), 2))\n"
        "done.append(True)\n"
        "print('through')\n"
    )
    command = [sys.executable, "-c", program, str(demo)]
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "through\n", "")


def test_disasm_says_what_it_stands_for(fixture_library: FixtureLibrary) -> None:
    command = [
        sys.executable,
        "-m",
        "miniloader",
        "disasm",
        fixture_library("asks_itself"),
        "listed",
        "--loaded",
    ]
    said = [
        subprocess.run(
            [*map(str, command), *more],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(miniloader.__file__).parents[1],
            env={**os.environ, "COLUMNS": "200"},
        ).stdout
        for more in ([], ["--json"])
    ]
    assert "miniloader's, for dl_iterate_phdr in libc.so.6" in said[0]
    targets = [one["target"] for one in json.loads(said[1])["instructions"] if one["target"]]
    assert [(one["owner"]["name"], one["stand_in"]) for one in targets if one["stand_in"]] == [
        ("dl_iterate_phdr", True)
    ]
