"""What ld.so searches in: this process, or a program or library in a root, which may be another machine's.

Which directories are searched last ld.so was built with: they are read out of its file, where they stand one
behind the other (``system_dirs`` of glibc's ``elf/dl-load.c``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import compress, product
from typing import TYPE_CHECKING, Final

from miniloader import elf
from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.header import Header
from miniloader.errors import ElfError, LoadError
from miniloader.forking import importing
from miniloader.kernel.cpuinfo import features, vendor
from miniloader.kernel.procfs import read_proc_file, require_proc
from miniloader.loader import musl
from miniloader.loader.ld_so_cache import CACHE, Cache, read_cache
from miniloader.loader.root import Root
from miniloader.loader.search import Asker, Found, Machine, Surroundings, find
from miniloader.native import gate
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.loader.beside_glibc.host import HostListing
    from miniloader.loader.copies import Copies

__all__ = [
    "NeedFound",
    "find_here",
    "find_needed",
    "find_path",
    "inspect",
    "interpreter_for",
    "look_at_process",
    "of_process",
    "of_root",
    "own_machine",
]

_LINUX: Final = "/lib/ld-linux"
#: The interpreters of glibc, for files that name none: libraries.  Source: glibc's ``shlib-versions``.
_INTERPRETERS: Final = {
    ("X86_64", 64): "/lib64/ld-linux-x86-64.so.2",
    ("AARCH64", 64): f"{_LINUX}-aarch64.so.1",
    ("386", 32): f"{_LINUX}.so.2",
    ("ARM", 32): f"{_LINUX}-armhf.so.3",
    ("PPC64", 64): "/lib64/ld64.so.2",
    ("RISCV", 64): f"{_LINUX}-riscv64-lp64d.so.1",
    ("S390", 64): "/lib/ld64.so.1",
}
_PRINTABLE: Final = bytes(range(0x21, 0x7F))
_DIRECTORIES: Final = ("/lib64/", "/usr/lib64/", "/lib/", "/usr/lib/")  # where there is no ld.so to be asked
_LARGEST: Final = 1 << 24  # bytes of an ld.so; glibc's is 200 kB
_PSEUDO_HWCAP: Final = b"\0tls\0"  # of the legacy hwcaps, which glibc 2.37 has given up

# The micro-architecture levels of the x86-64 psABI, by what /proc/cpuinfo calls their features.
_LEVELS: Final = (
    ("x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
    ("x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
    ("x86-64-v2", "cmov cx16 cx8 lahf_lm popcnt pni sse2 sse4_1 sse4_2 ssse3"),
)
# What GLIBC_TUNABLES can keep ld.so from using of them (glibc's cpu-tunables.c), by what the kernel calls it.
_TUNABLE: Final = {
    "AVX": "avx", "AVX2": "avx2", "AVX512BW": "avx512bw", "AVX512CD": "avx512cd", "AVX512DQ": "avx512dq",
    "AVX512ER": "avx512er", "AVX512F": "avx512f", "AVX512PF": "avx512pf", "AVX512VL": "avx512vl",
    "BMI1": "bmi1", "BMI2": "bmi2", "CMOV": "cmov", "CX8": "cx8", "FMA": "fma", "LZCNT": "abm",
    "MOVBE": "movbe", "OSXSAVE": "xsave", "POPCNT": "popcnt", "SSE2": "sse2", "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2", "SSSE3": "ssse3",
}  # fmt: skip
# What glibc calls Intel's processors with these (cpu-features.c), instead of what the kernel calls them.
_HASWELL: Final = frozenset("avx2 bmi1 bmi2 abm movbe popcnt fma".split())
_OF_CPU: Final = b"glibc.cpu.hwcaps="
_AVX512_1: Final = frozenset("avx512cd avx512bw avx512dq avx512vl".split())


# ------------------------------------------------------------------------------------ this process
def of_process() -> Surroundings:
    """What ld.so of this process searches in, with ``LD_LIBRARY_PATH`` as it was when the program started."""
    cache = _own_cache()
    last = next(iter(_last_surroundings), None)  # read once: another thread may renew it meanwhile
    if last is None or last.cache is not cache:
        header, asker, interpreter = _program()
        last = _surroundings(Root("/"), header, interpreter, asker, _library_path(), cache)
        _last_surroundings[:] = [last]
    return last


_last_surroundings: list[Surroundings] = []


@lru_cache(maxsize=1)
def _program() -> tuple[Header, Asker, str]:
    """The program of this process: its header, what it searches along, and its interpreter."""
    require_proc()
    image = read_image(Source.open("/proc/self/exe"))
    try:
        asker = Asker.of(image, path=os.path.realpath("/proc/self/exe"))
        return image.header, asker, interpreter_for(image) or ""
    finally:
        image.source.close()


@lru_cache(maxsize=1)
def own_machine() -> Machine:
    """What files have to be for to be loaded into this process."""
    return Machine.of(_program()[0])


@lru_cache(maxsize=1)
def _library_path() -> tuple[str, ...]:
    """``LD_LIBRARY_PATH`` as it was when the program started, which is what ld.so goes by."""
    return split_library_path(os.fsdecode(next(_at_start(b"LD_LIBRARY_PATH="), b"")))


def _at_start(variable: bytes) -> Iterator[bytes]:
    """The values of a variable of the environment as it was when the program started."""
    entries = _environment().split(b"\0")
    return (entry.removeprefix(variable) for entry in entries if entry.startswith(variable))


@lru_cache(maxsize=1)
def _environment() -> bytes:
    """The environment as it was when the program started."""
    return read_proc_file("/proc/self/environ")


def look_at_process() -> None:
    """Learn of this process what only ``/proc`` tells, while the program can read that.

    One that has become another user, or has another root, cannot, and goes on opening libraries.
    """
    _program()
    _environment()


def split_library_path(value: str) -> tuple[str, ...]:
    """The elements of ``LD_LIBRARY_PATH``.

    >>> split_library_path("/opt/lib:;lib"), split_library_path("")
    (('/opt/lib', '', 'lib'), ())
    """
    return tuple(re.split("[:;]", value)) if value else ()


_last_cache: list[tuple[object, Cache | None]] = []


def _own_cache() -> Cache | None:
    """The cache of this machine, read once for as long as it is the same file."""
    try:
        status = os.stat(CACHE)
    except OSError:
        return None
    stamp = (status.st_mtime_ns, status.st_ino)
    if not _last_cache or _last_cache[0][0] != stamp:
        machine = own_machine()
        _last_cache[:] = [(stamp, read_cache(CACHE, machine.number, machine.order))]
    return _last_cache[0][1]


# ------------------------------------------------------------------------------------------ a root
def of_root(
    root: Root,
    image: ElfImage,
    library_path: tuple[str, ...] = (),
    *,
    hwcaps: bool = False,
    program: Asker | None = None,
) -> Surroundings:
    """What ld.so would search in for ``image``, a program or a library that lies in ``root``.

    With ``hwcaps`` the sub-directories that suit this machine's processor are searched as well.
    """
    machine = Machine.of(image.header)
    try:
        cache = read_cache(root.outside(CACHE), machine.number, machine.order)
    except OSError:
        cache = None
    interpreter = interpreter_for(image) or ""
    return _surroundings(root, image.header, interpreter, program, library_path, cache, hwcaps=hwcaps)


def interpreter_for(image: ElfImage) -> str | None:
    """The ld.so that a program names, or that loads libraries of its machine; None for a static program.

    >>> interpreter_for(read_image(Source.open("/proc/self/exe"))) is not None
    True
    """
    if image.interpreter is not None:
        return image.interpreter
    if image.header.type == "EXEC" or not image.needed:
        return None
    machine, elf_class = image.header.machine, image.header.elf_class
    of_musl = musl.interpreter_of(machine, elf_class, image.needed)
    return of_musl or _INTERPRETERS.get((machine, elf_class))


def _surroundings(
    root: Root,
    header: Header,
    interpreter: str,
    program: Asker | None,
    library_path: tuple[str, ...],
    cache: Cache | None,
    *,
    hwcaps: bool = True,
) -> Surroundings:
    machine = Machine.of(header)
    if musl.is_musl(interpreter):
        directories = musl.default_directories(root, interpreter)
        return Surroundings(root, machine, program, library_path, directories=directories, musl=interpreter)
    directories, has_legacy = _built_in(root, interpreter)
    name = header.machine.lower()
    levels = _hwcaps() if hwcaps and name == gate.processor() else ()
    subdirectories = tuple(f"glibc-hwcaps/{level}" for level in levels)
    if hwcaps and has_legacy and name == gate.processor():
        subdirectories += _legacy_subdirectories()
    return Surroundings(
        root,
        machine,
        program,
        library_path,
        cache,
        directories,
        subdirectories,
        hwcaps=levels,
        library_token=directories[0].strip("/").removeprefix("usr/"),
        platform=_platform(name),
    )


def _built_in(root: Root, interpreter: str) -> tuple[tuple[str, ...], bool]:
    """The default directories of the ld.so at ``interpreter``; whether it knows the legacy hwcaps."""
    try:
        path = root.outside(interpreter)
        status = os.stat(path)
    except (OSError, ValueError):
        return _DIRECTORIES, False
    return _read_built_in(path, (status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=8)
def _read_built_in(path: str, _stamp: tuple[int, int]) -> tuple[tuple[str, ...], bool]:
    try:
        source = Source.open(path)
        data = bytes(source.read(0, min(source.size, _LARGEST), "ld.so"))
        source.close()
    except ElfError:
        return _DIRECTORIES, False
    directories = tuple(os.fsdecode(directories_in(data)).split("\0")[:-1]) or _DIRECTORIES
    return directories, _PSEUDO_HWCAP in data


def directories_in(data: bytes) -> bytes:
    """The longest row of directories, each with a NUL behind it.

    Only what is before a slash and a NUL is looked at: one expression for all would take as long as all
    else that a first load does.

    >>> directories_in(b"no /x/\\0 of /lib64/\\0/usr/lib64/\\0/lib\\0")
    b'/lib64/\\x00/usr/lib64/\\x00'
    """
    first, last, start, end = 0, 0, 0, 0
    at = data.find(b"/\0")
    while at >= 0:
        string = data.rfind(b"\0", 0, at) + 1
        printable = string + len(data[string:at].rstrip(_PRINTABLE))
        slash = data.find(b"/", printable, at)
        if slash >= 0:
            start, end = start if slash == end else slash, at + 2
            first, last = (start, end) if end - start > last - first else (first, last)
        at = data.find(b"/\0", at + 1)
    return data[first:last]


@lru_cache(maxsize=1)
def _usable() -> frozenset[str]:
    """The features of this processor that ld.so of this process uses."""
    # Until 2.38 glibc cuts the variable at its colons, where it lies.
    tunables = [*_at_start(b"GLIBC_TUNABLES="), *map(_OF_CPU.__add__, _at_start(_OF_CPU))]
    return (features() or frozenset()) - left_out_by(os.fsdecode(b":".join(tunables)))


def left_out_by(tunables: str) -> frozenset[str]:
    """The features of a processor that glibc does not use with these ``GLIBC_TUNABLES``.

    >>> sorted(left_out_by("glibc.malloc.check=1:glibc.cpu.hwcaps=-AVX2,-LZCNT,Prefer_ERMS,-SSE9"))
    ['abm', 'avx2']
    """
    given = [each.partition("=") for each in tunables.split(":")]
    last = [value for name, _, value in given if name == os.fsdecode(_OF_CPU[:-1])][-1:]
    switched_off = [name[1:] for value in last for name in value.split(",") if name.startswith("-")]
    return frozenset(_TUNABLE[name] for name in switched_off if name in _TUNABLE)


@lru_cache(maxsize=1)
def _hwcaps() -> tuple[str, ...]:
    """The ``glibc-hwcaps`` sub-directories for this processor, best first."""
    if gate.processor() != "x86_64":
        return ()
    processor = _usable()
    names: list[str] = []
    for level, needs in reversed(_LEVELS):  # each level includes the ones before it
        if not processor.issuperset(needs.split()):
            break
        names.insert(0, level)
    return tuple(names)


def _platform(machine: str) -> str:
    """What ``$PLATFORM`` stands for: the kernel's AT_PLATFORM, but for some processors that glibc names."""
    processor = _usable()
    if machine == "x86_64" and vendor() == "GenuineIntel" and processor >= _HASWELL:
        return "xeon_phi" if {"avx512cd", "avx512er", "avx512pf"} <= processor else "haswell"
    return machine


