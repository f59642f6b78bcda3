"""``load``: from a file to running code, step by step, and back again."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from miniloader.elf import ElfImage, LoadPlan, Source
from miniloader.elf.dynamic import DF_1_NODELETE, DT_FLAGS_1
from miniloader.elf.symbols import SHN_ABS, STT_GNU_IFUNC, STT_TLS
from miniloader.errors import LoadError, SymbolError, UsageError
from miniloader.loader import constructors
from miniloader.loader.beside_glibc import host, stand_ins, thread_local
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.events import OnEvent
from miniloader.loader.link import initialise_library, link_library, linking_order, map_library, read_life
from miniloader.loader.loaded import Graph, Loaded
from miniloader.loader.policy import Binding, Policy
from miniloader.loader.relocate import call_resolver
from miniloader.loader.scope import Definer
from miniloader.loader.search import find_path
from miniloader.native import functions

__all__ = ["Library", "load"]

_lock = threading.RLock()
# Reach for these only with the lock held.
_present: Final[list[Loaded]] = []  # as they were loaded
_lingering: Final[list[Loaded]] = []  # closed, but with destructors that some thread has yet to run


class Library:
    """A library loaded by :func:`load`; a context manager that closes it.

    ``base`` is the load bias: an address is ``base`` + vaddr.  A library that is never closed stays until the
    process ends, when its finalisers run.
    """

    def __init__(self, loaded: Loaded, stages_ms: dict[str, float]) -> None:
        self._loaded: Loaded | None = loaded
        self._name = loaded.name
        #: Milliseconds that each stage took, for the library and those loaded with it.
        self.stages_ms = stages_ms

    def __repr__(self) -> str:
        return f"<Library {self._name!r} {'closed' if self._loaded is None else f'at {self.base:#x}'}>"

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def loaded(self) -> Loaded:
        """The mapping itself, which other callers may share; :class:`LoadError` when closed."""
        if self._loaded is None:
            raise LoadError(f"{self._name}: is closed")
        return self._loaded

    @property
    def path(self) -> str:
        """The file it was loaded from."""
        return self._name

    @property
    def base(self) -> int:
        """The load bias, ``l_addr`` of dlopen's link map."""
        return self.loaded.bias

    @property
    def image(self) -> ElfImage:
        """What its file says."""
        return self.loaded.image

    @property
    def plan(self) -> LoadPlan:
        """How it is mapped, in vaddrs."""
        return self.loaded.plan

    @property
    def libraries(self) -> tuple[Loaded | HostLibrary, ...]:
        """It and everything it needs, breadth first; a ``HostLibrary`` is the process's own."""
        return tuple(self.loaded.local_scope())

    def address(self, name: str, version: str | None = None) -> int:
        """The address of the defined symbol ``name``, here or (as dlsym(3) looks) in what it needs.

        An IFUNC is resolved; a thread-local symbol gives the calling thread's.  Raises :class:`SymbolError`.
        """
        for library in self.loaded.local_scope():
            if isinstance(library, HostLibrary):
                found = host.symbol_address(library.handle, os.fsencode(name), version)
                if found is not None:
                    return found
                continue
            index = library.symbols.find(name, version)
            if index is not None:
                return _address_of(library, index)
        label = name if version is None else f"{name}, version {version}"
        raise SymbolError(f"{self._name}: no symbol {label}", hint=_similar(self.loaded, name))

    def function(
        self,
        name: str,
        restype: Any = ctypes.c_int,
        argtypes: Sequence[Any] = (),
        *,
        version: str | None = None,
        use_errno: bool = False,
    ) -> Any:
        """The function ``name`` as a ctypes function; see :meth:`address` for what is found."""
        return ctypes.CFUNCTYPE(restype, *argtypes, use_errno=use_errno)(self.address(name, version))

    def gdb_commands(self) -> tuple[str, ...]:
        """What to tell gdb, attached to this process, so that it knows functions and lines.

        One command for the library and for each that was loaded with it; those of ld.so gdb finds itself.
        There is none for a library that lies inside a larger file.  After ``load(…, gdb=True)`` gdb needs
        none of them.
        """
        from miniloader.loader.beside_glibc.debugger import file_of

        ours = [library for library in self.loaded.local_scope() if isinstance(library, Loaded)]
        files = [(file_of(library.image.source), library.bias) for library in ours]
        return tuple(f"add-symbol-file {_quoted(path)} -o {bias:#x}" for path, bias in files if path)

    def close(self) -> None:
        """Run the finalisers and unmap, if nobody else uses it; a second call does nothing.

        Whatever points into it (functions, data) must not be used any more.
        """
        with _lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                loaded.handles -= 1
                _sweep(loaded)


