"""One library of ours in this process: its pages, what it needs, and how all of it is taken back.

A :class:`Loaded` is the mapping itself, shared by every caller and every library that needs it, and counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import compress, repeat
from operator import attrgetter, contains
from typing import TYPE_CHECKING, Final, TypeVar

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.dynamic import DF_1_NODELETE, DT_FLAGS_1
from miniloader.elf.symbols import SymbolTable
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import gnu_unique, host, stand_ins
from miniloader.loader.beside_glibc.code_page import CodePage
from miniloader.loader.beside_glibc.host import HostLibrary, HostListing
from miniloader.loader.beside_glibc.thread_local import Blocks
from miniloader.loader.beside_glibc.tls_carrier import Carrier
from miniloader.loader.constructors import constructor_order, run_constructors
from miniloader.loader.events import OnEvent, tell
from miniloader.loader.memory import Memory
from miniloader.loader.policy import Policy
from miniloader.loader.scope import Definer
from miniloader.loader.search import Asker
from miniloader.loader.spans import open_names, readable
from miniloader.loader.symbol_lookup import MappedSymbols

if TYPE_CHECKING:
    from miniloader.loader.beside_glibc.debugger import Registered
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["Loaded", "called_so", "move_before", "search_order"]

T = TypeVar("T")


def _stay(filtee: object, library: object) -> None:
    """Nobody hears of a filtee."""


def _working_directory() -> str | None:
    """The current directory, where the path that a file was opened by begins; None where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None


_ANSWERS_TO: Final = attrgetter("answers_to")


class Undo:
    """What gives back whatever was made, the last thing first."""

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def callback(self, function: Callable[..., object], *arguments: object) -> None:
        """To be called when all is given back."""
        self._calls.append((function, arguments))

    def close(self) -> None:
        """Give all back; what one call raises is raised when the others are made."""
        while self._calls:
            function, arguments = self._calls.pop()
            try:
                function(*arguments)
            except BaseException:
                self.close()
                raise


