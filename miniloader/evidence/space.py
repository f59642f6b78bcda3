"""What is where in one process: whose symbol, or whose code, is at an address that a word holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.layout import Symbolic
from miniloader.kernel.frames import distinct
from miniloader.values import dataclass

__all__ = ["Placed", "Space"]


@dataclass(frozen=True)
class Placed:
    """A file in a process: ``bias`` is address - vaddr, [``start``, ``end``) are addresses.

    ``facts`` is None where the file cannot be read.  The bias is negative where the end of a file lies at a
    low address.
    """

    bias: int
    start: int
    end: int
    facts: FileFacts | None

    @property
    def shift(self) -> np.uint64:
        """The bias as it is added to arrays of vaddrs, modulo 2**64."""
        return np.uint64(self.bias % 2**64)


class Space:
    """What is where in one process; ``code`` are the addresses [start, end) of all executable mappings.

    ``stand_ins`` are the functions that code of miniloader's stands for, by where it is.
    """

    def __init__(
        self,
        placed: Iterable[Placed],
        code: Iterable[tuple[int, int]],
        vdso: tuple[int, int] = (0, 0),
        stand_ins: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._placed = sorted(placed, key=lambda file: file.start)
        self._starts = np.array([file.start for file in self._placed], dtype=np.uint64)
        self._ends = np.array([file.end for file in self._placed], dtype=np.uint64)
        self._shifts = {file.facts: file.shift for file in self._placed if file.facts is not None}
        self._code = np.array(sorted(code), dtype=np.uint64).reshape(-1, 2)
        self._vdso = np.array([vdso], dtype=np.uint64)
        self._stand_ins = np.array(sorted(stand_ins.items()), dtype=np.uint64).reshape(-1, 2)

    def meant(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """``values``, but for an address of code that stands for a function: that function's address.

        >>> Space([], [], stand_ins={0x7000: 0x1234}).meant(np.array([0x7000, 0x8000], np.uint64)).tolist()
        [4660, 32768]
        """
        if not len(self._stand_ins):
            return values
        addresses, functions = self._stand_ins.T
        at = np.minimum(np.searchsorted(addresses, values), len(addresses) - 1)
        return np.where(addresses[at] == values, functions[at], values)

    def in_code(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which addresses are executable.

        >>> Space([], [(0x1000, 0x2000)]).in_code(np.array([0xFFF, 0x1000, 0x2000], np.uint64)).tolist()
        [False, True, False]
        """
        return _inside(addresses, self._code)

    def defines(
        self, names: NDArray[np.uint64], addresses: NDArray[np.uint64], values: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.intp]]:
        """Whether the file at each of ``addresses`` (``values`` less the addend) defines the name there.

        The second answer: which cannot be told, since that file cannot be read.  The third: which of the
        files that is (for :meth:`remember`), -1: none.
        """
        good, hidden = np.zeros((2, len(names)), np.bool_)
        if not len(self._starts):
            return good, hidden, np.full(len(names), -1)
        # The end belongs to it, too: that is where symbols such as _end are.
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        at = np.where((at >= 0) & (addresses <= self._ends[at]), at, -1)
        for index in np.flatnonzero(np.bincount(at[at >= 0], minlength=0)).tolist():
            rows, facts = np.flatnonzero(at == index), self._placed[index].facts
            if facts is None:
                hidden[rows] = True
                continue
            vaddrs = addresses[rows] - self._placed[index].shift
            if len(facts.definitions):
                good[rows] = _contains(facts.definitions, facts.keys(vaddrs, names[rows]))
            if len(facts.indirect_names):
                resolved = _contains(facts.indirect_names, names[rows]) & _inside(vaddrs, facts.code)
                good[rows] |= resolved
        in_vdso = np.flatnonzero(_inside(values, self._vdso))
        if len(in_vdso):
            indirect = [file.facts.indirect_names for file in self._placed if file.facts is not None]
            resolvable = distinct(np.concatenate(indirect))
            if len(resolvable):
                good[in_vdso] |= _contains(resolvable, names[in_vdso])
        return good, hidden, at

    def in_block(
        self, names: NDArray[np.uint64], offsets: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether a thread-local symbol of each name is at its offset in some file's block.

        The second answer: which of the others cannot be told, since some file cannot be read.
        """
        good = np.zeros(len(names), np.bool_)
        for facts in self._shifts:
            if len(facts.thread_local):
                good |= _contains(facts.thread_local, facts.keys(offsets, names))
        return good, ~good & any(file.facts is None for file in self._placed)

    def address_of(self, name: int) -> int | None:
        """The address of the symbol so called; None where none, several or only an IFUNC define it."""
        addresses = {
            file.bias + vaddr
            for file in self._placed
            if file.facts is not None
            for vaddr in file.facts.defined(name)
        }
        return addresses.pop() if len(addresses) == 1 else None

    def remember(
        self,
        slots: Symbolic,
        rows: NDArray[np.intp],
        addresses: NDArray[np.uint64],
        where: NDArray[np.intp],
    ) -> None:
        """Keep with ``slots`` that the files ``where`` define what their ``rows`` want, at ``addresses``."""
        for index in np.flatnonzero(np.bincount(where[where >= 0], minlength=0)).tolist():
            facts, found = self._placed[index].facts, where == index
            if facts is None:
                continue
            if facts not in slots.targets:
                slots.targets.append(facts)
            slots.target[rows[found]] = slots.targets.index(facts)
            vaddrs = addresses[found] - self._placed[index].shift
            slots.target_vaddr[rows[found]] = vaddrs + slots.addend[rows[found]]

    def as_known(self, slots: Symbolic, values: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which slots hold the address of a definition that was found before, in whatever process."""
        shifts = [*(self._shifts.get(facts) for facts in slots.targets), None]  # the last is for -1
        shift = np.array([shift or 0 for shift in shifts], np.uint64)
        mapped = np.array([shift is not None for shift in shifts])
        target = (shift[slots.target] + slots.target_vaddr) & slots.mask
        return np.asarray(mapped[slots.target] & (values == target))


def _inside(values: NDArray[np.uint64], spans: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in one of the sorted, disjoint spans [start, end)."""
    if not len(spans):
        return np.zeros(len(values), np.bool_)
    at = np.searchsorted(spans[:, 0], values, side="right") - 1
    return np.asarray((at >= 0) & (values < spans[at, 1]))


def _contains(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in the sorted array, which is not empty."""
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)
