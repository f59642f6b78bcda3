"""One library in this process, and how the libraries it needs are found.

A :class:`Loaded` is the mapping itself, shared by every caller and every library that needs it, and counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from miniloader.elf import ElfImage, LoadPlan, Source, read_image
from miniloader.elf.checks import refuse_problems
from miniloader.elf.symbols import SymbolTable
from miniloader.errors import LoadError, MiniloaderError
from miniloader.loader.beside_glibc import gnu_unique, host, stand_ins, unwinder
from miniloader.loader.beside_glibc.code_page import Stub
from miniloader.loader.beside_glibc.host import HostLibrary, Listing
from miniloader.loader.beside_glibc.thread_local import Blocks
from miniloader.loader.events import Event, OnEvent, Stage
from miniloader.loader.lazy_binding import Slots
from miniloader.loader.memory import Memory
from miniloader.loader.policy import Policy, comes_from_host, refuse
from miniloader.loader.search import Asker, find
from miniloader.loader.spans import open_names, readable
from miniloader.native import Names

if TYPE_CHECKING:
    from miniloader.loader.beside_glibc.debugger import Registered
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["Graph", "Loaded"]


class Loaded:
    """One mapped library.  It is a :class:`~miniloader.loader.scope.Definer` for the others."""

    def __init__(self, image: ElfImage, loader: Loaded | None, policy: Policy) -> None:
        self.image = image
        self.policy = policy
        self.above = loader.asker() if loader is not None else None  # and not it, which may be closed before
        self.needs: list[Loaded | HostLibrary] = []  # in the order of DT_NEEDED
        # Of these ours; for what a caller asked for all that are needed, sorted (ld.so's l_initfini).
        self.before: list[Loaded] = []
        self.memory: Memory | None = None
        self._names: Names | None = None
        self.blocks = Blocks()  # of thread-local storage
        self.stubs: dict[int, Stub] = {}  # by the function that each stands for
        self.slots: Slots | None = None  # of the PLT, when it is bound lazily
        self.unwind_table: int | None = None  # its address, once registered
        self.debugging: Registered | None = None  # what gdb is told of it
        self.ready: Prepared | None = None  # its relocated pages, while they may be of use
        self.holds: list[Loaded] = []  # what it is bound to without needing it (ld.so's l_reldeps)
        self.host_handles: list[int] = []  # of what it needs from the system's loader
        self.handles = 0  # how many callers hold it
        self.stays = False  # until the process ends, whoever closes it
        self.destructors: list[int] = []  # their addresses, in order
        self.initialised = False

    @property
    def name(self) -> str:
        """What to call it."""
        return self.image.path

    @property
    def plan(self) -> LoadPlan:
        """How it is mapped."""
        return self.mapped.plan

    @property
    def is_mapped(self) -> bool:
        """Whether its pages are there: not before it is mapped, nor when it is closed."""
        return self.memory is not None and self.memory.mapped

    @property
    def mapped(self) -> Memory:
        """Its pages; :class:`LoadError` when it is closed."""
        if self.memory is None or not self.memory.mapped:
            raise LoadError(f"{self.name}: is not loaded any more")
        return self.memory

    @property
    def bias(self) -> int:
        """Its load bias."""
        return self.mapped.bias

    @property
    def symbols(self) -> SymbolTable:
        """Its dynamic symbols, as arrays: read from the file when they are first asked for."""
        return self.image.symbols

    @property
    def names(self) -> Names:
        """The same where they lie in memory."""
        if self._names is None:
            self._names = open_names(self.image, readable(self.image, self.plan), self.bias)
        return self._names

    @names.setter
    def names(self, names: Names) -> None:
        self._names = names

    @property
    def build_id(self) -> str | None:
        """Its build-id, in hexadecimal."""
        return self.image.build_id

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from other files."""
        return self.image.source.key

    def is_called(self, name: str) -> bool:
        """Whether ``name``, as ``DT_NEEDED`` has it, means this library."""
        return name in (self.image.soname, os.path.basename(self.name))

    @property
    def ours(self) -> list[Loaded]:
        """What it needs that the system's loader does not have."""
        return [needed for needed in self.needs if isinstance(needed, Loaded)]

    def asker(self) -> Asker:
        """It, as one who needs other libraries."""
        return Asker(self.image.path, self.image.rpath, self.image.runpath, self.above)

    def discard(self) -> bool:
        """Unmap it and give everything back; ``False`` if a thread has destructors of it yet to run."""
        if not self.blocks.close():
            return False
        self.blocks = Blocks()
        stand_ins.remove(self)
        if self.unwind_table is not None:
            unwinder.deregister(self.unwind_table)
            self.unwind_table = None
        if self.debugging is not None:
            self.debugging.withdraw()
            self.debugging = None
        if self.memory is not None:
            self.memory.unmap()
        self._names = None
        for stub in self.stubs.values():
            stub.unmap()
        if self.slots is not None:
            self.slots.close()
        if self.ready is not None:
            self.ready.close()
            self.ready = None
        self.stubs, self.slots = {}, None
        gnu_unique.forget(self)
        for handle in self.host_handles:
            host.close_host(handle)
        self.host_handles = []
        self.needs, self.before, self.holds = [], [], []  # circles, which would keep the file open
        return True

    def stub_for(self, function: int) -> Stub:
        """The code that stands for ``function`` in this library."""
        if function not in self.stubs:
            self.stubs[function] = Stub()
        return self.stubs[function]

    @property
    def stand_ins(self) -> dict[int, int]:
        """Where code is that stands for a function to this library, by the function's address."""
        own = {function: stub.address for function, stub in self.stubs.items()}
        return {**stand_ins.stand_ins(), **own}

    def give_up(self, graph: Graph, reason: str) -> None:
        """Its relocated pages are of no use: say why, and go the plain way."""
        if self.ready is not None:
            self.ready.close()
            self.ready = None
        graph.event("prepared", self.name, f"not from the cache: {reason}", reason=reason)

    def local_scope(self, listing: Listing | None = None) -> list[Loaded | HostLibrary]:
        """It and everything it needs, breadth first, each once; ``listing`` is what ld.so has."""
        found: list[Loaded | HostLibrary] = [self]
        seen, of_host = {id(self)}, (listing or host.listing()).by_name
        for library in found:
            for needed in library.needs if isinstance(library, Loaded) else _needs_of_host(library, of_host):
                if id(needed) not in seen:
                    seen.add(id(needed))
                    found.append(needed)
        return found