class Loaded:
    """One library, from when its file is open; it is a :class:`~miniloader.loader.scope.Definer` for others.

    ``undo`` is what takes it back, the last thing first: whoever makes something for it pushes there how that
    is given back.
    """

    def __init__(
        self, image: ElfImage, needed_by: Loaded | None, policy: Policy, tell: OnEvent | None = None
    ) -> None:
        self.image = image
        self.key = image.source.key  # what tells its file from others
        self.policy = policy
        self.tell = tell  # who hears of its load, and of those that it asks for itself
        self.undo = Undo()
        self.needed_by = needed_by  # whose need brought it, while that is there: ld.so's l_loader
        self.called = {image.path}  # the names that it was found by: ld.so's l_name and l_libname
        self.answers_to = {image.path, image.soname}  # these, and its SONAME
        self.needs: list[Loaded | HostLibrary] = []  # in the order in which its dynamic section has them
        self.filtees: list[Loaded | HostLibrary] = []  # those whose symbols come before its own
        # What of ours is initialised before it: of what a caller asked for all (ld.so's l_initfini).
        self.before: list[Loaded] = []
        self.roots: list[
            Loaded
        ] = []  # what callers asked for and needs it: its symbols are found from these on
        # Where symbols are looked up from it on, once that is settled (ld.so's l_searchlist).
        self.scope: list[Loaded | HostLibrary] = []
        self.holds: list[Loaded] = []  # what it is bound to without needing it (ld.so's l_reldeps)
        self.memory: Memory | None = None
        self.blocks = Blocks()  # of thread-local storage
        self.exits: Carrier | None = None  # for which glibc counts the destructors of its threads' objects
        self.stubs: dict[int, CodePage] = {}  # by the function that each stands for
        self.debugging: Registered | None = None  # what gdb is told of it
        self.ready: Prepared | None = None  # its relocated pages, while they may be of use
        self.not_prepared: str | None = None  # why they were asked for, and are of no use
        self.handles = 0  # how many callers hold it
        # Whether it is never unmapped, once its load is complete; and whether that is so (NODELETE).
        self.will_stay, self.stays = image.dynamic.flag(DT_FLAGS_1, DF_1_NODELETE), False
        self.shared = False  # whether others may be bound to a unique symbol of it
        self.waiting: list[int] | None = None  # the addresses of constructors that have yet to run, in order
        self.bind_left: Callable[[], None] | None = None  # binds the slots of its PLT that are left
        self.destructors: list[int] = []  # their addresses, in order
        self.initialised = False
        self.may_open = False  # whether it is bound to dlopen(3)
        self._names: MappedSymbols | None = None
        self._asker: tuple[Asker | None, Asker] | None = None  # who needed it, and itself
        self._opened_in = None if image.path.startswith("/") else _working_directory()

    def __repr__(self) -> str:
        return f"<Loaded {self.name!r} {f'at {self.bias:#x}' if self.is_mapped else 'not mapped'}>"

    @property
    def name(self) -> str:
        """The path of its file, which is what messages call it."""
        return self.image.path

    @property
    def plan(self) -> LoadPlan:
        """How it is mapped, in vaddrs."""
        return self.mapped.plan

    @property
    def is_mapped(self) -> bool:
        """Whether its pages are in memory: not before it is mapped, nor once it is closed."""
        return self.memory is not None and self.memory.mapped

    @property
    def mapped(self) -> Memory:
        """Its pages in memory; :class:`LoadError` before they are mapped and once it is closed."""
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
    def names(self) -> MappedSymbols:
        """Its dynamic symbols where they lie in memory, to be looked up by name."""
        if self._names is None:
            spans = readable(self.image, self.plan)
            prepared = self.ready is not None  # and looked at then
            self._names = open_names(self.image, spans, self.bias, check=not prepared)
        return self._names

    @names.setter
    def names(self, names: MappedSymbols) -> None:
        self._names = names

    @property
    def symbol_count(self) -> int:
        """How many dynamic symbols it has."""
        return self.ready.symbols if self.ready is not None else len(self.names)

    @property
    def build_id(self) -> str | None:
        """Its build-id, in hexadecimal."""
        return self.image.build_id

    def call(self, name: str) -> None:
        """Note that the library was found by ``name``."""
        self.called.add(name)
        self.answers_to.add(name)

    @property
    def ours(self) -> list[Loaded]:
        """What it needs that the system's loader does not have."""
        return [needed for needed in self.needs if isinstance(needed, Loaded)]

    @property
    def edges(self) -> list[tuple[Loaded | HostLibrary, bool]]:
        """What it needs, and whether that is a filtee."""
        filtees = self.filtees
        return (
            [(needed, needed in filtees) for needed in self.needs]
            if filtees
            else [*zip(self.needs, repeat(False))]
        )

    def asker(self) -> Asker:
        """The library as one that needs others, to search for them."""
        loader = self.needed_by.asker() if self.needed_by is not None else None
        if self._asker is None or self._asker[0] is not loader:
            self._asker = loader, Asker.of(self.image, loader, opened_in=self._opened_in)
        return self._asker[1]

    def run_waiting(self) -> None:
        """Run its constructors, if they have yet to run; its destructors do even if one does not end."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self.initialised = True
            self.run(waiting)

    def run(self, constructors: list[int]) -> None:
        """Call ``constructors`` of it, at these addresses; who hears of its load is told of each."""
        listener = self.tell

        def told(address: int) -> None:
            if listener is not None:
                tell(listener, "initialise", self.name, f"call {address:#x}", {"address": address})

        run_constructors(constructors, told if listener is not None else None)

    def has_exits(self) -> bool:
        """Whether a thread has destructors of its objects yet to run; it is not asked again if none has."""
        return self.exits is not None and self.exits.is_kept()

    def has_let_go(self) -> bool:
        """Close what it has of ld.so for its threads; ``False`` if one of them has destructors yet to run."""
        return self.blocks.close() and (self.exits is None or self.exits.close())

    def discard(self) -> bool:
        """Unmap it and give everything back; ``False`` if a thread has destructors of it yet to run."""
        if not self.has_let_go():
            return False
        self.undo.close()
        self._names = self.tell = None  # who has heard of it may have kept what leads to it
        for libraries in (self.needs, self.filtees, self.before, self.roots, self.scope, self.holds):
            libraries.clear()  # circles, which would keep the file open
        self.needed_by = None
        return True

    def stub_for(self, function: int) -> CodePage:
        """The code that stands for ``function`` in this library."""
        if function not in self.stubs:
            self.stubs[function] = stub = CodePage()
            self.undo.callback(stub.unmap)
        return self.stubs[function]

    def hold(self, definer: Definer) -> None:
        """Note that it is bound to ``definer``, which must not go before it: ld.so's add_dependency.

        What stays anyway needs no note.
        """
        if not isinstance(definer, Loaded) or definer.will_stay:
            return
        if definer not in (self, *self.before, *self.holds):
            self.holds.append(definer)

    def share(self, definer: Definer) -> None:
        """Note that it is bound to a unique symbol of ``definer``, as whoever comes later will be.

        So ``definer`` stays, but for one whose code does not run: nothing can refer to it.
        """
        if isinstance(definer, Loaded):
            definer.will_stay |= definer.policy.init
            self.hold(definer)
            if not definer.shared:
                definer.shared = True
                definer.undo.callback(gnu_unique.forget, definer)

    @property
    def stand_ins(self) -> dict[int, int]:
        """Where code is that stands for a function to this library, by the function's address."""
        return {**stand_ins.stand_ins(), **{function: stub.address for function, stub in self.stubs.items()}}

    def drop_prepared(self) -> None:
        """Close its relocated pages, if it has any; those that are mapped stay."""
        if self.ready is not None:
            self.ready.close()
            self.ready = None

    def local_scope(
        self,
        listing: HostListing | None = None,
        move: Callable[[object, object], None] = _stay,
    ) -> list[Loaded | HostLibrary]:
        """Where its symbols are looked up: :func:`search_order` from it on; ``listing`` is what ld.so has.

        What was loaded for others, and outlives one of them, has only what it needs itself: glibc's
        ``elf/dl-close.c``.
        """
        if self.scope:
            return list(self.scope)
        of_host = (listing or host.listing()).edges

        def edges(library: Loaded | HostLibrary) -> Iterable[tuple[Loaded | HostLibrary, bool]]:
            return library.edges if isinstance(library, Loaded) else of_host(library)

        return search_order(self, edges, move)

    def settle(
        self,
        listing: HostListing | None = None,
        move: Callable[[object, object], None] = _stay,
    ) -> bool:
        """Somebody asks for it by itself: its scope is settled now, and what is initialised before it.

        Whether that was not settled before.  ``move`` hears of filtees, see :func:`search_order`: they move
        as well where all is there already.
        """
        if self.scope:
            return False
        self.scope = self.local_scope(listing, move)
        others = [member for member in self.scope if isinstance(member, Loaded) and member is not self]
        members = [self, *others]
        self.before = constructor_order(members, lambda library: library.before)[::-1] if others else members
        for member in (self, *others):
            if member.waiting is None:  # glibc's resize_scopes: what waits sees its own load alone
                member.roots.append(self)
        return True


