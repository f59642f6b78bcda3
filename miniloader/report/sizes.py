"""What is large in a file: its sections and its symbols, as ``inspect --sizes`` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.elf.demangling import demangled
from miniloader.elf.symbols import SHN_UNDEF, STT_SECTION, STT_TLS, SymbolTable
from miniloader.elf.symtab import read_symtab
from miniloader.errors import printable
from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record
from miniloader.report.numbers import size
from miniloader.report.text import Part, Table, heading, more

__all__ = ["SCHEMA", "lines", "to_json"]

_SHOWN: Final = 30
_SHN_LORESERVE: Final = 0xFF00


def to_json(image: ElfImage, *, raw: bool) -> dict[str, Any]:
    """``{sections[{name, file, memory}], symbols[{name, demangled, section, size}]}``, the largest first.

    Sizes are bytes, in the file and in memory.  Symbols are those of ``.symtab``, or of the dynamic symbol
    table where there is none; of several at one place the first.
    """
    sections: list[dict[str, Any]] = [
        {
            "name": section.name,
            "file": section.file_size,
            "memory": section.size if section.allocated and section.name != ".tbss" else 0,
        }
        for section in image.sections[1:]
    ]
    sections.sort(key=lambda row: (-max(row["file"], row["memory"]), row["name"]))
    return {"sections": sections, "symbols": [*_symbols(image, raw=raw)]}


def _symbols(image: ElfImage, *, raw: bool) -> Iterator[dict[str, Any]]:
    table = _table(image)
    rows = table.rows
    told = set()
    sized = (rows["size"] > 0) & (rows["shndx"] != SHN_UNDEF) & (rows["shndx"] < _SHN_LORESERVE)
    sized &= (table.type != STT_SECTION) & (rows["name"] != 0)
    indices = sized.nonzero()[0]
    for index in indices[(-rows["size"][indices].astype("f8")).argsort(kind="stable")].tolist():
        place, start = int(rows["shndx"][index]), int(rows["value"][index])
        if (place, start, table.type[index] == STT_TLS) in told:
            continue
        told.add((place, start, table.type[index] == STT_TLS))
        name = table.name(index)
        yield {
            "name": name,
            "demangled": None if raw else demangled(name),
            "section": image.sections[place].name if place < len(image.sections) else None,
            "size": int(rows["size"][index]),
        }


def _table(image: ElfImage) -> SymbolTable:
    static = read_symtab(image)
    return static if len(static) else image.symbols


SCHEMA: Final = record(
    {"sections": array(record(keys(TEXT, "name"), keys(COUNT, "file memory")))},
    {"symbols": array(record(
        keys(TEXT, "name"), keys(nullable(TEXT), "demangled section"), keys(COUNT, "size")
    ))},
)  # fmt: skip
"""What :func:`to_json` gives."""


def lines(image: ElfImage, *, raw: bool) -> Iterator[Part]:
    """The largest sections and symbols."""
    sizes = to_json(image, raw=raw)
    sections, symbols = sizes["sections"], sizes["symbols"]
    in_file, in_memory = (sum(row[key] for row in sections) for key in ("file", "memory"))
    yield heading("Sections", f"{size(in_file)} of the file, {size(in_memory)} in memory; the largest first")
    rows = [(f"{row['file']:,}", f"{row['memory']:,}", printable(row["name"])) for row in sections[:_SHOWN]]
    yield Table((">in the file", ">in memory", "section"), rows, 2)
    if len(sections) > _SHOWN:
        yield (f"  {more(len(sections) - _SHOWN, 'sections')} (--json lists all)",)
    yield ()
    total = sum(row["size"] for row in symbols)
    yield heading("Symbols", f"{size(total)} in {len(symbols):,} of them; the largest first")
    named = [
        (f"{row['size']:,}", printable(row["section"] or ""), printable(row["demangled"] or row["name"]))
        for row in symbols[:_SHOWN]
    ]
    yield Table((">bytes", "section", "symbol"), named, 2)
    if len(symbols) > _SHOWN:
        yield (f"  {more(len(symbols) - _SHOWN, 'symbols')} (--json lists all)",)
