"""The slots on a set of pages of one file, laid out for comparison: made once, used for every process.

Processes that run the same program have copied nearly the same pages, so what depends on the file and the
pages alone is kept: where the slots are, what the file has there, what each would hold but for addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import SHN_UNDEF, STB_WEAK, STT_GNU_IFUNC, STT_TLS
from miniloader.elf.tables import Table
from miniloader.evidence.file_facts import FileFacts
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
)
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.machine.relocation import BELOW_THREAD_POINTER

__all__ = ["Layout", "Layouts", "Symbolic"]

_OCTETS: Final = 8  # of the largest value
_MOST_KEPT: Final = 4  # sets of pages for each file


class Layout:
    """The slots on the pages at ``vaddrs``, by page and vaddr; all arrays are by slot but where said.

    ``expected`` are the file's pages, shape (pages, PAGE_SIZE), with zeroes where ``tails`` begin: what a
    process has that nobody wrote to.  ``page`` is an index into them, ``slot`` one into ``FileFacts.slots``,
    ``file`` the value that ``expected`` has there.  ``on_page`` counts the slots of each page.

    ``relative`` are the slots (indices) that take the bias + ``relative_addend``, ``other`` all the rest.  Of
    those (indices into ``other``) ``uneven`` do the same but are not aligned words, ``anything`` may take
    any value, ``code`` an address in code.  The rest are what their names say.  Values are counted modulo
    ``mask`` + 1: as many bytes as a slot has; ``word_mask`` is that of a whole word,
    which leaves so many bits of the value ``unused``.
    """

    def __init__(
        self,
        facts: FileFacts,
        vaddrs: NDArray[np.uint64],
        file_offsets: NDArray[np.uint64],
        tails: NDArray[np.int64],
    ) -> None:
        self.expected = facts.pages(file_offsets)
        for row in np.flatnonzero(tails < PAGE_SIZE).tolist():
            self.expected[row, tails[row] :] = 0
        low = np.searchsorted(facts.slot_vaddrs, vaddrs)
        self.on_page = np.searchsorted(facts.slot_vaddrs, vaddrs + np.uint64(PAGE_SIZE)) - low
        self.page = np.repeat(np.arange(len(vaddrs), dtype=np.int32), self.on_page)
        first = np.repeat(low - (np.cumsum(self.on_page) - self.on_page), self.on_page)
        self.slot = first + np.arange(len(first))
        slots = facts.slots  # by column: of a large library there are millions on the pages
        self.vaddr = facts.slot_vaddrs[self.slot]
        self._offset = (self.vaddr - vaddrs[self.page]).view(np.int64)
        # What goes over the end of its page is judged there by its first bytes only.
        self.size = np.minimum(slots["size"][self.slot], PAGE_SIZE - self._offset)
        self._odd = (self._offset & (facts.word - 1) != 0) | (self.size != facts.word)
        self._any_odd = bool(self._odd.any())
        self._dtype = f"u{facts.word}"
        self._word = (self.page.astype(np.int64) * PAGE_SIZE + self._offset) // facts.word
        self.unused = np.uint64(8 * (_OCTETS - facts.word))
        self.word_mask = np.uint64(2**64 - 1) >> self.unused
        self.mask = np.uint64(2**64 - 1) >> ((_OCTETS - self.size) * 8).astype(np.uint64)
        self.file = self.values(self.expected)
        plain = (slots["what"][self.slot] == RELATIVE) & ~self._odd
        self.relative, self.other = np.flatnonzero(plain), np.flatnonzero(~plain)
        self.relative_addend = slots["addend"][self.slot[self.relative]].view(np.uint64)
        self._sort(facts, slots[self.slot[self.other]])

    def _sort(self, facts: FileFacts, slots: Table) -> None:
        """Tell the other slots apart by how they are judged."""
        kind, short = slots["what"], self.size[self.other] < facts.word
        symbolic = np.isin(kind, (SYMBOL, MODULE_OFFSET))
        self.uneven = np.flatnonzero(kind == RELATIVE)
        self.uneven_addend = slots["addend"].view(np.uint64)[self.uneven]
        self.uneven_mask = self.mask[self.other[self.uneven]]
        self.anything = np.flatnonzero(
            np.isin(kind, (OTHER, COPY, ARGUMENT)) | (short & ~np.isin(kind, (RELATIVE, LOADER)) & ~symbolic)
        )
        self.thread = np.flatnonzero((kind == THREAD_OFFSET) & ~short)
        self.thread_below = facts.image is not None and facts.image.header.machine in BELOW_THREAD_POINTER
        self.module = np.flatnonzero((kind == MODULE) & ~short)
        self.code = np.flatnonzero(np.isin(kind, (INDIRECT, DESCRIPTOR)))
        self.loader = np.flatnonzero(kind == LOADER)
        rows = np.flatnonzero(symbolic)
        self.symbolic = _symbolic(
            facts, slots[rows], rows, self.file[self.other[rows]], self.mask[self.other[rows]]
        )

    def values(self, pages: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """The value that ``pages`` have at every slot."""
        if not self._any_odd:
            return np.asarray(pages.view(self._dtype).reshape(-1)[self._word], np.uint64)
        values = np.zeros((len(self.page), _OCTETS), np.uint8)
        for octet in range(_OCTETS):
            has = self.size > octet
            values[has, octet] = pages[self.page[has], self._offset[has] + octet]
        return values.view(np.uint64)[:, 0]

    def undo(self, pages: NDArray[np.uint8]) -> None:
        """Put into ``pages`` what is expected at every slot."""
        if not self._any_odd:
            pages.view(self._dtype).reshape(-1)[self._word] = self.file
            return
        for octet in range(_OCTETS):
            has = self.size > octet
            at = self.page[has], self._offset[has] + octet
            pages[at] = self.expected[at]


@dataclass(slots=True, eq=False)
class Symbolic:
    """The slots that hold a symbol's address, or (``offset``) its offset in a module's block.

    ``rows`` are indices into ``Layout.other``, ``mask`` says how long each is (:class:`Layout`).
    ``names`` are None where the symbols cannot be read, or make no sense.  ``own`` is the file's own value of
    the symbol + addend; ``local``: which bind to it for certain, ``weak``: to nothing, if need be;
    ``call``: which lead to their own PLT entry, at first.
    A definition once found is one in all processes: the file ``targets[target]`` (-1: none) has what the slot
    wants at ``target_vaddr``, the addend added.
    """

    rows: NDArray[np.intp]
    addend: NDArray[np.uint64]
    file: NDArray[np.uint64]
    mask: NDArray[np.uint64]
    names: NDArray[np.uint64] | None = None
    own: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    local: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    offset: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    weak: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    call: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    target: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    target_vaddr: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    targets: list[FileFacts] = field(default_factory=list)

    @property
    def is_offset(self) -> NDArray[np.bool_]:
        """``offset`` where it is known; else all may be."""
        return self.offset if self.names is not None else np.ones(len(self.rows), np.bool_)


def _symbolic(
    facts: FileFacts,
    chosen: Table,
    rows: NDArray[np.intp],
    file: NDArray[np.uint64],
    mask: NDArray[np.uint64],
) -> Symbolic:
    symbolic = Symbolic(rows, chosen["addend"].astype(np.uint64), file, mask)
    table, symbol = facts.symbols, chosen["symbol"]
    if table is None or (symbol >= len(table)).any():
        return symbolic
    kind, undefined = table.type[symbol], table.rows["shndx"][symbol] == SHN_UNDEF
    symbolic.names = facts.name_numbers[symbol]
    symbolic.own = table.rows["value"][symbol].astype(np.uint64) + symbolic.addend
    symbolic.offset = chosen["what"] == MODULE_OFFSET
    symbolic.local = ~undefined & (kind != STT_GNU_IFUNC) & (kind != STT_TLS)
    symbolic.call = np.isin(chosen["kind"], facts.call_kinds)
    symbolic.weak = undefined & (table.bind[symbol] == STB_WEAK)
    symbolic.target, symbolic.target_vaddr = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.uint64)
    return symbolic


class Layouts:
    """The layouts of the pages asked for last, a few for each file: made once, used for every process.

    An audit makes one and hands it to whoever classifies; what it keeps goes with it.
    """

    def __init__(self) -> None:
        self._kept: dict[FileFacts, dict[tuple[bytes, bytes, bytes], Layout]] = {}

    def of(
        self,
        facts: FileFacts,
        vaddrs: NDArray[np.uint64],
        file_offsets: NDArray[np.uint64],
        tails: NDArray[np.int64],
    ) -> Layout:
        """The layout of the pages at ``vaddrs``, each with its place in the file and its bss tail."""
        kept = self._kept.setdefault(facts, {})
        key = (vaddrs.tobytes(), file_offsets.tobytes(), tails.tobytes())
        layout = kept.pop(key, None) or Layout(facts, vaddrs, file_offsets, tails)
        kept[key] = layout  # the last used is the last
        if len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]
        return layout
