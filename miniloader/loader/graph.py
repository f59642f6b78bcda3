"""What one load brings: the library, and all that it needs and this process does not have yet.

ld.so's ``_dl_map_object_deps``: breadth first, each file once.  What is found is opened and read; mapping it
comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from miniloader.elf import Source, read_image
from miniloader.elf.checks import refuse_problems
from miniloader.elf.dynamic import DT_AUXILIARY, DT_NEEDED
from miniloader.errors import ElfError, LoadError, MiniloaderError
from miniloader.loader.beside_glibc import host
from miniloader.loader.beside_glibc.host import HostLibrary, HostListing
from miniloader.loader.copies import copies_of, is_file_of
from miniloader.loader.events import Event, OnEvent, Stage
from miniloader.loader.loaded import Loaded, search_order
from miniloader.loader.policy import Policy, comes_from_host, refuse
from miniloader.loader.scope import Bindings
from miniloader.loader.search import Surroundings, expand, find
from miniloader.loader.surroundings import of_process
from miniloader.loader.unload import find_present

__all__ = ["Graph", "Needed"]

Needed = Loaded | HostLibrary


class Graph:
    """The libraries that one load brings: ``new`` holds them as they were found, what was asked for first.

    ``order`` is their order of search, in which filtees come before their filters, with those present before.
    ``listing`` is what ld.so had when it was last asked.  ``bindings`` are those of each library, once it is
    linked; one that is relocated from prepared pages has none.
    """

    def __init__(self, policy: Policy, tell: OnEvent | None) -> None:
        self.policy = policy
        self.tell = tell
        self.new: list[Loaded] = []
        self.order: list[Loaded] = []
        self.bindings: dict[Loaded, Bindings] = {}
        self.listing: HostListing
        self.surroundings: Surroundings

    def event(self, stage: Stage, library: str, text: str, **data: Any) -> None:
        """Tell whoever listens."""
        if self.tell is not None:
            self.tell(Event(stage, library, text, data))

    def add(self, source: Source, needed_by: Loaded | None = None) -> Loaded:
        """Open ``source`` as a new member; it is closed when it is refused."""
        try:
            image = read_image(source)
            refuse(image, self.policy)
            library = Loaded(image, needed_by, self.policy)
            reason = _find_prepared(library) if self.policy.prepared else None
            if library.ready is None:  # what is in the cache has been checked when it was prepared
                refuse_problems(image)
        except MiniloaderError:
            source.close()
            raise
        self.new.append(library)
        count = len(image.segments)
        self.event("parse", image.path, f"{count} program headers", segments=count)
        if reason is not None:
            self.go_plain(library, reason)
        return library

    def go_plain(self, library: Loaded, reason: str) -> None:
        """The relocated pages of ``library`` are of no use, for this ``reason``: it goes the plain way."""
        library.drop_prepared()
        library.not_prepared = f"not from the cache: {reason}"
        self.event("prepared", library.name, library.not_prepared, reason=reason)

    def complete(self) -> None:
        """Find what each member needs, and what that needs, in the order of :func:`search_order`."""
        self.listing, self.surroundings = host.listing(), of_process()
        root: Needed = self.new[0]
        order = search_order(root, self._find_needs)
        self.order = [library for library in order if isinstance(library, Loaded)]
        for library in self.new[1:]:
            library.before = library.ours

    def _find_needs(self, library: Needed) -> Iterable[tuple[Needed, bool]]:
        """What ``library`` needs, and whether it is a filtee: of a new one it is found now."""
        if not isinstance(library, Loaded):
            return ()  # what it needs ld.so has as well
        if library in self.new:
            for tag, name in library.image.needs:
                try:
                    needed = self._need(expand(name, library.asker(), self.surroundings), library)
                except MiniloaderError as error:
                    if tag != DT_AUXILIARY:
                        raise
                    text = f"{name}: DT_AUXILIARY, which may be missing: {error}"
                    self.event("need", library.name, text, needed=name, path=None, copies=None)
                    continue
                library.needs.append(needed)
                if tag != DT_NEEDED:
                    library.filtees.append(needed)
        return library.edges

    def _need(self, name: str, library: Loaded) -> Needed:
        """What ``library`` gets for ``name``: what is called so, ld.so's or ours, or the file found."""
        of_host = self.listing.called(name)
        if of_host is not None and of_host.path:  # the program stays
            of_host = self._hold(of_host.path, library, load=False)
        if of_host is not None:
            return self._tell_of_host(name, library, of_host)
        same = self._present(lambda member: member.is_called(name))
        if same is not None:
            return self._answer(name, library, same, "loaded already")
        path = self._search(name, library)
        source = Source.open(path)
        same_file = self._same_file(source)
        if same_file is not None:
            source.close()
            if isinstance(same_file, Loaded):
                same_file.called.add(name)
            return self._answer(name, library, same_file, f"loaded already as {same_file.name}")
        if comes_from_host(name) or comes_from_host(_soname(source)):
            source.close()
            of_host = self._hold(path, library, load=True)
            assert of_host is not None  # or it had raised
            return self._answer(name, library, of_host, f"the system's loader has loaded {of_host.name}")
        text = f"{name}: {source.name}"
        self.event("need", library.name, text, needed=name, path=source.name, copies=None)
        needed = self.add(source, library)
        needed.called.add(name)
        return needed

    def _tell_of_host(self, name: str, library: Loaded, of_host: HostLibrary) -> HostLibrary:
        """Who listens hears that the process's own is used, and of another copy that would be found."""
        how, copies = f"the process's own, {of_host.name}", None
        if self.tell is not None:
            copies = copies_of(name, of_host, find(name, library.asker(), self.surroundings).path)
            how = copies.text() if copies is not None else how
        self.event("need", library.name, f"{name}: {how}", needed=name, path=of_host.name, copies=copies)
        return of_host

    def _answer(self, name: str, library: Loaded, needed: Needed, how: str) -> Needed:
        self.event("need", library.name, f"{name}: {how}", needed=name, path=needed.name, copies=None)
        return needed

    def _present(self, is_it: Callable[[Loaded], bool]) -> Loaded | None:
        """A library of ours: of this load, or of an earlier one that initialised as this one will."""
        new = next((library for library in self.new if is_it(library)), None)
        return new or find_present(lambda library: library.policy.init == self.policy.init and is_it(library))

    def _hold(self, path: str, library: Loaded, *, load: bool) -> HostLibrary | None:
        """The library that the system's loader has for ``path``, or loads; held as long as ``library``."""
        handle = host.open_host(path, load=load)
        if handle is None:
            return None
        library.undo.callback(host.close_host, handle)
        bias = host.load_address(handle)
        if bias not in self.listing.by_bias:
            self.listing = host.listing()
        if bias not in self.listing.by_bias:
            raise LoadError(f"{library.name}: needs {path}, which the system's loader has, but does not list")
        return self.listing.by_bias[bias]

    def _search(self, name: str, library: Loaded) -> str:
        """The path of the file that ld.so would take for ``name``; each place is told."""
        found = find(name, library.asker(), self.surroundings)
        for step in found.steps:
            text = f"{step.rule}: {step.path}: {step.outcome}"
            fields = {"rule": step.rule, "path": step.path, "outcome": step.outcome}
            self.event("search", library.name, text, needed=name, **fields)
        if found.stopped:
            step = found.steps[-1]
            raise LoadError(f"{library.name}: needs {name}, and {step.path} is {step.outcome}")
        if found.path is None:
            import shlex  # which few need

            places = len(found.steps)
            raise LoadError(
                f"{library.name}: needs {name}, which is in none of the {places} places searched",
                hint=f"all that it needs: miniloader check {shlex.quote(self.new[0].name)}",
            )
        return found.path

    def _same_file(self, source: Source) -> Needed | None:
        """The library that was loaded from the same file under another name."""
        same = self._present(lambda library: library.key == source.key)
        return same or next((lib for lib in self.listing.found if is_file_of(lib, source)), None)


def _soname(source: Source) -> str | None:
    """The SONAME of the library in ``source``; None where it cannot be read, as adding it will say."""
    try:
        return read_image(source).soname
    except ElfError:
        return None


def _find_prepared(library: Loaded) -> str | None:
    """Give the library its relocated pages, if the cache has any; else why it has none."""
    from miniloader.loader.prepared.pages import find as find_prepared

    try:
        library.ready = find_prepared(library.image)
    except LoadError as error:
        return str(error)
    library.undo.callback(library.drop_prepared)
    return None
