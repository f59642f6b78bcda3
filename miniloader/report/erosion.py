"""What processes have no longer in common with their relatives, in words that a person can act on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from miniloader.errors import printable
from miniloader.forking import importing
from miniloader.report.numbers import count, size
from miniloader.report.text import Line, Part, Table, heading, listed, more

if TYPE_CHECKING:
    from miniloader.lab.audit.result import Audit
    from miniloader.lab.erosion.advice import Advice
    from miniloader.lab.erosion.result import ErodedObjects, Erosion
    from miniloader.lab.erosion.since import ErodedSince

__all__ = ["advice_view", "eroded_rows", "erosion_view"]

_MOST: Final = 8
_MOST_TYPES: Final = 6
_MOST_NAMES: Final = 4
_ALIKE: Final = 0.05
_MOST_ALIKE: Final = 3  # types, the first of which have to be the same


def erosion_view(audit: Audit) -> Iterator[Part]:
    """What every process has no longer in common with its nearest relative: a table, and sentences."""
    if audit.erosion is None:
        if _may_be_relatives(audit):
            yield ()
            yield ("erosion since fork: unknown, for that takes page frame numbers (level frames: root)",)
        return
    rows = sorted((row for row in audit.erosion if row.apart), key=lambda row: (-row.apart, row.pid))
    if not rows:
        return
    yield ()
    about = "two copies now of what was one frame since a fork (proven), or may have been (possible)"
    yield heading("no longer shared", about)
    cells = [
        [
            str(row.pid),
            str(row.relative),
            size(row.proven),
            size(row.possible),
            "?" if row.same is None else size(row.same),
            f"{size(row.changed)} changed while they were read" if row.changed else "",
        ]
        for row in rows[:_MOST]
    ]
    if len(rows) > _MOST:
        cells.append([f"… {more(len(rows) - _MOST)}"])
    yield Table(("process", "with", ">proven", ">possible", ">same bytes", "also"), cells)
    yield from _sentences(row for row in rows if row.same is not None)
    counted = [row for row in rows if _is_counted(row)]
    if counted:
        known = any(2 * row.proven_same >= (row.same or 0) for row in counted)
        said = (
            "gc.freeze() before the fork would help only against the collector: who reads an object counts it"
        )
        yield ((f"  {'' if known else 'if it was shared: '}{said}, and so copies its page", "dim"),)
    if sum(row.possible for row in rows) > sum(row.proven for row in rows):
        said = "possible: two that built the same thing after the fork look alike; an earlier look proves it"
        yield ((f"  {said} (--save FILE now, `miniloader diff` later; or --every)", "dim"),)


def _may_be_relatives(audit: Audit) -> bool:
    pids = {process.pid for process in audit.processes}
    return any(process.parent in pids for process in audit.processes)


def _is_counted(row: Erosion) -> bool:
    """Whether counts or the collector, of CPython, may be the cause of much of it."""
    return _of_python(row) and _touched(row) + _counts(row) > row.apart // 2


def _touched(row: Erosion) -> int:
    """What counts or the collector may have touched of what holds the same bytes: objects begin there, and it
    was not copied by collapsing pages into huge ones.
    """
    if row.touched is None:  # as older versions saved it
        return max((row.same or 0) - (row.huge or 0), 0)
    return row.touched


def _of_python(row: Erosion) -> bool:
    return (row.runtime or "").startswith("cpython")


def _counts(row: Erosion) -> int:
    return row.causes.get("reference-count", 0) + row.causes.get("collector", 0)


def _sentences(rows: Iterable[Erosion]) -> Iterator[Line]:
    """What is said of the first rows; of workers that are much alike only of the first of them."""
    alike: list[list[Erosion]] = []
    for row in rows:
        group = next((group for group in alike if _is_alike(group[0], row)), None)
        if group is not None:
            group.append(row)
        elif len(alike) < _MOST:
            alike.append([row])
    for first, *like_it in alike:
        yield _sentence(first)
        if like_it:
            pids = listed([str(row.pid) for row in like_it], _MOST)
            yield (pids, "bold"), f": like {first.pid}, to within {_ALIKE * 100:.0f} %"


def _is_alike(first: Erosion, row: Erosion) -> bool:
    """Whether two rows say much the same: of one relative, with the same objects in front."""
    figures = (
        (row.proven, first.proven),
        (row.possible, first.possible),
        (row.same or 0, first.same or 0),
        (row.huge or 0, first.huge or 0),
        (_touched(row), _touched(first)),
        *((row.causes.get(cause, 0), first.causes.get(cause, 0)) for cause in _DIFFERING),
    )
    most = _ALIKE * first.apart
    names = [[kind.type for kind in erosion.objects[:_MOST_ALIKE]] for erosion in (row, first)]
    told = (row.relative, row.runtime, *names[0]) == (first.relative, first.runtime, *names[1])
    return told and all(abs(figure - of_first) <= most for figure, of_first in figures)


def _sentence(row: Erosion) -> Line:
    """How much of it holds the same bytes, what differs in the others, and which objects lie there."""
    texts, proven_same = [], row.proven_same
    touched = _of_python(row) and 2 * _touched(row) >= (row.same or 0)
    if row.proven:
        of_all = f"{size(row.proven)} that it no longer shares with {row.relative}"
        text = f"{size(proven_same)} of {of_all} hold the same bytes as there"
        texts.append(text + (f": {_TOUCHED} them" if touched and proven_same else ""))
    if row.possible:  # that both have a frame of their own, and the same bytes, is all that is known
        same = (row.same or 0) - proven_same
        of_all = f"{size(row.possible)} that it and {row.relative} have a frame of their own for"
        text = f"{size(same)} of {of_all} hold the same bytes in both"
        texts.append(text + (f": if it was shared, {_TOUCHED} it" if touched and same else ""))
    if row.huge:
        texts.append(f"{size(row.huge)} of the same bytes were collapsed into huge pages, which copies them")
    written = (row.same or 0) - _touched(row) - (row.huge or 0)
    if _of_python(row) and written > 0 and (not touched or 10 * written > (row.same or 0)):
        texts.append(f"{size(written)} of the same bytes are where no object begins: data, no counts")
    text = ": " + "; ".join(texts)
    differing = {cause: number for cause, number in row.causes.items() if number and cause in _DIFFERING}
    if differing:
        listing = ", ".join(f"{size(number)} {_DIFFERING[cause]}" for cause, number in differing.items())
        text += f"; what differs: {listing}"
    if row.objects:
        names = [_counted(kind) for kind in row.objects]
        text += f". Objects there: {listed(names, _MOST_TYPES)}"
    return ((str(row.pid), "bold"), text)


def _counted(kind: ErodedObjects) -> str:
    """How many there are; a type of Python's keeps its name, whatever their number."""
    name = printable(kind.type)
    return count(kind.count, name, name.replace("malloc chunk", "malloc chunks", 1))


