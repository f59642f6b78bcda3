"""A file and all that it needs, breadth first, each once: as glibc's ``_dl_map_object_deps`` gathers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from miniloader.elf.dynamic import DT_AUXILIARY, DT_NEEDED
from miniloader.errors import ElfError
from miniloader.lab.check.shared_object import SharedObject, Shelf
from miniloader.loader.loaded import search_order
from miniloader.loader.search import Asker, Found, Surroundings, expand, find
from miniloader.values import dataclass

__all__ = ["Closure", "Lack", "gather"]


@dataclass(frozen=True, eq=False)
class Lack:
    """A library that ``needed_by`` needs and cannot have: not ``found``, or not readable (``error``)."""

    name: str
    needed_by: SharedObject
    found: Found
    error: ElfError | None = None


@dataclass(frozen=True, eq=False)
class Closure:
    """A file and what it needs: ``objects`` breadth first, itself first; ``lacks`` is what is not there.

    ``named`` are the objects by the names that they were asked for by, and their own (``DT_SONAME``).
    """

    objects: tuple[SharedObject, ...]
    lacks: tuple[Lack, ...]
    named: dict[str, SharedObject]


def gather(
    first: SharedObject, surroundings: Surroundings, shelf: Shelf, present: Sequence[SharedObject] = ()
) -> Closure:
    """All that ``first`` needs; what is ``present`` in the process already is not looked for again.

    Filtees (``DT_FILTER``, ``DT_AUXILIARY``) come right before their filters; an auxiliary one may lack.
    """
    gathering = _Gathering(first, surroundings, shelf, present)
    objects = search_order(first, gathering.needs_of)
    return Closure(tuple(objects), tuple(gathering.lacks), gathering.named)


class _Gathering:
    """What has been found so far, by name and by file, and what has not."""

    def __init__(
        self, first: SharedObject, surroundings: Surroundings, shelf: Shelf, present: Sequence[SharedObject]
    ) -> None:
        self._surroundings, self._shelf = surroundings, shelf
        self.named: dict[str, SharedObject] = {}
        self.lacks: list[Lack] = []
        self._missing: set[str] = set()
        self._by_identity = {item.identity: item for item in (*present, first)}
        for item in (*present, first):
            self._know(item, item.path)
        self._askers = {first.identity: _asker(first, None, surroundings)}

    def needs_of(self, item: SharedObject) -> Iterator[tuple[SharedObject, bool]]:
        """What ``item`` needs, in order, and which of it are its filtees."""
        for tag, text in item.image.needs:
            asker = self._askers.get(item.identity) or _asker(item, None, self._surroundings)
            name = expand(text, asker, self._surroundings)
            needed = self.named.get(name) or self._find(name, item, asker, optional=tag == DT_AUXILIARY)
            if needed is not None:
                yield needed, tag != DT_NEEDED

    def _find(self, name: str, item: SharedObject, asker: Asker, *, optional: bool) -> SharedObject | None:
        """The object that ``item`` gets for ``name``; None where there is none, noted unless ``optional``."""
        if name in self._missing:
            return None
        found, error = find(name, asker, self._surroundings), None
        try:
            needed = self._shelf.take(found.path) if found.path is not None else None
        except ElfError as fault:
            needed, error = None, fault
        if needed is None:
            if not optional:
                self._missing.add(name)
                self.lacks.append(Lack(name, item, found, error))
            return None
        needed = self._by_identity.setdefault(needed.identity, needed)
        self._know(needed, name)
        self._askers.setdefault(needed.identity, Asker.of(needed.image, asker, found.path))
        return needed

    def _know(self, item: SharedObject, name: str) -> None:
        for known in (name, item.image.soname):
            if known:
                self.named.setdefault(known, item)


def _asker(item: SharedObject, loader: Asker | None, surroundings: Surroundings) -> Asker:
    program = surroundings.program
    if program is not None and item.is_program and program.path == item.path:
        return program
    return Asker.of(item.image, loader, item.path)
