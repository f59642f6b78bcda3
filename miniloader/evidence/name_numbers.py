"""Numbers in place of symbol names, which are compared by the million."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.symbols import SymbolTable

__all__ = ["NameNumbers"]


class NameNumbers:
    """Gives every symbol name a number, the same in all files that share this object."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def numbers(self, table: SymbolTable) -> NDArray[np.uint64]:
        """The number of the name of each symbol of ``table``."""
        numbers = self._numbers
        names = table.names(np.arange(len(table)))
        return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.uint64, len(names))
