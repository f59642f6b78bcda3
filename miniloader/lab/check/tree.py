"""What a program or a library needs, and what that needs: where ld.so finds it, and why there.

The walk is that of glibc's ``_dl_map_object_deps``, the search :func:`miniloader.loader.search.find`; but
files are only read, and what is missing, or cannot be read, is noted and not gone into.  So it works for any
machine and inside any root: see :class:`Tree` for what comes of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final

from miniloader.elf.dynamic import DF_1_PIE, DT_AUXILIARY, DT_FILTER, DT_FLAGS_1, DT_NEEDED
from miniloader.elf.header import Header
from miniloader.elf.image import ElfImage, read_image
from miniloader.elf.kinds.file_kind import refuse_unlinked
from miniloader.elf.source import Source, unreadable
from miniloader.errors import ElfError, LoadError, UsageError
from miniloader.forking import cached_property
from miniloader.loader.root import Root
from miniloader.loader.search import Asker, Found, Step, Surroundings, expand, find
from miniloader.loader.surroundings import interpreter_for, of_root, split_library_path
from miniloader.values import dataclass

__all__ = ["Dependency", "Description", "Files", "Need", "Tree", "tree"]

#: What JSON calls the rules of a search.
FOUND_BY: Final = {
    "path": "path",
    "DT_RPATH": "rpath",
    "DT_RUNPATH": "runpath",
    "LD_LIBRARY_PATH": "LD_LIBRARY_PATH",
    "/etc/ld.so.cache": "cache",
    "default directory": "default",
}
_LOADED: Final = "loaded"
_ITSELF, _INTERPRETER = -1, -2  # where a name leads to that is no library of the tree, or not yet
_MOST_STEPS: Final = 100_000  # files looked at for one tree
_KINDS: Final = {DT_NEEDED: "needed", DT_AUXILIARY: "auxiliary", DT_FILTER: "filter"}
_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Description:
    """What a file says of who it is and what it needs.

    ``needs`` are the kind (needed, auxiliary, filter) and name of each, in order; ``versions`` those it
    needs, by the name of the library that has to define them.
    """

    header: Header
    soname: str | None
    needs: tuple[tuple[str, str], ...]
    asker: Asker
    versions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Need:
    """A need: the file at ``needed_by`` needs ``name``, and gets one of :attr:`Tree.libraries` for it.

    ``library`` is -1 for the file itself; ``kind`` is needed, auxiliary or filter.
    """

    needed_by: str
    name: str
    kind: str
    library: int


@dataclass(frozen=True)
class Dependency:
    """A library of a tree, or the name of one that is missing: then ``path`` is None.

    ``name`` is what it was first asked for by, ``needed_by`` are the paths of all who need it.  ``found_by``
    is one of path, rpath, runpath, LD_LIBRARY_PATH, cache, default, loaded (ld.so itself, which is there
    before) or None; ``found_in`` whose path or which cache that was.  ``versions`` are all that is needed of
    it, sorted.  ``searched`` is every file that was looked at, up to the one found.  ``fault`` says what is
    wrong with the file: ld.so stops at it.  All paths are paths inside the root.
    """

    name: str
    path: str | None
    found_by: str | None
    found_in: str | None
    needed_by: tuple[str, ...]
    versions: tuple[str, ...]
    searched: tuple[Step, ...]
    fault: str | None = None
    description: Description | None = None
    optional: bool = False

    @property
    def is_missing(self) -> bool:
        """Whether ld.so would end at it: it is not there, or cannot be read."""
        return (self.path is None or self.fault is not None) and not self.optional


@dataclass(frozen=True, eq=False)
class Tree:
    """What ``path`` needs: its ``libraries``, breadth first as ld.so loads them, each once, without itself.

    ``interpreter`` is the ld.so that a program names, ``surroundings`` what was searched in.  ``needs`` has a
    row for each ``DT_NEEDED`` of each file, in order.
    """

    path: str
    interpreter: str | None
    description: Description
    libraries: tuple[Dependency, ...]
    needs: tuple[Need, ...]
    surroundings: Surroundings

    @property
    def missing(self) -> tuple[Dependency, ...]:
        """The libraries without which it does not load."""
        return tuple(library for library in self.libraries if library.is_missing)

    @cached_property
    def needs_of(self) -> Mapping[str, tuple[Need, ...]]:
        """The needs of each file, by its path."""
        by_path: dict[str, list[Need]] = {}
        for need in self.needs:
            by_path.setdefault(need.needed_by, []).append(need)
        return {path: tuple(needs) for path, needs in by_path.items()}

    def who_needs(self, name: str) -> tuple[Dependency, ...]:
        """The libraries that ``name`` means: asked for as that, or with that path, SONAME or file name."""
        return tuple(library for library in self.libraries if name in _names(library))


def _names(library: Dependency) -> tuple[str | None, ...]:
    file_name = library.path.rpartition("/")[2] if library.path else None
    soname = library.description.soname if library.description else None
    return library.name, library.path, file_name, soname


class Files:
    """The files of one root, each read once: to be shared by the trees of one run."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._described: dict[tuple[int, int], Description] = {}

    def open(self, path: str) -> ElfImage:
        """The image of the file at ``path`` inside of the root; :class:`ElfError` where it cannot be read."""
        try:
            return read_image(Source(self.root.open(path), path))
        except (OSError, ValueError) as error:
            raise unreadable(path, "file", error) from None

    def describe(
        self, path: str, loader: Asker | None = None, *, real: str | None = None
    ) -> tuple[tuple[int, int], Description]:
        """Device and inode of the file, and what it says, as ``loader`` has loaded it.

        ``real`` is where the file is to itself, where that is not ``path``: a program.
        """
        image = self.open(path)
        identity = image.source.identity
        try:
            if identity not in self._described:
                self._described[identity] = describe(image)
        finally:
            image.source.close()
        described = self._described[identity]
        read = described.asker
        asker = Asker(real or path, read.rpath, read.runpath, loader, read.no_default)
        values = (described.header, described.soname, described.needs, asker, described.versions)
        return identity, Description(*values)


