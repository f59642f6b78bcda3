"""In which order constructors and destructors run, and whose definition wins: as with dlopen(3).

Graphs of small libraries are built, each of which says when it comes and when it goes; then the same is done
in two processes, once with dlopen and once with miniloader.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

import miniloader
from miniloader.loader.constructors import constructor_order


class InChild(Protocol):
    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


Graph = dict[str, str]  # who needs whom, in order

GRAPHS: dict[str, Graph] = {
    "chain": {"a": "b", "b": "c", "c": ""},
    "diamond": {"a": "bc", "b": "d", "c": "d", "d": ""},
    "needed in two orders": {"a": "bc", "b": "dc", "c": "", "d": ""},
    "late need of an early one": {"a": "bcd", "b": "", "c": "b", "d": "cb"},
    "two": {"a": "b", "b": "a"},
    "cycle": {"a": "b", "b": "c", "c": "a"},
    "cycle below": {"a": "b", "b": "c", "c": "d", "d": "b"},
    "cycle of two, entered twice": {"a": "bc", "b": "c", "c": "b"},
    "cycles that share": {"a": "b", "b": "cd", "c": "a", "d": "b"},
    "itself": {"a": "ab", "b": ""},
    "tail behind a cycle": {"a": "bd", "b": "c", "c": "be", "d": "", "e": "d"},
    "wide": {"a": "edcb", "b": "", "c": "b", "d": "", "e": "cf", "f": "b"},
}


def random_graph(number: int) -> Graph:
    chance = random.Random(number)
    names = "abcdefg"[: chance.randrange(4, 8)]
    graph = {
        name: "".join(chance.sample(names, min(len(names), chance.choice((0, 1, 1, 2, 2, 3)))))
        for name in names
    }
    return {**graph, "a": graph["a"] or "b"}


def reachable(graph: Graph, names: str = "a") -> Graph:
    """What ``names`` and everything they need need, breadth first."""
    found = list(names)
    for name in found:  # grows meanwhile
        found += (needed for needed in dict.fromkeys(graph[name]) if needed not in found)
    return {name: graph[name] for name in found}


ALL = GRAPHS | {f"random {number}": random_graph(number) for number in range(12)}

_SOURCE = """
#include <stdio.h>
#include <stdlib.h>
static void tell(const char *what) { dprintf(atoi(getenv("ORDER_FD")), "%s" NAME " ", what); }
__attribute__((constructor)) static void come(void) { tell("+"); }
__attribute__((destructor)) static void go(void) { tell("-"); }
const char *who(void) { return NAME; }
const char *ask(void) { return who(); }
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each graph's libraries are; ``a`` is the one to load."""
    root = tmp_path_factory.mktemp("graphs")
    source = root / "node.c"
    source.write_text(_SOURCE)
    objects = {}
    for name in "abcdefg":
        objects[name] = root / f"{name}.o"
        command = ["gcc", "-c", "-fPIC", "-O1", f'-DNAME="{name}"', str(source), "-o", str(objects[name])]
        subprocess.run(command, check=True)
    places = {}
    for number, (title, graph) in enumerate(ALL.items()):
        places[title] = root / str(number)
        stand_ins = places[title] / "stand-ins"
        stand_ins.mkdir(parents=True)
        for directory in (stand_ins, places[title]):  # what a library needs has to be there when it is linked
            for name, needs in graph.items():
                link = [
                    "ld",
                    "-shared",
                    "-soname",
                    f"libnode_{name}.so",
                    "-rpath",
                    "$ORIGIN",
                    "--no-as-needed",
                ]
                needed = [str(stand_ins / f"libnode_{n}.so") for n in needs] if directory != stand_ins else []
                output = str(directory / f"libnode_{name}.so")
                subprocess.run([*link, str(objects[name]), *needed, "-lc", "-o", output], check=True)
    return places


DLOPEN = """
import _ctypes, os, sys
for path in sys.argv[2:]:
    handle = _ctypes.dlopen(path, os.RTLD_NOW)
    os.write(int(os.environ["ORDER_FD"]), b"| ")
    if sys.argv[1] == "close":
        _ctypes.dlclose(handle)
        os.write(int(os.environ["ORDER_FD"]), b"| ")
"""
LOAD = """
import os, sys, miniloader
for path in sys.argv[2:]:
    library = miniloader.load(path)
    os.write(int(os.environ["ORDER_FD"]), b"| ")
    if sys.argv[1] == "close":
        library.close()
        os.write(int(os.environ["ORDER_FD"]), b"| ")
"""


def told(code: str, when: str, *paths: Path) -> str:
    """What the libraries say when ``paths`` are loaded in a new process, and closed or left till its end."""
    reading, writing = os.pipe()
    environment = {**os.environ, "ORDER_FD": str(writing)}
    command = [sys.executable, "-c", code, when, *map(str, paths)]
    with subprocess.Popen(command, pass_fds=[writing], env=environment) as process:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
    assert process.returncode == 0
    return text


