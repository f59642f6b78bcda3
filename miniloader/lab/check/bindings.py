"""Who binds to what: for each symbol that a relocation looks up, who serves it, and who else defines it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import STB_LOCAL
from miniloader.lab.check.shared_object import SharedObject
from miniloader.lab.check.situation import Situation, owners_of
from miniloader.values import dataclass

__all__ = ["SymbolBinding", "bindings"]

_Way = tuple[NDArray[np.int64], list[SharedObject | None], SharedObject | None]
_DEFAULT, _PROTECTED = 0, 3  # visibilities (gABI 4, st_other)


@dataclass(frozen=True)
class SymbolBinding:
    """A reference: ``referrer`` asks for ``symbol`` (of ``version``), and ``provider`` serves it.

    ``provider`` is None where nobody does; ``also`` are the others in scope that define the name in a version
    that would serve, in order.  All are paths.
    """

    referrer: str
    symbol: str
    version: str | None
    provider: str | None
    also: tuple[str, ...]


def bindings(situation: Situation, name: str | None = None) -> Iterator[SymbolBinding]:
    """What every reference of what this load brings is bound to; with ``name`` only those to that symbol.

    References that never leave their own library (hidden and protected symbols) are no look-ups.
    """
    scope = situation.scope
    program = scope[0] if scope and scope[0].header.type == "EXEC" else None
    for item in situation.new:
        uses = item.uses
        everybody: list[SharedObject | None] = [*scope]
        beyond = [member if member is not item else None for member in scope]
        ways: list[_Way] = [(uses.symbols, everybody, None), (uses.copies, beyond, None)]
        if (
            program is not None
        ):  # for all but calls its PLT entries are the functions: their addresses are known
            pointers = uses.pointers
            ways = [(uses.calls, everybody, None), (pointers, everybody, program), ways[1]]
        rows = (
            row
            for symbols, members, entries in ways
            for row in _bound(item, _looked_up(item, symbols, name), members, entries)
        )
        yield from dict.fromkeys(rows)


def _looked_up(item: SharedObject, symbols: NDArray[np.int64], name: str | None) -> NDArray[np.int64]:
    visibility, defined = item.rows["other"][symbols] & 3, item.rows["shndx"][symbols] != 0
    leaves = (visibility == _DEFAULT) | ((visibility == _PROTECTED) & ~defined)
    wanted: NDArray[np.int64] = symbols[leaves & (item.bind[symbols] != STB_LOCAL)]
    if name is None:
        return wanted
    return np.array([symbol for symbol in wanted.tolist() if item.name(symbol) == name], np.int64)


def _bound(
    item: SharedObject,
    wanted: NDArray[np.int64],
    members: Sequence[SharedObject | None],
    entries: SharedObject | None,
) -> Iterator[SymbolBinding]:
    """The rows of ``wanted``: ``members`` are the scope, with None for who is passed over.

    The PLT entries of the program ``entries`` serve as its definitions do.
    """
    serves = np.zeros((len(members), len(wanted)), bool)
    for place, member in enumerate(members if len(wanted) else ()):
        if member is not None:
            serves[place] = owners_of(item, wanted, [member], None)["owner"] >= 0
            if member is entries:
                serves[place] |= owners_of(item, wanted, [member], None, plt_entries=True)["owner"] >= 0
    for column, symbol in enumerate(wanted.tolist()):
        places = np.flatnonzero(serves[:, column]).tolist()
        paths = [member.path for member in (members[place] for place in places) if member is not None]
        version = item.version(symbol)
        yield SymbolBinding(
            item.path,
            item.name(symbol),
            version.name if version else None,
            paths[0] if paths else None,
            tuple(paths[1:]),
        )