def describe(image: ElfImage) -> Description:
    """What the file of ``image`` says; :class:`ElfError` where that cannot be read."""
    entries = [(_KINDS[tag], value) for tag, value in image.dynamic.entries if tag in _KINDS]
    needs = tuple((kind, image.text(value, f"DT_{kind.upper()}")) for kind, value in entries)
    versions: dict[str, list[str]] = {}
    for version in image.versions.values():
        if version.file is not None:
            versions.setdefault(version.file, []).append(version.name)
    by_file = {file: tuple(names) for file, names in versions.items()}
    return Description(image.header, image.soname, needs, Asker.of(image), by_file)


class _Growing:
    """A dependency while the tree grows."""

    def __init__(self, name: str, found: Found, found_by: str | None, *, optional: bool) -> None:
        self.name, self.found, self.found_by = name, found, found_by
        self.steps = list(found.steps)
        self.needed_by: dict[str, None] = {}
        self.versions: set[str] = set()
        self.description: Description | None = None
        self.fault = self.steps[-1].outcome if found.stopped else None
        self.optional = optional

    def grown(self) -> Dependency:
        """The dependency, once nothing is added any more."""
        last = self.steps[-1] if self.steps and self.found.path is not None else None
        return Dependency(
            self.name,
            self.found.path,
            self.found_by or (FOUND_BY[last.rule] if last is not None else None),
            last.found_in if last is not None else None,
            tuple(self.needed_by),
            tuple(sorted(self.versions)),
            tuple(self.steps),
            self.fault,
            self.description,
            self.optional,
        )


class _TreeWalk:
    """One walk: the libraries met so far, and by what ld.so would tell them from others."""

    def __init__(self, files: Files, surroundings: Surroundings, path: str) -> None:
        self.files, self.surroundings, self.path = files, surroundings, path
        self.libraries: list[_Growing] = []
        self.needs: list[Need] = []
        self._by_name: dict[str, int] = {}  # positions in ``libraries``, or these two
        self._by_file: dict[tuple[int, int], int] = {}
        self._missing: dict[str, int] = {}
        self._steps, self._interpreter = 0, ""

    def know(self, number: int, names: Sequence[str | None], identity: tuple[int, int] | None) -> None:
        """Note what the library at ``number`` is called, and its file; who came first keeps a name."""
        for name in names:
            if name is not None:
                self._by_name.setdefault(name, number)
        if identity is not None:
            self._by_file.setdefault(identity, number)

    def know_interpreter(self, path: str) -> None:
        """Note that ld.so, the file at ``path``, is there before anything is asked for; if it is."""
        try:
            identity, description = self.files.describe(path)
        except ElfError:
            return
        self._interpreter = path
        self.know(_INTERPRETER, (path, description.soname), identity)

    def grow(self, description: Description) -> None:
        """Find all that the described file needs, breadth first."""
        coming = [description]
        for needer in coming:  # grows meanwhile
            for kind, name in needer.needs:
                number, new = self._need(name, needer.asker, optional=kind == "auxiliary")
                self.needs.append(Need(needer.asker.path, name, kind, number))
                if number >= 0:
                    library = self.libraries[number]
                    library.needed_by[needer.asker.path] = None
                    library.optional &= kind == "auxiliary"
                    library.versions.update(needer.versions.get(name, ()))
                if new is not None:
                    coming.append(new)

    def _need(self, name: str, asker: Asker, *, optional: bool) -> tuple[int, Description | None]:
        """The position of what ``asker`` gets for ``name``; its description, where it is a new one."""
        name = expand(name, asker, self.surroundings)
        number = self._by_name.get(name)
        if number is not None and number >= _ITSELF:
            return number, None
        if number == _INTERPRETER:
            found, found_by = Found(name, self._interpreter, ()), _LOADED
        else:
            found, found_by = find(name, asker, self.surroundings), None
        self._steps += len(found.steps)
        if self._steps > _MOST_STEPS:
            expected = f"at most {_MOST_STEPS:,} places to look at"
            raise ElfError(self.path, "DT_NEEDED", "more libraries and directories", expected)
        if found.path is None:
            return self._miss(name, found, optional=optional), None
        return self._take(name, found, found_by, asker, optional=optional)

    def _miss(self, name: str, found: Found, *, optional: bool) -> int:
        """The position of the missing ``name``, which is one dependency whoever needs it."""
        number = self._missing.setdefault(name, len(self.libraries))
        if number == len(self.libraries):
            self.libraries.append(_Growing(name, found, None, optional=optional))
        else:
            steps = self.libraries[number].steps
            looked = set(steps)
            steps += (step for step in found.steps if step not in looked)
        return number

    def _take(
        self, name: str, found: Found, found_by: str | None, asker: Asker, *, optional: bool
    ) -> tuple[int, Description | None]:
        assert found.path is not None
        number, library = len(self.libraries), _Growing(name, found, found_by, optional=optional)
        try:
            identity, description = self.files.describe(found.path, asker)
        except ElfError as error:
            library.fault = str(error)
            self.libraries.append(library)
            self.know(number, (name, found.path), None)
            return number, None
        known = self._by_file.get(identity)
        if known is not None and known >= _ITSELF:
            self.know(known, (name,), None)
            return known, None
        library.description = description
        self.libraries.append(library)
        if found_by == _LOADED:  # its names lead to it from now on
            self._by_name = {
                key: number if value == _INTERPRETER else value for key, value in self._by_name.items()
            }
        self.know(number, (name, found.path, description.soname), identity)
        return number, description


