"""Which libraries of ours this process has, and how they leave it: what glibc's ``dl-close.c`` does.

A library goes when no caller holds it and nothing that stays needs it.  First all that go are finalised, in
the order of their needs, and then unmapped: what one of them calls on the way is still there.
"""

from __future__ import annotations

import atexit
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from operator import attrgetter
from typing import Final

from miniloader.forking import loading
from miniloader.loader import constructors
from miniloader.loader.beside_glibc import dynamic_linker, process_end, stand_ins
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.ld_so_cache import CACHE
from miniloader.loader.loaded import Loaded
from miniloader.loader.search import places
from miniloader.loader.surroundings import of_process
from miniloader.native import buffer_address, functions

__all__ = [
    "end",
    "enter",
    "find_present",
    "global_scope",
    "let_go",
    "lock",
    "make_global",
    "of_file",
    "present",
    "take_back",
    "unfinished",
    "with_code",
]

#: Held by whoever changes what this process has, or looks at it, and by whoever forks.
lock: Final = loading
#: The libraries that other loads may share, in the order of ld.so's list: as they were loaded, but filtees
#: right before their filters.
present: Final[list[Loaded]] = []
#: Those of loads that are not complete; what they need has to stay.
unfinished: Final[set[Loaded]] = set()
#: Those of ours that have been made global, in this order: ld.so's global scope goes on with them.
global_scope: Final[list[Loaded]] = []
_KEY: Final = attrgetter("key")
_WILL_STAY: Final = attrgetter("will_stay")
_ended: Final[set[bool]] = set()  # not empty once exit(3) has what is left to be finalised
_closed: Final[list[Loaded]] = []  # let go, and not looked at yet
_leaving: Final[list[Loaded]] = []  # whose destructors run now, or have run: not unmapped yet
_lingering: Final[list[Loaded]] = []  # closed, but with destructors that some thread has yet to run


def find_present(is_it: Callable[[Loaded], bool]) -> Loaded | None:
    """The first library present for which ``is_it`` holds."""
    return next((library for library in present if is_it(library)), None)


def with_code() -> Iterator[Loaded]:
    """All whose code may run: what is present, begins, or goes."""
    return chain(present, unfinished, _leaving, _lingering)


def of_file(key: object, libraries: Iterable[Loaded]) -> list[Loaded]:
    """All of ``libraries``, of which there may be hundreds, whose file has this ``key``."""
    return [library for library in libraries if library.key == key] if key in map(_KEY, libraries) else []


def enter(order: Sequence[Loaded], new: Collection[Loaded]) -> None:
    """From now on ``new`` are present as well, in this ``order``, which may have moved others, too.

    Those that will stay do so from now on.
    """
    _put_in_order(order, {*present, *new})
    for library in filter(_WILL_STAY, present):
        library.stays |= library.policy.init
    stand_ins.be_asked_at_exit()


def _put_in_order(order: Sequence[Loaded], libraries: Collection[Loaded]) -> None:
    """``libraries`` are present, in this ``order``; what is not in it comes last, as it was."""
    present[:] = dict.fromkeys([*filter(libraries.__contains__, order), *present])


def let_go(library: Loaded, caller: Loaded | None = None) -> None:
    """A caller does not hold ``library`` any more: what nobody holds now is finalised and unmapped.

    What a destructor lets go meanwhile goes after that, as in glibc: others may still need it.  Where the
    ``caller`` is itself a library of ours, it stays until the next one goes, since its code goes on.
    """
    library.handles -= 1
    if library.handles:
        return
    _closed.append(library)
    if len(_closed) > 1 or _ended:
        return
    try:
        for closed in _closed:  # grows meanwhile
            _leave(closed, caller)
    finally:
        _closed.clear()


def _leave(closed: Loaded, caller: Loaded | None) -> None:
    gone = _going(closed, caller)
    for library in present:
        if library not in gone and not library.scope and any(root in gone for root in library.roots):
            library.scope = list(dict.fromkeys([library, *library.needs]))
    for library in present:
        if library.needed_by in gone:
            library.needed_by = None  # from now on that one's paths are not searched for it
    _leaving.extend(gone)
    known = set(present)
    for member in gone:
        _finalise(member)
    _leaving.clear()
    _unmap(gone, known.issuperset(present))


def _going(closed: Loaded, caller: Loaded | None) -> list[Loaded]:
    """What goes, in the order of its destructors: nobody holds it, and no thread has objects of it.

    glibc's ``l_tls_dtor_count``: what destroys the objects of a thread is the library's own code.
    """
    kept = [*unfinished, *filter(_stays, present), *([caller] if caller is not None else [])]
    _add_what_they_use(kept)
    going = []
    for member in _in_destructor_order(closed):  # who needs others is before them
        if member in kept:
            continue
        if member.has_exits():
            kept.append(member)
            _add_what_they_use(kept)
        else:
            going.append(member)
    for member in going:
        if member in kept and member.exits is not None:  # in a circle; and its threads are not asked again
            member.stays = True
    return [member for member in going if member not in kept]


