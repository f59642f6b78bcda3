"""Who serves each reference of a running process: what its slots lead to, read from its memory.

ld.so has looked every symbol up by the rules of its scope; whatever has come in the way since (a library
that was preloaded, a hook in a GOT, a call that never happened) stands in the slots alone.  Nothing is
stopped, and only pages that are in memory are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import (
    SHN_ABS,
    SHN_UNDEF,
    STB_WEAK,
    STT_GNU_IFUNC,
)
from miniloader.errors import ElfError, UsageError
from miniloader.evidence.slots import COPY, SYMBOL
from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record, words
from miniloader.kernel.frames import distinct
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.procfs import read_stat
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.linked_process import LinkedImage, LinkedProcess
from miniloader.lab.audit.select import matches
from miniloader.machine.relocation import KINDS
from miniloader.values import dataclass

__all__ = ["LIVE_SCHEMA", "STATES", "LiveBinding", "LiveBindings", "live_bindings"]

STATES: Final[dict[str, str]] = {
    "bound": "leads to the definition of the symbol in the library that serves it",
    "preempted": "leads to another's definition, which comes before the referrer's own in its scope",
    "chosen": "leads to what the provider's resolver has chosen for this processor (IFUNC)",
    "entry": "leads to a PLT entry of the program at a fixed address: the function's address for everybody",
    "copy": "leads to the program's copy of the variable, which everybody uses (copy relocation)",
    "copied": "the program's copy itself: whose variable it was made of",
    "offset": "holds an offset or a distance, not an address (thread-local storage): told by look-up",
    "lazy": "leads back to its own PLT: has not been called yet",
    "stand-in": "leads to code of miniloader's, which answers for the provider's function",
    "rebound": "leads elsewhere than to any definition: somebody has put something else there",
    "overwritten": "data that was relocated, and that the program has changed since: told by look-up",
    "nobody": "0: a weak reference that nobody serves",
    "unread": "not in memory, or in a file that cannot be read",
}
"""What a slot may show: the state, and what that says."""

_BOUND, _PREEMPTED, _CHOSEN, _ENTRY, _COPY, _COPIED, _OFFSET, _LAZY, _STAND_IN, _REBOUND, _OVERWRITTEN, \
    _NOBODY, _UNREAD = range(len(STATES))  # fmt: skip
_NAMES: Final = tuple(STATES)
_BY_LOOK_UP: Final = (_COPIED, _OFFSET, _OVERWRITTEN)
_PAGE_MASK: Final = np.uint64(PAGE_SIZE - 1)


@dataclass(frozen=True)
class LiveBinding:
    """What ``slots`` slots of the library ``referrer`` show of a ``symbol`` (of ``version``).

    ``state`` is one of :data:`STATES`.  ``provider`` is who serves it, None where nobody does, or nobody
    yet; ``leads_to`` is where they lead, where that is not the symbol itself; ``also`` are the other files
    of the process that define the name in a version that would serve, as they were loaded.  All are paths.
    """

    referrer: str
    symbol: str
    version: str | None
    provider: str | None
    state: str
    leads_to: str | None
    slots: int
    also: tuple[str, ...]


@dataclass(frozen=True)
class LiveBindings:
    """All bindings of process ``pid`` called ``name``; ``unreadable`` are files, and why."""

    pid: int
    name: str
    bindings: tuple[LiveBinding, ...]
    unreadable: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``audit --bindings --json`` prints."""
        return {
            "pid": self.pid,
            "name": self.name,
            "bindings": [asdict(row) | {"also": [*row.also]} for row in self.bindings],
            "unreadable": [{"path": path, "reason": reason} for path, reason in self.unreadable],
        }


LIVE_SCHEMA: Final = record(
    {"pid": COUNT, "name": TEXT},
    {
        "bindings": array(
            record(
                keys(TEXT, "referrer symbol"),
                keys(nullable(TEXT), "version provider leads_to"),
                {"state": words(" ".join(STATES)), "slots": COUNT, "also": array(TEXT)},
            )
        )
    },
    {"unreadable": array(record(keys(TEXT, "path reason")))},
)
"""What :meth:`LiveBindings.to_json` gives."""


