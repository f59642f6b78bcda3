"""What loading has cost while a program ran: for each library asked for, what came with it, and its time.

The time between two events of a load belongs to the later one's stage; that after the start of a constructor
belongs to the constructor.  So the parts of a load are its whole.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

from miniloader.loader.events import Event, OnEvent, Stage
from miniloader.values import dataclass

__all__ = ["PARTS", "Bill", "BilledLibrary", "Constructor", "Meter", "Opened"]

#: Where time goes, by the stages of a load that end there; what no event ends is ``other``.
PARTS: Final[Mapping[str, tuple[Stage, ...]]] = {
    "search": ("search", "need", "parse", "open"),
    "map": ("reserve", "map", "guard", "zero"),
    "bind": ("bind", "tls"),
    "relocate": ("relocate", "protect", "register", "prepared"),
    "constructors": ("initialise",),
    "other": ("finalise", "unmap", "host"),
}
_PART_OF: Final = {stage: part for part, stages in PARTS.items() for stage in stages}


@dataclass(frozen=True)
class Constructor:
    """One constructor: its ``vaddr``, and how many ``seconds`` it took, with all that it did."""

    vaddr: int
    seconds: float


@dataclass(frozen=True)
class BilledLibrary:
    """One library that was loaded: seconds by :data:`PARTS`, and how many pages relocation copied."""

    path: str
    parts: Mapping[str, float]
    constructors: tuple[Constructor, ...]
    private_pages: int

    @property
    def seconds(self) -> float:
        """How long all parts took together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Opened:
    """One call of dlopen(3): by whom, what for, what it gave, and what came of it.

    ``how`` is ``loaded``, ``present`` (it was there already), ``ld.so`` or ``refused``; ``seconds`` is all of
    it, ``nested`` calls, which constructors made, too; ``page_faults`` were the calling thread's.
    """

    name: str
    how: str
    seconds: float
    page_faults: int
    libraries: tuple[BilledLibrary, ...]
    nested: tuple[Opened, ...]


@dataclass(frozen=True)
class Bill:
    """What loading has cost: ``opened`` in order; ``lookups`` by dlsym(3) and their seconds.

    ``program_seconds`` is all else that the program did; ``fell_back`` what ld.so has loaded, and why.
    """

    opened: tuple[Opened, ...]
    lookups: int
    lookup_seconds: float
    program_seconds: float
    fell_back: tuple[tuple[str, str], ...] = field(default=())

    @property
    def seconds(self) -> float:
        """What was spent in our dlopen(3) and dlsym(3)."""
        return sum(opened.seconds for opened in self.opened) + self.lookup_seconds


class _Library:
    """A library while it is being loaded."""

    def __init__(self, path: str) -> None:
        self.path, self.bias, self.pages = path, 0, 0
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.constructors: list[tuple[int, float]] = []

    def billed(self) -> BilledLibrary:
        constructors = [Constructor(address - self.bias, taken) for address, taken in self.constructors]
        return BilledLibrary(self.path, self.parts, tuple(constructors), self.pages)


class _Call:
    """A call of dlopen(3) that has not come back."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.begin, self.since, self.how = name, now, now, "present"
        self.faults = _faults()
        self.root, self.is_known = _Library(name), False  # what was asked for; whether its file is known
        self.libraries: dict[str, _Library] = {}
        self.nested: list[Opened] = []
        self.constructor: _Library | None = None  # whose constructor runs
        self.address = 0  # its address

    def of_new(self, stage: Stage, path: str) -> _Library:
        """Whose cost it is, of a library not known yet: before its file is, that of what was asked for."""
        if stage != "parse":
            return self.root
        if not self.is_known:
            self.is_known, self.root.path = True, path  # the first that is read
        library = self.libraries[path] = _Library(path) if self.libraries else self.root
        return library

    def hear(self, stage: Stage, name: str, data: Mapping[str, Any], now: float) -> None:
        """The time until ``now`` is that of the constructor that ran, or of this ``stage``."""
        library = self.libraries.get(name) or self.of_new(stage, name)
        if self.constructor is None:
            library.parts[_PART_OF[stage]] += now - self.since
            self.since = now
        else:
            self.spend(now, library, _PART_OF[stage])
        if not data:
            return
        if "bias" in data:
            library.bias = int(data["bias"])
        if "pages" in data:
            library.pages += int(data["pages"])
        if stage == "initialise":
            self.constructor, self.address = library, int(data["address"])

    def spend(self, now: float, library: _Library, part: str) -> None:
        """The time until ``now`` is that of the constructor that ran, or this ``part`` of ``library``."""
        taken, self.since, running = now - self.since, now, self.constructor
        if running is None:
            library.parts[part] += taken
        else:
            running.parts["constructors"] += taken
            running.constructors.append((self.address, taken))
            self.constructor = None


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt


class Meter:
    """Measures each call as it comes; an ``OnEvent`` for what is loaded, that passes on what it hears."""

    def __init__(self, tell: OnEvent | None = None) -> None:
        self._tell = tell
        #: Unless somebody else listens, too: see :func:`miniloader.loader.events.is_brief`.
        self.brief = tell is None
        self._start = time.perf_counter()
        self._calls: list[_Call] = []
        self._opened: list[Opened] = []
        self._lookups, self._lookup_seconds = 0, 0.0
        self.fell_back: list[tuple[str, str]] = []

    def begin(self, name: str, begin: float) -> None:
        """A call of dlopen(3) began then."""
        self._interrupt(begin)
        self._calls.append(_Call(name, begin))

    def end(self, name: str | None, begin: float, how: str | None = None) -> None:
        """The call that began at ``begin`` is answered."""
        now = time.perf_counter()
        if name is None:
            if not self._calls:  # within a load it is the load's, a constructor's mostly
                self._lookups += 1
                self._lookup_seconds += now - begin
            return
        self._interrupt(now)
        call = self._calls.pop()
        if how == "glibc":
            if self._calls:
                self._calls[-1].since = now
            return
        new = list(call.libraries.values())
        libraries = tuple([library.billed() for library in new or (call.root,)])
        loaded = how or ("loaded" if any(library.bias for library in new) else "present")
        faults, nested, end = _faults() - call.faults, tuple(call.nested), time.perf_counter()
        call.root.parts["other"] += end - now  # making the bill takes time as well
        opened = Opened(name, loaded, end - begin, faults, libraries, nested)
        if self._calls:
            self._calls[-1].nested.append(opened)
            self._calls[-1].since = end
        else:
            self._opened.append(opened)

    def note(self, stage: Stage, library: str, data: Mapping[str, Any]) -> None:
        """Hear of one step, which nobody else listens to."""
        if self._calls:
            self._calls[-1].hear(stage, library, data, time.perf_counter())

    def __call__(self, event: Event) -> None:
        """Hear of one event."""
        self.note(event.stage, event.library, event.data)
        if self._tell is not None:
            self._tell(event)
            if self._calls:
                self._calls[-1].since = time.perf_counter()

    def _interrupt(self, now: float) -> None:
        """Another call begins within the last one, or that ends."""
        if self._calls:
            call = self._calls[-1]
            call.spend(now, call.root, "other")

    def bill(self) -> Bill:
        """What it has come to."""
        spent = sum(opened.seconds for opened in self._opened) + self._lookup_seconds
        program = time.perf_counter() - self._start - spent
        opened, fell_back = tuple(self._opened), tuple(self.fell_back)
        return Bill(opened, self._lookups, self._lookup_seconds, program, fell_back)
