"""Why is a private page of a file private?  Its bytes are compared with the file's: pure functions.

A page has a set of causes.  First every place that the loader writes (:mod:`miniloader.evidence.slots`) is
judged by its value, then the file's bytes are put back there, and what still differs somebody else wrote:

- ``relocation``: a place holds what its relocation computes.  RELATIVE and RELR: bias + addend, exactly.  A
  symbol's address (64, GLOB_DAT, JUMP_SLOT): the file that is mapped at the value defines a symbol of that
  name there, of whatever version, or an IFUNC of that name and the value is in its code (or in the vDSO);
  or it is 0 for an undefined weak symbol, or the slot's own PLT entry (not bound yet).  IRELATIVE: an
  address in code.  Thread-local storage: a module number, a negative offset, an address in code.
  What COPY brings belongs to the program from then on and is never verified, nor are PC-relative words
  in code: any value counts.
- ``overwritten``: a place of a relocation that holds neither that nor what the file has.
- ``loader``: the dynamic section, GOT[0] to GOT[2], and all that ld.so writes to its own pages.
- ``bss``: the tail of the last file page, past ``p_filesz``: zeroed by the loader, the program's afterwards.
- ``write``: anything else that differs.
- ``identical``: copied, yet nothing differs: the byte that was there was stored again, or it was undone.
- ``unknown``: with a reason.

Whether the first of several definitions was chosen is not decided again here: the name at the address is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import SHN_UNDEF, STB_WEAK, STT_GNU_IFUNC, STT_TLS
from miniloader.elf.tables import Table
from miniloader.evidence.slots import (
    ARGUMENT,
    COPY,
    DESCRIPTOR,
    INDIRECT,
    LOADER,
    MODULE,
    MODULE_OFFSET,
    OTHER,
    RELATIVE,
    SYMBOL,
    THREAD_OFFSET,
    Facts,
)
from miniloader.kernel.syscalls import PAGE_SIZE

__all__ = ["CAUSES", "WORD_DTYPE", "Cause", "Classified", "Placed", "Space", "bit", "cause_names", "classify"]

Cause = Literal["relocation", "overwritten", "loader", "bss", "write", "identical", "unknown"]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)
"""Every cause; cause ``CAUSES[i]`` is bit ``i`` of a set."""

WORD_DTYPE: Final = np.dtype(
    [
        ("page", np.int32),  # index into what was classified
        ("vaddr", np.uint64),
        ("size", np.uint8),  # bytes
        ("cause", np.uint8),  # one bit; 0: a slot that is still as in the file
        ("slot", np.int64),  # index into Facts.slots; -1: none
        ("file", np.uint64),  # what the file has (in bss: 0)
        ("live", np.uint64),  # what the process has
    ]
)
"""A word that the loader writes, or that differs from the file."""

_WORD: Final = 8
_MOST_MODULES: Final = 1 << 20


def bit(cause: Cause) -> int:
    """The bit that stands for ``cause`` in a set."""
    return 1 << CAUSES.index(cause)


def cause_names(causes: int) -> tuple[Cause, ...]:
    """The causes in a set."""
    return tuple(cause for index, cause in enumerate(CAUSES) if causes >> index & 1)


_RELOCATION, _OVERWRITTEN, _LOADER, _BSS, _WRITE, _IDENTICAL, _UNKNOWN = map(bit, CAUSES)


@dataclass(frozen=True, slots=True)
class Placed:
    """A file in a process: ``bias`` is address - vaddr, [``start``, ``end``) are addresses.

    ``facts`` is None where the file cannot be read.
    """

    bias: int
    start: int
    end: int
    facts: Facts | None


class Space:
    """What is where in one process; ``code`` are the addresses [start, end) of all executable mappings."""

    def __init__(
        self, placed: Iterable[Placed], code: Iterable[tuple[int, int]], vdso: tuple[int, int] = (0, 0)
    ) -> None:
        self._placed = sorted(placed, key=lambda one: one.start)
        self._starts = np.array([one.start for one in self._placed], dtype=np.uint64)
        self._ends = np.array([one.end for one in self._placed], dtype=np.uint64)
        self._code = np.array(sorted(code), dtype=np.uint64).reshape(-1, 2)
        self._vdso = np.array([vdso], dtype=np.uint64)

    def in_code(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which addresses are executable."""
        return _inside(addresses, self._code)

    def defines(
        self, names: NDArray[np.uint64], addresses: NDArray[np.uint64], values: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether the file at each of ``addresses`` (``values`` less the addend) defines the name there.

        The second answer: which cannot be told, since that file cannot be read.
        """
        good, hidden = np.zeros(len(names), np.bool_), np.zeros(len(names), np.bool_)
        if not len(self._starts):
            return good, hidden
        # The end belongs to it, too: that is where symbols such as _end are.
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        at = np.where((at >= 0) & (addresses <= self._ends[at]), at, -1)
        for index in np.flatnonzero(np.bincount(at[at >= 0], minlength=0)).tolist():
            here, facts = np.flatnonzero(at == index), self._placed[index].facts
            if facts is None:
                hidden[here] = True
                continue
            vaddrs = addresses[here] - np.uint64(self._placed[index].bias)
            wanted, known = facts.keys(vaddrs, names[here]), facts.definitions
            if len(known):
                found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
                good[here] = known[found] == wanted
            if len(facts.indirect_names):
                resolved = _contains(facts.indirect_names, names[here]) & _inside(vaddrs, facts.code)
                good[here] |= resolved
        in_vdso = np.flatnonzero(_inside(values, self._vdso))
        if len(in_vdso):
            every = [one.facts.indirect_names for one in self._placed if one.facts is not None]
            good[in_vdso] |= np.isin(names[in_vdso], np.concatenate(every))
        return good, hidden


def _inside(values: NDArray[np.uint64], spans: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in one of the sorted, disjoint spans [start, end)."""
    if not len(spans):
        return np.zeros(len(values), np.bool_)
    at = np.searchsorted(spans[:, 0], values, side="right") - 1
    return np.asarray((at >= 0) & (values < spans[at, 1]))


def _contains(ordered: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in the sorted array, which is not empty."""
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)


@dataclass(frozen=True, slots=True, eq=False)
class Classified:
    """``causes``: a set of bits for each page; ``unreadable``: unknown, for a file could not be read.

    ``words``: the words with a cause of their own, as WORD_DTYPE, by page and vaddr; relocations that are
    as they should be are among them only when asked for.  ``written`` has a row (page, symbol number, cause
    bit) for every symbol with bytes that the program (or loader) wrote.
    """

    causes: NDArray[np.uint8]
    unreadable: NDArray[np.bool_]
    words: Table
    written: NDArray[np.int64]


def classify(
    facts: Facts,
    space: Space,
    bias: int,
    vaddrs: NDArray[np.uint64],
    file_offsets: NDArray[np.uint64],
    live: NDArray[np.uint8],
    *,
    every_word: bool = False,
) -> Classified:
    """Why the copied pages at ``vaddrs`` are what they are.

    ``live`` are their bytes in the process, shape (pages, PAGE_SIZE); they are changed in place.
    ``file_offsets`` say which page of the file each was.  ``every_word`` asks for all slots in ``words``.
    """
    pages = len(vaddrs)
    causes = np.zeros(pages, np.uint8)
    unreadable = np.zeros(pages, np.bool_)
    if facts.trouble:
        empty = np.empty((0, 3), np.int64)
        return Classified(causes | np.uint8(_UNKNOWN), ~unreadable, np.empty(0, WORD_DTYPE), empty)
    expected = facts.pages(file_offsets)
    tails = _zero_tails(facts, vaddrs, expected, live, causes)
    here = _Here(facts, space, bias, vaddrs, live, expected)
    slot_words = here.judge()
    for value in (_RELOCATION, _OVERWRITTEN, _LOADER, _UNKNOWN):
        causes[slot_words["page"][slot_words["cause"] == value]] |= np.uint8(value)
    unreadable[slot_words["page"][slot_words["cause"] == _UNKNOWN]] = True
    here.undo()
    words, octets = _differing(vaddrs, live, expected)
    own = np.uint8(_LOADER if facts.is_dynamic_loader else _WRITE)
    octet_cause = np.where(_in_tail(octets, vaddrs, tails), np.uint8(_BSS), own)
    np.bitwise_or.at(causes, octets["page"], octet_cause)
    words["cause"] = np.where(_in_tail(words, vaddrs, tails), np.uint8(_BSS), own)
    changed = slot_words[np.isin(slot_words["cause"], (_OVERWRITTEN, _LOADER))]
    written = _symbols(
        facts,
        np.concatenate([octets["page"], changed["page"]]),
        np.concatenate([octets["vaddr"], changed["vaddr"]]),
        np.concatenate([octet_cause, changed["cause"]]),
    )
    causes[causes == 0] = _IDENTICAL
    both = np.concatenate([slot_words if every_word else changed, words])
    return Classified(causes, unreadable, both[np.lexsort((both["vaddr"], both["page"]))], written)


def _zero_tails(
    facts: Facts,
    vaddrs: NDArray[np.uint64],
    expected: NDArray[np.uint8],
    live: NDArray[np.uint8],
    causes: NDArray[np.uint8],
) -> NDArray[np.int64]:
    """Zero in ``expected`` what the loader zeroes; where each page's tail begins (PAGE_SIZE: none)."""
    tails = np.full(len(vaddrs), PAGE_SIZE, np.int64)
    for span in facts.plan.zeroed if facts.plan is not None else ():
        at = span.start % PAGE_SIZE
        for row in np.flatnonzero(vaddrs == span.start - at).tolist():
            tails[row] = at
            untouched = expected[row, at:].any() and np.array_equal(expected[row, at:], live[row, at:])
            if not untouched:
                causes[row] |= _BSS
                expected[row, at:] = 0
    return tails


def _in_tail(words: Table, vaddrs: NDArray[np.uint64], tails: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which words begin in the bss tail of their page."""
    offset = (words["vaddr"] - vaddrs[words["page"]]).astype(np.int64)
    return np.asarray(offset >= tails[words["page"]])


def _differing(
    vaddrs: NDArray[np.uint64], live: NDArray[np.uint8], expected: NDArray[np.uint8]
) -> tuple[Table, Table]:
    """The words, and the single bytes (fields page and vaddr), that are not as expected."""
    now, then = live.view(np.uint64), expected.view(np.uint64)
    page, word = np.nonzero(now != then)
    words = np.zeros(len(page), WORD_DTYPE)
    words["page"], words["slot"], words["size"] = page, -1, _WORD
    words["vaddr"] = vaddrs[page] + (word * _WORD).astype(np.uint64)
    words["live"], words["file"] = now[page, word], then[page, word]
    differs = (words["live"] ^ words["file"])[:, np.newaxis].view(np.uint8)
    row, octet = np.nonzero(differs)
    octets = np.zeros(len(row), np.dtype([("page", np.int32), ("vaddr", np.uint64)]))
    octets["page"], octets["vaddr"] = words["page"][row], words["vaddr"][row] + octet.astype(np.uint64)
    return words, octets


def _symbols(
    facts: Facts, pages: NDArray[np.int32], vaddrs: NDArray[np.uint64], causes: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """The distinct (page, symbol, cause) of these places, where a symbol covers them."""
    symbols = facts.symbols_at(vaddrs)
    found = symbols >= 0
    packed = (pages[found].astype(np.int64) << 32 | symbols[found]) << 8 | causes[found]
    packed = np.unique(packed)
    return np.stack([packed >> 40, packed >> 8 & 0xFFFFFFFF, packed & 0xFF], axis=1)


class _Here:
    """The slots on some pages of one file in one process."""

    def __init__(
        self,
        facts: Facts,
        space: Space,
        bias: int,
        vaddrs: NDArray[np.uint64],
        live: NDArray[np.uint8],
        expected: NDArray[np.uint8],
    ) -> None:
        self._facts, self._space, self._bias = facts, space, np.uint64(bias)
        self._live, self._expected = live, expected
        starts = facts.slots["vaddr"]
        low = np.searchsorted(starts, vaddrs)
        count = np.searchsorted(starts, vaddrs + np.uint64(PAGE_SIZE)) - low
        self._page = np.repeat(np.arange(len(vaddrs), dtype=np.int32), count)
        first = np.repeat(low - (np.cumsum(count) - count), count)
        self._slot = first + np.arange(len(first))
        slots = facts.slots[self._slot]
        # What goes over the end of its page is judged there by its first bytes only.
        offset = (slots["vaddr"] - vaddrs[self._page]).astype(np.int64)
        self._size = np.minimum(slots["size"], PAGE_SIZE - offset)
        self._slots, self._offset = slots, offset
        self._odd = bool(np.any((offset % _WORD != 0) | (self._size != _WORD)))

    def judge(self) -> Table:
        """Every slot as WORD_DTYPE, with its cause: 0 where it is still as in the file."""
        words = np.zeros(len(self._slots), WORD_DTYPE)
        words["page"], words["slot"] = self._page, self._slot
        words["vaddr"], words["size"] = self._slots["vaddr"], self._size
        live, file = self._gather(self._live), self._gather(self._expected)
        words["live"], words["file"] = live, file
        good, hidden = self._verified(live, file)
        what = self._slots["what"]
        same = live == file
        words["cause"] = np.select(
            [what == LOADER, good, same, hidden],
            [np.where(same, 0, _LOADER), _RELOCATION, 0, _UNKNOWN],
            _LOADER if self._facts.is_dynamic_loader else _OVERWRITTEN,
        )
        return words

    def undo(self) -> None:
        """Put back what the file has at every slot."""
        if not self._odd:
            word = self._offset // _WORD
            self._live.view(np.uint64)[self._page, word] = self._expected.view(np.uint64)[self._page, word]
            return
        for octet in range(_WORD):
            has = self._size > octet
            at = self._page[has], self._offset[has] + octet
            self._live[at] = self._expected[at]

    def _gather(self, pages: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """The value at every slot."""
        if not self._odd:
            return np.asarray(pages.view(np.uint64)[self._page, self._offset // _WORD])
        values = np.zeros((len(self._page), _WORD), np.uint8)
        for octet in range(_WORD):
            has = self._size > octet
            values[has, octet] = pages[self._page[has], self._offset[has] + octet]
        return values.view(np.uint64)[:, 0]

    def _verified(
        self, live: NDArray[np.uint64], file: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which slots hold what their relocation computes; which nobody can tell about."""
        what, signed = self._slots["what"], live.view(np.int64)
        addend = self._slots["addend"].view(np.uint64)
        good = (what == RELATIVE) & (live == self._bias + addend)
        hidden = np.zeros(len(live), np.bool_)
        rest = np.flatnonzero(what != RELATIVE)
        kind = what[rest]
        good[rest] |= np.isin(kind, (OTHER, COPY)) & (live != file)[rest]
        good[rest] |= (self._size < _WORD)[rest] & (live != file)[rest]
        code = rest[np.isin(kind, (INDIRECT, DESCRIPTOR))]
        good[code] |= self._space.in_code(live[code])
        good[rest] |= (kind == ARGUMENT) & (live != file)[rest]
        good[rest] |= (kind == THREAD_OFFSET) & (signed[rest] < 0)
        good[rest] |= (kind == MODULE) & (live[rest] > 0) & (live[rest] < _MOST_MODULES)
        symbolic = rest[np.isin(kind, (SYMBOL, MODULE_OFFSET))]
        if len(symbolic):
            good[symbolic], hidden[symbolic] = self._bound(symbolic, live, file, addend)
        return good, hidden

    def _bound(
        self,
        rows: NDArray[np.intp],
        live: NDArray[np.uint64],
        file: NDArray[np.uint64],
        addends: NDArray[np.uint64],
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """The same for slots that hold a symbol's address, or its offset in a module's block."""
        table, symbol = self._facts.symbols, self._slots["symbol"][rows]
        if table is None or (symbol >= len(table)).any():  # it cannot be read, or makes no sense
            return np.zeros(len(rows), np.bool_), np.ones(len(rows), np.bool_)
        value, addend = live[rows], addends[rows]
        own = table.rows["value"][symbol].astype(np.uint64)
        kind, undefined = table.type[symbol], table.rows["shndx"][symbol] == SHN_UNDEF
        offset = self._slots["what"][rows] == MODULE_OFFSET
        local = ~undefined & (kind != STT_GNU_IFUNC) & (kind != STT_TLS)
        good = local & (value == self._bias + own + addend)
        good |= offset & (value == own + addend)
        good |= undefined & (table.bind[symbol] == STB_WEAK) & (value == addend)
        good |= (file[rows] != 0) & (value == self._bias + file[rows])  # its own PLT entry: not bound yet
        hidden = np.zeros(len(rows), np.bool_)
        left = np.flatnonzero(~good & ~offset)
        if len(left):
            names = self._facts.name_numbers[symbol[left]]
            target = value[left] - addend[left]
            good[left], hidden[left] = self._space.defines(names, target, value[left])
        return good, hidden