def live_bindings(pid: int, library: str | None = None) -> LiveBindings:
    """What every slot of process ``pid`` leads to; ``library`` chooses referrers by a pattern.

    Raises UsageError when it chooses none, ProcessGone, EvidenceError.

    >>> import os
    >>> found = live_bindings(os.getpid(), "libc.so*")
    >>> {row.state for row in found.bindings} <= set(STATES)
    True
    """
    name, _ = read_stat(pid)
    with PageMap(pid) as pagemap, ProcessMemory(pid) as memory:
        process = LinkedProcess(pid, pagemap, memory)
        chosen = [
            image
            for image in process.images
            if library is None or matches(library, image.path, os.path.basename(image.path))
        ]
        if library is not None and not chosen:
            raise UsageError(f"--library {library!r}: this process has no such library mapped")
        rows = tuple(row for image in chosen for row in _rows(process, image))
        return LiveBindings(pid, name, rows, process.unreadable)


# ------------------------------------------------------------------------------------- what slots show
def _rows(process: LinkedProcess, image: LinkedImage) -> Iterator[LiveBinding]:
    """A row for each symbol of ``image``, and for each different thing that its slots show."""
    slots = image.references
    values, done = process.slot_words(image)
    judged = _Judged(process, image, slots, values, done)
    several = process.counts(image.facts.name_numbers[slots["symbol"]]) > 1
    several |= judged.state == _LAZY  # of which nobody has looked who would serve
    shown = np.where(np.isin(judged.state, (_CHOSEN, _REBOUND)), values, np.uint64(0))
    columns = (slots["symbol"], judged.state, judged.provider, shown, several)
    counted = Counter(zip(*(column.tolist() for column in columns), strict=True))
    for (symbol, state, provider, value, has_others), number in counted.items():
        definers = process.definers(image, symbol) if has_others else []
        path = process.images[provider].path if provider >= 0 else None
        version = image.table.version(symbol)
        yield LiveBinding(
            image.path,
            image.table.name(symbol),
            version.name if version is not None else None,
            path,
            _NAMES[state],
            process.place(value) if state in (_CHOSEN, _REBOUND) else None,
            number,
            tuple(dict.fromkeys(other.path for other, _ in definers if other.path != path)),
        )


