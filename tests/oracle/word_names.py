"""Naming what a word refers to, so that words of two processes can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import read_maps
from miniloader.kernel.process_memory import ProcessMemory

__all__ = ["Referring", "WordNames"]

_NOBODY: Final = -1
_THREAD: Final = 1 << 32  # added to a file's number: its thread-local block
_LARGEST_OFFSET: Final = 1 << 22  # from the thread pointer; what is more is an address


class Referring(Protocol):
    """What is known of each word: its ``vaddrs`` and, from its relocation, its ``formulas``."""

    @property
    def vaddrs(self) -> NDArray[np.uint64]:
        """Where they are."""
        ...

    @property
    def formulas(self) -> NDArray[np.object_]:
        """As in :mod:`miniloader.machine.relocation`."""
        ...


class WordNames:
    """What is where in one process: ``report`` is what it told (see :mod:`tests.oracle.held`).

    ``files`` numbers paths, the same for all processes that are to be compared.
    """

    def __init__(self, pid: int, report: Mapping[str, Any], files: dict[str, int]) -> None:
        self._pid = pid
        self._bias = np.uint64(report["bias"])
        self._files = files
        rows = [(row["start"], row["end"], row["bias"], row["path"]) for row in report["libraries"]]
        rows += [
            (v.start, v.end, v.start, v.path) for v in read_maps(pid) if v.path in ("[vdso]", "[vsyscall]")
        ]
        rows.sort()
        self._starts = np.array([row[0] for row in rows], np.uint64)
        self._ends = np.array([row[1] for row in rows], np.uint64)
        self._biases = np.array([row[2] for row in rows], np.uint64)
        self._numbers = np.array([files.setdefault(row[3], len(files)) for row in rows], np.int64)
        # A carrier of ours is listed, too: the library that it serves comes after it, and counts.
        self._modules = {
            row["tls_module"]: files[row["path"]] for row in report["libraries"] if row["tls_module"]
        }
        blocks = {row["tls_module"]: row for row in report["libraries"] if row["tls_offset"] is not None}
        self._blocks = [(row["tls_offset"], files[row["path"]]) for row in blocks.values()]

    def of(
        self, words: Referring, values: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The file (-1: none) and the offset of each of ``values``, the words' contents."""
        owner = np.full(len(values), _NOBODY, np.int64)
        offset = values.copy()
        formulas = words.formulas
        with np.errstate(over="ignore"):
            own = formulas == "B + A"
            owner[own], offset[own] = 0, values[own] - self._bias
            place = (formulas == "S + A") | (formulas == "S") | (formulas == "indirect")
            owner[place], offset[place] = self.addresses(values[place])
            near = formulas == "S + A - P"
            signed = values[near].astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)
            owner[near], offset[near] = self.addresses(signed + self._bias + words.vaddrs[near])
        for index in np.flatnonzero(np.isin(formulas, ("module", "thread offset", "descriptor"))).tolist():
            owner[index], offset[index] = self._thread_local(formulas[index], int(values[index]))
        return owner, offset

    def text(self, words: Referring, values: NDArray[np.uint64], index: int) -> str:
        """One word, and what it refers to."""
        owner, offset = self.of(words, values)
        number, paths = int(owner[index]), list(self._files)
        if number == _NOBODY:
            return f"{int(values[index]):#x}"
        block = " thread-local" if number >= _THREAD else ""
        name = "itself" if words.formulas[index] == "B + A" else paths[number % _THREAD]
        return f"{name}{block} + {int(offset[index]):#x}"

    def addresses(self, values: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Each as an address: its library (-1: none; its very end counts, too) and the offset in it."""
        if not len(values):
            return np.empty(0, np.int64), values
        owner, offset = np.full(len(values), _NOBODY, np.int64), values.copy()
        # The longest first: between the segments of one (ld.so, aarch64) there may be another (the vDSO).
        for row in np.argsort(self._starts - self._ends, kind="stable").tolist():
            inside = (self._starts[row] <= values) & (values <= self._ends[row])
            owner[inside], offset[inside] = self._numbers[row], values[inside] - self._biases[row]
        return owner, offset

    def _thread_local(self, formula: str, value: int) -> tuple[int, int]:
        if formula == "module":
            number = self._modules.get(value)
            return (_NOBODY, value) if number is None else (number + _THREAD, 0)
        signed = value - (1 << 64) if value >> 63 else value
        if formula == "descriptor" and signed > _LARGEST_OFFSET:
            # Its argument points to a module and an offset (glibc's tls_index).
            module, offset = self._pair(value)
            if module in self._modules:
                return self._modules[module] + _THREAD, offset
            return _NOBODY, value
        # Offsets are negative on x86-64, positive on aarch64; other blocks are of one thread, far away.
        below = [block for block in self._blocks if block[0] <= signed and (block[0] < 0) == (signed < 0)]
        if not below:
            return _NOBODY, value
        start, number = max(below)
        return number + _THREAD, signed - start

    def _pair(self, address: int) -> tuple[int, int]:
        with ProcessMemory(self._pid) as memory:
            module, offset = memory.words(np.array([address], np.uint64), 2)[0].tolist()
        return module, offset
