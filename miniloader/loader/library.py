"""``Library``: what a caller has of a library that is loaded: its symbols, and the right to close it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from miniloader.arrays import np
from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.symbols import SHN_ABS, STB_GNU_UNIQUE, STT_GNU_IFUNC, STT_TLS
from miniloader.errors import LoadError, SymbolError
from miniloader.forking import importing
from miniloader.loader import unload
from miniloader.loader.beside_glibc import dynamic_linker, gnu_unique, thread_local
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.loaded import Loaded
from miniloader.loader.relocate import call_resolver
from miniloader.loader.scope import WEAK_GIVES_WAY, find_name, is_weak
from miniloader.showing import Showing

if TYPE_CHECKING:
    from ctypes import _CFunctionType as CFunction

__all__ = ["Library", "find_symbol"]


class Library(Showing):
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

    def __getattr__(self, name: str) -> CFunction:
        """The function ``name`` as a ctypes function that returns an int, kept, as ``ctypes.CDLL`` does it.

        Its ``restype`` and ``argtypes`` can be set.  Names that are Library's own, or of Python
        (``__len__``), are not looked up: ``library["close"]`` finds those, too.  SymbolError, which is an
        AttributeError, too, where there is none.
        """
        if name == "_loaded" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        function = self[name]
        setattr(self, name, function)
        return function

    def __getitem__(self, name: str) -> CFunction:
        """The function ``name`` as a new ctypes function that returns an int; SymbolError without it."""
        function: CFunction = self.function(name)
        return function

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._loaded is None

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
        """The library and everything it needs, breadth first; a ``HostLibrary`` is the process's own."""
        return tuple(self.loaded.local_scope())

    def address(self, name: str, version: str | None = None) -> int:
        """The address of the defined symbol ``name``, here or (as dlsym(3) looks) in what it needs.

        An IFUNC is resolved; a thread-local symbol gives the calling thread's.  Raises :class:`SymbolError`.
        """
        definition = find_symbol(self.loaded.local_scope(), os.fsencode(name), version)
        if definition is not None:
            return definition[0]
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
        with importing:
            from miniloader.loader.beside_glibc.debugger import file_of

        libraries = [library for library in self.loaded.local_scope() if isinstance(library, Loaded)]
        files = [(file_of(library.image.source), library.bias) for library in libraries]
        return tuple(f"add-symbol-file {_quoted(path)} -o {bias:#x}" for path, bias in files if path)

    def close(self) -> None:
        """Run the finalisers and unmap, if nobody else uses it; a second call does nothing.

        Whatever points into it (functions, data) must not be used any more.
        """
        with unload.lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                unload.let_go(loaded)


def _quoted(path: str) -> str:
    """``path`` as gdb reads an argument (buildargv of libiberty)."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def find_symbol(
    libraries: Iterable[Loaded | HostLibrary], name: bytes, version: str | None = None
) -> tuple[int, Loaded | HostLibrary] | None:
    """The address of ``name`` in the first of ``libraries`` that has it, and which that is.

    An IFUNC is resolved; a thread-local symbol gives the calling thread's.  Without a ``version`` it is the
    newest, as dlsym(3) has it.
    """
    if WEAK_GIVES_WAY:
        libraries = sorted(libraries, key=partial(is_weak, name))
    for library in libraries:
        address = (
            dynamic_linker.symbol_address(library.handle, name, version)
            if isinstance(library, HostLibrary)
            else _address_of(library, name, version)
        )
        if address is not None:
            return address, library
    return None


def _address_of(library: Loaded, name: bytes, version: str | None) -> int | None:
    """The address of the symbol in ``library``, ``None`` where that does not define it."""
    if version is None:
        owner, _, address, value, _, info, _ = find_name(name, [library], newest=True)
        if owner < 0:
            return None
    else:
        index = library.symbols.find(os.fsdecode(name), version)
        if index is None:
            return None
        _, info, _, shndx, value, _ = library.symbols.rows[index].item()
        address = value if shndx == SHN_ABS else library.bias + value
    if info & 0xF == STT_TLS and library.blocks.own is not None:
        return thread_local.address_of(library.blocks.own, value)
    if info >> 4 == STB_GNU_UNIQUE:
        address, definer = gnu_unique.settled(name, address, library)
        if definer is not None:
            library.share(definer)
        return address
    return call_resolver(address) if info & 0xF == STT_GNU_IFUNC else address


def _similar(library: Loaded, name: str) -> str | None:
    """A hint: the versions that ``name`` has, else the defined names that look like it."""
    with importing:
        from miniloader.suggestions import did_you_mean, in_versions

    table = library.symbols
    versions = in_versions(name, table.versions_of(os.fsencode(name)))
    return versions or did_you_mean(
        name, (table.name(index) for index in np.flatnonzero(table.defined).tolist())
    )
