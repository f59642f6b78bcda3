"""Why is a private page of a file private?  Its bytes are compared with the file's: pure functions.

A page has a set of causes.  First every place that the loader writes (:mod:`miniloader.evidence.slots`) is
judged by its value, then the file's bytes are put back there, and what still differs somebody else wrote:

- ``relocation``: a place holds what its relocation computes.  RELATIVE and RELR: bias + addend, exactly.  A
  symbol's address (64, GLOB_DAT, JUMP_SLOT): the file that is mapped at the value defines a symbol of that
  name there, of whatever version, or an IFUNC of that name and the value is in its code (or in the vDSO);
  or it is 0 for an undefined weak symbol, or the slot's own PLT entry (not bound yet).  IRELATIVE: an
  address in code, or 0.  Thread-local storage: a module number, a negative offset, an address in code.
  What COPY brings belongs to the program from then on and is never verified, nor are PC-relative words
  in code: any value counts.
- ``overwritten``: a place of a relocation that holds something else; what the file has, too, where other
  places show that the image has been relocated.
- ``loader``: the dynamic section, GOT[0] to GOT[2], and all that ld.so writes to its own pages.
- ``bss``: the tail of the last file page, past ``p_filesz``: zeroed by the loader, the program's afterwards.
- ``write``: anything else that differs.
- ``identical``: copied, yet nothing differs: the byte that was there was stored again, or it was undone.
- ``unknown``: with a reason.

Whether the first of several definitions was chosen is not decided again here: the name at the address is.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.tables import Table
from miniloader.evidence.cause_names import CAUSES, bit
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.layout import Layout, Layouts, Symbolic
from miniloader.evidence.space import Space
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import NamedTuple, dataclass

__all__ = ["WORD_DTYPE", "Classified", "classify"]

Words = Literal["none", "own", "every"]

WORD_DTYPE: Final = np.dtype(
    [
        ("page", np.int32),  # index into what was classified
        ("vaddr", np.uint64),
        ("size", np.uint8),  # bytes
        ("cause", np.uint8),  # one bit; 0: a slot that is still as in the file
        ("slot", np.int64),  # index into FileFacts.slots; -1: none
        ("file", np.uint64),  # what the file has (in bss: 0)
        ("live", np.uint64),  # what the process has
    ]
)
"""A word that the loader writes, or that differs from the file."""

_MOST_MODULES: Final = 1 << 20


_RELOCATION, _OVERWRITTEN, _LOADER, _BSS, _WRITE, _IDENTICAL, _UNKNOWN = map(bit, CAUSES)


@dataclass(frozen=True, eq=False)
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
    facts: FileFacts,
    space: Space,
    bias: int,
    vaddrs: NDArray[np.uint64],
    file_offsets: NDArray[np.uint64],
    live: NDArray[np.uint8],
    *,
    words: Words = "own",
    layouts: Layouts | None = None,
    relocated: bool = False,
) -> Classified:
    """Why the copied pages at ``vaddrs`` are what they are.

    ``live`` are their bytes in the process, shape (pages, PAGE_SIZE); they are changed in place.
    ``file_offsets`` say which page of the file each was.  ``words``: which of them to list: those with a
    cause of their own, every slot, too, or none (the quickest).  ``layouts`` keeps what is the same for the
    next process that has these pages.  ``relocated``: other pages have shown that the image is.
    """
    pages = len(vaddrs)
    causes = np.zeros(pages, np.uint8)
    unreadable = np.zeros(pages, np.bool_)
    if facts.trouble:
        empty = np.empty((0, 3), np.int64)
        return Classified(causes | np.uint8(_UNKNOWN), ~unreadable, np.empty(0, WORD_DTYPE), empty)
    tails, zeroed = _tails(facts, vaddrs, file_offsets, live)
    causes[zeroed < PAGE_SIZE] = _BSS
    layout = (layouts or Layouts()).of(facts, vaddrs, file_offsets, zeroed)
    values = layout.values(live)
    cause = _judged(facts, layout, space, np.uint64(bias % 2**64), values, relocated)
    # Nearly every slot is as its relocation made it: only the others are looked at one by one.
    rows = np.flatnonzero(cause != _RELOCATION)
    as_computed = layout.on_page > np.bincount(layout.page[rows], minlength=pages)
    causes[as_computed] |= np.uint8(_RELOCATION)
    if len(rows):
        for value in (_OVERWRITTEN, _LOADER, _UNKNOWN):
            causes[layout.page[rows[cause[rows] == value]]] |= np.uint8(value)
        unreadable[layout.page[rows[cause[rows] == _UNKNOWN]]] = True
    layout.undo(live)
    words_of = f"u{facts.word}"
    differing = np.flatnonzero(live.view(words_of) != layout.expected.view(words_of))
    writer = np.uint8(_LOADER if facts.is_dynamic_loader else _WRITE)
    pieces = _differing_pieces(facts, vaddrs, tails, live, layout.expected, differing)
    piece_cause = np.where(_in_tail(pieces.page, pieces.vaddr, vaddrs, tails), np.uint8(_BSS), writer)
    for value in (_BSS, int(writer)):
        causes[pieces.page[piece_cause == value]] |= np.uint8(value)
    changed = rows[(cause[rows] == _OVERWRITTEN) | (cause[rows] == _LOADER)]
    written = _written(
        np.concatenate([pieces.page, layout.page[changed]]),
        np.concatenate([pieces.symbol, facts.symbols_at(layout.vaddr[changed])]),
        np.concatenate([piece_cause, cause[changed]]),
    )
    causes[causes == 0] = _IDENTICAL
    listed = np.empty(0, WORD_DTYPE)
    if words != "none":
        slots = _slot_words(layout, np.arange(len(cause)) if words == "every" else changed, cause, values)
        beside = _differing_words(facts.word, vaddrs, live, layout.expected, differing)
        inside = _in_tail(beside["page"], beside["vaddr"], vaddrs, tails)
        beside["cause"] = np.where(inside, np.uint8(_BSS), writer)
        listed = np.concatenate([slots, beside])
        listed = listed[np.lexsort((listed["vaddr"], listed["page"]))]
    return Classified(causes, unreadable, listed, written)


def _tails(
    facts: FileFacts, vaddrs: NDArray[np.uint64], file_offsets: NDArray[np.uint64], live: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each page's bss tail begins (PAGE_SIZE: none), and where each tail that was zeroed does."""
    tails = np.full(len(vaddrs), PAGE_SIZE, np.int64)
    zeroed = tails.copy()
    for span in facts.plan.zeroed if facts.plan is not None else ():
        at = span.start % PAGE_SIZE
        for row in np.flatnonzero(vaddrs == span.start - at).tolist():
            tails[row] = at
            tail = facts.pages(file_offsets[row : row + 1])[0, at:]
            untouched = tail.any() and np.array_equal(tail, live[row, at:])
            zeroed[row] = PAGE_SIZE if untouched else at
    return tails, zeroed


