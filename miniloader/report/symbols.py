"""Symbols in words, as ``inspect --symbols`` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import repeat
from typing import Any, Final

import numpy as np

from miniloader.elf import ElfImage
from miniloader.elf.demangling import demangled_all
from miniloader.elf.symbols import SymbolTable, shown_name
from miniloader.elf.symtab import read_symtab
from miniloader.elf.versions import VERSION_HIDDEN
from miniloader.json_schema import BOOL, COUNT, TEXT, keys, nullable, record, words
from miniloader.values import dataclass

__all__ = ["ORDERS", "SCHEMA", "Symbol", "selected", "symbol_list"]

_BINDS: Final = {0: "local", 1: "global", 2: "weak", 10: "unique"}
_TYPES: Final = {
    0: "notype", 1: "object", 2: "func", 3: "section", 4: "file", 5: "common", 6: "tls", 10: "ifunc",
}  # fmt: skip
_PLACES: Final = {0: "undefined", 0xFFF1: "absolute"}
_VISIBILITIES: Final = ("default", "internal", "hidden", "protected")


@dataclass(frozen=True)
class Symbol:
    """One symbol, in words; ``demangled`` where its name is one of C++ or Rust.

    ``section`` is ``undefined``, ``absolute``, or ``defined``; ``default`` tells ``name@@V``, found by who
    asks for no version, from ``name@V``; ``file`` is the library that a version is needed of.
    """

    name: str
    value: int
    size: int
    type: str
    bind: str
    visibility: str
    section: str
    version: str | None
    default: bool
    file: str | None
    demangled: str | None = None

    @property
    def versioned_name(self) -> str:
        """``name``, ``name@@V`` or ``name@V``, as linkers write it; the symbol of a version is just that."""
        if self.version in (None, self.name):
            return self.name
        return f"{self.name}{'@@' if self.default else '@'}{self.version}"

    @property
    def shown(self) -> str:
        """The name as people write it, with the version as linkers write it."""
        return (self.demangled or self.name) + self.versioned_name[len(self.name) :]


SCHEMA: Final = record(
    keys(TEXT, "name type bind"),
    keys(COUNT, "value size"),
    {"visibility": words("default internal hidden protected"), "default": BOOL},
    {"section": words("undefined absolute defined"), "version": nullable(TEXT), "file": nullable(TEXT)},
    {"demangled": nullable(TEXT)},
)
"""A :class:`Symbol` in ``--json``."""


def symbol_list(image: ElfImage, *, raw: bool = True) -> Iterator[Symbol]:
    """Every symbol but the empty first, in the order of the table; demangled, too, unless ``raw``.

    Of a file that is linked dynamically these are its dynamic symbols, of any other those of ``.symtab``.
    """
    table = image.symbols if len(image.symbols) or image.header.type == "REL" else read_symtab(image)
    rows, versions = table.rows[1:], _versions(table)
    names = [*map(shown_name, table.names(np.arange(1, len(table))))]
    columns = zip(
        names,
        rows["value"].tolist(),
        rows["size"].tolist(),
        table.type[1:].tolist(),
        table.bind[1:].tolist(),
        (rows["other"] & 3).tolist(),
        rows["shndx"].tolist(),
        table.versym[1:].tolist() if len(table.versym) else repeat(0),
        repeat(None) if raw else demangled_all(names),
        strict=False,
    )
    for name, value, size, kind, bind, visibility, place, number, plain in columns:
        yield Symbol(
            name,
            value,
            size,
            _TYPES.get(kind, str(kind)),
            _BINDS.get(bind, str(bind)),
            _VISIBILITIES[visibility],
            _PLACES.get(place, "defined"),
            *versions[number],
            plain,
        )


def _versions(table: SymbolTable) -> Mapping[int, tuple[str | None, bool, str | None]]:
    """By the number that a symbol has of it: a version's name, whether it is the default one, its file."""
    numbers = set(table.versym.tolist()) if len(table.versym) else {0}
    described: dict[int, tuple[str | None, bool, str | None]] = {}
    for number in numbers:
        version = table.versions.get(number & ~VERSION_HIDDEN) if len(table.versym) else None
        described[number] = (None, False, None)
        if version is not None and not version.base:
            default = version.file is None and not number & VERSION_HIDDEN
            described[number] = (version.name, default, version.file)
    return described


def selected(
    symbols: Iterable[Symbol], pattern: str | None, *, defined: bool | None = None, sort: str | None = None
) -> list[Symbol]:
    """Which of ``symbols`` the ``pattern`` fits, sorted by name, address or size (``ORDERS``; largest first).

    A pattern is a shell's, of the whole name, or a part of it, as it is in the file or demangled.  With
    ``defined`` those that are, or are not.
    """
    chosen = [
        symbol
        for symbol in symbols
        if defined in (None, symbol.section != "undefined") and (pattern is None or _fits(symbol, pattern))
    ]
    return sorted(chosen, key=_ORDERS[sort]) if sort is not None else chosen


def _fits(symbol: Symbol, pattern: str) -> bool:
    names = (symbol.name, symbol.versioned_name, symbol.demangled or "")
    if any(sign in pattern for sign in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)


_ORDERS: Final[dict[str, Callable[[Symbol], Any]]] = {
    "name": lambda symbol: symbol.shown,
    "address": lambda symbol: symbol.value,
    "size": lambda symbol: -symbol.size,
}
ORDERS: Final = tuple(_ORDERS)
"""What symbols can be sorted by."""