class _Judged:
    """What the ``slots`` of ``image`` show: the state of each, and the number of who serves it, or -1."""

    def __init__(
        self,
        process: LinkedProcess,
        image: LinkedImage,
        slots: NDArray[Any],
        values: NDArray[np.uint64],
        done: NDArray[np.bool_],
    ) -> None:
        self._process, self._image, self._slots, self._values = process, image, slots, values
        self.state = np.full(len(slots), _UNREAD, np.int64)
        self.provider = np.full(len(slots), -1, np.int64)
        self._own = image.table.rows[slots["symbol"]]
        self._names = image.facts.name_numbers[slots["symbol"]]
        is_address = slots["what"] == SYMBOL
        self._target = self._masked(process.space.meant(values) - slots["addend"].astype(np.uint64))
        rows = np.flatnonzero(is_address & done)
        rows = self._to_definitions(rows)
        rows = self._null(rows)
        rows = self._lazy(rows)
        rows = self._chosen(rows)
        rows = self._absolute(rows)
        kinds = KINDS.get(image.image.header.machine, {})
        only_slots = [code for code, kind in kinds.items() if kind.formula == "S"]  # of the GOT
        in_got = np.isin(slots["kind"][rows], only_slots)
        self.state[rows] = np.where(in_got, _REBOUND, _OVERWRITTEN)
        self.state[slots["what"] == COPY] = _COPIED
        self.state[~is_address & (slots["what"] != COPY)] = _OFFSET
        self._look_up(np.flatnonzero(np.isin(self.state, _BY_LOOK_UP)))

    def _masked(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        narrow = self._slots["size"] == 4
        return np.asarray(np.where(narrow, values & np.uint64(0xFFFFFFFF), values), np.uint64)

    def _to_definitions(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Judge those that lead to where some image defines their symbol; the rest is returned."""
        process, at = self._process, self._process.image_at(self._target[rows])
        for number in distinct(at[at >= 0]).tolist():
            definer = process.images[number]
            here = rows[at == number]
            vaddrs = self._target[here] - np.uint64(definer.bias % 2**64)
            defined = _among(definer.facts.definitions, definer.facts.keys(vaddrs, self._names[here]))
            here, vaddrs = here[defined], vaddrs[defined]
            preempted = (self._own["shndx"][here] != SHN_UNDEF) & (definer is not self._image)
            state = np.where(preempted, _PREEMPTED, _BOUND)
            state[_among(definer.entries, self._names[here])] = _ENTRY
            state[_among(definer.copies, vaddrs)] = _COPY
            state[process.space.meant(self._values[here]) != self._values[here]] = _STAND_IN
            self.state[here], self.provider[here] = state, number
        return np.asarray(rows[self.provider[rows] < 0])

    def _null(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        weak = (self._own["info"][rows] >> 4 == STB_WEAK) & (self._own["shndx"][rows] == SHN_UNDEF)
        null = weak & (self._target[rows] == 0)
        self.state[rows[null]] = _NOBODY
        return np.asarray(rows[~null])

    def _lazy(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Judge those that hold what the file has, the address of code of its own PLT."""
        image = self._image
        inside = rows[self._process.image_at(self._values[rows]) == image.number]
        if not len(inside):
            return rows
        expected, is_there = _words_of_file(image, self._slots["vaddr"][inside])
        lazy = inside[is_there & (expected + np.uint64(image.bias % 2**64) == self._values[inside])]
        self.state[lazy] = _LAZY
        return rows[~np.isin(rows, lazy)]

    def _chosen(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Judge those whose symbol is an IFUNC where it is looked up, and that lead to code."""
        code = self._process.space.in_code(self._target[rows])
        for row in rows[code].tolist():
            first = next(iter(self._process.definers(self._image, int(self._slots["symbol"][row]))), None)
            if first is not None and int(first[0].table.type[first[1]]) == STT_GNU_IFUNC:
                self.state[row], self.provider[row] = _CHOSEN, first[0].number
        return np.asarray(rows[self.provider[rows] < 0])

    def _absolute(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        for row in rows.tolist():
            for definer, symbol in self._process.definers(self._image, int(self._slots["symbol"][row])):
                defined = definer.table.rows[symbol]
                if int(defined["shndx"]) == SHN_ABS and int(defined["value"]) == int(self._target[row]):
                    self.state[row], self.provider[row] = _BOUND, definer.number
                    break
        return np.asarray(rows[self.provider[rows] < 0])

    def _look_up(self, rows: NDArray[np.intp]) -> None:
        """Say who serves those whose slots do not tell: who comes first in the scope."""
        for row in rows.tolist():
            definers = self._process.definers(self._image, int(self._slots["symbol"][row]))
            beyond = self.state[row] == _COPIED  # a copy is of what somebody else defines
            first = next((d for d, _ in definers if not (beyond and d is self._image)), None)
            if first is not None:
                self.provider[row] = first.number
            elif int(self._own["info"][row]) >> 4 == STB_WEAK:
                self.state[row] = _NOBODY


def _among(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in the sorted array."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)


def _words_of_file(
    image: LinkedImage, vaddrs: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The words that the file has at these vaddrs, and which of them are in the file."""
    expected, is_there = np.zeros(len(vaddrs), np.uint64), np.zeros(len(vaddrs), np.bool_)
    word = image.facts.word
    for load in image.image.loads:
        inside = (vaddrs >= load.vaddr) & (vaddrs + np.uint64(word) <= load.file_end)
        offsets = vaddrs[inside] - np.uint64(load.vaddr) + np.uint64(load.file_offset)
        at = (offsets & _PAGE_MASK).astype(np.intp)
        whole = at <= PAGE_SIZE - word
        try:
            pages = image.facts.pages(offsets[whole] & ~_PAGE_MASK)
        except ElfError:
            continue
        places = np.flatnonzero(inside)[whole]
        octets = np.take_along_axis(pages, at[whole, np.newaxis] + np.arange(word), axis=1)
        expected[places], is_there[places] = octets.copy().view(f"u{word}")[:, 0], True
    return expected, is_there