def _in_tail(
    pages: NDArray[np.integer],
    places: NDArray[np.uint64],
    vaddrs: NDArray[np.uint64],
    tails: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which of these vaddrs are in the bss tail of their page."""
    inside = np.zeros(len(pages), np.bool_)
    for row in np.flatnonzero(tails < PAGE_SIZE).tolist():
        inside |= (pages == row) & (places >= vaddrs[row] + np.uint64(tails[row]))
    return inside


class _Pieces(NamedTuple):
    """What differs, in pieces of one symbol (its number, -1: none): words, and single bytes."""

    page: NDArray[np.intp]
    vaddr: NDArray[np.uint64]
    symbol: NDArray[np.int64]


def _differing_pieces(
    facts: FileFacts,
    vaddrs: NDArray[np.uint64],
    tails: NDArray[np.int64],
    live: NDArray[np.uint8],
    expected: NDArray[np.uint8],
    differing: NDArray[np.intp],
) -> _Pieces:
    """The ``differing`` words, and instead of those that are not one symbol's alone the bytes that differ."""
    word = facts.word
    page, start = _at(word, vaddrs, differing)
    symbol, alone = facts.symbols_of(start, word)
    border = np.flatnonzero((tails < PAGE_SIZE) & (tails % word != 0))
    for straddling in border * (PAGE_SIZE // word) + tails[border] // word:
        alone &= differing != straddling
    if alone.all():
        return _Pieces(page, start, symbol)
    at = differing[~alone]
    bits = live.view(f"u{word}").reshape(-1)[at] ^ expected.view(f"u{word}").reshape(-1)[at]
    row, octet = np.divmod(np.flatnonzero(bits.view(np.uint8)), word)
    octets = start[~alone][row] + octet.astype(np.uint64)
    return _Pieces(
        np.concatenate([page[alone], page[~alone][row]]),
        np.concatenate([start[alone], octets]),
        np.concatenate([symbol[alone], facts.symbols_at(octets)]),
    )


def _at(
    word: int, vaddrs: NDArray[np.uint64], numbers: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Page and vaddr of words of ``word`` bytes by their number from the first page on."""
    on_page = PAGE_SIZE // word
    page = numbers // on_page
    return page, vaddrs[page] + ((numbers - page * on_page) * word).astype(np.uint64)


def _differing_words(
    word: int,
    vaddrs: NDArray[np.uint64],
    live: NDArray[np.uint8],
    expected: NDArray[np.uint8],
    differing: NDArray[np.intp],
) -> Table:
    """The words of ``word`` bytes (by their number) that are not as expected; no cause yet."""
    words = np.zeros(len(differing), WORD_DTYPE)
    words["page"], words["vaddr"] = _at(word, vaddrs, differing)
    words["slot"], words["size"] = -1, word
    words["live"] = live.view(f"u{word}").reshape(-1)[differing]
    words["file"] = expected.view(f"u{word}").reshape(-1)[differing]
    return words


def _slot_words(
    layout: Layout, rows: NDArray[np.intp], cause: NDArray[np.uint8], values: NDArray[np.uint64]
) -> Table:
    words = np.zeros(len(rows), WORD_DTYPE)
    words["page"], words["slot"] = layout.page[rows], layout.slot[rows]
    words["vaddr"], words["size"] = layout.vaddr[rows], layout.size[rows]
    words["live"], words["file"], words["cause"] = values[rows], layout.file[rows], cause[rows]
    return words


def _written(
    pages: NDArray[np.intp], symbols: NDArray[np.int64], causes: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """The distinct (page, symbol, cause) of places, where a symbol covers them."""
    of_symbol = symbols >= 0
    packed = (pages[of_symbol] << 32 | symbols[of_symbol]) << 8 | causes[of_symbol]
    packed = _changing(np.sort(_changing(packed)))  # neighbours are mostly alike: few are left to sort
    return np.stack([packed >> 40, packed >> 8 & 0xFFFFFFFF, packed & 0xFF], axis=1)


def _changing(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The elements of ``values`` that differ from the element before; the first always.

    >>> _changing(np.array([3, 3, 5, 5, 3])).tolist()
    [3, 5, 3]
    """
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return values[first]


# ------------------------------------------------------------------------------------------ the slots
def _judged(
    facts: FileFacts,
    layout: Layout,
    space: Space,
    bias: np.uint64,
    values: NDArray[np.uint64],
    relocated: bool,
) -> NDArray[np.uint8]:
    """The cause of every slot that holds ``values``: 0 where it is still as in the file."""
    cause = np.full(len(values), _RELOCATION, np.uint8)
    changed = _LOADER if facts.is_dynamic_loader else _OVERWRITTEN
    plain, right = layout.relative, (layout.relative_addend + bias) & layout.word_mask
    right_there = values[plain] == right
    relocated = relocated or bool((right_there & (right != layout.file[plain])).any())
    wrong = plain[~right_there]
    cause[wrong] = changed if relocated else np.where(values[wrong] == layout.file[wrong], 0, changed)
    live, file = values[layout.other], layout.file[layout.other]
    same = live == file
    good, hidden = _verified(layout, space, bias, live, same)
    if relocated:  # no definition is at 0, where ld.so would leave a slot
        symbolic = layout.symbolic
        none = (symbolic.file == 0) | (symbolic.file == symbolic.addend & symbolic.mask)
        cleared = symbolic.rows[~symbolic.is_offset & none]
        same[cleared] = False
    # What counts most comes last.
    verdict = np.full(len(live), changed, np.uint8)
    verdict[hidden] = _UNKNOWN
    verdict[same] = 0
    verdict[good] = _RELOCATION
    verdict[layout.loader] = np.where(same[layout.loader], 0, _LOADER)
    cause[layout.other] = verdict
    return cause


def _verified(
    layout: Layout, space: Space, bias: np.uint64, live: NDArray[np.uint64], same: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the other slots hold what their relocation computes; which nobody can tell about."""
    good, hidden = np.zeros((2, len(live)), np.bool_)
    if len(layout.uneven):
        good[layout.uneven] = live[layout.uneven] == (bias + layout.uneven_addend) & layout.uneven_mask
    if len(layout.anything):
        good[layout.anything] = ~same[layout.anything]
    if len(layout.thread):
        offsets = (live[layout.thread] << layout.unused).view(np.int64)
        good[layout.thread] = offsets < 0 if layout.thread_below else offsets > 0
    if len(layout.module):
        good[layout.module] = (live[layout.module] > 0) & (live[layout.module] < _MOST_MODULES)
    if len(layout.code):
        # A resolver may return none, as that of glibc that only looks at the processor's caches.
        good[layout.code] |= space.in_code(live[layout.code]) | (live[layout.code] == 0) & ~same[layout.code]
    rows = layout.symbolic.rows
    if len(rows):
        good[rows], hidden[rows] = _bound(layout.symbolic, space, bias, live[rows])
    return good, hidden


def _bound(
    slots: Symbolic, space: Space, bias: np.uint64, value: NDArray[np.uint64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which slots hold the address of their symbol, or its offset in a module's block; which nobody can tell.

    ``value`` is what each of ``slots`` holds in the process, ``bias`` the load bias of the file they are in.
    """
    hidden = np.zeros(len(value), np.bool_)
    value = space.meant(value)
    if slots.names is None:
        return hidden, ~hidden
    good = slots.local & (value == (bias + slots.own) & slots.mask)
    good |= slots.offset & (value == slots.own & slots.mask)
    good |= slots.weak & (value == slots.addend & slots.mask)
    good |= slots.call & (slots.file != 0) & (value == (bias + slots.file) & slots.mask)  # not bound yet
    good |= space.as_known(slots, value)
    rows = np.flatnonzero(~good & ~slots.offset)
    if len(rows):
        target = value[rows] - slots.addend[rows] & slots.mask[rows]
        good[rows], hidden[rows], where = space.defines(slots.names[rows], target, value[rows])
        space.remember(slots, rows[good[rows]], target[good[rows]], where[good[rows]])
    rows = np.flatnonzero(~good & slots.offset)
    if len(rows):
        good[rows], hidden[rows] = space.in_block(
            slots.names[rows], value[rows] - slots.addend[rows] & slots.mask[rows]
        )
    return good, hidden
