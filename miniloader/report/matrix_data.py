"""What a page draws of process × page matrices: every step's states and frames, encoded in few bytes.

A :class:`Film` is one matrix at several steps.  :func:`encode` makes of it what ``templates/page.js``
decodes: for each step and process a row of cells, as runs of equal values, where a value may also be "as
in the step before" or "as in the process with the same frame".  So 30,000 pages of 16 processes at five
steps take little more than the frame numbers of one process.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import printable
from miniloader.evidence.sharing import ABSENT, STATES, Sharing, analyse
from miniloader.evidence.snapshot import PAGE_DTYPE, ProcessPages, Snapshot
from miniloader.forking import cached_property
from miniloader.kernel.features import LEVELS
from miniloader.kernel.frames import flag_names
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["Film", "Group", "Scene", "encode", "pack", "table_of"]

_SAME_AS_BEFORE: Final = -1
_SAME_AS_PARTNER: Final = -2
_CELL: Final = 16  # a cell is partner × _CELL + state; partner 0: none, 1: itself, 2 + n: process n
_MOST_CHARACTERS: Final = 2_000_000  # of the packed data; what exceeds it is left out, least important first
#: What a reader is shown in place of a state's name.
_SHOWN: Final = {"sole": "the file's page", "copied-shared": "a copy in common", "absent": "not there"}
_MOST_RUNS: Final = 120  # rows of the text table for one step

Table = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Neighbouring pages [``start``, ``stop``) (indices) that are drawn together, and what they are."""

    start: int
    stop: int
    name: str
    about: str = ""


@dataclass(frozen=True)
class Scene:
    """The matrix at one step."""

    name: str
    about: str
    snapshot: Snapshot


@dataclass(frozen=True, eq=False)
class Film:
    """One matrix at several steps; ``rows`` name the processes, ``groups`` divide the pages.

    Every scene has the same processes and pages.  ``pages`` says more of some pages (``page.js`` knows the
    keys), ``ranges`` of runs of pages: (first, after the last, heading, text).
    """

    title: str
    rows: tuple[str, ...]
    groups: tuple[Group, ...]
    scenes: tuple[Scene, ...]
    start: int = 0
    ranges: tuple[tuple[int, int, str, str], ...] = ()
    pages: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def vaddrs(self) -> NDArray[np.uint64]:
        """Where each page starts."""
        return analyse(self.scenes[0].snapshot).vaddrs


