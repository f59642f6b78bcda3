"""The bench that a chapter works at: fresh files, recorded system calls, children, and looks at pages.

Everything made here is gone when the ``with`` block ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, WorkerError
from miniloader.evidence.sharing import STATES
from miniloader.evidence.snapshot import Snapshot, Target, take
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.kernel.mounts import mount_of
from miniloader.kernel.privileges import privileges
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.workers.child import uninterrupted
from miniloader.values import dataclass
from miniloader.walkthrough.children import Body, Child, Program
from miniloader.walkthrough.model import Call, Facts, Grid, Part, Row
from miniloader.walkthrough.recorded_calls import Calls, Made, Mapping

__all__ = ["ZEROS_UNTOLD", "Bench", "Place", "View", "file_system_of", "rows_of", "shipped", "views"]

#: Why a state may be unknown where frames are hidden (before Linux 6.7).
ZEROS_UNTOLD: Final = "this kernel does not say which pages are the page of zeros"

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NOT_FOR_FILES: Final = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"})


@dataclass(frozen=True)
class Place:
    """A directory for fresh files, and the type of its file system."""

    directory: str
    file_system: str

    def __str__(self) -> str:
        return f"{self.file_system} ({self.directory})"


class View:
    """What the kernel said of the pages of one mapping: arrays by page, and words for people.

    ``states`` are names of :data:`~miniloader.evidence.sharing.STATES`; ``frames`` are page frame numbers, 0
    where there is none or it is not known.
    """

    def __init__(self, states: Sequence[str], frames: NDArray[np.uint64], grid: Grid) -> None:
        self.states = tuple(states)
        self.frames = tuple(int(frame) for frame in frames)
        self.grid = grid

    @property
    def present(self) -> int:
        """How many pages the page table has."""
        return sum(state not in ("absent", "swapped", "unknown") for state in self.states)

    def pages(self, *states: str) -> tuple[int, ...]:
        """The pages in one of ``states``."""
        return tuple(page for page, state in enumerate(self.states) if state in states)

    def words(self, page: int) -> str:
        """One page for people: what it is, and its frame where that is known."""
        frame = self.frames[page]
        return _WORDS[self.states[page]] + (f", frame {frame:#x}" if frame else "")


_WORDS: Final = {state.name: state.name for state in STATES} | {
    "absent": "not in the page table",
    "shared": "page cache",
    "sole": "page cache",
    "copied": "private copy",
    "copied-shared": "private copy, mapped twice",
    "zero": "page of zeros",
}


class Bench(Calls):
    """Files, calls, children and looks for one chapter; a context manager that takes all of it away.

    ``level`` asks for less evidence than the best that works here.
    """

    def __init__(self, level: LevelName | None = None) -> None:
        super().__init__()
        best = best_level()
        names = [known.name for known in LEVELS]
        self.level: LevelName = best if level is None or names.index(level) < names.index(best) else level
        self._undo = ExitStack()
        self._recorded: list[Call] = []
        self._used: list[Place] = []
        self._places: dict[str, Place] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._undo.close()

    # -- where it happens
    @property
    def facts(self) -> Facts:
        """Kernel, file systems used so far, privilege and evidence."""
        system, uid = os.uname(), os.geteuid()
        return Facts(
            kernel=f"{system.sysname} {system.release}",
            machine=system.machine,
            page_size=PAGE_SIZE,
            file_systems=tuple(dict.fromkeys(map(str, self._used))),
            privilege=f"{'root' if uid == 0 else f'uid {uid}'}, {_right()}",
            level=self.level,
            shows=next(known.shows for known in LEVELS if known.name == self.level),
        )

    def place(self, kind: str = "disk") -> Place:
        """A directory of our own on a file system with a disk behind it, or on ``tmpfs``.

        Where there is no disk for us, tmpfs has to do; :attr:`facts` says which it was.  Raises EvidenceError
        where nothing can be written.
        """
        if kind not in self._places:
            parent = _find_place(kind)
            made = os.path.join(parent.directory, f"miniloader-{os.urandom(8).hex()}")
            self._undo.callback(shutil.rmtree, made, ignore_errors=True)  # first: Ctrl-C may come in between
            os.mkdir(made, 0o700)
            self._places[kind] = Place(made, parent.file_system)
            self._used.append(parent)
        return self._places[kind]

    def file(self, name: str, content: bytes, kind: str = "disk") -> str:
        """A fresh file, written back to its disk; its path."""
        path = os.path.join(self.place(kind).directory, name)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path

    def copy(self, library: Path) -> str:
        """A fresh copy of ``library`` that nobody else has mapped; its path."""
        return self.file(library.name, library.read_bytes())

    def keep(self, mapping: Mapping) -> Mapping:
        """Unmap ``mapping`` in the end."""
        from miniloader.kernel.syscalls import munmap

        self._undo.callback(munmap, *mapping)
        return mapping

    def keep_open(self, fd: int) -> int:
        """Close ``fd`` in the end."""
        self._undo.callback(os.close, fd)
        return fd

    # -- who does it
    def child(self, name: str, body: Body) -> Child:
        """A forked child that runs ``body`` a ``yield`` at a time."""
        with uninterrupted():
            return self._undo.enter_context(Child(name, body))

    def program(self, name: str) -> Program:
        """A freshly started program that maps files when asked to."""
        with uninterrupted():
            return self._undo.enter_context(Program(name))

    def fatal(self, child: Child, doing: str) -> str:
        """Let ``child`` do the last thing, noted as ``doing``; the signal that it died by, "" for none."""
        signal = ""
        try:
            child.next()
        except WorkerError:
            signal = child.died()
        self.record([Made(doing, f"killed by {signal}" if signal else "", access=True)], "child")
        return signal

    # -- what was done
    def record(self, made: Iterable[Made], process: str = "") -> None:
        """Keep calls in order: those of our own so far, then ``made`` by ``process``."""
        self._recorded += (Call(m.text, m.result, "", m.access) for m in self.taken())
        self._recorded += (Call(m.text, m.result, process, m.access) for m in made)

    def calls(self) -> tuple[Call, ...]:
        """What was done since the last time, for a step."""
        self.record(())
        recorded, self._recorded = tuple(self._recorded), []
        return recorded

    # -- what is seen
    def look(
        self,
        rows: Sequence[tuple[str, int, int]],
        pages: int,
        title: str = "",
        parts: Sequence[Part] = (),
    ) -> tuple[View, ...]:
        """The first ``pages`` pages of each of ``rows``, (name, pid, address); all share one grid."""
        targets = [Target(pid, address, 0, pages * PAGE_SIZE) for _, pid, address in rows]
        grid = Grid(title, tuple(name for name, _, _ in rows), self._take(targets, title), tuple(parts))
        return views(grid)

    def look_at(self, mapping: Mapping, name: str = "this process", title: str = "") -> View:
        """All pages of a mapping of this process."""
        return self.look([(name, os.getpid(), mapping.address)], mapping.pages, title)[0]

    def _take(self, targets: Sequence[Target], step: str) -> Snapshot:
        return take(targets, step=step, level=self.level)


def views(grid: Grid) -> tuple[View, ...]:
    """One for each row of ``grid``."""
    names = [state.name for state in STATES]
    return tuple(
        View([names[code] for code in states], process.pages["frame"], grid)
        for states, process in zip(grid.sharing.states.tolist(), grid.snapshot.processes, strict=True)
    )


def rows_of(before: View, after: View, pages: Iterable[int], name: str = "page") -> tuple[Row, ...]:
    """Evidence of some pages before and after."""
    return tuple(Row(f"{name} {page}", before.words(page), after.words(page)) for page in pages)


def shipped(name: str) -> Path:
    """A library that ships with miniloader for this machine; EvidenceError where there is none."""
    from miniloader import lab

    machine = os.uname().machine
    path = Path(lab.__file__).parent / "demo" / f"lib{name}-{machine}.so"
    if not path.exists():
        raise EvidenceError(f"no lib{name} ships with miniloader for {machine}")
    return path


def _right() -> str:
    """Whether we hold the one capability that matters, as far as ``/proc`` tells."""
    try:
        held = "CAP_SYS_ADMIN" in privileges().capabilities
    except EvidenceError:
        return "capabilities not known"
    return f"{'with' if held else 'without'} CAP_SYS_ADMIN"


# ----------------------------------------------------------------------------------------- places
def _find_place(kind: str) -> Place:
    """A directory that we may write, on the kind of file system asked for if there is any."""
    if kind == "tmpfs":
        wanted = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/tmp", "/run"]
    else:
        wanted = [os.environ.get("TMPDIR", ""), "/var/tmp", "/tmp", os.path.expanduser("~"), os.getcwd()]
    found = [
        Place(path, file_system_of(path)) for path in wanted if path and os.access(path, os.W_OK | os.X_OK)
    ]
    if kind == "tmpfs":
        found = [place for place in found if place.file_system in _IN_MEMORY]
    else:
        found.sort(key=lambda place: place.file_system in _IN_MEMORY)  # stable: disks first
    found = [place for place in found if place.file_system not in _NOT_FOR_FILES]
    if not found:
        raise EvidenceError(f"no {kind} directory that we may write in", hint="set TMPDIR to one")
    return found[0]


def file_system_of(path: str) -> str:
    """The type of the file system that ``path`` is on; "?" when not told."""
    try:
        mount = mount_of(None, os.path.realpath(path))
    except EvidenceError:
        return "?"
    return mount.kind if mount is not None else "?"
