"""Where a library is found by its name: as ld.so looks for it (glibc's ``elf/dl-load.c``), each step told.

:func:`places` is the whole search as a description, a pure function: which directories come by which rule,
for a name, for who needs it (:class:`Asker`) and in certain :class:`Surroundings`.  In this order:

1. ``DT_RPATH`` of who needs it, of who loaded that, and so on, then of the program; none of them where who
   needs it has a ``DT_RUNPATH``;
2. ``LD_LIBRARY_PATH``;
3. ``DT_RUNPATH`` of who needs it;
4. ``/etc/ld.so.cache``;
5. the default directories; of 4 and 5 those are left out where who needs it has ``DF_1_NODEFLIB``.

Where musl's dynamic linker looks is :func:`_places_of_musl`.

In each directory the sub-directories that suit the processor come first.  :func:`find` goes there and looks.
A process of our own, ``miniloader tree`` and ``miniloader check`` inside another root differ in nothing but
their surroundings: see :mod:`miniloader.loader.surroundings`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from miniloader.elf.dynamic import DF_1_NODEFLIB, DT_FLAGS_1
from miniloader.elf.layout import EHDR
from miniloader.files import NotRegularError
from miniloader.loader.ld_so_cache import CACHE, Cache
from miniloader.loader.musl import is_itself
from miniloader.loader.root import Root
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.elf.header import Header
    from miniloader.elf.image import ElfImage
    from miniloader.elf.source import Bytes

__all__ = ["Asker", "Found", "Machine", "Place", "Step", "Surroundings", "expand", "find", "fits", "places"]


@dataclass(frozen=True)
class Machine:
    """What a file has to be for: bits, ``<`` or ``>``, the number of the gABI's ``e_machine``."""

    elf_class: int
    order: str
    number: int

    @classmethod
    def of(cls, header: Header) -> Machine:
        """The machine that a file with this ``header`` is for."""
        number = EHDR.code("machine", f"EM_{header.machine}")
        return cls(header.elf_class, header.order, int(header.machine, 16) if number is None else number)


@dataclass(frozen=True)
class Asker:
    """A library, or the program, that needs others: its file, its paths as written, who loaded it.

    ``path`` is how its file was opened, with every link and every ``..``: ``$ORIGIN`` is the directory of
    that; only a program's is without links, since the kernel tells where it is.  ``rpath`` and ``runpath``
    are ``()`` without ``DT_RPATH`` and ``DT_RUNPATH``.  ``opened_in`` is where a relative ``path`` begins:
    the current directory when the file was opened, None where that is the one of now.
    """

    path: str
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    loader: Asker | None = None
    no_default: bool = False
    opened_in: str | None = None

    @classmethod
    def of(
        cls,
        image: ElfImage,
        loader: Asker | None = None,
        path: str | None = None,
        *,
        opened_in: str | None = None,
    ) -> Asker:
        """The asker that ``image`` is, opened as ``path``; :class:`ElfError` where a path cannot be read."""
        no_default = image.dynamic.flag(DT_FLAGS_1, DF_1_NODEFLIB)
        return cls(path or image.path, image.rpath, image.runpath, loader, no_default, opened_in)

    @property
    def origin(self) -> str:
        """What ``$ORIGIN`` stands for."""
        path = self.path
        if not path.startswith("/"):
            path = f"{(self.opened_in or os.getcwd()).rstrip('/')}/{path}"
        return path.rpartition("/")[0] or "/"

    def loaders(self) -> Iterator[Asker]:
        """The asker itself, who loaded it, who loaded that, and so on."""
        asker: Asker | None = self
        while asker is not None:
            yield asker
            asker = asker.loader


@dataclass(frozen=True, eq=False)
class Surroundings:
    """All that decides where a library is found, but for its name and who needs it.

    ``program`` is the program in whose process it happens (None: one without paths).  ``library_path`` is
    ``LD_LIBRARY_PATH``, split.  ``directories`` are the default ones, ``subdirectories`` those that suit the
    processor, best first (``glibc-hwcaps/x86-64-v3``), ``hwcaps`` their names as the cache has them.
    ``library_token`` and ``platform`` are what ``$LIB`` and ``$PLATFORM`` stand for, None where
    that is not known: a path with it is not searched.  ``musl`` is the path of musl's dynamic linker, where
    that one searches.  All paths are paths inside ``root``.
    """

    root: Root
    machine: Machine | None
    program: Asker | None = None
    library_path: tuple[str, ...] = ()
    cache: Cache | None = None
    directories: tuple[str, ...] = ()
    subdirectories: tuple[str, ...] = ()
    hwcaps: tuple[str, ...] = ()
    library_token: str | None = None
    platform: str | None = None
    musl: str | None = None


