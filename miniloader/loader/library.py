"""``load``: from a file to running code, step by step, and back again."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np

from miniloader.elf import ElfImage, LoadPlan, Source
from miniloader.elf.dynamic import DF_1_NODELETE, DT_FLAGS_1
from miniloader.elf.symbols import SHN_ABS, STT_GNU_IFUNC, STT_TLS
from miniloader.elf.tables import Table
from miniloader.errors import LoadError, SymbolError, UsageError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import host, life, tls, unwind
from miniloader.loader.events import OnEvent
from miniloader.loader.host import HostLibrary
from miniloader.loader.loaded import Binding, Graph, Loaded, Policy
from miniloader.loader.memory import map_plan, zero_tails
from miniloader.loader.relocate import Pages, apply, call_resolver, sort_relocations
from miniloader.loader.scope import Bindings, Definer
from miniloader.loader.scope import bind as bind_symbols
from miniloader.loader.search import find_path
from miniloader.machine.relocation import Kind

__all__ = ["Library", "load"]

_lock: Final = threading.RLock()
# Reach for these two only with the lock held.
_loaded: Final[dict[tuple[int, int, int], Loaded]] = {}  # by device, inode and offset in the file
_order: Final[list[Loaded]] = []  # as they were initialised


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
    def _open(self) -> Loaded:
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
        return self._open.bias

    @property
    def image(self) -> ElfImage:
        """What its file says."""
        return self._open.image

    @property
    def plan(self) -> LoadPlan:
        """How it is mapped, in vaddrs."""
        return self._open.plan

    @property
    def libraries(self) -> tuple[Loaded | HostLibrary, ...]:
        """It and everything it needs, breadth first; a ``HostLibrary`` is the process's own."""
        return tuple(self._open.local_scope())

    def address(self, name: str, version: str | None = None) -> int:
        """The address of the defined symbol ``name``, here or (as dlsym(3) looks) in what it needs.

        An IFUNC is resolved; a thread-local symbol gives the calling thread's.  Raises :class:`SymbolError`.
        """
        for library in self._open.local_scope():
            if isinstance(library, HostLibrary):
                found = host.symbol_address(library.handle, os.fsencode(name), version)
                if found is not None:
                    return found
                continue
            index = library.symbols.find(name, version)
            if index is not None:
                return _address_of(library, index)
        label = name if version is None else f"{name}, version {version}"
        raise SymbolError(f"{self._name}: no symbol {label}", hint=_similar(self._open, name))

    def function(
        self, name: str, restype: Any = ctypes.c_int, argtypes: Sequence[Any] = (), **options: Any
    ) -> Any:
        """The function ``name`` as a ctypes function; ``options`` are those of :func:`ctypes.CFUNCTYPE`."""
        prototype = ctypes.CFUNCTYPE(restype, *argtypes, **options)
        return prototype(self.address(name, options.pop("version", None)))

    def close(self) -> None:
        """Run the finalisers and unmap, if nobody else uses it; a second call does nothing.

        Whatever points into it (functions, data) must not be used any more.
        """
        with _lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                _release(loaded)


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
) -> Library:
    """Load the shared library ``path`` as dlopen(3) does, but ourselves.

    A bare name is searched as ld.so searches.  ``path`` may also be a :class:`~miniloader.elf.Source` (a
    descriptor, bytes in memory).  With ``init=False`` nothing of the library runs: no constructor, and no
    IFUNC resolver (their slots stay 0).  With ``init=True`` its own code does, which can do anything.
    ``bind="lazy"`` leaves PLT slots until they are first called.  ``address`` asks for its first page to be
    there.  The other three allow what is refused otherwise.  ``on_event`` hears of each step as it is done.

    Raises :class:`ElfError` when the file is at fault, else :class:`LoadError`; nothing stays mapped then.
    """
    if bind not in ("now", "lazy"):
        raise UsageError(f"bind={bind!r}: expected 'now' or 'lazy'")
    policy = Policy(init, bind, address, text_relocations, executable_stack, writable_code)
    clock = _Clock()
    with _lock:
        source = path if isinstance(path, Source) else Source.open(find_path(path))
        known = _loaded.get((*source.identity, source.start))
        if known is not None and address in (None, known.mapped.start):
            known.users += 1
            return Library(known, clock.stages)
        graph = Graph(policy, _known, on_event)
        with ExitStack() as undo:
            undo.callback(_undo, graph)
            root = _load(graph, source, clock)
            undo.pop_all()
        return Library(root, clock.stages)


