"""Where a library is found by its name: as ld.so(8) looks for it, each step told.

In this order: ``DT_RPATH`` of who needs it and of who loaded that (when there is no ``DT_RUNPATH``),
``LD_LIBRARY_PATH``, ``DT_RUNPATH`` of who needs it, ``/etc/ld.so.cache``, the default directories.  In each
directory the ``glibc-hwcaps`` sub-directories that suit the processor come first.  ld.so itself is asked for
``LD_LIBRARY_PATH`` as it was at start-up and for the default directories (dlinfo(3), ``RTLD_DI_SERINFO``).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

from miniloader import elf
from miniloader.elf import ElfImage, Source, read_image
from miniloader.errors import ElfError, LoadError
from miniloader.kernel.cpuinfo import features
from miniloader.kernel.procfs import read_proc_file
from miniloader.loader.beside_glibc import host
from miniloader.loader.ld_so_cache import CACHE, cached
from miniloader.values import dataclass

__all__ = ["Asker", "Found", "Step", "find", "find_needed", "find_path", "inspect"]

_MACHINE: Final = {"x86_64": (2, 62), "aarch64": (2, 183), "i386": (1, 3), "riscv64": (2, 243)}

# The micro-architecture levels of the x86-64 psABI, by what /proc/cpuinfo calls their features.
_LEVELS: Final = (
    ("x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
    ("x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
    ("x86-64-v2", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"),
)


@dataclass(frozen=True)
class Asker:
    """A library that needs others: its file, its paths as written, and who loaded it."""

    path: str
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]
    loader: Asker | None = None


@dataclass(frozen=True)
class Step:
    """One place that was looked at: by which rule, the file there, and what it was."""

    rule: str
    path: str
    outcome: str


@dataclass(frozen=True)
class Found:
    """The ``path`` found, ``None`` for none, after ``steps``."""

    name: str
    path: str | None
    steps: tuple[Step, ...]


def find(name: str, asker: Asker | None = None) -> Found:
    """Look for ``name``, needed by ``asker`` (``None``: by the program itself), as ld.so does.

    >>> find("libz.so.1").path is not None
    True
    >>> [step.outcome for step in find("/no/such/libz.so.1").steps]
    ['No such file or directory']
    """
    if "/" in name:
        path = _expand(name, asker.path if asker else None)
        outcome = _judge(path)
        return Found(name, path if outcome == "found" else None, (Step("path", path, outcome),))
    steps: list[Step] = []
    for rule, path in _candidates(name, asker):
        outcome = _judge(path)
        steps.append(Step(rule, path, outcome))
        if outcome == "found":
            return Found(name, path, tuple(steps))
    return Found(name, None, tuple(steps))


def find_path(path: str | os.PathLike[str]) -> str:
    """``path`` itself when it has a slash; a bare name as :func:`find` finds it, else in this directory.

    Raises :class:`LoadError` when there is neither.

    >>> find_path("./libany.so")
    './libany.so'
    """
    name = os.fspath(path)
    if "/" in name:
        return name
    found = find(name).path
    if found is not None:
        return found
    if os.path.exists(name):
        return os.path.join(os.curdir, name)
    raise LoadError(f"{name}: no library of that name where the system looks for one", hint="give its path")


def inspect(path: str | os.PathLike[str] | Source) -> ElfImage:
    """Read the shared object ``path`` (a bare name is searched as :func:`find_path` does): nothing is mapped,
    nothing is run, any machine will do.

    Raises :class:`ElfError` when the file is no ELF shared object or its headers make no sense; what else
    is wrong with it :func:`miniloader.elf.checks.problems_of` lists.
    """
    return elf.inspect(path if isinstance(path, Source) else find_path(path))


def find_needed(image: ElfImage) -> list[tuple[str, Found]]:
    """Who needs what, and where it is found: for ``image`` and for all that it needs, breadth first.

    Nothing is loaded.  A name is looked for once, for the first that needs it, as ld.so does; what cannot be
    read is not gone into.
    """
    found: dict[str, tuple[str, Found]] = {}
    libraries = [(image, _asker(image))]
    for library, asker in libraries:  # grows meanwhile
        for name in library.needed:
            if name in found:
                continue
            answer = find(name, asker)
            found[name] = (library.path, answer)
            if answer.path is not None:
                try:
                    needed = read_image(Source.open(answer.path))
                except ElfError:
                    continue
                libraries.append((needed, _asker(needed, asker)))
    return list(found.values())


def _asker(image: ElfImage, needed_by: Asker | None = None) -> Asker:
    return Asker(image.path, image.rpath, image.runpath, needed_by)


def _candidates(name: str, asker: Asker | None) -> Iterator[tuple[str, str]]:
    directories: list[tuple[str, str]] = []
    if asker is not None and not asker.runpath:
        above: Asker | None = asker
        while above is not None:
            if not above.runpath:
                directories += (("DT_RPATH", _expand(part, above.path)) for part in above.rpath)
            above = above.loader
    directories += (("LD_LIBRARY_PATH", part) for part in _library_path())
    if asker is not None:
        directories += (("DT_RUNPATH", _expand(part, asker.path)) for part in asker.runpath)
    yield from _in_directories(name, directories)
    for path in cached(name, _hwcaps()):
        yield CACHE, path
    yield from _in_directories(name, [("default directory", part) for part in _default_directories()])


def _in_directories(name: str, directories: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for rule, directory in directories:
        parent = directory or os.curdir  # an empty element is the current directory, ld.so(8)
        if os.path.isdir(os.path.join(parent, "glibc-hwcaps")):
            for level in _hwcaps():
                yield rule, os.path.join(parent, "glibc-hwcaps", level, name)
        yield rule, os.path.join(parent, name)


def _judge(path: str) -> str:
    """``found`` when the file is an ELF file for this machine; ld.so passes the others over."""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError as error:
        return str(error.strerror)
    expected = _MACHINE.get(platform.machine())
    if head[:4] != b"\x7fELF":
        return "not an ELF file"
    machine = int.from_bytes(head[18:20], "little" if head[5:6] == b"\1" else "big")
    if expected is not None and (head[4], machine) != expected:
        return "for another machine"
    return "found"


_TOKEN: Final = re.compile(r"\$(?:(ORIGIN|LIB|PLATFORM)\b|\{(ORIGIN|LIB|PLATFORM)\})")


def _expand(text: str, origin_of: str | None) -> str:
    """``$ORIGIN``, ``$LIB`` and ``$PLATFORM`` replaced (ld.so(8), "Dynamic string tokens")."""

    def value(match: re.Match[str]) -> str:
        token = match[1] or match[2]
        if token == "ORIGIN":
            return os.path.dirname(os.path.abspath(origin_of)) if origin_of else os.getcwd()
        return _lib() if token == "LIB" else platform.machine()

    return _TOKEN.sub(value, text)


@lru_cache(maxsize=1)
def _lib() -> str:
    """What ``$LIB`` stands for: the part of the first default directory after the root."""
    first = next(iter(_default_directories()), "/lib64")
    return first.removeprefix("/usr").removeprefix("/")


class _Serpath(ctypes.Structure):
    """``Dl_serpath``."""

    _fields_ = (("name", ctypes.c_char_p), ("flags", ctypes.c_uint))


@lru_cache(maxsize=1)
def _library_path() -> tuple[str, ...]:
    """``LD_LIBRARY_PATH`` as it was when the program started, which is what ld.so goes by."""
    entries = read_proc_file("/proc/self/environ").split(b"\0")
    value = next((entry[16:] for entry in entries if entry.startswith(b"LD_LIBRARY_PATH=")), b"")
    return tuple(re.split("[:;]", os.fsdecode(value))) if value else ()


@lru_cache(maxsize=1)
def _default_directories() -> tuple[str, ...]:
    """Where ld.so looks last: what it says of libc's search path, but for what it was given."""
    handle = host.open_host("libc.so.6", load=True)
    assert handle is not None
    size_and_count = (ctypes.c_size_t * 2)()
    host.information(handle, host.RTLD_DI_SERINFOSIZE, ctypes.addressof(size_and_count))
    room = ctypes.create_string_buffer(size_and_count[0])
    ctypes.memmove(room, size_and_count, ctypes.sizeof(size_and_count))
    host.information(handle, host.RTLD_DI_SERINFO, ctypes.addressof(room))
    paths = (_Serpath * (size_and_count[1] & 0xFFFFFFFF)).from_buffer(room, ctypes.sizeof(size_and_count))
    given = (*_library_path(), *(_expand(part, "/proc/self/exe") for part in host.libraries()[0].rpath))
    return tuple(path for path in (os.fsdecode(row.name or b"") for row in paths) if path not in given)


@lru_cache(maxsize=1)
def _hwcaps() -> tuple[str, ...]:
    """The ``glibc-hwcaps`` sub-directories for this processor, best first."""
    if platform.machine() != "x86_64":
        return ()
    processor = features() or frozenset()
    names: list[str] = []
    for level, needs in reversed(_LEVELS):  # each level includes the ones before it
        if not processor.issuperset(needs.split()):
            break
        names.insert(0, level)
    return tuple(names)
