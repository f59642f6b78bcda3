"""Who calls: the library that an address lies in, with all that decides what is found for it."""

from __future__ import annotations

from typing import Final

from miniloader.loader import unload
from miniloader.loader.beside_glibc import host
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.events import OnEvent
from miniloader.loader.loaded import Loaded
from miniloader.loader.policy import Policy
from miniloader.loader.search import Asker
from miniloader.loader.surroundings import of_process
from miniloader.values import dataclass

__all__ = ["Caller", "caller_at", "keep"]


@dataclass(frozen=True)
class Caller:
    """Who asks: ``library`` is None for a library of ld.so's, for the program, and for code of nobody's;
    of the first two, ``theirs`` is it.

    ``asker`` is whose paths are searched: of code of nobody's the program, as in ld.so.  ``policy`` is what
    its caller has allowed, and ``tell`` who hears of what it opens.
    """

    name: str
    library: Loaded | None
    asker: Asker | None
    policy: Policy
    tell: OnEvent | None = None
    theirs: HostLibrary | None = None


def caller_at(address: int) -> Caller:
    """Who has called and will go on at ``address``."""
    known = _that_stay.get(address)
    if known is not None:
        return known
    for library in unload.with_code():
        memory = library.memory
        if memory is not None and memory.mapped and memory.start <= address < memory.end:
            return Caller(library.name, library, library.asker(), library.policy, library.tell)
    caller = _host_at(address)
    if caller.name in _kept:
        _that_stay[address] = caller
    return caller


#: The libraries of ld.so's that are led to us, by name: they stay as long as the process.  Who calls from
#: them is found once.
_kept: Final[set[str]] = set()
_that_stay: Final[dict[int, Caller]] = {}


def keep(library: HostLibrary) -> None:
    """``library`` is led to us: it stays from now on, so that an address in it is one for ever."""
    if library.handle:
        _kept.add(library.name)


def _host_at(address: int) -> Caller:
    for theirs in host.libraries():
        if any(start <= address - theirs.bias < end for start, end in theirs.ranges):
            asker = Asker(theirs.path, theirs.rpath, theirs.runpath) if theirs.path else of_process().program
            return Caller(theirs.name, None, asker, Policy(), theirs=theirs)
    return Caller("the program", None, of_process().program, Policy())