def tree(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "/",
    library_path: str | None = None,
    hwcaps: bool | None = None,
    files: Files | None = None,
) -> Tree:
    """What the program or library ``path`` needs, and where ld.so would find it.

    ``path`` may be a bare name, which is searched as ld.so does, then in this directory, then in ``PATH``.
    In another ``root`` it is a path inside of it, or one from here that lies below it; that root's cache,
    links, ld.so and default directories count.  ``library_path`` is ``LD_LIBRARY_PATH``, by default that of
    this process, and none in another root.  ``hwcaps`` says whether the sub-directories for this processor
    are searched, by default only in this root.  ``files`` may be shared by the trees of one run.

    Raises :class:`ElfError` where the file cannot be read, :class:`LoadError` where none has that name.

    >>> [library.name for library in tree("/proc/self/exe").missing]
    []
    """
    files = files or Files(Root(root))
    place = files.root
    if not os.path.isdir(place.directory):
        raise UsageError(f"{os.fspath(root)}: is no directory")
    if library_path is None:
        library_path = os.environ.get("LD_LIBRARY_PATH", "") if place.is_ours else ""
    name = os.fspath(path)
    name = place.inside(name) if "/" in name else _path_of(name, place, library_path)
    image = files.open(name)
    try:
        refuse_unlinked(image)
        is_program = image.interpreter is not None or image.header.type == "EXEC" or _is_pie(image)
        real = place.real(name) if is_program else name  # the kernel tells a program where it is
        elements = split_library_path(library_path)
        hwcaps = place.is_ours if hwcaps is None else hwcaps
        asker = Asker.of(image, path=real)
        surroundings = of_root(place, image, elements, hwcaps=hwcaps, program=asker)
        interpreter = image.interpreter if is_program else interpreter_for(image)
    finally:
        image.source.close()
    identity, description = files.describe(name, real=real)
    walk = _TreeWalk(files, surroundings, real)
    walk.know(_ITSELF, ("", name, real, description.soname), identity)
    if interpreter is not None:
        walk.know_interpreter(interpreter)
    walk.grow(description)
    libraries = tuple(library.grown() for library in walk.libraries)
    return Tree(
        real, interpreter if is_program else None, description, libraries, tuple(walk.needs), surroundings
    )


def _is_pie(image: ElfImage) -> bool:
    return image.dynamic.flag(DT_FLAGS_1, DF_1_PIE)


def _path_of(name: str, root: Root, library_path: str) -> str:
    """The path of what is called ``name``: a library as ld.so finds it, a file, a program in ``PATH``."""
    image = read_image(Source.open("/proc/self/exe"))
    surroundings = of_root(root, image, split_library_path(library_path))
    image.source.close()
    answer = find(name, None, surroundings)
    if answer.path is not None:
        return answer.path
    directories = (os.environ.get("PATH") or _PATH) if root.is_ours else _PATH
    for path in (f"./{name}", *(f"{directory or '.'}/{name}" for directory in directories.split(":"))):
        try:
            root.identity(path)
        except OSError:
            continue
        return path
    raise LoadError(f"{name}: neither a library of that name where the system looks for one, nor a program")
