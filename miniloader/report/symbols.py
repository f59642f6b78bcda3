"""Dynamic symbols in words, as ``inspect --symbols`` lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from miniloader.elf import ElfImage
from miniloader.json_schema import BOOL, COUNT, TEXT, keys, nullable, record, words
from miniloader.values import dataclass

__all__ = ["SCHEMA", "Symbol", "symbol_list"]

_BINDS: Final = {0: "local", 1: "global", 2: "weak", 10: "unique"}
_TYPES: Final = {
    0: "notype", 1: "object", 2: "func", 3: "section", 4: "file", 5: "common", 6: "tls", 10: "ifunc",
}  # fmt: skip
_VISIBILITIES: Final = ("default", "internal", "hidden", "protected")


@dataclass(frozen=True)
class Symbol:
    """One dynamic symbol, in words.

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

    @property
    def versioned_name(self) -> str:
        """``name``, ``name@@V`` or ``name@V``, as linkers write it; the symbol of a version is just that."""
        if self.version in (None, self.name):
            return self.name
        return f"{self.name}{'@@' if self.default else '@'}{self.version}"


SCHEMA: Final = record(
    keys(TEXT, "name type bind"),
    keys(COUNT, "value size"),
    {"visibility": words("default internal hidden protected"), "default": BOOL},
    {"section": words("undefined absolute defined"), "version": nullable(TEXT), "file": nullable(TEXT)},
)
"""A :class:`Symbol` in ``--json``."""


def symbol_list(image: ElfImage) -> Iterator[Symbol]:
    """Every symbol of the dynamic symbol table but the empty first, in its order."""
    table = image.symbols
    for index in range(1, len(table)):
        row, version = table.rows[index], table.version(index)
        place = {0: "undefined", 0xFFF1: "absolute"}.get(int(row["shndx"]), "defined")
        yield Symbol(
            name=table.name(index),
            value=int(row["value"]),
            size=int(row["size"]),
            type=_TYPES.get(int(table.type[index]), str(table.type[index])),
            bind=_BINDS.get(int(table.bind[index]), str(table.bind[index])),
            visibility=_VISIBILITIES[int(row["other"]) & 3],
            section=place,
            version=version.name if version and not version.base else None,
            default=version is not None and version.file is None and not table.hidden(index),
            file=version.file if version else None,
        )