def make_global(libraries: Iterable[Loaded | HostLibrary]) -> None:
    """From now on all that is loaded may be bound to ``libraries``: dlopen(3) with ``RTLD_GLOBAL``."""
    for library in libraries:
        if isinstance(library, HostLibrary):
            if not library.is_global:
                handle = dynamic_linker.open_host(
                    library.path, load=False, flags=dynamic_linker.RTLD_NOW | dynamic_linker.RTLD_GLOBAL
                )
                if handle is not None:
                    dynamic_linker.close_host(handle)
        elif library not in global_scope:
            global_scope.append(library)
            library.undo.callback(global_scope.remove, library)


def take_back(new: list[Loaded], order: Sequence[Loaded]) -> None:
    """Undo the load that brought ``new``, whatever it has come to, but for the ``order`` of the others.

    As in ld.so, a filtee that was there stays where the load moved it.
    """
    _put_in_order(order, present)
    for library in present:
        library.will_stay = library.stays
    for library in reversed(new):
        if library in present:
            _finalise(library)  # whoever listens has raised between two constructors
    unfinished.difference_update(new)
    _unmap(new[::-1])
    for library in new:
        if library not in _lingering:
            library.image.source.close()


def _stays(library: Loaded) -> bool:
    """Whether ``library`` is held: by a caller, by another library, or for as long as the process lives.

    As glibc's, one with a unique symbol that others may be bound to is never unloaded; without its code,
    ``init=False``, nothing can refer to it.
    """
    return bool(library.handles or (library.shared and library.policy.init) or library.stays)


def _add_what_they_use(libraries: list[Loaded]) -> None:
    for library in libraries:  # grows meanwhile
        libraries += (used for used in (*library.ours, *library.holds) if used not in libraries)


def _unmap(gone: list[Loaded], is_all_known: bool = True) -> None:
    """Unmap ``gone``, and what had to wait, but for what has to wait still.

    Unless ``is_all_known``, their destructors have loaded others, which may need them.
    """
    users = present if _lingering or not is_all_known else ()
    gone += (library for library in _lingering if library not in gone)
    left = [library for library in gone if not library.has_let_go()]
    # Asked once more: one carrier may be what another one waits for.
    waiting = [*users, *(library for library in left if not library.has_let_go())]
    _add_what_they_use(waiting)
    _lingering[:] = [library for library in gone if library in waiting or not library.discard()]
    for library in present:  # who is gone is nobody's root, and its file is open no longer
        library.roots[:] = [root for root in library.roots if root.is_mapped]


def _in_destructor_order(closed: Loaded | None = None) -> list[Loaded]:
    return constructors.destructor_order(
        present, lambda library: library.before, lambda library: library.holds, closed
    )


def _finalise(library: Loaded) -> None:
    """Run the destructors of ``library``, if it was initialised; nobody finds it from then on."""
    if library.initialised:
        library.initialised = False
        for address in library.destructors:
            constructors.run_destructor(address)
    present.remove(library)


def _of_host(libraries: Iterable[Loaded]) -> list[HostLibrary]:
    """What ``libraries`` need of ld.so's, each once."""
    needed = (need for library in libraries for need in library.needs)
    return list(dict.fromkeys(need for need in needed if isinstance(need, HostLibrary)))


def _searched(library: Loaded) -> list[str]:
    """The directories in which ``library`` has names looked for, but for those that all have searched."""
    first = takewhile(
        lambda place: place.rule not in (CACHE, "default directory"),
        places("lib", library.asker(), of_process()),
    )
    return [directory for place in first for directory in place.directories]


@atexit.register
def end() -> None:
    """Python ends, or the process: the destructors that are left run as ld.so's do, and nothing is unmapped.

    That is after all that exit(3) was told of; where ld.so cannot be given them, exit(3) runs them in its
    turn.  Until then Python, and what is called at exit, may call into the libraries, as with ld.so.
    """
    with lock:
        if present and not _ended:
            for library in tuple(present):  # what destructors call is bound while Python is there
                if library.bind_left is not None:
                    library.bind_left()
            askers = [library for library in present if library.may_open]
            if askers:
                process_end.let_open({library.mapped: _searched(library) for library in askers})
            left = [library for library in _in_destructor_order() if library.initialised]
            addresses = array("Q", [address for library in left for address in library.destructors])
            if addresses and not process_end.hand_over(addresses, _of_host(left)):
                functions().set_destructors(buffer_address(addresses), len(addresses))
        _ended.add(True)
        stand_ins.fall_silent()