def _needs_of_host(library: HostLibrary, by_name: Mapping[str, HostLibrary]) -> list[HostLibrary]:
    """What ld.so found for the needs of one of its libraries: by soname, or by file name."""
    return [by_name[name] for name in library.needed if name in by_name]


class Graph:
    """The libraries that one call of ``load`` brings: ``new`` holds them breadth first.

    ``known`` finds a library that an earlier call brought.  ``listing`` is what ld.so had when it was last
    asked.
    """

    def __init__(
        self,
        policy: Policy,
        known: Callable[[Callable[[Loaded], bool]], Loaded | None],
        tell: OnEvent | None,
    ) -> None:
        self.policy = policy
        self.known = known
        self.tell = tell
        self.new: list[Loaded] = []
        self.listing: Listing

    def event(self, stage: Stage, library: str, text: str, **data: Any) -> None:
        """Tell whoever listens."""
        if self.tell is not None:
            self.tell(Event(stage, library, text, data))

    def add(self, source: Source, loader: Loaded | None = None) -> Loaded:
        """Open ``source`` as a new member."""
        reason, ready = "", None
        try:
            image = read_image(source)
            refuse(image, self.policy)
            if self.policy.prepared:
                try:
                    from miniloader.loader.prepared.pages import find as find_prepared

                    ready = find_prepared(image)
                except LoadError as error:
                    reason = str(error)
            if ready is None:  # what is in the cache has been checked when it was prepared
                refuse_problems(image)
        except MiniloaderError:
            source.close()
            raise
        self.event(
            "parse", image.path, f"{len(image.segments)} program headers", segments=len(image.segments)
        )
        library = Loaded(image, loader, self.policy)
        library.ready = ready
        if reason:
            library.give_up(self, reason)
        self.new.append(library)
        return library

    def complete(self) -> None:
        """Find what each member needs, and what that needs, breadth first."""
        self.listing = host.listing()
        for library in self.new:  # grows meanwhile
            for name in library.image.needed:
                library.needs.append(self._need(name, library))
        for library in self.new[1:]:
            library.before = library.ours

    def _need(self, name: str, library: Loaded) -> Loaded | HostLibrary:
        mine = self._mine(lambda other: other.is_called(name))
        if mine is not None:
            self.event("need", library.name, f"{name}: loaded already", needed=name, path=mine.name)
            return mine
        # A path could lead to any file, which dlopen would run.
        handle = host.open_host(name, load=False)
        if handle is None and "/" not in name and comes_from_host(name):
            handle = host.open_host(name, load=True)
            self.listing = host.listing()
        if handle is not None:
            return self._from_host(name, library, handle)
        found = find(name, library.asker())
        for step in found.steps:
            self.event(
                "search",
                library.name,
                f"{step.rule}: {step.path}: {step.outcome}",
                needed=name,
                **_fields(step),
            )
        if found.path is None:
            raise LoadError(
                f"{library.name}: needs {name}, which is in none of the {len(found.steps)} places searched"
            )
        source = Source.open(found.path)
        same = self._same_file(source)
        if same is not None:
            source.close()
            self.event(
                "need", library.name, f"{name}: loaded already as {same.name}", needed=name, path=same.name
            )
            return same
        self.event("need", library.name, f"{name}: {found.path}", needed=name, path=found.path)
        return self.add(source, library)

    def _mine(self, is_it: Callable[[Loaded], bool]) -> Loaded | None:
        """A library of ours: of this call, or of an earlier one that initialised as this one will."""
        new = next((library for library in self.new if is_it(library)), None)
        return new or self.known(lambda other: other.policy.init == self.policy.init and is_it(other))

    def _from_host(self, name: str, library: Loaded, handle: int) -> HostLibrary:
        library.host_handles.append(handle)
        bias = host.load_address(handle)
        if bias not in self.listing.by_bias:
            self.listing = host.listing()
        same = self.listing.by_bias.get(bias)
        if same is None:
            raise LoadError(f"{library.name}: needs {name}, which the system's loader has, but does not list")
        self.event(
            "need", library.name, f"{name}: the process's own, {same.name}", needed=name, path=same.name
        )
        return same

    def _same_file(self, source: Source) -> Loaded | HostLibrary | None:
        mine = self._mine(lambda other: other.key == source.key)
        if mine is not None:
            return mine
        for other in self.listing.found:
            try:
                status = os.stat(other.path) if other.path else None
            except OSError:
                continue  # its file is gone: it is another than the one just found
            if status is not None and (status.st_dev, status.st_ino) == source.identity:
                return other
        return None


def _fields(step: Any) -> dict[str, str]:
    return {"rule": step.rule, "path": step.path, "outcome": step.outcome}
