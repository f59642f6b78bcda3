"""``Loading`` and ``load``: from a file to running code, one step at a time or at once.

``map`` finds the library and what it needs, and maps them; nothing is written yet.  ``link`` binds their
symbols and writes what has to be relocated; nothing of them has run yet, but what choosing among functions
takes (IFUNC).  ``initialise`` runs their constructors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from miniloader.elf import ElfImage, Source
from miniloader.elf.dynamic import DF_1_INITFIRST, DT_FLAGS_1
from miniloader.errors import UsageError
from miniloader.forking import importing
from miniloader.loader import unload
from miniloader.loader.beside_glibc import stand_ins
from miniloader.loader.constructors import (
    read_constructors,
    read_preinitialisers,
)
from miniloader.loader.events import OnEvent
from miniloader.loader.graph import Graph, Needed
from miniloader.loader.library import Library
from miniloader.loader.link import link_library, linking_order
from miniloader.loader.loaded import Loaded, move_before
from miniloader.loader.mapping import map_library, zero_bss
from miniloader.loader.policy import Binding, Policy
from miniloader.loader.scope import Bindings, Definer
from miniloader.loader.surroundings import find_path
from miniloader.native import functions

__all__ = ["Loading", "can_answer", "load"]

_STEPS: Final = ("map", "link", "initialise")
_NEXT: Final = {name: f"{name}() comes next" for name in _STEPS}
_BEGUN: Final = {name: f"{name}() has begun" for name in _STEPS}
_HINT: Final = "the steps of a load are map(), link() and initialise(), each once"


class _Step:
    """A step of a load, from when it begins until it ends, with the lock held; what fails is undone."""

    def __init__(self, steps: Loading, name: str, then: str) -> None:
        self._steps, self._name, self._then = steps, name, then

    def __enter__(self) -> None:
        steps, name = self._steps, self._name
        if steps._state != _NEXT[name]:
            raise UsageError(f"{steps._name}: {name}() is called out of turn: {steps._state}", hint=_HINT)
        unload.lock.__enter__()
        steps._state, steps._since = _BEGUN[name], time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._steps._state = self._then
            else:
                self._steps._undo()
        finally:
            unload.lock.__exit__()


class Loading:
    """A load in three steps, each taken once, in order: :meth:`map`, :meth:`link`, :meth:`initialise`.

    A context manager: leaving it before the last step is done takes everything back, and so does a step that
    fails.  After the last step :attr:`library` is the caller's, to close.  Between the steps nobody else has
    what is being loaded: another load of the file maps it again.  The arguments are those of :func:`load`.

    >>> import miniloader
    >>> with miniloader.Loading("libz.so.1") as steps:
    ...     libz, *needed = steps.map()
    ...     bindings = steps.link()[libz]
    ...     constructors = steps.initialise()[libz]
    >>> steps.library.base == libz.bias
    True
    >>> steps.library.close()
    """

    def __init__(
        self,
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
    ) -> None:
        if bind not in ("now", "lazy"):
            raise UsageError(f"bind={bind!r}: expected 'now' or 'lazy'")
        if prepared and bind == "lazy":
            raise UsageError("what is prepared is bound already: bind='lazy' is for the plain way")
        #: What is to be loaded, as the caller gave it.
        self.path = path
        policy = Policy(init, bind, address, text_relocations, executable_stack, writable_code, prepared, gdb)
        name = path.name if isinstance(path, Source) else os.fspath(path)
        self._begin(name, Graph(policy, on_event))
        self._graph.keeps_bindings = True

    @classmethod
    def for_caller(
        cls,
        source: Source,
        image: ElfImage | None,
        name: str,
        policy: Policy,
        asked_in: Graph,
    ) -> Loading:
        """The load of a file that has been found for somebody who has called dlopen(3) for ``name``.

        As in ld.so the paths of who has called count for this file, and not for what it needs.  ``image`` is
        what is in it, if that has been read.
        """
        steps = cls.__new__(cls)
        steps.path = source
        steps._begin(name, Graph(policy, asked_in.tell, asked_in), image)
        return steps

    def _begin(self, name: str, graph: Graph, image: ElfImage | None = None) -> None:
        self._name = name  # that was asked for
        self._graph = graph
        self._image = image
        #: The libraries that :meth:`map` has mapped, breadth first: the one asked for, then what it needs.
        #: Empty where this process had it already, which is then shared.
        self.mapped: tuple[Loaded, ...] = ()
        #: The constructors that :meth:`initialise` runs: the addresses of each library's, in order.
        self.constructors: dict[Loaded, list[int]] = {}
        #: Milliseconds that each stage took.
        self.stages_ms: dict[str, float] = {}
        #: What :meth:`link` has bound the symbols of each mapped library to; those that take their relocated
        #: pages from the cache bind nothing, and are not among them.
        self.bindings: dict[Loaded, Bindings] = self._graph.bindings
        self._root: Loaded | None = None
        self._order: list[Loaded] = []  # those mapped, as they are initialised
        self._library: Library | None = None
        self._state = _NEXT["map"]
        self._since = 0.0

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is None:
            self._undo()

    @property
    def library(self) -> Library:
        """What has been loaded; :class:`UsageError` before the last step is done."""
        if self._library is None:
            raise UsageError(f"{self._name}: is not loaded: {self._state}", hint=_HINT)
        return self._library

    def map(self) -> tuple[Loaded, ...]:
        """Find the library and all that it needs, and map them: see :attr:`mapped`.

        Where the process has the library already, it gets another handle, and there is nothing to do in any
        step.
        """
        with _Step(self, "map", then=_NEXT["link"]):
            source = self.path if isinstance(self.path, Source) else Source.open(find_path(self.path))
            self._root = self._share(source) or self._map(source)
        return self.mapped

    def link(self) -> dict[Loaded, Bindings]:
        """Bind symbols, write the words that are relocated, take away rights: see :attr:`bindings`."""
        with _Step(self, "link", then=_NEXT["initialise"]):
            if self.mapped:  # what is new has come in order
                self._asked_for.settle(self._graph.listing)
            else:
                self._asked_for.settle(move=partial(move_before, unload.present))
            order = self._asked_for.before[::-1]
            self._order = [library for library in order if library in self.mapped]
            if self.mapped:
                self._link()
            if self._graph.policy.gdb:
                _show_to_debugger(self._order or order)
                self._took("gdb")
        return self.bindings

    def initialise(self) -> dict[Loaded, list[int]]:
        """Run the constructors, of what is needed first: see :attr:`constructors`."""
        with _Step(self, "initialise", then="all steps are taken"):
            if self.mapped:
                self._initialise()
            self._library = Library(self._asked_for, self.stages_ms)
        return self.constructors

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _asked_for(self) -> Loaded:
        assert self._root is not None  # once it is mapped
        return self._root

    def _undo(self) -> None:
        """Take back whatever the steps have done."""
        with unload.lock:
            self._state = "what was done is undone"
            new, self._graph.new, root, self._root = self._graph.new, [], self._root, None
            unload.take_back(new, self._graph.order)
            if root is not None and root not in new:
                unload.let_go(root)

    def _took(self, stage: str) -> None:
        """What has been done since the last one was this ``stage``."""
        since, self._since = self._since, time.perf_counter()
        self.stages_ms[stage] = (self._since - since) * 1e3

    def _share(self, source: Source) -> Loaded | None:
        """One more handle of what this process has of the file, initialised as this one is to be."""
        policy = self._graph.policy
        key, init = source.key, policy.init
        same = unload.of_file(key, unload.present)
        library = next((library for library in same if library.policy.init == init), None)
        if library is None or policy.address not in (None, library.mapped.start):
            return None
        library.handles += 1
        return library

    def _map(self, source: Source) -> Loaded:
        graph = self._graph
        root = graph.add(source, None, self._image)
        root.call(self._name)
        root.will_stay |= graph.policy.stays
        functions()  # the loader's own library, before it is asked which there are
        graph.complete()
        self._took("parse")
        for library in graph.new:
            map_library(graph, library)
        self._took("map")
        self.mapped = tuple(graph.new)
        unload.unfinished.update(graph.new)
        return root

    def _link(self) -> None:
        for library in self.mapped:
            zero_bss(self._graph, library)
            if library.image.executable_stack and self._graph.policy.init:
                with importing:
                    from miniloader.loader.beside_glibc import stack

                stack.make_executable(library.name)
                self._graph.event("protect", library.name, "stacks are executable from now on")
        listing, policy = self._graph.listing, self._graph.policy
        # ld.so's global scope comes first, then the library and what it needs.
        local = self._asked_for.scope
        process: list[Needed] = [*listing.global_scope, *unload.global_scope]
        scope: list[Definer] = list(dict.fromkeys([*local, *process] if policy.deep else [*process, *local]))
        for library in linking_order(self._order, scope):
            link_library(self._graph, library, scope)
        self._took("relocate")

    def _initialise(self) -> None:
        unload.enter(self._graph.order, self.mapped)
        if self._graph.policy.init:
            for library in self.mapped:
                _show_to_libraries(library)
            # All are read before any runs: a page of the file that is gone must not be met half-way.
            order, root = self._initialisation_order(), self._asked_for
            for library in order:
                if library in self.mapped:
                    library.waiting, library.destructors = read_constructors(library.image, library.mapped)
                    self.constructors[library] = library.waiting
            at = int(order[0] in self.mapped and order[0].image.dynamic.flag(DT_FLAGS_1, DF_1_INITFIRST))
            for library in order[:at]:
                library.run_waiting()
            root.run(read_preinitialisers(root.image, root.mapped))
            for library in order[at:]:
                library.run_waiting()
        if self._graph.policy.is_global:  # which as with ld.so no constructor has seen
            unload.make_global(self._asked_for.scope)
        unload.unfinished.difference_update(self.mapped)
        self._asked_for.handles += 1
        self._took("init")

    def _initialisation_order(self) -> list[Loaded]:
        """The last one mapped of those with DF_1_INITFIRST comes before all others, as in glibc.

        Of what was there some may have constructors that wait: who asks is one of those before them.
        """
        first = [library for library in self.mapped if library.image.dynamic.flag(DT_FLAGS_1, DF_1_INITFIRST)]
        order = self._asked_for.before[::-1]
        return sorted(order, key=lambda library: library not in first[-1:])


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
    """Load the shared library ``path`` as dlopen(3) does, but ourselves: all steps of a :class:`Loading`.

    A bare name is searched as ld.so searches.  ``path`` may also be a :class:`~miniloader.elf.Source` (a
    descriptor, bytes in memory).  With ``init=False`` nothing of the library runs: no constructor, and no
    IFUNC resolver (their slots stay 0).  With ``init=True`` its own code does, which can do anything.
    ``bind="lazy"`` leaves PLT slots until they are first called.  ``address`` asks for its first page to be
    there.  ``prepared`` takes relocated pages from the cache, at the address they were made for (see
    :func:`miniloader.prepare`), or says in an event why it does not.  ``gdb`` shows the library, and
    what is loaded with it, to a debugger, before its constructors run.  The others allow what else is
    refused.  ``on_event`` hears of each thing as it is done.

    Raises :class:`ElfError` when the file is at fault, else :class:`LoadError`; nothing stays mapped then.

    >>> import ctypes, miniloader
    >>> with miniloader.load("libz.so.1") as libz:
    ...     crc32 = libz.function("crc32", ctypes.c_ulong, [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_uint])
    ...     hex(crc32(0, b"hello", 5))
    '0x3610a686'
    """
    steps = Loading(
        path,
        init,
        bind,
        on_event,
        address=address,
        text_relocations=text_relocations,
        executable_stack=executable_stack,
        writable_code=writable_code,
        prepared=prepared,
        gdb=gdb,
    )
    steps._graph.keeps_bindings = False  # nobody can ask for them
    with unload.lock, steps:
        steps.map()
        steps.link()
        steps.initialise()
    return steps.library


def _answer(place: int) -> int:
    """Answer the question at the address ``place``; what that takes is imported for the first one.

    Many libraries are bound to dlopen(3), and few ever call it.
    """
    try:
        with unload.lock:  # the limit is one for all threads
            return _answer_deep_in_calls(place)
    except RecursionError:  # there is no room for the lock: ld.so answers, which needs none
        return 0


def _answer_deep_in_calls(place: int) -> int:
    limit = sys.getrecursionlimit()
    raised = min(limit + _DEPTH, _MOST_CALLS)
    sys.setrecursionlimit(raised)
    try:
        if not _answering:
            with importing:
                from miniloader.loader.from_inside import answer
            _answering.append(answer)
        return _answering[0](place, _load_for_caller)
    finally:
        if sys.getrecursionlimit() == raised:
            _set_recursion_limit(limit)


#: Calls within calls, many times what a load takes: who asks may be deep in its own, and has not made ours.
_DEPTH: Final = 500
_MOST_CALLS: Final = (1 << 31) - 1
#: Python's own refuses a limit that what is being called has reached.
_set_recursion_limit: Final = ctypes.pythonapi.Py_SetRecursionLimit
_answering: Final[list[Callable[..., int]]] = []


def _load_for_caller(
    source: Source, image: ElfImage | None, name: str, policy: Policy, asked_in: Graph
) -> Loaded:
    with Loading.for_caller(source, image, name, policy, asked_in) as steps:
        steps.map()
        steps.link()
        for library in steps.mapped:
            library.image.source.rest()  # the program's own files get the numbers that they would have
        steps.initialise()
    return steps.library.loaded


stand_ins.answer_with(_answer)


def can_answer() -> bool:
    """Whether dlopen(3) and its like can lead to us in this process, whoever calls them; from now on they can
    be led there."""
    return bool(stand_ins.by_name())


def _show_to_libraries(library: Loaded) -> None:
    """Have dladdr(3) and its like, which libraries of ours call, know the library."""
    memory, carrier = library.mapped, library.blocks.own
    module = carrier.module if carrier is not None else 0
    stand_ins.add(library.image, memory, library.symbol_count, module)
    library.undo.callback(stand_ins.remove, memory)


def _show_to_debugger(libraries: Sequence[Loaded]) -> None:
    with importing:
        from miniloader.loader.beside_glibc.debugger import register

    for library in libraries:
        if library.debugging is None:
            library.debugging = register(library.image, library.bias)
            library.undo.callback(library.debugging.withdraw)
