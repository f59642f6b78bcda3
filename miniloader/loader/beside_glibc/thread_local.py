"""Thread-local storage for libraries that glibc does not know, in all four models.

See :mod:`miniloader.loader.beside_glibc.tls_carrier` for how glibc is asked.  What a relocation needs:
``module`` and ``module offset`` (general and local dynamic) serve ``__tls_get_addr``;
``thread offset`` (initial exec) needs a block at the same distance from every
thread's pointer; ``descriptor`` (TLSDESC) is glibc's own.
Source: "ELF Handling For Thread-Local Storage" (Drepper) and the AMD64 psABI.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

from miniloader.elf import Tls
from miniloader.elf.symbols import STT_TLS
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.tls_carrier import Carrier, GlibcQuestion, open_carrier
from miniloader.loader.relocation_job import Row
from miniloader.loader.scope import Bindings, Definer
from miniloader.machine.relocation import Kind
from miniloader.native import ADDRESS_MASK
from miniloader.values import dataclass

__all__ = ["Blocks", "Write", "address_of", "answer"]

_ASKED: Final = ("thread offset", "descriptor")  # what only glibc can answer

Write = tuple[Sequence[int], Sequence[int], int]
"""The vaddrs, values and size of words to write."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The carriers of one library: ``own`` has its template (``None`` without ``PT_TLS``), ``asking`` asked
    about other libraries' symbols."""

    own: Carrier | None = None
    asking: Carrier | None = None

    def answer(self, question: GlibcQuestion) -> tuple[int, int]:
        """The two words that glibc has answered a question with."""
        carrier = self.own if question.symbol is None else self.asking
        assert carrier is not None
        return carrier.answers[question]

    def close(self) -> bool:
        """Close both, the one that may need the other first; whether they are gone (see :class:`Carrier`)."""
        gone = [carrier.close() for carrier in (self.asking, self.own) if carrier is not None]
        return all(gone)


def answer(
    me: Definer,
    tls: Tls | None,
    template: Callable[[], bytes],
    bindings: Bindings,
    rows: Iterable[tuple[Kind, Sequence[Row]]],
    carrier_of: Callable[[Definer], Carrier | None],
) -> tuple[Blocks, list[Write]]:
    """Open the carriers that library ``me`` needs and compute its thread-local relocations ``rows``.

    ``template`` gives the bytes of its ``PT_TLS``, relocated; ``carrier_of`` the carrier of another library
    of ours, if it has been linked.  Raises :class:`LoadError`, in glibc's words when glibc refuses.
    """
    words = [_needs(me, tls, bindings, kind, of_kind, carrier_of) for kind, of_kind in rows]
    blocks = _open_carriers(me, tls, template, words)
    return blocks, [write for needed in words for write in _writes(needed, blocks)]


_Block = Carrier | HostLibrary | None
"""Who has a variable's storage: ``None`` is the library that is relocated."""


@dataclass(frozen=True, eq=False)
class _Words:
    """The thread-local words of one relocation kind: where they are, and what each needs to be known.

    A variable is ``offsets`` from the beginning of its module's block, and ``within`` from what glibc is
    asked about: a symbol of the system's libraries, the whole block of ours.  ``blocks`` says who has the
    block, of all but module offsets; ``questions`` what glibc is asked, for thread offsets and descriptors.
    """

    kind: Kind
    vaddrs: Sequence[int]
    offsets: Sequence[int]
    within: Sequence[int]
    blocks: Sequence[_Block]
    questions: Sequence[GlibcQuestion]


# ------------------------------------------------------------------------------------- what is needed
def _needs(
    me: Definer,
    tls: Tls | None,
    bindings: Bindings,
    kind: Kind,
    rows: Sequence[Row],
    carrier_of: Callable[[Definer], Carrier | None],
) -> _Words:
    """What the ``rows`` of one kind need; those whose weak symbol nobody defines stay as they are."""
    place_of = bindings.places(call=False)
    bound = [(vaddr, place_of[symbol], addend) for vaddr, _, symbol, addend in rows]
    bound = [row for row in bound if bindings.at(row[1], "owner") >= 0]
    places = [place for _, place, _ in bound]
    definers = [bindings.owner_at(place) for place in places]
    vaddrs = [vaddr for vaddr, _, _ in bound]
    offsets = [_signed(bindings.at(place, "value") + addend) for _, place, addend in bound]
    within = [
        addend if isinstance(definer, HostLibrary) else offset
        for (_, _, addend), definer, offset in zip(bound, definers, offsets, strict=True)
    ]
    if kind.formula == "module offset":
        return _Words(kind, vaddrs, offsets, within, (), ())
    blocks = [
        _block(me, tls, bindings, place, carrier_of(definer))
        for place, definer in zip(places, definers, strict=True)
    ]
    # Thread offsets are asked for the beginning, descriptors for the variable itself: offsets can be added.
    addends = within if kind.formula == "descriptor" else [0] * len(within)
    questions = [
        GlibcQuestion(kind.formula, _symbol(block, bindings, place), addend)
        for block, place, addend in zip(blocks, places, addends, strict=True)
        if kind.formula in _ASKED
    ]
    return _Words(kind, vaddrs, offsets, within, blocks, questions)