def move_before(order: list[Loaded], filtee: object, library: object) -> None:
    """Put a ``filtee`` right before the ``library``, if both are in this ``order``."""
    if isinstance(filtee, Loaded) and isinstance(library, Loaded) and {filtee, library} <= {*order}:
        order.remove(filtee)
        order.insert(order.index(library), filtee)


def called_so(name: str, libraries: Iterable[Loaded]) -> list[Loaded]:
    """Which of ``libraries``, of which there may be hundreds, ``name`` means, as ``DT_NEEDED`` has it.

    It is the SONAME, the path, or a name that the library was found by before.
    """
    libraries = list(libraries)
    return [*compress(libraries, map(contains, map(_ANSWERS_TO, libraries), repeat(name)))]


def search_order(
    root: T,
    edges: Callable[[T], Iterable[tuple[T, bool]]],
    move: Callable[[T, T], None] = _stay,
) -> list[T]:
    """``root`` and everything it needs, each once, in the order of ld.so's search list: breadth first.

    ``edges`` gives what a library needs, in order, and whether that is a filtee: it comes right before the
    library, whose filter (``DT_FILTER``, ``DT_AUXILIARY``) the library is, unless it is before already;
    ``move`` hears of both.  The next edge is asked for when that is done.  Source: glibc's ``elf/dl-deps.c``.

    >>> needs = {"app": [("front", False), ("c", False)], "front": [("impl", True)], "impl": [("m", False)]}
    >>> search_order("app", lambda name: needs.get(name, []))
    ['app', 'impl', 'front', 'c', 'm']
    """
    order, seen, done, place = [root], {root}, set[T](), 0
    while place < len(order):
        library = order[place]
        if library in done:
            place += 1
            continue
        done.add(library)
        for needed, is_filtee in edges(library):
            if not is_filtee:
                if needed not in seen:
                    seen.add(needed)
                    order.append(needed)
                continue
            is_new = needed not in seen
            seen.add(needed)
            if is_new or needed in order[order.index(library) + 1 :]:
                if not is_new:
                    order.remove(needed)
                order.insert(order.index(library), needed)
                move(needed, library)
        place += order[place] is library  # else a filtee has come there
    return order