def test_constructors_and_destructors_at_close(graphs: dict[str, Path]) -> None:
    paths = [directory / "libnode_a.so" for directory in graphs.values()]
    # The sonames are the same in all graphs: each is closed before the next one is loaded.
    ours, theirs = (told(code, "close", *paths).split("| ") for code in (LOAD, DLOPEN))
    found = {title: (ours[2 * n], ours[2 * n + 1]) for n, title in enumerate(graphs)}
    assert found == {title: (theirs[2 * n], theirs[2 * n + 1]) for n, title in enumerate(graphs)}
    assert found["chain"] == ("+c +b +a ", "-a -b -c ")


@pytest.mark.parametrize("title", ["diamond", "cycle", "tail behind a cycle", "random 3"])
def test_destructors_at_the_end_of_the_process(graphs: dict[str, Path], title: str) -> None:
    path = graphs[title] / "libnode_a.so"
    ours, theirs = (told(code, "keep", path) for code in (LOAD, DLOPEN))
    assert ours == theirs
    assert ours.count("-") == ours.count("+") == len(reachable(ALL[title]))


def test_loading_several_that_share(graphs: dict[str, Path]) -> None:
    """The second load brings only what the first did not; at the end all go."""
    directory = graphs["wide"]
    paths = [directory / f"libnode_{name}.so" for name in "dcae"]
    ours, theirs = (told(code, "keep", *paths) for code in (LOAD, DLOPEN))
    assert ours == theirs
    assert ours.startswith("+d | +b +c | ")


@pytest.mark.parametrize("title", ALL)
def test_who_was_asked_for_is_initialised_last(title: str) -> None:
    graph = reachable(ALL[title])
    order = constructor_order(list(graph), lambda name: graph[name] if name != "a" else "")
    assert sorted(order) == sorted(graph)
    assert order[-1] == "a"
    if not any(name in reached for name in graph for reached in [set(reachable(graph, graph[name]))]):
        for name in graph:  # without a cycle, needs come first
            assert all(order.index(needed) < order.index(name) for needed in graph[name])


# ------------------------------------------------------------------------------------------ the scope
def test_the_first_in_the_scope_wins(fixture_library: Callable[[str], Path], in_child: InChild) -> None:
    a, c = fixture_library("chain_a"), fixture_library("chain_c")

    def ours() -> list[int]:
        with miniloader.load(a) as library, miniloader.load(c) as below:
            # It is loaded already, bound in the scope that brought it.
            found = [library.function(name)() for name in ("chain_a", "chain_winner")]
            found.append(below.function("chain_winner")())
        with miniloader.load(c) as alone:
            return [*found, alone.function("chain_winner")()]

    def theirs() -> list[int]:
        library, below = ctypes.CDLL(str(a)), ctypes.CDLL(str(c))
        found = [library.chain_a(), library.chain_winner(), below.chain_winner()]
        for handle in (below._handle, library._handle):
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(handle))
        return [*found, ctypes.CDLL(str(c)).chain_winner()]

    assert in_child(ours) == in_child(theirs) == [123, ord("a"), ord("a"), ord("c")]


@pytest.mark.parametrize("title", ["diamond", "chain", "cycle", "wide"])
def test_all_libraries_of_a_graph_are_bound_in_one_scope(
    graphs: dict[str, Path], title: str, in_child: InChild
) -> None:
    def ask_each() -> list[str]:
        ctypes.CDLL(None).setenv(b"ORDER_FD", str(os.open(os.devnull, os.O_WRONLY)).encode(), 1)
        answers = []
        with miniloader.load(graphs[title] / "libnode_a.so") as library:
            for member in library.libraries:
                if member.name.startswith(str(graphs[title])):
                    ask = member.symbols.find("ask")
                    assert ask is not None
                    address = member.bias + int(member.symbols.rows["value"][ask])
                    answers.append(ctypes.CFUNCTYPE(ctypes.c_char_p)(address)().decode())
        return answers

    assert in_child(ask_each) == ["a"] * len(GRAPHS[title])


def test_cycles_are_loaded_once_and_work(fixture_library: Callable[[str], Path]) -> None:
    with miniloader.load(fixture_library("cycle_a")) as library:
        assert library.function("cycle_a", ctypes.c_int, [ctypes.c_int])(5) == 1 + 10 + 1 + 10 + 1
        names = [os.path.basename(member.name) for member in library.libraries]
        assert names[:2] == ["libcycle_a.so", "libcycle_b.so"]
        assert len(names) == len(set(names))


