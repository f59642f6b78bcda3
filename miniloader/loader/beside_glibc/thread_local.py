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

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import Tls
from miniloader.elf.symbols import STT_TLS
from miniloader.elf.tables import Table
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import host
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.tls_carrier import TLSDESC, TPOFF64, Carrier, Question, open_carrier
from miniloader.loader.scope import Bindings, Definer
from miniloader.machine.relocation import Kind
from miniloader.values import dataclass

__all__ = ["Blocks", "Write", "address_of", "answer"]

_KIND: Final = {"thread offset": TPOFF64, "descriptor": TLSDESC}

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
    library of ours, which may have to be linked for that.  Raises :class:`LoadError`, in glibc's words when
    glibc refuses.
    """
    starts = bindings.field("value")
    # Of the system's libraries the symbol is asked for; of ours the block, which it has an offset in.
    of_host = np.array([isinstance(definer, HostLibrary) for definer in bindings.scope], bool)
    begins = np.where((bindings.owner >= 0) & of_host[bindings.owner], starts, np.uint64(0))
    asked = [_Asked(kind, table, bindings, starts, begins) for kind, table in rows]
    own: dict[Question, None] = {}
    foreign: dict[Question, None] = {}
    needed: dict[str, None] = {}

    def owner(definer: Definer, place: int) -> _Block:
        """Who has the block that a symbol is in."""
        if definer is me:
            if tls is None:
                raise LoadError(f"{me.name}: relocations of its own thread-local storage, but no PT_TLS")
            return None
        if not isinstance(definer, HostLibrary):
            carrier = carrier_of(definer)
            if carrier is None:
                text = f"{me.name}: thread-local storage of {definer.name} is not there yet"
                raise LoadError(text, hint=_CYCLE)
            return carrier
        if int(bindings.field("info")[place]) & 0xF != STT_TLS:  # glibc might divide by 0
            label = bindings.label(place)
            raise LoadError(f"{me.name}: thread-local relocation of {label}, which is not thread-local")
        return definer

    def question(kind: str, definer: Definer, place: int, value: int) -> tuple[bool, Question]:
        """Whose carrier is asked what: own block by offset, others' by their symbols."""
        block = owner(definer, place)
        if block is None:
            return True, Question(_KIND[kind], None, value)
        if isinstance(block, Carrier):
            needed[block.name] = None
            return False, Question(_KIND[kind], block.symbol, value)
        if block.path:
            needed[block.path] = None
        return False, Question(_KIND[kind], bindings.label(place), value - int(starts[place]))

    def module(block: _Block) -> int:
        """Its module, for which nobody has to be asked."""
        block = block or mine
        assert block is not None
        return block.tls_module if isinstance(block, HostLibrary) else block.module

    blocks = [item.blocks(owner) for item in asked]
    for item in asked:
        for is_own, asks in item.questions(question):
            (own if is_own else foreign)[asks] = None
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
    modules = [[module(block) for block in of] for of in blocks]
    writes = [w for item, of in zip(asked, modules, strict=True) for w in item.writes(question, known, of)]
    return Blocks(mine, asking), writes


_CYCLE: Final = "the two libraries need each other"
_Block = Carrier | HostLibrary | None  # None: the library's own
_Ask = Callable[[str, Definer, int, int], tuple[bool, Question]]


class _Asked:
    """The relocations of one kind, and what has to be known for each."""

    def __init__(
        self,
        kind: Kind,
        rows: Table,
        bindings: Bindings,
        starts: NDArray[np.uint64],
        begins: NDArray[np.uint64],
    ) -> None:
        self.kind = kind
        place = bindings.place(rows["symbol"])
        bound = bindings.owner[place] >= 0  # what is weak and undefined stays as it is
        self.rows, self.place = rows[bound], place[bound]
        self.owner, self.start = bindings.owner[self.place], begins[self.place]
        self.scope = bindings.scope
        with np.errstate(over="ignore"):
            self.offset = starts[self.place] + self.rows["addend"].view(np.uint64)

    def _each(self, ask: _Ask) -> list[tuple[bool, Question]]:
        """The question of each row.  A thread offset is asked for the beginning: offsets are added."""
        formula = self.kind.formula
        if formula not in _KIND:
            return []
        about = self.offset if formula == "descriptor" else self.start
        rows = zip(self.owner.tolist(), self.place.tolist(), about.view(np.int64).tolist(), strict=True)
        return [ask(formula, self.scope[owner], place, offset) for owner, place, offset in rows]

    def questions(self, ask: _Ask) -> Iterable[tuple[bool, Question]]:
        return self._each(ask)

    def blocks(self, owner: Callable[[Definer, int], _Block]) -> list[_Block]:
        """Whose block each row is about, if it wants the module."""
        if self.kind.formula != "module":
            return []
        rows = zip(self.owner.tolist(), self.place.tolist(), strict=True)
        return [owner(self.scope[definer], place) for definer, place in rows]

    def writes(
        self, ask: _Ask, known: dict[tuple[bool, Question], Any], modules: Sequence[int]
    ) -> Iterable[Write]:
        if not len(self.rows):
            return
        vaddrs, formula = self.rows["offset"], self.kind.formula
        if formula == "module offset":
            yield vaddrs, self.offset, self.kind.size
            return
        if formula == "module":
            yield vaddrs, np.array(modules, np.uint64), self.kind.size
            return
        answers = np.array([known[key] for key in self._each(ask)], np.uint64)
        if formula == "thread offset":
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
