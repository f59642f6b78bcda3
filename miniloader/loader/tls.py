"""Thread-local storage for libraries that glibc does not know, in all four models.

See :mod:`miniloader.loader.carrier` for how glibc is asked.  What a relocation needs: ``module`` and
``module offset`` (general and local dynamic) serve ``__tls_get_addr``; ``thread offset`` (initial exec)
needs a block at the same distance from every thread's pointer; ``descriptor`` (TLSDESC) is glibc's own.
Source: "ELF Handling For Thread-Local Storage" (Drepper) and the AMD64 psABI.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import Tls
from miniloader.elf.symbols import STT_TLS
from miniloader.elf.tables import Table
from miniloader.errors import LoadError
from miniloader.loader import host
from miniloader.loader.carrier import DTPMOD64, TLSDESC, TPOFF64, Carrier, Question, open_carrier
from miniloader.loader.host import HostLibrary
from miniloader.loader.scope import Bindings, Definer
from miniloader.machine.relocation import Kind

__all__ = ["Blocks", "Write", "address_of", "answer"]

_KIND: Final = {"module": DTPMOD64, "thread offset": TPOFF64, "descriptor": TLSDESC}

Write = tuple[NDArray[np.uint64], NDArray[np.uint64], int]
"""The vaddrs, values and size of words to write."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The carriers of one library: ``own`` has its template (``None`` without ``PT_TLS``), ``asking`` asked
    about other libraries' symbols."""

    own: Carrier | None = None
    asking: Carrier | None = None

    def close(self) -> bool:
        """Close both, the one that may need the other first; whether they are gone (see :class:`Carrier`)."""
        gone = [carrier.close() for carrier in (self.asking, self.own) if carrier is not None]
        return all(gone)


def answer(
    me: Definer,
    tls: Tls | None,
    template: Callable[[], bytes],
    bindings: Bindings,
    rows: Iterable[tuple[Kind, Table]],
    carrier_of: Callable[[Definer], Carrier | None],
) -> tuple[Blocks, list[Write]]:
    """Open the carriers that library ``me`` needs and compute its thread-local relocations ``rows``.

    ``template`` gives the bytes of its ``PT_TLS``, relocated; ``carrier_of`` the carrier of another
    library of ours.  Raises :class:`LoadError`, in glibc's words when glibc refuses.
    """
    starts = bindings.field("value")
    asked = [_Asked(kind, table, bindings, starts) for kind, table in rows]
    own: dict[Question, None] = {}
    foreign: dict[Question, None] = {}
    needed: dict[str, None] = {}

    def question(kind: str, definer: Definer, place: int, value: int) -> tuple[bool, Question]:
        """Whose carrier is asked what: own block by offset, others' by their symbols."""
        if definer is me:
            return True, Question(_KIND[kind], None, value)
        if isinstance(definer, HostLibrary):
            if int(bindings.field("info")[place]) & 0xF != STT_TLS:  # glibc might divide by 0
                label = bindings.label(place)
                raise LoadError(f"{me.name}: thread-local relocation of {label}, which is not thread-local")
            if definer.path:
                needed[definer.path] = None
            return False, Question(_KIND[kind], bindings.label(place), value - int(starts[place]))
        carrier = carrier_of(definer)
        if carrier is None:
            raise LoadError(
                f"{me.name}: thread-local storage of {definer.name} is not there yet", hint=_CYCLE
            )
        needed[carrier.name] = None
        return False, Question(_KIND[kind], carrier.symbol, value)

    for item in asked:
        for is_own, asks in item.questions(question):
            (own if is_own else foreign)[asks] = None
    if own and tls is None:
        raise LoadError(f"{me.name}: relocations of its own thread-local storage, but no PT_TLS")
    mine = open_carrier(me.name, list(own), tls=tls, template=template()) if tls is not None else None
    try:
        asking = open_carrier(me.name, list(foreign), needed=list(needed)) if foreign else None
    except LoadError:
        if mine is not None:
            mine.close()
        raise
    known = {(True, asks): mine.answers[place] for place, asks in enumerate(own)} if mine else {}
    if asking is not None:
        known |= {(False, asks): asking.answers[place] for place, asks in enumerate(foreign)}
    writes = [write for item in asked for write in item.writes(question, known)]
    return Blocks(mine, asking), writes


_CYCLE: Final = "the two libraries need each other"
_Ask = Callable[[str, Definer, int, int], tuple[bool, Question]]


class _Asked:
    """The relocations of one kind, and what has to be known for each."""

    def __init__(self, kind: Kind, rows: Table, bindings: Bindings, starts: NDArray[np.uint64]) -> None:
        self.kind = kind
        place = bindings.place(rows["symbol"])
        bound = bindings.owner[place] >= 0  # what is weak and undefined stays as it is
        self.rows, self.place = rows[bound], place[bound]
        # Of the system's libraries the symbol is asked for; of ours the block, which it has an offset in.
        foreign = np.array([isinstance(definer, HostLibrary) for definer in bindings.scope], bool)
        self.owner = bindings.owner[self.place]
        self.start = np.where(foreign[self.owner], starts[self.place], np.uint64(0))
        self.scope = bindings.scope
        with np.errstate(over="ignore"):
            self.offset = starts[self.place] + self.rows["addend"].view(np.uint64)

    def _each(self, ask: _Ask) -> list[tuple[bool, Question]]:
        """The question of each row.  All but descriptors ask about the beginning: offsets are added."""
        formula = self.kind.formula
        if formula == "module offset":
            return []
        about = self.offset if formula == "descriptor" else self.start
        rows = zip(self.owner.tolist(), self.place.tolist(), about.view(np.int64).tolist(), strict=True)
        return [ask(formula, self.scope[owner], place, offset) for owner, place, offset in rows]

    def questions(self, ask: _Ask) -> Iterable[tuple[bool, Question]]:
        return self._each(ask)

    def writes(self, ask: _Ask, known: dict[tuple[bool, Question], Any]) -> Iterable[Write]:
        if not len(self.rows):
            return
        vaddrs, formula = self.rows["offset"], self.kind.formula
        if formula == "module offset":
            yield vaddrs, self.offset, self.kind.size
            return
        answers = np.array([known[key] for key in self._each(ask)], np.uint64)
        if formula == "module":
            yield vaddrs, answers[:, 0], self.kind.size
        elif formula == "thread offset":
            with np.errstate(over="ignore"):
                yield vaddrs, answers[:, 0] + (self.offset - self.start), self.kind.size
        else:
            yield vaddrs, answers[:, 0], 8
            yield vaddrs + np.uint64(8), answers[:, 1], 8


class _Index(ctypes.Structure):
    """``tls_index`` of the psABI."""

    _fields_ = (("module", ctypes.c_size_t), ("offset", ctypes.c_size_t))


@lru_cache(maxsize=1)
def _get_address() -> Any:
    address = host.symbol_address(host.global_handle(), b"__tls_get_addr")
    if address is None:
        raise LoadError("the system's loader has no __tls_get_addr")
    return ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.POINTER(_Index))(address)


def address_of(carrier: Carrier, offset: int) -> int:
    """Where ``offset`` of the carrier's block is for the calling thread."""
    return int(_get_address()(ctypes.byref(_Index(carrier.module, offset))))