def test_constructors_get_what_mains_get_and_destructors_all_run(
    fixture_library: Callable[[str], Path],
) -> None:
    log, count = (ctypes.c_int * 16)(), ctypes.c_int()
    library = miniloader.load(fixture_library("init_fini"))
    events = (ctypes.c_int * 16).from_address(library.address("events"))
    assert list(events)[:5] == [1, 2, 3, 4, 0]
    argc = ctypes.c_int.from_address(library.address("seen_argc")).value
    argv = ctypes.POINTER(ctypes.c_char_p).from_address(library.address("seen_argv"))
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    assert [argv[index] for index in range(argc)] == words
    environment = ctypes.c_void_p.from_address(library.address("seen_envp")).value
    assert environment == ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ").value
    set_log = library.function("set_log", None, [ctypes.c_void_p, ctypes.c_void_p])
    set_log(ctypes.addressof(log), ctypes.addressof(count))
    library.close()
    # Twenty, registered with atexit, is called by __cxa_finalize, from a destructor of the compiler's own.
    ours = list(log)[: count.value]
    assert sorted(ours) == [20, 21, 22, 23, 24]

    ctypes.memset(log, 0, ctypes.sizeof(log))
    count.value = 0
    theirs = ctypes.CDLL(str(fixture_library("init_fini")))
    theirs.set_log(log, ctypes.byref(count))
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(theirs._handle))
    assert ours == list(log)[: count.value]


# -------------------------------------------------------------------------------- counting references
# Constructors that note whether they were called in order, as main is, and with the stack as it has to be.
_MANY = """
#include <stdint.h>
#include <stdlib.h>
extern char **environ;
int calls, wrong;
static void note(int number, int argc, char **argv, char **envp, void *frame) {
    wrong += number != calls++ || argc < 1 || argv[argc] || envp != environ || (uintptr_t)frame % 16;
}
#define ONE(n) static __attribute__((constructor)) void c##n(int argc, char **argv, char **envp) { \\
    note(0##n, argc, argv, envp, __builtin_frame_address(0)); }
#define EIGHT(n) ONE(n##0) ONE(n##1) ONE(n##2) ONE(n##3) ONE(n##4) ONE(n##5) ONE(n##6) ONE(n##7)
#define ALL(n) EIGHT(n##0) EIGHT(n##1) EIGHT(n##2) EIGHT(n##3) EIGHT(n##4) EIGHT(n##5) EIGHT(n##6) EIGHT(n##7)
ALL(0) ALL(1) ALL(2) ALL(3)
"""


def test_hundreds_of_constructors(tmp_path: Path) -> None:
    path = tmp_path / "libmany.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-fno-omit-frame-pointer", "-xc", "-", "-o", str(path)]
    subprocess.run(command, input=_MANY, text=True, check=True)

    def counts(**options: Any) -> list[int]:
        with miniloader.load(path, **options) as library:
            return [ctypes.c_int.from_address(library.address(name)).value for name in ("calls", "wrong")]

    assert counts() == [256, 0]
    assert counts(on_event=lambda event: None) == [256, 0]  # each by itself


def mapped(path: Path) -> bool:
    return os.path.realpath(path) in Path("/proc/self/maps").read_text()


def test_a_library_stays_while_anybody_uses_it(
    fixture_library: Callable[[str], Path], in_child: InChild
) -> None:
    """c is bound to a's chain_who: so a stays until c goes, though b alone is held."""
    paths = [fixture_library(f"chain_{name}") for name in "abc"]

    def story(
        load: Callable[[Path], Any], close: Callable[[Any], None], call: Callable[[Any, str], int]
    ) -> Any:
        first, second, below = load(paths[0]), load(paths[0]), load(paths[1])
        close(first)
        told: list[Any] = [call(second, "chain_a")]
        close(second)
        told += [call(below, "chain_b"), call(below, "chain_winner"), [mapped(path) for path in paths]]
        close(below)
        return [*told, [mapped(path) for path in paths]]

    def ours() -> Any:
        return story(miniloader.load, lambda lib: lib.close(), lambda lib, name: lib.function(name)())

    def theirs() -> Any:
        dlclose = ctypes.CDLL(None).dlclose
        return story(
            lambda path: ctypes.CDLL(str(path)),
            lambda lib: dlclose(ctypes.c_void_p(lib._handle)),
            lambda lib, name: lib[name](),
        )

    told = in_child(ours)
    assert told == in_child(theirs)
    assert told == [123, 23, ord("a"), [True, True, True], [False, False, False]]


def test_a_library_that_is_closed_says_so(demo: Path) -> None:
    library = miniloader.load(demo)
    library.close()
    library.close()
    assert "closed" in repr(library)
    with pytest.raises(miniloader.LoadError, match="is closed"):
        library.address("demo_add")
    with pytest.raises(miniloader.LoadError, match="is closed"):
        _ = library.base


def test_a_cycle_goes_when_nobody_holds_it(fixture_library: Callable[[str], Path]) -> None:
    a, b = fixture_library("cycle_a"), fixture_library("cycle_b")
    first, second = miniloader.load(a), miniloader.load(b)
    first.close()
    assert mapped(a)
    assert mapped(b)
    second.close()
    assert not mapped(a)
    assert not mapped(b)