def _signed(number: int) -> int:
    """The number that has these 64 bits, from -2⁶³ on."""
    return (number & ADDRESS_MASK ^ 1 << 63) - (1 << 63)


def _block(me: Definer, tls: Tls | None, bindings: Bindings, place: int, carrier: Carrier | None) -> _Block:
    """Who has the storage of the symbol that ``bindings.wanted[place]`` is bound to."""
    definer = bindings.owner_at(place)
    if definer is me:
        if tls is None:
            raise LoadError(
                f"{me.name}: relocates words for thread-local storage of its own, but has no PT_TLS"
            )
        return None
    if not isinstance(definer, HostLibrary):
        if carrier is None:
            text = f"{me.name}: refers to thread-local storage of {definer.name}, which is not set up yet"
            raise LoadError(text, hint="the two libraries refer to each other's")
        return carrier
    if bindings.at(place, "info") & 0xF != STT_TLS:  # glibc might divide by 0
        label = bindings.label(place)
        raise LoadError(f"{me.name}: thread-local relocation of {label}, which is not thread-local")
    return definer


def _symbol(block: _Block, bindings: Bindings, place: int) -> str | None:
    """The symbol that glibc is asked about; ``None`` is the block of the carrier that asks."""
    if block is None:
        return None
    return block.symbol if isinstance(block, Carrier) else bindings.label(place)


# ------------------------------------------------------------------------------------- which carriers
def _open_carriers(
    me: Definer, tls: Tls | None, template: Callable[[], bytes], words: Sequence[_Words]
) -> Blocks:
    """The library's own carrier, if it has ``PT_TLS``, and one to ask about others' storage, if it has to."""
    asked = [pair for needed in words for pair in zip(needed.blocks, needed.questions, strict=False)]
    of_own = dict.fromkeys(question for block, question in asked if block is None)
    of_others = dict.fromkeys(question for block, question in asked if block is not None)
    blocks = dict.fromkeys(block for block, _ in asked if block is not None)
    names = [name for name in map(_opened_as, blocks) if name]
    own = open_carrier(me.name, list(of_own), tls=tls, template=template()) if tls is not None else None
    if not of_others:
        return Blocks(own)
    try:
        others = [block for block in blocks if isinstance(block, Carrier)]
        asking = open_carrier(me.name, list(of_others), needed=names, others=others)
        return Blocks(own, asking)
    except LoadError:
        if own is not None:
            own.close()
        raise


def _opened_as(block: Carrier | HostLibrary) -> str:
    """The name by which glibc knows the library that has a block; ``""`` for the program itself."""
    return block.name if isinstance(block, Carrier) else block.path


# ----------------------------------------------------------------------------------------- which words
def _writes(words: _Words, carriers: Blocks) -> Iterable[Write]:
    """The words of one kind, now that glibc has answered."""
    vaddrs, formula, size = words.vaddrs, words.kind.formula, words.kind.size
    if not len(vaddrs):
        return
    if formula == "module offset":
        yield vaddrs, [offset & ADDRESS_MASK for offset in words.offsets], size
    elif formula == "module":
        yield vaddrs, [_module(block or carriers.own) for block in words.blocks], size
    else:
        answers = [carriers.answer(question) for question in words.questions]
        if formula == "thread offset":
            pairs = zip(answers, words.within, strict=True)
            yield vaddrs, [(first + within) & ADDRESS_MASK for (first, _), within in pairs], size
        else:
            yield vaddrs, [first for first, _ in answers], 8
            yield [vaddr + 8 for vaddr in vaddrs], [second for _, second in answers], 8


def _module(block: _Block) -> int:
    """The TLS module that glibc has for a block."""
    assert block is not None  # with PT_TLS there is a carrier
    return block.tls_module if isinstance(block, HostLibrary) else block.module


class _Index(ctypes.Structure):
    """``tls_index`` of the psABI."""

    _fields_ = (("module", ctypes.c_size_t), ("offset", ctypes.c_size_t))


@lru_cache(maxsize=1)
def _get_address() -> Any:
    address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), b"__tls_get_addr")
    if address is None:
        raise LoadError("the system's loader has no __tls_get_addr")
    return ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.POINTER(_Index))(address)


def address_of(carrier: Carrier, offset: int) -> int:
    """Where ``offset`` of the carrier's block is for the calling thread."""
    return int(_get_address()(ctypes.byref(_Index(carrier.module, offset))))