@dataclass(frozen=True)
class Place:
    """Where one rule has a library looked for: ``directories``, in order, or the file at ``path``.

    ``found_in`` is whose path it is: the library with the ``DT_RPATH`` or ``DT_RUNPATH``, the cache, or None.
    A directory ends with ``/``; the current one is "".
    """

    rule: str
    found_in: str | None
    directories: tuple[str, ...] = ()
    path: str | None = None


@dataclass(frozen=True)
class Step:
    """One file that was looked at: by which rule, whose path that is, and what the file was."""

    rule: str
    path: str
    outcome: str
    found_in: str | None = None

    @property
    def misfit(self) -> Literal["", "class", "machine"]:
        """Why a file that may fit another process does not fit: its word size, or its processor."""
        if self.outcome in _WRONG_CLASS:
            return "class"
        return "machine" if self.outcome == _OTHER_MACHINE else ""


@dataclass(frozen=True)
class Found:
    """The ``path`` found, ``None`` for none, after ``steps``.

    Where ``stopped``, the file at the last step ended the search: ld.so refuses it, and all that needs it.
    """

    name: str
    path: str | None
    steps: tuple[Step, ...]
    stopped: bool = False

    @property
    def refusal(self) -> str:
        """What dlerror(3) says of a search that found nothing.

        >>> Found("libz.so", None, (Step("path", "./libz.so", "not an ELF file"),), stopped=True).refusal
        './libz.so: invalid ELF header'
        """
        if self.stopped:
            return f"{self.steps[-1].path}: {_stopping(self.steps[-1].outcome)}"
        outcomes = [step.outcome for step in self.steps]
        other_class = next((_WRONG_CLASS[each] for each in outcomes if each in _WRONG_CLASS), None)
        if other_class is not None:
            return f"{self.name}: wrong ELF class: {other_class}"
        last = outcomes[-1] if outcomes and outcomes[-1] != _OTHER_MACHINE else os.strerror(errno.ENOENT)
        return f"{self.name}: cannot open shared object file: {last}"


# ------------------------------------------------------------------------------------- the description
def places(name: str, asker: Asker | None, surroundings: Surroundings) -> Iterator[Place]:
    """Where ``name`` is to be looked for when ``asker`` needs it (None: when nobody with a path does).

    >>> nowhere = Surroundings(Root("/"), None, directories=("/lib/",), library_token="lib64")
    >>> plugin = Asker("/opt/app/plugin.so", runpath=("$ORIGIN/../$LIB",))
    >>> [(place.rule, place.directories) for place in places("libz.so.1", plugin, nowhere)]
    [('DT_RUNPATH', ('/opt/app/../lib64/',)), ('default directory', ('/lib/',))]
    """
    if "/" in name:
        yield Place("path", None, (), name)
        return
    program = surroundings.program
    if surroundings.musl is not None:
        yield from _places_of_musl(name, asker, surroundings, surroundings.musl)
        return
    if asker is None or not asker.runpath:
        askers = list(asker.loaders()) if asker is not None else []
        if program is not None and program not in askers:
            askers.append(program)
        for holder in askers:
            if holder.rpath and not holder.runpath:
                yield Place("DT_RPATH", holder.path, _directories(holder.rpath, holder, surroundings))
    if surroundings.library_path:
        directories = _directories(surroundings.library_path, program, surroundings)
        yield Place("LD_LIBRARY_PATH", None, directories)
    if asker is not None and asker.runpath:
        yield Place("DT_RUNPATH", asker.path, _directories(asker.runpath, asker, surroundings))
    by_default = asker or program
    no_default = by_default is not None and by_default.no_default
    cached = surroundings.cache and surroundings.cache.best(name, surroundings.hwcaps)
    if cached and not (no_default and cached.startswith(surroundings.directories)):
        yield Place(CACHE, CACHE, path=cached)
    if not no_default:
        yield Place("default directory", None, surroundings.directories)


def _places_of_musl(
    name: str, asker: Asker | None, surroundings: Surroundings, interpreter: str
) -> Iterator[Place]:
    """Where musl looks: both kinds of path are one to it, and go for whatever a library needs in turn."""
    if is_itself(name):
        yield Place("path", None, path=interpreter)
        return
    if surroundings.library_path:
        yield Place("LD_LIBRARY_PATH", None, _directories(surroundings.library_path, None, surroundings))
    askers = list(asker.loaders()) if asker is not None else []
    if surroundings.program is not None and surroundings.program not in askers:
        askers.append(surroundings.program)
    for holder in askers:
        rule, path = ("DT_RUNPATH", holder.runpath) if holder.runpath else ("DT_RPATH", holder.rpath)
        if path:
            yield Place(rule, holder.path, _directories(path, holder, surroundings))
    yield Place("default directory", None, surroundings.directories)


