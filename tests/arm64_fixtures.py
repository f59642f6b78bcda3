"""Loads fixtures, by us and by dlopen(3), each in a child: both do, or none, and functions answer alike.

What ``check`` says of each, inside this process's program, must be what dlopen does with it, too.

``tools/arm64 --test`` runs it on an aarch64 kernel, where there is no compiler and pytest would take long.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator

import miniloader
from fixtures.build import FIXTURES, FixtureError, build
from miniloader.lab.check.check import Checker
from miniloader.loader.from_inside.words import words_of

#: A fixture, a function of it, its argument, and what it returns.
CALLS = (
    ("asks_itself", "ask", None, ctypes.c_char_p),
    ("cxx", "throw_and_catch", 5, ctypes.c_int),
    ("cxx_static_unwinder", "throw_and_catch", 5, ctypes.c_int),
    ("cxx_static", "throw_and_catch", 5, ctypes.c_int),
    ("tls_general", "tls_next", None, ctypes.c_int),
    ("tls_local", "tls_next", None, ctypes.c_int),
    ("tls_descriptors", "tls_next", None, ctypes.c_int),
    ("lazy", "call_own", 6, ctypes.c_int),
    *(("ifunc_given", "resolver_given", index, ctypes.c_ulong) for index in range(6)),
)


def ours(name: str, function: str, argument: int | None, restype: type, bind: str) -> object:
    library = miniloader.load(build(name), bind=bind)
    given = [] if argument is None else [argument]
    return library.function(function, restype, [ctypes.c_int] * len(given))(*given)


def theirs(name: str, function: str, argument: int | None, restype: type) -> object:
    called = ctypes.CDLL(str(build(name)))[function]
    called.restype = restype
    return called(*[] if argument is None else [argument])


def load_any(path: str) -> object:
    """Load what dlopen would, too."""
    return miniloader.load(path, text_relocations=True, executable_stack=True)


def opened(load: Callable[[str], object], name: str) -> object:
    """Whether a fixture loads, or in which words it is refused."""
    try:
        load(str(build(name)))
    except OSError as error:
        return f"refused: {error}"
    except miniloader.MiniloaderError as error:
        return f"refused: {words_of(error)}"
    return "loads"


def compare_verdicts() -> Iterator[str]:
    """Fixtures that load, or are refused, not as dlopen says it, or that ``check`` says something else of."""
    checker = Checker(within=os.path.realpath(sys.executable))
    for name in FIXTURES:
        try:
            path = build(name)
        except FixtureError:  # no cross compiler makes it
            continue
        said = str(in_child(opened, ctypes.CDLL, name))
        if said.startswith("died"):  # a resolver that calls what is not bound yet: on x86-64 it comes last
            continue
        ours = str(in_child(opened, load_any, name))
        if said != ours:
            yield f"{name}: dlopen: {said}; miniloader: {ours}"
        checked = checker.check(path)
        if checked.loads != (said == "loads"):
            yield f"{name}: dlopen: {said}; check: {[problem.kind for problem in checked.problems]}"


def guarded(name: str, load: Callable[[str], object]) -> object:
    """The kernel's flags of the mappings of code of a fixture: ``bt`` is BTI."""
    path = str(build(name))
    kept = load(path)
    with open("/proc/self/smaps", encoding="ascii") as file:
        sections = re.split(r"(?m)^(?=[0-9a-f]+-)", file.read())
    flags = [text.rsplit("VmFlags: ", 1)[1].split() for text in sections if path in text.partition("\n")[0]]
    del kept
    return [sorted(words) for words in flags if "ex" in words]


def in_child(function: Callable[..., object], *arguments: object) -> object:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function(*arguments)
        except Exception as error:  # noqa: BLE001 - compared, whatever it is
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, pickle.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(message) if message else f"died, status {status}"


def main() -> int:
    different = 0
    for call in CALLS:
        expected = in_child(theirs, *call)
        for bind in ("now", "lazy"):
            answer = in_child(ours, *call, bind)
            different += answer != expected
            print("alike" if answer == expected else f"{answer!r} instead of {expected!r}", bind, *call[:2])
    for name in ("demo", "demo_guarded"):
        expected, answer = in_child(guarded, name, ctypes.CDLL), in_child(guarded, name, miniloader.load)
        different += answer != expected or not answer
        print("alike" if answer == expected else f"{answer!r} instead of {expected!r}", "flags of code", name)
        print(" ", expected)
    verdicts = list(compare_verdicts())
    print(*verdicts, f"{len(verdicts)} other verdicts than dlopen's", sep="\n")
    return int(different + len(verdicts) > 0)


if __name__ == "__main__":
    sys.exit(main())