class _Clock:
    """Adds up what each stage takes, in milliseconds."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + (time.perf_counter() - start) * 1e3


def _known(key: tuple[int, int, int] | None, name: str) -> Loaded | None:
    if key is not None:
        return _loaded.get(key)
    names = (
        (library, (library.image.soname, os.path.basename(library.name))) for library in _loaded.values()
    )
    return next((library for library, both in names if name in both), None)


def _load(graph: Graph, source: Source, clock: _Clock) -> Loaded:
    with clock.stage("parse"):
        root = graph.add(source)
        graph.complete()
    for library in graph.new:
        with clock.stage("map"):
            _map(graph, library)
    scope: list[Definer] = [library for library in host.libraries() if library.is_global]
    scope += root.local_scope()
    order = life.in_order(graph.new, lambda library: [n for n in library.needs if isinstance(n, Loaded)])
    for library in order:
        with clock.stage("relocate"):
            _link(graph, library, scope)
    for library in order:
        _loaded[library.key] = library
        _order.append(library)
        for needed in library.needs:
            if isinstance(needed, Loaded) and needed is not library:
                needed.users += 1
        if graph.policy.init:
            with clock.stage("init"):
                _initialise(graph, library)
    root.users += 1
    return root


def _map(graph: Graph, library: Loaded) -> None:
    image = library.image
    plan = image.plan(PAGE_SIZE)
    wanted = graph.policy.address if library is graph.new[0] else None
    memory = map_plan(plan, image.source, address=wanted)
    library.memory = memory
    library.undo.callback(memory.unmap)
    text = f"{plan.length:#x} bytes at {memory.start:#x}"
    graph.event("reserve", image.path, text, address=memory.start, length=plan.length)
    for mapping in plan.mappings:
        start, end = memory.bias + mapping.start, memory.bias + mapping.end
        text = f"{start:#x}-{end:#x} {mapping.protection} {mapping.kind}"
        if mapping.kind == "file":
            text += f", offset {mapping.file_offset:#x}"
        graph.event("map", image.path, text, bias=memory.bias, mapping=mapping)
    zeroed = zero_tails(memory)
    if zeroed:
        graph.event("zero", image.path, f"{zeroed} bytes of bss in file pages", bytes=zeroed)


def _link(graph: Graph, library: Loaded, scope: list[Definer]) -> None:
    image, memory = library.image, library.mapped
    own = scope.index(library)
    relocations = sort_relocations(image)
    first = [library, *scope] if image.dynamic.symbolic else scope
    bindings = bind_symbols(image.symbols, relocations.wanted, first, 0 if image.dynamic.symbolic else own)
    graph.event("bind", image.path, f"{len(bindings.wanted)} symbols", bindings=bindings)
    read_only = [m for m in memory.plan.mappings if m.kind == "file" and "w" not in m.protection]
    if image.dynamic.text_relocations:
        for mapping in read_only:
            memory.protect(mapping.start, mapping.end, "rw" + mapping.protection[2])
    copied = apply(
        image,
        memory,
        relocations,
        bindings,
        lambda pages, rows: _thread_local(library, bindings, pages, rows),
    )
    if image.tls is not None and library.blocks.own is not None:
        library.undo.callback(library.blocks.close)
        text = f"module {library.blocks.own.module}, {image.tls.memsz} bytes a thread"
        graph.event("tls", image.path, text, module=library.blocks.own.module, bytes=image.tls.memsz)
    if image.dynamic.text_relocations:
        for mapping in read_only:
            memory.protect(mapping.start, mapping.end, mapping.protection)
    total = len(image.relocations)
    graph.event("relocate", image.path, f"{total} words on {copied} pages", words=total, pages=copied)
    relro = memory.plan.relro
    if relro:
        memory.protect(relro.start, relro.end, "r--")
        graph.event(
            "protect",
            image.path,
            f"{relro.start:#x}-{relro.end:#x} r--",
            start=relro.start,
            end=relro.end,
        )
    table = unwind.eh_frame(image)
    if table is not None and unwind.register(memory.bias + table):
        library.undo.callback(unwind.deregister, memory.bias + table)
        graph.event("register", image.path, ".eh_frame, for exceptions", vaddr=table)


def _thread_local(
    library: Loaded, bindings: Bindings, pages: Pages, rows: Iterator[tuple[Kind, Table]]
) -> list[tls.Write]:
    """Give ``library`` its thread-local storage; what is to be written."""
    template = library.image.tls
    blocks, writes = tls.answer(
        library,
        template,
        lambda: pages.bytes_at(template.vaddr, template.filesz) if template is not None else b"",
        bindings,
        rows,
        lambda other: other.blocks.own if isinstance(other, Loaded) else None,
    )
    library.blocks = blocks
    return writes


def _initialise(graph: Graph, library: Loaded) -> None:
    for address in life.constructors(library.image, library.mapped):
        graph.event("initialise", library.name, f"call {address:#x}", address=address)
        life.run_constructor(address)
    library.initialised = True


def _address_of(library: Loaded, index: int) -> int:
    _, info, _, shndx, value, _ = library.symbols.rows[index].item()
    if info & 0xF == STT_TLS and library.blocks.own is not None:
        return tls.address_of(library.blocks.own, value)
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
        _loaded.pop(library.key, None)
        if library in _order:
            _order.remove(library)
        library.undo.close()
    for handle in graph.host_handles:
        host.close_host(handle)


def _release(library: Loaded) -> None:
    """One user fewer; without any, finalise and unmap it, and release what it needs."""
    library.users -= 1
    if library.users > 0 or library.image.dynamic.flag(DT_FLAGS_1, DF_1_NODELETE):
        return
    _finalise(library)
    _loaded.pop(library.key, None)
    library.undo.close()
    for needed in library.needs:
        if isinstance(needed, Loaded) and needed is not library:
            _release(needed)


def _finalise(library: Loaded) -> None:
    if library in _order:
        _order.remove(library)
    if library.initialised:
        library.initialised = False
        for address in life.destructors(library.image, library.mapped):
            life.run_destructor(address)


@atexit.register
def _finalise_all() -> None:
    """At the end of the process, finalisers run in the reverse order of construction; nothing is unmapped."""
    with _lock:
        for library in reversed(_order.copy()):
            _finalise(library)