@lru_cache(maxsize=1)
def _legacy_subdirectories() -> tuple[str, ...]:
    """The sub-directories of before ``glibc-hwcaps`` on x86-64: each choice of some names, best first."""
    if gate.processor() != "x86_64":
        return ()
    processor = _usable() if vendor() == "GenuineIntel" else frozenset()
    avx512 = ["avx512_1"] if processor >= _AVX512_1 else []
    names = ["tls", _platform("x86_64"), *avx512, "x86_64"]
    chosen = ("/".join(compress(names, choice)) for choice in product((True, False), repeat=len(names)))
    return tuple(filter(None, dict.fromkeys(chosen)))


# ------------------------------------------------------------------------- by name, in this process
def find_here(name: str, asker: Asker | None = None) -> Found:
    """Look for ``name``, needed by ``asker``, as ld.so of this process does.

    >>> find_here("libz.so.1").path is not None
    True
    >>> [step.outcome for step in find_here("/no/such/libz.so.1").steps]
    ['No such file or directory']
    """
    return find(name, asker, of_process())


def find_path(path: str | os.PathLike[str]) -> str:
    """``path`` itself when it has a slash; a bare name as :func:`find_here` finds it, else in this directory.

    Raises :class:`LoadError` when there is neither.

    >>> find_path("./libany.so")
    './libany.so'
    """
    name = os.fspath(path)
    if "/" in name:
        return name
    found = find_here(name).path
    if found is not None:
        return found
    if os.path.exists(name) or os.path.exists(name[: name.find("(")]):  # or a member of an archive
        return os.path.join(os.curdir, name)
    with importing:
        from miniloader.suggestions import offered
    meant = offered(_called_like(name)) or "give its path"
    raise LoadError(f"{name}: no library of that name where the system looks for one", hint=meant)


