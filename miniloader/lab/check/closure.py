"""A file and all that it needs, breadth first, each once: as glibc's ``_dl_map_object_deps`` gathers it."""

from __future__ import annotations

from collections.abc import Sequence

from miniloader.errors import ElfError
from miniloader.lab.check.shared_object import SharedObject, Shelf
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
    """All that ``first`` needs; what is ``present`` in the process already is not looked for again."""
    named: dict[str, SharedObject] = {}
    by_identity = {item.identity: item for item in (*present, first)}
    for item in (*present, first):
        named.setdefault(item.path, item)
        if item.image.soname:
            named.setdefault(item.image.soname, item)
    objects, lacks, missing = [first], list[Lack](), set[str]()
    askers = {first.identity: _asker(first, None, surroundings)}
    for item in objects:  # grows meanwhile
        for text in item.image.needed:
            asker = askers.get(item.identity) or _asker(item, None, surroundings)
            name = expand(text, asker, surroundings)
            needed = named.get(name)
            if needed is None and name not in missing:
                found = find(name, asker, surroundings)
                try:
                    needed = shelf.take(found.path) if found.path is not None else None
                    if needed is None:
                        lacks.append(Lack(name, item, found))
                except ElfError as error:
                    lacks.append(Lack(name, item, found, error))
                if needed is None:
                    missing.add(name)
                    continue
                needed = by_identity.setdefault(needed.identity, needed)
                named[name] = needed
                if needed.image.soname:
                    named.setdefault(needed.image.soname, needed)
                askers.setdefault(needed.identity, Asker.of(needed.image, asker, found.path))
            if needed is not None and needed not in objects:
                objects.append(needed)
    return Closure(tuple(objects), tuple(lacks), named)


def _asker(item: SharedObject, loader: Asker | None, surroundings: Surroundings) -> Asker:
    program = surroundings.program
    if program is not None and item.is_program and program.path == item.path:
        return program
    return Asker.of(item.image, loader, item.path)