def load(
    path: str | os.PathLike[str] | Source,
    init: bool = True,
    bind: Binding = "now",
    on_event: OnEvent | None = None,
    *,
    address: int | None = None,
    text_relocations: bool = False,
    executable_stack: bool = False,
    writable_code: bool = False,
    prepared: bool = False,
    gdb: bool = False,
) -> Library:
    """Load the shared library ``path`` as dlopen(3) does, but ourselves.

    A bare name is searched as ld.so searches.  ``path`` may also be a :class:`~miniloader.elf.Source` (a
    descriptor, bytes in memory).  With ``init=False`` nothing of the library runs: no constructor, and no
    IFUNC resolver (their slots stay 0).  With ``init=True`` its own code does, which can do anything.
    ``bind="lazy"`` leaves PLT slots until they are first called.  ``address`` asks for its first page to be
    there.  ``prepared`` takes relocated pages from the cache, at the address they were made for (see
    :func:`miniloader.prepare`), or says in an event why it does not.  ``gdb`` shows the library, and
    what is loaded with it, to a debugger, before its constructors run.  The others allow what else is
    refused.  ``on_event`` hears of each step as it is done.

    Raises :class:`ElfError` when the file is at fault, else :class:`LoadError`; nothing stays mapped then.
    """
    if bind not in ("now", "lazy"):
        raise UsageError(f"bind={bind!r}: expected 'now' or 'lazy'")
    if prepared and bind == "lazy":
        raise UsageError("what is prepared is bound already: bind='lazy' is for the plain way")
    policy = Policy(init, bind, address, text_relocations, executable_stack, writable_code, prepared, gdb)
    clock = _Clock()
    with _lock:
        source = path if isinstance(path, Source) else Source.open(find_path(path))
        known = _known(lambda library: library.key == source.key and library.policy.init == init)
        if known is not None and address in (None, known.mapped.start):
            order = _sort(known)
            if gdb:
                _show_to_debugger(order, clock)
            known.handles += 1
            return Library(known, clock.stages)
        graph = Graph(policy, _known, on_event)
        try:
            root = _load(graph, source, clock)
        except BaseException:
            _undo(graph)
            raise
        root.handles += 1
        return Library(root, clock.stages)


