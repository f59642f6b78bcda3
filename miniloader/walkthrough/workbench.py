"""The workbench of a chapter: fresh files, traced system calls, other processes, and looks at pages.

Everything made with it is gone when the ``with`` block ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from miniloader.errors import EvidenceError, WorkerError
from miniloader.evidence.snapshot import ProcessRange, take
from miniloader.forking import importing
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.kernel.privileges import privileges
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE, munmap
from miniloader.lab.workers.child import uninterrupted
from miniloader.values import dataclass
from miniloader.walkthrough.child_processes import Body, Child, Program
from miniloader.walkthrough.mapping_views import MappingView, views_of
from miniloader.walkthrough.scratch_files import ScratchDirectory, scratch_directory
from miniloader.walkthrough.step import Grid, Part
from miniloader.walkthrough.traced_calls import Calls, Mapping, TracedCall

__all__ = ["Environment", "Workbench", "shipped"]


@dataclass(frozen=True)
class Environment:
    """Where a chapter ran: its header.  ``file_systems`` read like ``ext4 (/var/tmp)``."""

    kernel: str
    machine: str
    page_size: int
    file_systems: tuple[str, ...]
    privilege: str
    level: LevelName
    shows: str

    def to_json(self) -> dict[str, Any]:
        """The key ``facts`` of a chapter; its level is told beside it."""
        return {
            "kernel": self.kernel,
            "machine": self.machine,
            "page_size": self.page_size,
            "file_systems": list(self.file_systems),
            "privilege": self.privilege,
            "shows": self.shows,
        }


class Workbench(Calls):
    """Files, calls, processes and looks for one chapter; a context manager that takes all of it away.

    ``level`` asks for less evidence than the best that works here.
    """

    def __init__(self, level: LevelName | None = None) -> None:
        super().__init__()
        best = best_level()
        names = [evidence.name for evidence in LEVELS]
        self.level: LevelName = best if level is None or names.index(level) < names.index(best) else level
        self._undo = ExitStack()
        self._used: list[ScratchDirectory] = []
        self._places: dict[str, ScratchDirectory] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._undo.close()

    # -- where it happens
    @property
    def environment(self) -> Environment:
        """Kernel, file systems used so far, privilege and evidence."""
        system, uid = os.uname(), os.geteuid()
        return Environment(
            kernel=f"{system.sysname} {system.release}",
            machine=system.machine,
            page_size=PAGE_SIZE,
            file_systems=tuple(dict.fromkeys(map(str, self._used))),
            privilege=f"{'root' if uid == 0 else f'uid {uid}'}, {_right()}",
            level=self.level,
            shows=next(evidence.shows for evidence in LEVELS if evidence.name == self.level),
        )

    def place(self, kind: str = "disk") -> ScratchDirectory:
        """A directory of our own on a file system with a disk behind it, or on ``tmpfs``.

        Where there is no disk for us, tmpfs has to do; :attr:`environment` says which it was.  Raises
        EvidenceError where nothing can be written.
        """
        if kind not in self._places:
            parent = scratch_directory(kind)
            directory = os.path.join(parent.directory, f"miniloader-{os.urandom(8).hex()}")
            self._undo.callback(shutil.rmtree, directory, ignore_errors=True)  # Ctrl-C may come before mkdir
            os.mkdir(directory, 0o700)
            self._places[kind] = ScratchDirectory(directory, parent.file_system)
            self._used.append(parent)
        return self._places[kind]

    def file(self, name: str, content: bytes, kind: str = "disk") -> str:
        """The path of a fresh file, written back to its disk."""
        path = os.path.join(self.place(kind).directory, name)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path

    def copy(self, library: Path) -> str:
        """The path of a fresh copy of ``library`` that nobody else has mapped."""
        return self.file(library.name, library.read_bytes())

    # -- what stays until the end
    def opened(self, path: str, flags: int = os.O_RDONLY) -> int:
        """open(2) a file that is closed in the end."""
        fd = self.open(path, flags)
        self._undo.callback(os.close, fd)
        return fd

    def mapped(self, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> Mapping:
        """mmap(2) what is unmapped in the end."""
        mapping = self.mmap(length, protection, flags, fd, offset)
        self._undo.callback(munmap, *mapping)
        return mapping

    # -- who does it
    def child(self, name: str, body: Body) -> Child:
        """A forked child that runs ``body`` a ``yield`` at a time."""
        with uninterrupted():
            return self._undo.enter_context(Child(name, body))

    def program(self, name: str) -> Program:
        """A freshly started program that maps files when asked to."""
        with uninterrupted():
            return self._undo.enter_context(Program(name))

    def resume(self, child: Child) -> Any:
        """Let ``child`` run to its next ``yield``, and trace what it does; the value it yields."""
        value, calls = child.next()
        self.add(calls, child.name)
        return value

    def ask(self, program: Program, request: str, **arguments: Any) -> Any:
        """Have ``program`` carry out ``request``, and trace what it does; its answer."""
        value, calls = program.ask(request, **arguments)
        self.add(calls, program.name)
        return value

    def fatal(self, child: Child, doing: str) -> str:
        """Let ``child`` do the last thing, told as ``doing``; the signal that it died by, "" for none."""
        signal = ""
        try:
            child.next()
        except WorkerError:
            signal = child.died()
        self.add([TracedCall(doing, f"killed by {signal}" if signal else "", access=True)], child.name)
        return signal

    # -- what is seen
    def look(
        self, rows: Sequence[tuple[str, int, int]], pages: int, title: str = "", parts: Iterable[Part] = ()
    ) -> tuple[MappingView, ...]:
        """The first ``pages`` pages of each of ``rows``, (name, pid, address); all share one grid."""
        targets = [ProcessRange(pid, address, 0, pages * PAGE_SIZE) for _, pid, address in rows]
        snapshot = take(targets, step=title, level=self.level)
        return views_of(Grid(title, tuple(name for name, _, _ in rows), snapshot, tuple(parts)))

    def look_at(self, mapping: Mapping, name: str = "this process", title: str = "") -> MappingView:
        """All pages of a mapping of this process."""
        return self.look([(name, os.getpid(), mapping.address)], mapping.pages, title)[0]


def shipped(name: str) -> Path:
    """A library that ships with miniloader for this machine; EvidenceError where there is none."""
    with importing:
        from miniloader import lab

    machine = os.uname().machine
    path = Path(lab.__file__).parent / "demo" / f"lib{name}-{machine}.so"
    if not os.access(path, os.R_OK):  # Path.exists() raises, in some Pythons, where it may not look
        raise EvidenceError(f"no lib{name} ships with miniloader for {machine}, or none that may be read")
    return path


def _right() -> str:
    """Whether we hold the one capability that matters, as far as ``/proc`` tells."""
    try:
        held = "CAP_SYS_ADMIN" in privileges().capabilities
    except EvidenceError:
        return "capabilities not known"
    return f"{'with' if held else 'without'} CAP_SYS_ADMIN"
