"""``.symtab``: the symbols that linking does not need, static functions among them.

The table is found by section headers, so it is a convenience for naming things; most libraries are stripped
of it.
"""

from __future__ import annotations

import numpy as np

from miniloader.elf.image import ElfImage
from miniloader.elf.symbols import SymbolTable, check_names
from miniloader.elf.tables import symbol_dtype
from miniloader.errors import ElfError

__all__ = ["read_symtab"]


def read_symtab(image: ElfImage) -> SymbolTable:
    """The symbols of ``.symtab``; none where the file has no usable one.  They have no versions."""
    dtype = symbol_dtype(image.header.elf_class, image.header.order)
    table = next((section for section in image.sections if section.type == "SHT_SYMTAB"), None)
    names = None
    if table is not None and table.link < len(image.sections):
        names = image.sections[table.link]
    nothing = SymbolTable(np.empty(0, dtype), b"", None, np.empty(0, np.uint16))
    if table is None or names is None:
        return nothing
    try:
        data = image.source.read(table.file_offset, table.size - table.size % dtype.itemsize, ".symtab")
        strings = image.source.read(names.file_offset, names.size, ".strtab")
        rows = np.frombuffer(data, dtype)
        check_names(rows, strings, image.path)
    except ElfError:
        return nothing
    return SymbolTable(rows, strings, None, np.empty(0, np.uint16))
