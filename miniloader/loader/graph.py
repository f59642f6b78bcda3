"""What one load brings: the library, and all that it needs and this process does not have yet.

ld.so's ``_dl_map_object_deps``: breadth first, each file once.  What is found is opened and read; mapping it
comes later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.checks import refuse_problems
from miniloader.elf.dynamic import DT_AUXILIARY, DT_NEEDED
from miniloader.elf.layout import EHDR
from miniloader.errors import ElfError, LoadError, MiniloaderError
from miniloader.forking import cached_property, importing
from miniloader.loader.beside_glibc import dynamic_linker, host
from miniloader.loader.beside_glibc.host import HostLibrary, HostListing
from miniloader.loader.events import BriefListener, Event, OnEvent, Stage, is_brief
from miniloader.loader.loaded import Loaded, called_so, move_before, search_order
from miniloader.loader.policy import Policy, comes_from_host, refuse
from miniloader.loader.scope import WEAK_GIVES_WAY, Bindings
from miniloader.loader.search import Asker, Surroundings, expand, find, fits
from miniloader.loader.surroundings import of_process, own_machine
from miniloader.loader.unload import of_file, present
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.loader.copies import Copies

__all__ = ["Graph", "Needed", "Resolution"]

Needed = Loaded | HostLibrary
_PLAIN: Final = r"[\w@%+=:,./-]+"  # what a shell takes as it is


@dataclass(frozen=True)
class Resolution:
    """What somebody gets for a name: a library that is there, or the file that has yet to be loaded.

    ``how`` says how it was come by.  ``handle`` is ld.so's, of a library of its own but the program, to be
    closed by whoever gets it.  ``copies`` tell of another file that would be found; ``image`` is what is in
    the file.
    """

    what: Loaded | HostLibrary | Source
    how: str
    handle: int | None = None
    copies: Copies | None = None
    image: ElfImage | None = None

    @property
    def path(self) -> str:
        """The path of its file."""
        return self.what.name


class Graph:
    """The libraries that one load brings: ``new`` holds them as they were found, what was asked for first.

    ``order`` is that of ld.so's list of all that is loaded: those of ours that are present, then the new ones
    as they were found, but filtees right before their filters.  What is there by a name is the first one.
    ``listing`` is what ld.so had when it was last asked.  ``bindings`` are those of each library, once it is
    linked, if it ``keeps_bindings``; one that is relocated from prepared pages has none.
    """

    def __init__(self, policy: Policy, tell: OnEvent | None, asked_in: Graph | None = None) -> None:
        self.policy = policy
        self._asked_in = asked_in  # where the first member was found, a moment ago
        self.tell = tell
        self.brief = is_brief(tell)
        self._note = cast(BriefListener, tell).note if self.brief else None
        self.new: list[Loaded] = []
        self.order: list[Loaded] = []
        self.bindings: dict[Loaded, Bindings] = {}
        self.keeps_bindings = False
        self.listing: HostListing

    @cached_property
    def surroundings(self) -> Surroundings:
        """Where ld.so would search: found out when a name has to be searched for."""
        return self._asked_in.surroundings if self._asked_in is not None else of_process()

    def event(self, stage: Stage, library: str, text: str, **data: Any) -> None:
        """Tell whoever listens."""
        if self._note is not None:
            self._note(stage, library, data)
        elif self.tell is not None:
            self.tell(Event(stage, library, text, data))

    def add(self, source: Source, needed_by: Loaded | None = None, image: ElfImage | None = None) -> Loaded:
        """Open ``source`` as a new member, with its ``image`` if that has been read; closed when refused."""
        try:
            image = image or read_image(source)
            refuse(image, self.policy)
            library = Loaded(image, needed_by, self.policy, self.tell)
            reason = _find_prepared(library) if self.policy.prepared else None
            if library.ready is None:  # what is in the cache has been checked when it was prepared
                refuse_problems(image)
        except MiniloaderError:
            source.close()
            raise
        self.new.append(library)
        self.order.append(library)
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

    def look_around(self) -> None:
        """See what of ours is present, and what ld.so has unless that has been seen a moment ago."""
        self.order = [*present, *self.new]  # not before the load has begun: until then another may close some
        self.listing = self._asked_in.listing if self._asked_in is not None else host.listing()

    def complete(self) -> None:
        """Find what each member needs, and what that needs, in the order of :func:`search_order`."""
        self.look_around()
        root: Needed = self.new[0]
        search_order(root, self._find_needs, partial(move_before, self.order))
        for library in self.new[1:]:
            library.before = library.ours
        if self.brief:
            self.event("need", self.new[0].name, "all that is needed is found")

    def _find_needs(self, library: Needed) -> Iterator[tuple[Needed, bool]]:
        """What ``library`` needs, and whether it is a filtee: of a new one it is found now."""
        if not isinstance(library, Loaded):
            return  # what it needs ld.so has as well
        if library not in self.new:
            yield from library.edges
            return
        for tag, name in library.image.needs:
            try:
                needed = self._need(self.expanded(name, library.asker()), library)
            except MiniloaderError as error:
                if tag != DT_AUXILIARY:
                    raise
                text = f"{name}: DT_AUXILIARY, which may be missing: {error}"
                self.event("need", library.name, text, needed=name, path=None, copies=None)
                continue
            library.needs.append(needed)
            if tag != DT_NEEDED:
                library.filtees.append(needed)
            yield needed, tag != DT_NEEDED

    def expanded(self, name: str, asker: Asker | None) -> str:
        """``name`` as ``asker`` means it: see :func:`miniloader.loader.search.expand`."""
        return expand(name, asker, self.surroundings) if "$" in name else name

    def _need(self, name: str, library: Loaded) -> Needed:
        """What ``library`` gets for ``name``."""
        theirs = self.listing.that_stays(name) if self.tell is None or self.brief else None
        if theirs is not None:
            return theirs
        answer = self.look(name, library.asker(), library.name)
        if isinstance(answer.what, Source):
            if not self.brief:
                text = f"{name}: {answer.path}"
                self.event("need", library.name, text, needed=name, path=answer.path, copies=None)
            needed = self.add(answer.what, library, answer.image)
            needed.call(name)
            return needed
        if answer.handle is not None:
            library.undo.callback(dynamic_linker.close_host, answer.handle)
        if not self.brief:
            told = {"needed": name, "path": answer.path, "copies": answer.copies}
            self.event("need", library.name, f"{name}: {answer.how}", **told)
        return answer.what

    def look(self, name: str, asker: Asker | None, who: str, *, open_host: bool = True) -> Resolution:
        """What ``asker``, called ``who``, gets for ``name``: what is called so, ld.so's or ours, or the file.

        A library of ld.so's is held by the handle in the answer.  Unless ``open_host``, the file is the
        answer, too, where ld.so is to open it.
        """
        of_host = self._of_host(name, asker)
        if of_host is not None:
            return of_host
        same = self._alike(called_so(name, self.order))
        if same is not None:
            same.call(name)  # where that is its SONAME
            return Resolution(same, "loaded already")
        source = self._open_path(name) or Source.open(self._search(name, asker, who))
        same_file = self._same_file(source)
        if same_file is not None:
            source.close()
            if isinstance(same_file, Loaded):
                same_file.call(name)
                return Resolution(same_file, f"loaded already as {same_file.name}")
            how = f"loaded already as {same_file.name}"
            return Resolution(same_file, how, dynamic_linker.open_host(same_file.path, load=False))
        image = _image_of(source)
        if open_host and (comes_from_host(name) or (image and comes_from_host(image.soname))):
            source.close()
            handle = dynamic_linker.open_host(source.name, load=True)
            assert handle is not None  # or it had raised
            library = self._behind(handle, source.name)
            return Resolution(library, f"the system's loader has loaded {library.name}", handle)
        return Resolution(source, "found", None, None, image)

    def _alike(self, libraries: Iterable[Loaded]) -> Loaded | None:
        """The first of ``libraries`` that is of this load, or of one that initialised as this one will."""
        init = self.policy.init
        return next((library for library in libraries if library.policy.init == init), None)

    def _of_host(self, name: str, asker: Asker | None) -> Resolution | None:
        """The process's own, if it has one; who listens hears of another copy that would be found."""
        library, handle = self.listing.called(name), None
        if library is None:
            return None
        if library.path:  # the program stays
            handle = dynamic_linker.open_host(library.path, load=False)
            if handle is None:
                return None
            library = self._behind(handle, library.path)
        how, copies = f"the process's own, {library.name}", None
        if self.tell is not None and not self.brief:
            with importing:
                from miniloader.loader.copies import copies_of

            copies = copies_of(name, library, find(name, asker, self.surroundings).path)
            how = copies.text() if copies is not None else how
        return Resolution(library, how, handle, copies)

    def _behind(self, handle: int, path: str) -> HostLibrary:
        """The library of the system's loader whose ``handle`` it has given for ``path``."""
        bias = dynamic_linker.load_address(handle)
        if bias not in self.listing.by_bias:
            self.listing = host.listing()
        if bias not in self.listing.by_bias:
            dynamic_linker.close_host(handle)
            raise LoadError(f"{path}: the system's loader has it, but does not list it")
        return self.listing.by_bias[bias]

    def _open_path(self, name: str) -> Source | None:
        """The file at the path ``name``, opened once if nobody hears of the search and it is right."""
        if "/" not in name or "$" in name or (self.tell is not None and not self.brief):
            return None
        try:
            source = Source.open(name)
        except ElfError:
            return None
        is_right = False
        try:  # the file may be cut short meanwhile
            is_right = fits(source.read(0, min(EHDR.size, source.size), "ELF header"), own_machine())
        finally:
            if not is_right:
                source.close()
        return source if is_right else None

    def _search(self, name: str, asker: Asker | None, who: str) -> str:
        """The path of the file that ld.so would take for ``name``; each place is told."""
        found = find(name, asker, self.surroundings)
        for step in found.steps if not self.brief else ():
            text = f"{step.rule}: {step.path}: {step.outcome}"
            fields = {"rule": step.rule, "path": step.path, "outcome": step.outcome}
            self.event("search", who, text, needed=name, **fields)
        if found.stopped:
            step = found.steps[-1]
            raise LoadError(f"{who}: needs {name}, and {step.path} is {step.outcome}", ld_so=found.refusal)
        if found.path is None:
            places, all_of_it = len(found.steps), None
            if self.new:
                all_of_it = f"all that it needs: miniloader check {_quoted(self.new[0].name)}"
            raise LoadError(
                f"{who}: needs {name}, which is in none of the {places} places searched",
                hint=all_of_it,
                ld_so=found.refusal,
            )
        return found.path

    def _same_file(self, source: Source) -> Needed | None:
        """The library that was loaded from the same file under another name."""
        key = source.key
        same = self._alike(of_file(key, self.order))
        return same or self.listing.by_identity.get(source.identity)


def _quoted(path: str) -> str:
    """``path`` as a shell takes it for one word, as shlex has it.

    That is not imported here, where it may be a program's own module of the name, or out of reach: chroot(2).
    """
    return path if re.fullmatch(_PLAIN, path, re.ASCII) else "'" + path.replace("'", "'\"'\"'") + "'"


def _image_of(source: Source) -> ElfImage | None:
    """The library in ``source``; None where its headers or its SONAME are wrong, as adding it will say."""
    try:
        image = read_image(source)
        image.soname  # noqa: B018 - which may be outside of the strings
    except ElfError:
        return None
    return image


def _find_prepared(library: Loaded) -> str | None:
    """Give the library its relocated pages, if the cache has any; else why it has none."""
    if WEAK_GIVES_WAY:
        return "LD_DYNAMIC_WEAK is set, and they were bound without it"
    with importing:
        from miniloader.loader.prepared.index import find as find_prepared

    try:
        library.ready = find_prepared(library.image)
    except LoadError as error:
        return str(error)
    library.undo.callback(library.drop_prepared)
    return None
