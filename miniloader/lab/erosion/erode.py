"""What every process of an audit has no longer in common with its nearest living relative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Survey
from miniloader.lab.erosion.causes import ErosionCause, causes_of
from miniloader.lab.erosion.census import Census
from miniloader.lab.erosion.chunks import eroded_chunks
from miniloader.lab.erosion.contents import PagePart, compare, huge_copies
from miniloader.lab.erosion.memory import PrivateMemory, private_memory
from miniloader.lab.erosion.moved_pages import without_moved
from miniloader.lab.erosion.pairs import Pair, pairs_of
from miniloader.lab.erosion.pools import pools_in
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.result import ErodedObjects, ErodedPages, Erosion, spans_of
from miniloader.lab.erosion.types import Types
from miniloader.values import dataclass

__all__ = ["erosion", "erosion_of"]


def erosion(
    processes: Sequence[Survey], merged: NDArray[np.uint64] | None, *, contents: bool
) -> tuple[Erosion, ...]:
    """A row for each process that has a relative among ``processes``, whose frames must be known.

    ``merged`` are the frames of KSM (None: not known).  ``contents``: whether the bytes are read as well.
    """
    families = Counter(process.known.stack for process in processes)
    memories = [private_memory(process) for process in processes if families[process.known.stack] > 1]
    if not contents:
        return erosion_of(memories, merged)
    surveys = {process.pid: process for process in processes}
    pairs = map(without_moved, pairs_of(memories, merged))
    copies: dict[int, set[int]] = {}
    return tuple(_read(pair, surveys[pair.pid], copies.setdefault(pair.relative, set())) for pair in pairs)


def erosion_of(memories: Sequence[PrivateMemory], merged: NDArray[np.uint64] | None) -> tuple[Erosion, ...]:
    """A row for each process that has a relative among them; nobody reads the bytes."""
    return tuple(_row(without_moved(pair), None, None) for pair in pairs_of(memories, merged))


@dataclass(frozen=True, eq=False)
class _Contents:
    """What is on the pages that are two frames: which hold the same bytes (and how many of them are in huge
    copies, None: not known; on how many of the others objects begin, None: of no known Python), how many
    freezing may have spared, how many could not be read.
    """

    same: NDArray[np.uint64]
    touched: int | None
    spared: int
    huge: int | None
    unread: int
    causes: Mapping[str, int]
    objects: tuple[ErodedObjects, ...]


def _read(pair: Pair, process: Survey, copies: set[int]) -> Erosion:
    """The row of a pair; ``copies`` are frames that have been counted for its relative, and are by this."""
    runtime = process.interpreter.name if process.interpreter is not None else None
    with suppress(EvidenceError):  # one of them has ended, or nobody may read it
        return _row(pair, runtime, _contents(pair, process, copies))
    return _row(pair, runtime, None)


def _row(pair: Pair, runtime: str | None, found: _Contents | None) -> Erosion:
    possible = np.setdiff1d(pair.apart, pair.proven, assume_unique=True)
    pages = ErodedPages(
        together=spans_of(pair.together),
        proven=spans_of(pair.proven),
        possible=spans_of(possible),
        same=() if found is None else spans_of(found.same),
    )
    return Erosion(
        pid=pair.pid,
        relative=pair.relative,
        proven=len(pair.proven) * PAGE_SIZE,
        possible=len(possible) * PAGE_SIZE,
        same=None if found is None else len(found.same) * PAGE_SIZE,
        changed=0 if found is None else found.unread * PAGE_SIZE,
        huge=None if found is None or found.huge is None else found.huge * PAGE_SIZE,
        touched=None if found is None or found.touched is None else found.touched * PAGE_SIZE,
        spared=None if found is None else found.spared * PAGE_SIZE,
        causes={} if found is None else {name: pages * PAGE_SIZE for name, pages in found.causes.items()},
        objects=() if found is None else found.objects,
        runtime=runtime,
        pages=pages,
    )


def _contents(pair: Pair, process: Survey, copies: set[int]) -> _Contents:
    """Read the pages that are two frames, a part at a time: no more than a part is kept."""
    census, unread, causes = None, 0, Counter[str]()
    same, with_objects = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
    done = spared = 0
    with ExitStack() as stack:
        memory = stack.enter_context(PresentMemory(pair.pid, process.present))
        if process.interpreter is not None and process.interpreter.is_known:
            pools = pools_in(process.copies.addresses, memory)
            census = Census(pools, Types(memory, pools, process.interpreter.type_address))
        for part in compare(pair):
            same.append(part.addresses[part.same])
            unread += int(np.count_nonzero(~part.read))
            of_cause, holds = _causes(part, census)
            with_objects.append(holds[part.same])
            causes.update({cause: int(np.count_nonzero(pages)) for cause, pages in of_cause.items()})
            rows = slice(done, done := done + len(part.addresses))
            lost = part.same & holds | of_cause["collector"]
            in_common = pair.frames[0][rows][lost & pair.several[rows]].tolist()
            spared += int(np.count_nonzero(lost & ~pair.several[rows])) + len({*in_common} - copies)
            copies.update(in_common)
        equal, held = np.concatenate(same), np.concatenate(with_objects)
        huge = huge_copies(pair.pid, pair.apart, equal)
        touched = np.count_nonzero(held if huge is None else held & ~huge)
        return _Contents(
            same=equal,
            touched=int(touched) if census is not None else None,
            spared=spared,
            huge=None if huge is None else int(np.count_nonzero(huge)),
            unread=unread,
            causes=causes,
            objects=census.objects() if census is not None else _chunks(memory, pair, process),
        )


def _chunks(memory: PresentMemory, pair: Pair, process: Survey) -> tuple[ErodedObjects, ...]:
    """What malloc has on these pages, of a program that is no interpreter whose objects are not known."""
    return eroded_chunks(memory, pair.apart) if process.interpreter is None else ()


def _causes(
    part: PagePart, census: Census | None
) -> tuple[Mapping[ErosionCause, NDArray[np.bool_]], NDArray[np.bool_]]:
    """Which of the pages that were read there are of each cause, and which have objects; these are counted.

    Without a ``census`` any page may have some.
    """
    differs = part.read & ~part.same
    changed = np.flatnonzero(differs)
    objects, holds = None, part.read
    if census is not None and part.read.all():
        objects, holds = census.count(part.addresses, part.words, differs)
    elif census is not None and part.read.any():
        holds = np.zeros(len(part.read), np.bool_)
        objects, holds[part.read] = census.count(
            part.addresses[part.read], part.words[part.read], differs[part.read]
        )
    found = causes_of(part.words[changed] != part.words_of_relative[changed], objects)
    causes = {cause: np.zeros(len(part.read), np.bool_) for cause in found}
    for cause, pages in found.items():
        causes[cause][changed] = pages
    return causes | {"unknown": part.same}, holds