class _Clock:
    """Adds up what each stage takes, in milliseconds."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, stage: str) -> None:
        """What has been done since the last one is this ``stage``."""
        last, self._last = self._last, time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + (self._last - last) * 1e3


def _known(is_it: Callable[[Loaded], bool]) -> Loaded | None:
    return next((library for library in _present if is_it(library)), None)


def _load(graph: Graph, source: Source, clock: _Clock) -> Loaded:
    root = graph.add(source)
    functions()  # the loader's own library, before it is asked which there are
    stand_ins.make()
    graph.complete()
    clock.ends("parse")
    for library in graph.new:
        map_library(graph, library)
    clock.ends("map")
    scope: list[Definer] = [library for library in graph.listing.found if library.is_global]
    scope += (library for library in root.local_scope(graph.listing) if library not in scope)
    order = [library for library in _sort(root) if library in graph.new]
    for library in linking_order(order, scope):
        link_library(graph, library, scope)
    clock.ends("relocate")
    if graph.policy.gdb:
        _show_to_debugger(order, clock)
    _present.extend(graph.new)
    if graph.policy.init:
        for library in graph.new:
            stand_ins.add(library)
        # All are read before any runs: a page of the file that is gone must not be met half-way.
        constructors = [read_life(library) for library in order]
        for library, addresses in zip(order, constructors, strict=True):
            initialise_library(graph, library, addresses)
    clock.ends("init")
    return root


def _show_to_debugger(libraries: Sequence[Loaded], clock: _Clock) -> None:
    from miniloader.loader.beside_glibc.debugger import register

    for library in libraries:
        if library.debugging is None:
            library.debugging = register(library.image, library.bias)
    clock.ends("gdb")


def _quoted(path: str) -> str:
    """``path`` as gdb reads an argument (buildargv of libiberty)."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sort(root: Loaded) -> list[Loaded]:
    """``root`` and what of ours it needs, in the order they are initialised, which is noted in it."""
    items = [root]
    for library in items:  # grows meanwhile: breadth first
        items += (other for other in library.ours if other not in items)
    order = constructors.constructor_order(items, lambda library: library.before)
    root.before = order[::-1]
    return order


def _address_of(library: Loaded, index: int) -> int:
    _, info, _, shndx, value, _ = library.symbols.rows[index].item()
    if info & 0xF == STT_TLS and library.blocks.own is not None:
        return thread_local.address_of(library.blocks.own, value)
    address = value if shndx == SHN_ABS else library.bias + value
    return call_resolver(address) if info & 0xF == STT_GNU_IFUNC else address


def _similar(library: Loaded, name: str) -> str | None:
    """A hint: the defined names that look like ``name``."""
    import difflib

    table = library.symbols
    names = [table.name(index) for index in np.flatnonzero(table.defined).tolist()]
    close = difflib.get_close_matches(name, names, 3)
    return f"did you mean {', '.join(close)}?" if close else None


def _undo(graph: Graph) -> None:
    """Take back everything of a load that failed."""
    for library in reversed(graph.new):
        if library in _present:
            _finalise(library)  # whoever listens has raised between two constructors
    _release(graph.new[::-1])
    for library in graph.new:
        if library not in _lingering:
            library.image.source.close()


def _sweep(closed: Loaded) -> None:
    """Finalise and unmap what no caller holds any more, nor anything that is held (cycles, too)."""
    kept = [
        library
        for library in _present
        if library.handles
        or library.stays
        or stand_ins.is_held(library)
        or (library.initialised and library.image.dynamic.flag(DT_FLAGS_1, DF_1_NODELETE))
    ]
    _add_what_they_use(kept)
    gone = [library for library in _in_destructor_order(closed) if library not in kept]
    for library in gone:
        _finalise(library)
    _release(gone)


def _release(gone: list[Loaded]) -> None:
    """Unmap these, and what had to wait, but for what has to wait still."""
    gone += (library for library in _lingering if library not in gone)
    for library in gone:
        library.blocks.close()  # one carrier may be what another one waits for
    waiting = [library for library in gone if not library.blocks.close()]
    _add_what_they_use(waiting)
    _lingering[:] = [library for library in gone if library in waiting or not library.discard()]


def _add_what_they_use(libraries: list[Loaded]) -> None:
    for library in libraries:  # grows meanwhile
        libraries += (other for other in (*library.ours, *library.holds) if other not in libraries)


def _in_destructor_order(closed: Loaded | None = None) -> list[Loaded]:
    return constructors.destructor_order(
        _present, lambda library: library.before, lambda library: library.holds, closed
    )


def _finalise(library: Loaded) -> None:
    _present.remove(library)
    if library.initialised:
        library.initialised = False
        for address in library.destructors:
            constructors.run_destructor(address)


@atexit.register
def _finalise_all() -> None:
    """At the end of the process all finalisers run; nothing is unmapped."""
    with _lock:
        for library in _in_destructor_order():
            _finalise(library)


def _after_fork() -> None:
    """A thread that held the lock is not in the child."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
