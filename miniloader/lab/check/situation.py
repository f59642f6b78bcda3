"""A file where it is to be loaded: what it needs, the process it comes into, and what is bound to what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import STB_WEAK, STT_GNU_IFUNC
from miniloader.lab.check.closure import Closure
from miniloader.lab.check.names import definitions_of
from miniloader.lab.check.releases import Limit
from miniloader.lab.check.shared_object import SharedObject, Shelf
from miniloader.loader.search import Surroundings
from miniloader.loader.spans import error_for
from miniloader.native import Stopped
from miniloader.values import dataclass

__all__ = ["Host", "Served", "Situation", "owners_of", "unresolved"]


@dataclass(frozen=True, eq=False)
class Host:
    """A process that opens a library: the program at ``path`` (None: any that has no more than glibc), and
    what is loaded as it starts, in the order in which symbols are looked up."""

    path: str | None
    objects: tuple[SharedObject, ...]

    @property
    def program(self) -> SharedObject | None:
        """The program itself."""
        return self.objects[0] if self.path is not None else None


Served = dict[SharedObject, frozenset[SharedObject]]
"""Objects all of whose references have been found, and the objects that they were found in."""


@dataclass(frozen=True, eq=False)
class Situation:
    """All that decides whether ``file`` can be loaded.

    ``host`` is None for a program, which is a process of its own.  ``limit`` is how old a system may be that
    it is meant for.  ``served`` is what a run has learned so far: whoever finds all its symbols in some
    objects finds them in any scope that has these objects, since a library more takes nothing away.
    """

    file: SharedObject
    host: Host | None
    closure: Closure
    surroundings: Surroundings
    shelf: Shelf
    served: Served
    limit: Limit | None = None

    @cached_property
    def scope(self) -> tuple[SharedObject, ...]:
        """Where symbols are looked up, in order: what the process has, then the file and what it needs."""
        before = self.host.objects if self.host is not None else ()
        return tuple(dict.fromkeys((*before, *self.closure.objects)))

    @cached_property
    def new(self) -> tuple[SharedObject, ...]:
        """What this load brings: the file, and what it needs and the process does not have."""
        before = set(self.host.objects) if self.host is not None else set()
        return tuple(item for item in self.closure.objects if item not in before)

    @cached_property
    def libc(self) -> SharedObject | None:
        """The C library of the process, if it is glibc's."""
        return self.closure.named.get("libc.so.6")

    @property
    def of_musl(self) -> bool:
        """Whether musl's dynamic linker does it, which knows neither versions nor IFUNCs."""
        return self.surroundings.musl is not None

    @cached_property
    def unresolved(self) -> tuple[tuple[SharedObject, tuple[int, ...]], ...]:
        """What no object in scope defines: who refers to it, and its symbols; weak ones may be missing."""
        found = ((item, unresolved(item, self.scope, self.served, of_musl=self.of_musl)) for item in self.new)
        return tuple((item, symbols) for item, symbols in found if symbols)


def owners_of(
    item: SharedObject,
    symbols: NDArray[np.int64],
    scope: Sequence[SharedObject],
    own: int | None,
    *,
    plt_entries: bool = False,
    versioned: bool = True,
) -> NDArray[np.void]:
    """What ``symbols`` of ``item`` are bound to in ``scope``: rows of
    :data:`~miniloader.loader.symbol_lookup.DEFINITION`.  ``own``, ``versioned`` and
    ``plt_entries`` are as in :func:`~miniloader.loader.symbol_lookup.look_up`.  :class:`ElfError` names the
    file whose tables do not let a name be looked up.
    """
    wanted = np.ascontiguousarray(symbols)
    how = {"versioned": versioned, "plt_entries": plt_entries}

    def rows_in(members: Sequence[SharedObject], own: int | None) -> NDArray[np.void]:
        return definitions_of(item.names, wanted, [member.names for member in members], own, **how)

    try:
        return rows_in(scope, own)
    except Stopped as stopped:
        for member in scope:
            try:
                rows_in([member], None)
            except Stopped as alone:
                raise error_for(member.path, alone) from None
        raise error_for(item.path, stopped) from None


def unresolved(
    item: SharedObject, scope: Sequence[SharedObject], served: Served, *, of_musl: bool = False
) -> tuple[int, ...]:
    """The symbols of ``item`` that its relocations look up, that are not weak, and that nobody defines.

    ``of_musl``: as musl looks them up, which asks for no versions and passes over IFUNCs (``find_sym2`` of
    its ldso/dynlink.c).
    """
    before = served.get(item)
    if before is not None and before.issubset(scope):
        return ()
    wanted = item.uses.symbols
    strong = item.bind[wanted] != STB_WEAK
    elsewhere = item.rows["shndx"][wanted] == 0
    if of_musl:
        elsewhere |= item.rows["info"][wanted] & 0xF == STT_GNU_IFUNC
    wanted = wanted[strong & elsewhere]
    copies = item.uses.copies
    copies = copies[item.bind[copies] != STB_WEAK]
    rows = owners_of(item, wanted, scope, scope.index(item), versioned=not of_musl)
    owners = np.where((rows["info"] & 0xF == STT_GNU_IFUNC) & of_musl, -1, rows["owner"])
    beyond = [member for member in scope if member is not item]  # a copy is of what somebody else defines
    sources = owners[:0]
    if len(copies):
        sources = owners_of(item, copies, beyond, None, versioned=not of_musl)["owner"]
    missing = np.concatenate([wanted[owners < 0], copies[sources < 0]])
    if not len(missing):
        served[item] = frozenset(scope[place] for place in set(owners.tolist())) | {
            beyond[place] for place in set(sources.tolist())
        }
    return tuple(missing.tolist())