def _called_like(name: str) -> list[str]:
    """Libraries of the system that somebody may mean by ``name``: ``z``, ``libz``, ``zlib``, ``libz.so``."""
    cache, by_stem = _own_cache(), dict[str, list[str]]()
    for library in cache.names() if cache is not None else ():
        by_stem.setdefault(_stem(library), []).append(library)
    with importing:
        from miniloader.suggestions import near
    stems = [_stem(name)] if _stem(name) in by_stem else near(_stem(name), by_stem)
    return [library for stem in stems for library in _of_programs(by_stem[stem])]


def _of_programs(names: list[str]) -> list[str]:
    """Without the names for linking, such as ``libz.so``, where there are those that programs need."""
    return [name for name in names if not name.endswith(".so")] or names


def _stem(name: str) -> str:
    """What is left of a library's name without what they all have.

    >>> _stem("libz.so.1"), _stem("zlib"), _stem("libstdc++.so")
    ('z', 'z', 'stdc++')
    """
    return name.lower().partition(".so")[0].removeprefix("lib").removesuffix("lib")


def inspect(path: str | os.PathLike[str] | Source) -> ElfImage:
    """Read the ELF file ``path``: a library (a bare name is searched as :func:`find_path` does), a program,
    an object file, a core dump; ``libx.a(member.o)`` is a member of an archive.  Nothing is mapped,
    nothing is run, any machine will do.

    Raises :class:`ElfError` when the file is no ELF file or its headers make no sense; what else is wrong
    with a library :func:`miniloader.elf.checks.problems_of` lists.
    """
    return elf.inspect(path if isinstance(path, Source) else find_path(path))