_TOKEN: Final = r"\$(?:(ORIGIN|LIB|PLATFORM)(?![A-Za-z0-9_])|\{(ORIGIN|LIB|PLATFORM)\})"


def expand(text: str, asker: Asker | None, surroundings: Surroundings) -> str:
    """``text`` with ``$ORIGIN``, ``$LIB`` and ``$PLATFORM`` replaced (ld.so(8), "Dynamic string tokens").

    "" where one of them stands for nothing that is known.

    >>> expand("${ORIGIN}/../x", Asker("/opt/bin/../lib/a.so"), Surroundings(Root("/"), None))
    '/opt/bin/../lib/../x'
    """
    if "$" not in text:
        return text
    tokens = {token or braced for token, braced in re.findall(_TOKEN, text)}
    values = {token: _value(token, asker, surroundings) for token in tokens}
    if None in values.values():
        return ""
    return re.sub(_TOKEN, lambda match: values[match[1] or match[2]] or "", text)


def _value(token: str, asker: Asker | None, surroundings: Surroundings) -> str | None:
    if token == "ORIGIN":
        return asker.origin if asker is not None else None
    return surroundings.library_token if token == "LIB" else surroundings.platform


def _directories(texts: Sequence[str], asker: Asker | None, surroundings: Surroundings) -> tuple[str, ...]:
    """The directories of a path, each once; ``texts`` are its elements as written."""
    if tuple(texts) == ("",):
        return ()  # an empty path has no elements
    directories = []
    for text in texts:
        directory = expand(text, asker, surroundings)
        if directory:
            directories.append(directory.rstrip("/") + "/")
        elif not text:
            directories.append("")  # the current directory
    return tuple(dict.fromkeys(directories))


# --------------------------------------------------------------------------------------------- looking
def find(name: str, asker: Asker | None, surroundings: Surroundings) -> Found:
    """Look for ``name``, needed by ``asker``, as ld.so does in such ``surroundings``.

    >>> anywhere = Surroundings(Root("/"), None, directories=("/no/such/",))
    >>> [step.outcome for step in find("libz.so.1", None, anywhere).steps]
    ['No such file or directory']
    """
    steps: list[Step] = []
    for place in places(name, asker, surroundings):
        for outcome in _look(name, asker, place, surroundings, steps):
            if outcome == _FOUND:
                return Found(name, steps[-1].path, tuple(steps), False)
            if _stopping(outcome) is not None:
                return Found(name, None, tuple(steps), stopped=True)
    return Found(name, None, tuple(steps))


def _look(
    name: str, asker: Asker | None, place: Place, surroundings: Surroundings, steps: list[Step]
) -> Iterator[str]:
    """What each file is that a ``place`` leads to, noted in ``steps`` as well."""
    root = surroundings.root
    if place.path is not None:
        path = expand(place.path, asker, surroundings)
        outcome, _ = _judge(root, path, surroundings.machine)
        steps.append(Step(place.rule, path, outcome, place.found_in))
        yield outcome
        return
    for directory in place.directories:
        below = [each + "/" for each in surroundings.subdirectories if root.has_directory(directory + each)]
        number = 0
        for path in (f"{directory}{sub}{name}" for sub in [*below, ""]):
            outcome, number = _judge(root, path, surroundings.machine)
            steps.append(Step(place.rule, path, outcome, place.found_in))
            yield outcome
        # What is wrong in another way than not to be there ends this path, but not the search: open_path().
        if number not in _ABSENT and (not directory.startswith("/") or root.has_directory(directory)):
            return


