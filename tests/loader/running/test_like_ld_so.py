"""Small programs that ld.so and ours run side by side: what their libraries do, and what they are told."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import miniloader
from tests.loader.conftest import InChild

NOW, LAZY, GLOBAL = os.RTLD_NOW, os.RTLD_LAZY, os.RTLD_GLOBAL
Story = Callable[[], Any]


def made(path: Path, source: str, *options: str) -> None:
    """A library from C, or from C++ where the path's last part ends in ``xx.so``."""
    language, compiler = ("c++", "g++") if path.name.endswith("xx.so") else ("c", "gcc")
    command = [compiler, "-w", "-O1", "-shared", "-fPIC", "-x", language, "-", "-x", "none", *options]
    subprocess.run([*command, "-o", path.name], input=source, text=True, cwd=path.parent, check=True)


def call(handle: int, name: str) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(_ctypes.dlsym(handle, name))())


def is_mapped(name: str) -> bool:
    return f"/{name}" in Path("/proc/self/maps").read_text()


# --------------------------------------------------------------------------- what is closed, and stays
THREAD_LOCAL: Final = """
extern "C" int setenv(const char *, const char *, int);
struct Noted { int value; Noted() : value(3) {} ~Noted() { setenv("ENDED", "yes", 1); } };
thread_local Noted noted;
extern "C" int use() { return noted.value; }
"""


def of_threads() -> Any:
    """A library whose thread-local object begins as zeros, and is built when it is first used."""
    handle = _ctypes.dlopen("./localxx.so", NOW)
    used, closed, answers = threading.Event(), threading.Event(), list[Any]()

    def work() -> None:
        answers.append(call(handle, "use"))
        used.set()
        closed.wait()

    thread = threading.Thread(target=work)
    thread.start()
    used.wait()
    _ctypes.dlclose(handle)
    answers.append(is_mapped("localxx.so"))
    closed.set()
    thread.join()
    return answers


def held_for_ever() -> Any:
    """What is never unmapped may be closed more often than it was opened."""
    handle = _ctypes.dlopen("./stays.so", NOW)
    for _ in range(3):
        _ctypes.dlclose(handle)
    return [call(_ctypes.dlopen("./stays.so", NOW), "next"), is_mapped("stays.so")]


UNIQUE: Final = """
inline __attribute__((weak)) int &count() { static int value; return value; }
extern "C" int next() { return ++count(); }
"""


def unique() -> Any:
    """A unique symbol is one for all, dlsym(3) as well; who has it stays, and is finalised in its turn."""
    name, first, second = "_ZZ5countvE5value", *(_ctypes.dlopen(f"./{n}xx.so", NOW) for n in ("one", "two"))
    answers = [call(first, "next"), call(second, "next")]
    answers.append(_ctypes.dlsym(first, name) == _ctypes.dlsym(second, name))
    _ctypes.dlclose(first)
    _ctypes.dlclose(second)
    return [*answers, is_mapped("onexx.so"), is_mapped("twoxx.so")]


# -------------------------------------------------------------------------------- what is bound late
def global_since() -> Any:
    """A slot is bound late: to what has become global since the library was loaded, too."""
    handle = _ctypes.dlopen("./needy.so", LAZY)
    _ctypes.dlopen("./gives.so", NOW | GLOBAL)
    return call(handle, "ask")


STORIES: Final[dict[Story, list[tuple[str, str, list[str]]]]] = {
    of_threads: [("localxx.so", THREAD_LOCAL, [])],
    held_for_ever: [("stays.so", "static int n; int next(void) { return ++n; }", ["-Wl,-z,nodelete"])],
    unique: [("onexx.so", UNIQUE, []), ("twoxx.so", UNIQUE, [])],
    global_since: [
        ("needy.so", "int given(void); int ask(void) { return given(); }", ["-Wl,-z,lazy"]),
        ("gives.so", "int given(void) { return 5; }", []),
    ],
}


def _told(story: Story, directory: Path, by_us: bool) -> Any:
    os.chdir(directory)
    if not by_us:
        return story()
    with miniloader.importing(strict=True):
        return story()


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_as_ld_so(story: Story, in_child: InChild, tmp_path: Path) -> None:
    for name, source, options in STORIES[story]:
        made(tmp_path / name, source, *options)
    theirs = in_child(_told, story, tmp_path, False)
    assert in_child(_told, story, tmp_path, True) == theirs
    assert theirs