# ------------------------------------------------------------------------------------------ packing
def pack(value: object) -> str:
    """``value`` as JSON, deflated, in base64: nothing in it can be mistaken for markup."""
    text = json.dumps(_inert(value), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _inert(value: object) -> object:
    """``value`` with every string in it printable, since names come from outside; bytes in base64."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case str():
            return printable(value)
        case Mapping():
            return {str(key): _inert(item) for key, item in value.items()}
        case list() | tuple():
            return [_inert(item) for item in value]
    return value


def encode(film: Film) -> str:
    """The film for ``page.js``; without map counts, flags or frame numbers where it would be too large."""
    left_out: list[str] = []
    optional = ["map counts", "flags", "frame numbers"]
    while True:
        packed = pack(_encoded(film, left_out))
        if len(packed) <= _MOST_CHARACTERS or not optional:
            return packed
        left_out.append(optional.pop(0))


class _Rows:
    """Encoded rows, each kept once."""

    def __init__(self) -> None:
        self.all: list[list[int]] = []
        self._known: dict[bytes, int] = {}

    def add(self, values: Table) -> int:
        """The number of the row with ``values``: counts and values of its runs in turn."""
        key = values.tobytes()
        if key not in self._known:
            self._known[key] = len(self.all)
            self.all.append(_runs(values))
        return self._known[key]


def _runs(values: Table) -> list[int]:
    """How many, and which value, of each run of equal values."""
    if not len(values):
        return []
    edges = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]])
    runs: list[int] = np.stack([np.diff(edges), values[edges[:-1]]], axis=1).ravel().tolist()
    return runs


def _encoded(film: Film, left_out: Sequence[str]) -> dict[str, Any]:
    rows = _Rows()
    last_tables: dict[str, Table] = {}
    flag_sets: dict[int, int] = {0: 0}
    mappings: dict[str, int] = {}
    drawn = np.concatenate([np.arange(group.start, group.stop) for group in film.groups] or [np.arange(0)])
    states: set[int] = set()
    scenes = []
    for scene in film.scenes:
        sharing = analyse(scene.snapshot)
        partners = sharing.partners.astype(np.int64)
        states.update(np.unique(sharing.states[:, drawn]).tolist())
        told = _told(_aligned(scene.snapshot, sharing), flag_sets)
        tables = {"cells": _cells(sharing, partners)} | {
            name: values for called, name, values in told if called not in left_out
        }
        encoded = {}
        for name, values in tables.items():
            last_values = last_tables.get(name)
            brief = values.copy()
            if name != "cells":
                _take_from_partners(brief, partners)
            if last_values is not None:
                brief[values == last_values] = _SAME_AS_BEFORE
            encoded[name] = [rows.add(row) for row in brief]
        last_tables = tables
        scenes.append(
            {
                "name": scene.name,
                "about": scene.about,
                "used": sharing.used_bytes,
                "unshared": sharing.unshared_bytes,
                "gone": [process.gone for process in scene.snapshot.processes],
                "reasons": [process.reason for process in scene.snapshot.processes],
                "maps": [
                    mappings.setdefault(json.dumps(_mappings(process)), len(mappings))
                    for process in scene.snapshot.processes
                ],
            }
            | encoded
        )
    processes = film.scenes[0].snapshot.processes
    vaddrs = film.vaddrs
    level = film.scenes[-1].snapshot.level
    return {
        "title": film.title,
        "rows": list(film.rows),
        "pids": [process.pid for process in processes],
        "bases": [f"{process.base:x}" for process in processes],
        "page_size": PAGE_SIZE,
        "vaddrs": _runs((vaddrs // PAGE_SIZE).astype(np.int64) - np.arange(len(vaddrs))),
        "pages": len(vaddrs),
        "at": film.start,
        "groups": [[group.start, group.stop, group.name, group.about] for group in film.groups],
        "legend": sorted(states),
        "states": [[_SHOWN.get(state.name, state.name), state.sign, state.help] for state in STATES],
        "level": level,
        "shows": next(row.shows for row in LEVELS if row.name == level),
        "left_out": list(left_out),
        "scenes": scenes,
        "encoded": rows.all,
        "flags": [" ".join(flag_names(flags)) for flags in flag_sets],
        "mappings": [json.loads(text) for text in mappings],
        "ranges": [list(note) for note in film.ranges],
        "about": {str(page): dict(facts) for page, facts in film.pages.items()},
    }


def _aligned(snapshot: Snapshot, sharing: Sharing) -> NDArray[np.void]:
    """The records of every page of every process; blank where a process has not got the page."""
    table = np.zeros((len(snapshot.processes), len(sharing.vaddrs)), dtype=PAGE_DTYPE)
    table["map_count"] = -1
    for row, process in zip(table, snapshot.processes, strict=True):
        row[np.searchsorted(sharing.vaddrs, process.pages["vaddr"])] = process.pages
    return table


def _cells(sharing: Sharing, partners: Table) -> Table:
    """State and partner of each page of each process in one number."""
    process = np.arange(len(sharing.pids))[:, np.newaxis]
    partner = np.where(partners < 0, 0, np.where(partners == process, 1, partners + 2))
    return (partner * _CELL + sharing.states).astype(np.int64)


def _take_from_partners(values: Table, partners: Table) -> None:
    """What belongs to a frame is the same for all who have it: told once, for the first."""
    process = np.arange(len(values))[:, np.newaxis]
    values[(partners >= 0) & (partners != process)] = _SAME_AS_PARTNER


def _told(pages: NDArray[np.void], flag_sets: dict[int, int]) -> Iterable[tuple[str, str, Table]]:
    """What is known of frames: (what it is called when left out, its key, its values by process and page).

    A frame number is told less the page's index, so that neighbouring frames give a run; 0 is unknown, and so
    it is of a map count plus one and of the index of a set of flags.
    """
    frames, count = pages["frame"].astype(np.int64), pages.shape[1]
    yield "frame numbers", "frames", np.where(frames > 0, frames - np.arange(count) + count, 0)
    values, inverse = np.unique(pages["flags"], return_inverse=True)
    numbers = [flag_sets.setdefault(int(value), len(flag_sets)) for value in values]
    yield "flags", "flags", np.array(numbers, dtype=np.int64)[inverse].reshape(pages.shape)
    yield "map counts", "counts", pages["map_count"].astype(np.int64) + 1


def _mappings(process: ProcessPages) -> list[list[Any]]:
    """Start and end (vaddrs), protection and name of each mapping; the same where they lie at other bases."""
    mappings = []
    for backing in process.mappings:
        vma = backing.vma
        name = f"{vma.path} +{vma.file_offset:#x}" if vma.is_file else vma.path or "anonymous"
        kind = "file" if vma.is_file else "anonymous"
        mappings.append(
            [f"{vma.start - process.base:x}", f"{vma.end - process.base:x}", vma.protection, kind, name]
        )
    return mappings


# -------------------------------------------------------------------------------------------- as text
def table_of(film: Film, scene: Scene) -> dict[str, Any]:
    """The matrix at one step as text: runs of pages that look the same, for ``matrix.html``."""
    sharing = analyse(scene.snapshot)
    runs = sharing.runs(film.vaddrs[[group.start for group in film.groups]].tolist())
    names = {index: group.name for group in film.groups for index in range(group.start, group.stop)}
    shown = [run for run in runs if run.start in names and any(state != ABSENT for state in run.states)]
    return {
        "rows": [
            {
                "from": f"{run.vaddr:#x}",
                "pages": run.pages,
                "group": names[run.start],
                "cells": [
                    _in_words(film, index, state, partner)
                    for index, (state, partner) in enumerate(zip(run.states, run.partners, strict=True))
                ],
            }
            for run in shown[:_MOST_RUNS]
        ],
        "more": max(0, len(shown) - _MOST_RUNS),
        "nothing": not shown,
    }


def _in_words(film: Film, index: int, state: int, partner: int) -> str:
    name = _SHOWN.get(STATES[state].name, STATES[state].name)
    return f"{name}, with {film.rows[partner]}" if partner not in (-1, index) else name