_ABSENT: Final = (0, errno.ENOENT, errno.EACCES)
_HEADER: Final = {32: 52, 64: 64}  # bytes of an ELF header
_PROGRAM_HEADER: Final = {32: (42, 32), 64: (54, 56)}  # where e_phentsize is, and what it has to be
_FOUND: Final = "found"
#: What is passed over: by the class of the files that are wanted, and in ld.so's words the class it has.
_OTHER_CLASS: Final = {64: "for a 32-bit machine", 32: "for a 64-bit machine"}
_WRONG_CLASS: Final = {_OTHER_CLASS[64]: "ELFCLASS32", _OTHER_CLASS[32]: "ELFCLASS64"}
_OTHER_MACHINE: Final = "for another machine"
_SHORT, _NOT_ELF, _NO_LIBRARY = (
    "too short for an ELF file",
    "not an ELF file",
    "neither a library nor a program",
)
_DIRECTORY, _NO_FILE = "a directory", "not a regular file"
_UNREADABLE: Final = "not to be read: "
_ORDER, _PADDED = "in another byte order", "of an unknown form: e_ident does not end in zeros"
_ABI, _ABI_VERSION = "for another OS ABI", "for another version of the OS ABI"
_IDENT_VERSION, _VERSION = "of an unknown version (EI_VERSION)", "of an unknown version (e_version)"
_ENTRY_SIZE: Final = "of an unknown form: program headers of another size (e_phentsize)"
#: What ends a search: open_verify() refuses such a file, and with it whatever needs it, in these words.
_STOPPING: Final = {
    _SHORT: "file too short",
    _NOT_ELF: "invalid ELF header",
    _DIRECTORY: "cannot read file data: Is a directory",
    _NO_FILE: "file too short",
    _ORDER: "ELF file data encoding not little-endian",
    _IDENT_VERSION: "ELF file version ident does not match current one",
    _ABI: "ELF file OS ABI invalid",
    _ABI_VERSION: "ELF file ABI version invalid",
    _PADDED: "nonzero padding in e_ident",
    _VERSION: "ELF file version does not match current one",
    _NO_LIBRARY: "only ET_DYN and ET_EXEC can be loaded",
    _ENTRY_SIZE: "ELF file's phentsize not the expected size",
}
#: /dev/zero, full, random and urandom (Documentation/admin-guide/devices.txt), which never end.
_ENDLESS: Final = frozenset(os.makedev(1, minor) for minor in (5, 7, 8, 9))


def _stopping(outcome: str) -> str | None:
    """What ld.so says of a file that ends a search; None where it goes on."""
    if outcome.startswith(_UNREADABLE):
        return f"cannot read file data: {outcome.removeprefix(_UNREADABLE)}"
    return _STOPPING.get(outcome)


def _judge(root: Root, path: str, machine: Machine | None) -> tuple[str, int]:
    """What the file is to ld.so: ``found``, passed over, or refused; and why it cannot be opened (errno)."""
    try:
        fd = root.open(path)
    except NotRegularError as error:  # ld.so opens it, unless it is a socket, and cannot read it
        if error.kind == "a socket":
            return os.strerror(errno.ENXIO), errno.ENXIO
        if error.kind == "a character device" and error.device in _ENDLESS:
            return _NOT_ELF, 0
        return (_DIRECTORY if error.kind == _DIRECTORY else _NO_FILE), 0
    except OSError as error:
        return str(error.strerror), error.errno or errno.EINVAL
    except ValueError:  # a NUL in it
        return str(os.strerror(errno.ENOENT)), errno.ENOENT
    try:
        head = os.read(fd, 64)
    except OSError as error:  # of the medium, or /proc/PID/mem
        return f"{_UNREADABLE}{error.strerror}", 0
    finally:
        os.close(fd)
    return _judge_header(head, machine), 0


def fits(head: Bytes, machine: Machine | None) -> bool:
    """Whether ld.so takes a file for ``machine`` that begins with ``head``, its first 64 bytes."""
    return _judge_header(bytes(head), machine) == _FOUND


def _judge_header(head: bytes, machine: Machine | None) -> str:
    """The outcome for a file that begins with ``head``; its tests are in the order of open_verify()."""
    elf_class = machine.elf_class if machine is not None else 64
    if len(head) < _HEADER[elf_class]:
        return _SHORT
    place, _ = _PROGRAM_HEADER[elf_class]
    return _judge_fields(head[:24], head[place : place + 2], machine)


@lru_cache(maxsize=64)
def _judge_fields(head: bytes, entry: bytes, machine: Machine | None) -> str:
    """The outcome for a file that begins with ``head``, and whose program headers have the size ``entry``."""
    if head[:4] != b"\x7fELF":
        return _NOT_ELF
    if machine is None:
        return _FOUND
    if head[4] != machine.elf_class // 32:
        return _OTHER_CLASS[machine.elf_class]
    order: Literal["little", "big"] = "little" if machine.order == "<" else "big"
    _, size = _PROGRAM_HEADER[machine.elf_class]
    parts = head[16:18], head[18:20], head[20:24], entry
    kind, number, version, entry_size = (int.from_bytes(part, order) for part in parts)
    tests = (
        (head[5] != (1 if order == "little" else 2), _ORDER),
        (head[6] != 1, _IDENT_VERSION),
        (head[7] not in (0, 3), _ABI),
        (head[7] == 0 and head[8] != 0, _ABI_VERSION),
        (any(head[9:16]), _PADDED),
        (version != 1, _VERSION),
        (number != machine.number, _OTHER_MACHINE),
        (kind not in (2, 3), _NO_LIBRARY),  # ET_EXEC, ET_DYN
        (entry_size != size, _ENTRY_SIZE),
    )
    return next((outcome for is_so, outcome in tests if is_so), _FOUND)
