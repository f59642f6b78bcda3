"""What would save memory, and how much: each figure is a sum of what an audit has seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal

from miniloader.forking import importing
from miniloader.json_schema import COUNT, TEXT, array, record, words
from miniloader.lab.audit.result import Audit, AuditedLibrary, PrivatePage
from miniloader.lab.audit.since_fork import had_at_fork, parents_in
from miniloader.values import dataclass

__all__ = ["ADVICE_SCHEMA", "Advice", "advice_json", "advise", "can_be_prepared"]

AdviceKind = Literal[
    "one-more", "ending-one", "freeze", "huge-pages", "preload", "prepared", "twice", "other-build", "arenas"
]
Bound = Literal["about", "at least", "at most"]

_ALIKE: Final = 3  # times that the largest of workers has what the smallest has


@dataclass(frozen=True)
class Advice:
    """One thing to do, and what it saves (``one-more``: costs), in bytes.

    - ``one-more``: another worker like those of ``pids`` costs about so much, as their median has it: copies
      and anonymous memory of its own; where they are not alike, as servers with helpers of several kinds
      are, at most as much as the largest.
    - ``ending-one``: ending one of them frees at least so much: the least of such memory that one has.
      Shared memory and pages of files stay, whoever alone had mapped them.
    - ``freeze``: ``gc.freeze()`` before the fork saves at most this over all of ``pids``: what holds the same
      bytes as its relative has, which references may have touched as well, or differs in the collector's
      words; a copy that several of them have in common is counted once.
    - ``huge-pages``: what was collapsed into huge pages since the fork, and holds the same bytes as before,
      is saved at most where these workers may have no transparent huge pages (``PR_SET_THP_DISABLE``).
    - ``preload``: that the parent loads ``libraries`` before it forks saves at least this: copies that are
      only relocated, in each of ``pids`` but one.  What their initialisation leaves in the heap comes on top.
    - ``prepared``: pages that are only relocated, of all processes: what prepared pages save at most.  Left
      out are what cannot be prepared (programs, the system's own libraries), and what was copied since the
      fork though it had been relocated before: that would be copied again.
    - ``twice``: one library that is several files in the page cache: about what the further ones take.
    - ``other-build``: several builds of one library, told by its name: all but the largest take so much at
      most that one build for all would save.
    - ``arenas``: that the threads of each of ``pids`` have one arena of glibc's malloc
      (``MALLOC_ARENA_MAX=1``) saves at most what is free in those that they have each for itself now.
    """

    kind: AdviceKind
    bound: Bound
    bytes: int
    pids: tuple[int, ...] = ()
    libraries: tuple[str, ...] = ()


def advise(audit: Audit) -> tuple[Advice, ...]:
    """What would help the processes of ``audit``, for each family; nothing that would save nothing."""
    families: dict[int, list[int]] = {}
    for row in audit.erosion or ():
        families.setdefault(row.relative, []).append(row.pid)
    found = [piece for parent, workers in families.items() for piece in _of_family(audit, parent, workers)]
    found += _of_files(audit)
    arenas = {process.pid: process.arenas_free for process in audit.counted if process.arenas_free}
    found.append(Advice("arenas", "at most", sum(arenas.values()), tuple(arenas)))
    return tuple(piece for piece in found if piece.bytes > 0)


def advice_json(audit: Audit) -> list[dict[str, Any]]:
    """The key ``advice`` of ``audit --json``."""
    return [asdict(piece) for piece in advise(audit)]


def _of_family(audit: Audit, parent: int, workers: Sequence[int]) -> Iterator[Advice]:
    """What concerns a parent, or the eldest of siblings, and the others."""
    pids = tuple(workers)
    costs = [
        (process.anonymous - process.anonymous_shared) * audit.page_size
        for process in audit.counted
        if process.pid in pids
    ]
    if costs:
        with importing:  # what most audits do without
            from statistics import median_low

        if max(costs) <= _ALIKE * min(costs):
            yield Advice("one-more", "about", median_low(costs), pids)
        else:
            yield Advice("one-more", "at most", max(costs), pids)
        yield Advice("ending-one", "at least", min(costs), pids)
    touched = {
        row.pid: row.spared or 0
        for row in audit.erosion or ()
        if row.pid in pids and (row.runtime or "").startswith("cpython")
    }
    yield Advice("freeze", "at most", sum(touched.values()), tuple(touched))
    huge = {row.pid: row.huge for row in audit.erosion or () if row.pid in pids and row.huge}
    yield Advice("huge-pages", "at most", sum(huge.values()), tuple(huge))
    late = [library for library in audit.libraries if _having(library).isdisjoint({parent})]
    pages = {library.path: _but_one(library, pids) for library in late}
    names = tuple(path for path, number in pages.items() if number)
    yield Advice("preload", "at least", sum(pages.values()) * audit.page_size, pids, names)


def _of_files(audit: Audit) -> Iterator[Advice]:
    """What concerns files, whoever has them."""
    parents = parents_in(audit.processes)
    relocated = {
        library.path: _to_prepare(library, had_at_fork(library, parents)) for library in audit.libraries
    }
    paths = tuple(path for path, number in relocated.items() if number)
    yield Advice("prepared", "at most", sum(relocated.values()) * audit.page_size, (), paths)
    for library in audit.libraries:
        if library.files > 1 and library.takes is not None:
            further = library.takes * (library.files - 1) // library.files
            yield Advice("twice", "about", further, tuple(sorted(_having(library))), (library.path,))
    for builds in _builds(audit.libraries):
        *smaller, _ = builds
        pids = tuple(sorted(frozenset[int]().union(*map(_having, smaller))))
        paths = tuple(dict.fromkeys(library.path for library in builds))
        yield Advice("other-build", "at most", sum(library.takes or 0 for library in smaller), pids, paths)


def _builds(libraries: Iterable[AuditedLibrary]) -> Iterator[Sequence[AuditedLibrary]]:
    """The builds of each library of which there are several, the largest last.

    Libraries that others need are called ``lib…so…`` and are one by that name; extension modules of different
    packages may be called alike.
    """
    named: dict[str, list[AuditedLibrary]] = {}
    for library in libraries:
        if library.build_id is not None and library.name.startswith("lib") and ".so" in library.name:
            named.setdefault(library.name, []).append(library)
    for builds in named.values():
        if len({library.build_id for library in builds}) > 1:
            yield sorted(builds, key=lambda library: library.takes or 0)


def _having(library: AuditedLibrary) -> frozenset[int]:
    return frozenset(process.pid for process in library.processes)


def _relocated(library: AuditedLibrary) -> list[PrivatePage]:
    return [page for page in library.private_pages if page.only_relocated]


def _to_prepare(library: AuditedLibrary, forked: Mapping[int, int]) -> int:
    """How many copies prepared pages would save; ``forked``: who had it at the fork, with the parents."""
    pages = _relocated(library)
    if not pages or not can_be_prepared(library.name):
        return 0
    if not forked:  # as it is where all have been started anew, however many there are
        return sum([len(page.alone) for page in pages])
    return sum([forked.get(pid) not in page.pids for page in pages for pid in page.alone])


def can_be_prepared(name: str) -> bool:
    """Whether `miniloader prepare` takes a file so called, and others that need it take it from there.

    >>> can_be_prepared("libz.so.1"), can_be_prepared("libc-2.31.so"), can_be_prepared("nginx")
    (True, False, False)
    """
    with importing:
        from miniloader.loader.policy import comes_from_host
    if ".so" not in name or name.startswith("ld-"):  # a program, or what loads all others
        return False
    stem = re.split(r"-[0-9.]+(?=\.so)|\.so", name, maxsplit=1)[0]  # glibc's own were called so to 2.33
    return not any(comes_from_host(f"{stem}.so{version}") for version in ("", ".0", ".1", ".2", ".6"))


def _but_one(library: AuditedLibrary, pids: Sequence[int]) -> int:
    """How many pages that are only relocated ``pids`` would share, had their parent loaded the library."""
    shares: Mapping[int, int] = {
        page.vaddr: len([pid for pid in page.pids if pid in pids and pid not in page.common])
        for page in _relocated(library)
    }
    return sum(max(number - 1, 0) for number in shares.values())


ADVICE_SCHEMA: Final = array(
    record(
        {"kind": words("one-more ending-one freeze huge-pages preload prepared twice other-build arenas")},
        {"bound": {"enum": ["about", "at least", "at most"]}, "bytes": COUNT},
        {"pids": array(COUNT), "libraries": array(TEXT)},
    )
)
"""What :func:`advice_json` gives."""