_TOUCHED: Final = "reference counts or the garbage collector touched"
_DIFFERING: Final = {
    "reference-count": "reference counts",
    "collector": "the collector's words",
    "other-write": "written otherwise",
}


def advice_view(audit: Audit) -> Iterator[Part]:
    """What would save memory, and how much."""
    with importing:
        from miniloader.lab.erosion.advice import advise

    pieces = [piece for piece in advise(audit) if audit.erosion is not None or piece.kind == "arenas"]
    if not pieces:
        return
    yield ()
    yield heading("what would help", "figures are sums of what is seen here")
    largest = sorted(pieces, key=lambda piece: -piece.bytes)
    for piece in largest[:_MOST]:
        yield (f"  {_told(piece)}",)
    if len(largest) > _MOST:
        yield ((f"  … {more(len(largest) - _MOST)}; --json has all", "dim"),)


def _told(piece: Advice) -> str:
    amount = f"{piece.bound} {size(piece.bytes)}"
    files = dict.fromkeys(printable(path.rpartition("/")[2]) for path in piece.libraries)
    names = listed([*files], _MOST_NAMES)
    leave = "leaves" if len(files) == 1 else "leave"
    workers = f"{listed([str(pid) for pid in piece.pids], _MOST_NAMES)}"
    return {
        "one-more": f"one more process like {workers}: costs {amount}",
        "ending-one": f"ending {'one of ' * (len(piece.pids) > 1)}{workers}: frees {amount}",
        "freeze": f"gc.freeze() before the fork: {amount} of {workers}, less what is read there as well",
        "huge-pages": f"no huge pages (PR_SET_THP_DISABLE) after the fork: {amount} of {workers}",
        "preload": f"loading before the fork: {amount} of {workers}, and what {names} {leave} in the heap",
        "prepared": f"prepared pages where miniloader loads (`miniloader prepare`): {amount}, of what is only"
        f" relocated ({names})",
        "twice": f"one file instead of several of {names} (other inodes): {amount} of {workers}",
        "arenas": f"one arena of malloc for all threads (MALLOC_ARENA_MAX=1): {amount} of {workers}",
        "other-build": f"one build of {names} instead of several: {amount} of {workers}",
    }[piece.kind]


def eroded_rows(rows: Sequence[ErodedSince] | None) -> Iterator[Part]:
    """What was one frame at the first look, and is two now; nothing where there is no such page."""
    eroded = sorted((row for row in rows or () if row.proven), key=lambda row: (-row.proven, row.pid))
    if not eroded:
        return
    yield ()
    yield heading("no longer shared", "one frame at the first look, two copies now")
    cells = [
        [str(row.pid), str(row.relative), size(row.proven), "?" if row.same is None else size(row.same)]
        for row in eroded[:_MOST]
    ]
    if len(eroded) > _MOST:
        cells.append([f"… {more(len(eroded) - _MOST)}"])
    yield Table(("process", "with", ">proven", ">same bytes"), cells)