@dataclass(frozen=True)
class NeedFound:
    """What is ``found`` for a name that the library ``needed_by`` needs; ``copies`` where another is used."""

    needed_by: str
    found: Found
    copies: Copies | None


def find_needed(image: ElfImage, present: HostListing | None = None) -> list[NeedFound]:
    """Who needs what, and where it is found: for ``image`` and for all that it needs, breadth first.

    Nothing is loaded.  A name is looked for once, for the first that needs it, as ld.so does; what cannot be
    read is not gone into.  Of what a process has ``present`` a load there takes that instead.
    """
    with importing:
        from miniloader.loader.copies import copies_of

    answers: dict[str, NeedFound] = {}
    surroundings = of_process()
    if present is not None and Machine.of(image.header) != surroundings.machine:
        present = None
    libraries = [(image, Asker.of(image))]
    for library, asker in libraries:  # grows meanwhile
        for name in library.needed:
            if name in answers:
                continue
            found, own = find(name, asker, surroundings), present.called(name) if present else None
            copies = copies_of(name, own, found.path) if own is not None else None
            answers[name] = NeedFound(library.path, found, copies)
            if found.path is not None and copies is None:
                try:
                    needed = read_image(Source.open(found.path))
                    libraries.append((needed, Asker.of(needed, asker)))
                except ElfError:
                    continue
    return list(answers.values())
