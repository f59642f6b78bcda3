"""``miniloader.check``: will a file load, and everything that is wrong with that at once; nothing is run.

The verdict is that of ``dlopen(RTLD_NOW)`` for a library, and for a program that of its start with
``LD_BIND_NOW=1``: what glibc does on the way is followed from file to file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from miniloader.errors import (
    ElfError,
    LoadError,
    MiniloaderError,
    UnsupportedError,
    UsageError,
)
from miniloader.kernel.procfs import read_process_file, refusal
from miniloader.lab.check.closure import Closure, gather
from miniloader.lab.check.load_rule import LoadProblem
from miniloader.lab.check.releases import Limit, limit_of
from miniloader.lab.check.rules import problems_of_load, wrong_class, wrong_machine
from miniloader.lab.check.shared_object import SharedObject, Shelf
from miniloader.lab.check.situation import Host, Served, Situation
from miniloader.loader.root import Root
from miniloader.loader.search import Asker, Surroundings, find
from miniloader.loader.surroundings import find_path, interpreter_for, of_root, split_library_path
from miniloader.values import dataclass
from miniloader.whole_numbers import whole_number

__all__ = ["Checked", "Checker", "check"]

_LIBC: Final = "libc.so.6"
_PYTHONS: Final = ("/usr/local/bin/python3", "/usr/bin/python3")  # in another root


@dataclass(frozen=True)
class Checked:
    """The verdict on one file: ``path`` as given, whom it comes into, in which ``root``, and the problems.

    ``host`` is the path of the program that would open a library; None for a program, and for a library
    that is judged in a process with nothing but the C library.
    """

    path: str
    host: str | None
    root: str
    problems: tuple[LoadProblem, ...]

    @property
    def loads(self) -> bool:
        """Whether no problem is an error."""
        return not any(problem.severity == "error" for problem in self.problems)


def check(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "/",
    within: str | int | None = None,
    libc: str | None = None,
    policy: str | None = None,
) -> Checked:
    """Whether the library or program ``path`` loads, and all that keeps it from doing so.

    In another ``root`` everything is searched inside of it, by its own ``ld.so.cache``.  ``within`` is a
    program or a process number, inside whom a library is judged; by default a Python extension is judged in
    this interpreter, any other library alone.  ``libc`` (``"2.28"``) or ``policy`` (``"manylinux_2_28"``) is
    the oldest system that the file is meant for.  :class:`UsageError` for an unknown one.

    >>> check("libz.so.1").loads
    True
    """
    return Checker(root, within=within, limit=limit_of(libc=libc, policy=policy)).check(path)


class Checker:
    """Judges one file after the other; what they need is read once for all of them."""

    def __init__(
        self,
        root: str | os.PathLike[str] = "/",
        *,
        within: str | int | None = None,
        limit: Limit | None = None,
        hwcaps: bool | None = None,
    ) -> None:
        self.root, self._limit = Root(root), limit
        self._library_path = (
            split_library_path(os.environ.get("LD_LIBRARY_PATH", "")) if self.root.is_ours else ()
        )
        self._within: str | None = None
        pid = within if isinstance(within, int) else whole_number(within or "")
        if pid is not None:
            self._enter(pid)
        elif within is not None:
            self._within = self._inside(str(within))
        self._hwcaps = self.root.is_ours if hwcaps is None else hwcaps
        self._shelf, self._served = Shelf(self.root), Served()
        self._surroundings: dict[tuple[object, ...], Surroundings] = {}
        self._hosts: dict[object, tuple[Host, Surroundings]] = {}

    def check(self, path: str | os.PathLike[str]) -> Checked:
        """The verdict on one file; what cannot be read is a problem, too."""
        name = os.fspath(path)
        try:
            return self._judged(name, self.situation(name))
        except ElfError as error:
            found = f"{error.field}: found {error.found}, expected {error.expected}"
            hint = "; ".join(filter(None, (found, error.hint)))
            return self._unread(name, LoadProblem("malformed", "error", name=error.path or name, hint=hint))
        except UnsupportedError:
            raise
        except LoadError as error:  # nothing of that name
            hint = str(error)
            return self._unread(name, LoadProblem("missing-library", "error", name=name, hint=hint))

    def _judged(self, name: str, situation: Situation) -> Checked:
        wrong = [*wrong_machine.problems(situation), *wrong_class.problems(situation)]
        itself = tuple(problem for problem in wrong if problem.needed_by is None)
        problems = itself or problems_of_load(situation)
        host = situation.host.path if situation.host is not None else None
        return Checked(name, host, self.root.directory, problems)

    def _unread(self, name: str, problem: LoadProblem) -> Checked:
        return Checked(name, None, self.root.directory, (problem,))

    def situation(self, name: str) -> Situation:
        """The file, what it needs and where it comes to; :class:`ElfError` where it cannot be read."""
        file = self._shelf.take(self._inside(name))
        surroundings = self._around(file)
        if file.is_program:
            asker = Asker.of(file.image, None, self.root.real(file.path))
            surroundings = replace(surroundings, program=asker)
            closure = gather(file, surroundings, self._shelf, self._interpreter(file))
            return Situation(file, None, closure, surroundings, self._shelf, self._served, self._limit)
        host, surroundings = self._host(file, surroundings)
        closure = gather(file, surroundings, self._shelf, host.objects)
        return Situation(file, host, closure, surroundings, self._shelf, self._served, self._limit)

    # -- where it comes to ------------------------------------------------------------------------

    def _enter(self, pid: int) -> None:
        """Look from inside of a process: its root, its program, its ``LD_LIBRARY_PATH``."""
        directory = f"/proc/{pid}/root"
        try:
            program = os.readlink(f"/proc/{pid}/exe")
            same = os.path.samestat(os.stat(f"{directory}/"), os.stat("/"))
        except OSError as error:
            if error.errno == errno.ENOENT and os.path.exists(f"/proc/{pid}"):
                said = f"process {pid}: runs no program: a thread of the kernel, or it has ended"
                raise LoadError(said) from None
            raise refusal(pid, "exe", error) from None
        if not same:
            self.root.directory = directory
        entries = read_process_file(pid, "environ").split(b"\0")
        value = next((entry[16:] for entry in entries if entry.startswith(b"LD_LIBRARY_PATH=")), b"")
        self._library_path, self._within = split_library_path(os.fsdecode(value)), program

    def _inside(self, name: str) -> str:
        """The path inside of the root; a bare name is searched where the root is this machine's own."""
        if self.root.is_ours:
            return name if os.path.exists(name) or "/" in name else find_path(name)
        return self.root.inside(name) if "/" in name and os.path.exists(name) else f"/{name.lstrip('/')}"

    def _around(self, file: SharedObject) -> Surroundings:
        key = (file.header.machine, file.header.elf_class, file.header.order, interpreter_for(file.image))
        if key not in self._surroundings:
            self._surroundings[key] = of_root(self.root, file.image, self._library_path, hwcaps=self._hwcaps)
        return self._surroundings[key]

    def _interpreter(self, file: SharedObject) -> tuple[SharedObject, ...]:
        path = interpreter_for(file.image)
        try:
            return () if path is None else (self._shelf.take(path),)
        except ElfError:
            return ()

    def _host(self, file: SharedObject, surroundings: Surroundings) -> tuple[Host, Surroundings]:
        """The process that opens a library, and where libraries are looked for in it."""
        program = self._within or (self._python() if _is_python_extension(file) else None)
        key = program or (surroundings.machine, None)
        if key not in self._hosts:
            self._hosts[key] = self._program(program) if program else self._alone(file, surroundings)
        return self._hosts[key]

    def _python(self) -> str | None:
        if self.root.is_ours:
            return os.path.realpath("/proc/self/exe")
        return next((path for path in _PYTHONS if os.path.exists(self.root.directory + path)), None)

    def _program(self, path: str) -> tuple[Host, Surroundings]:
        try:
            if not self._shelf.take(self._inside(path)).is_program:  # its situation is inside a program again
                raise UsageError(f"{path}: a library; --in names a program or a process")
            situation = self.situation(path)
        except ElfError as error:  # of the program's file, not of the one that is judged
            where = f"--in {path}: {error.field}"
            raise MiniloaderError(f"{where}: found {error.found}, expected {error.expected}") from None
        return Host(path, situation.closure.objects), situation.surroundings

    def _alone(self, file: SharedObject, surroundings: Surroundings) -> tuple[Host, Surroundings]:
        """A process that has nothing but the C library and ld.so."""
        found = find(_LIBC, None, surroundings).path
        interpreter = self._interpreter(file)
        try:
            libc = None if found is None else self._shelf.take(found)
        except ElfError:
            libc = None
        if libc is None or libc is file:
            return Host(None, interpreter if libc is None else ()), surroundings
        closure: Closure = gather(libc, surroundings, self._shelf, interpreter)
        return Host(None, closure.objects), surroundings


def _is_python_extension(file: SharedObject) -> bool:
    """Whether a library refers to functions of Python's that it does not define."""
    if b"\0Py" not in file.tables and b"\0_Py" not in file.tables:
        return False
    return any(name.startswith(("Py", "_Py")) for name in _undefined(file))


def _undefined(file: SharedObject) -> Iterator[str]:
    wanted = file.uses.symbols
    return (file.name(symbol) for symbol in wanted[file.rows["shndx"][wanted] == 0].tolist())
