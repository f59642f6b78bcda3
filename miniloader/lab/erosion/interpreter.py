"""Whether a process runs CPython, which one, and where its ``type`` lies: from the symbols of its files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from miniloader.errors import ElfError
from miniloader.evidence.file_facts import FileFacts
from miniloader.values import NamedTuple

__all__ = ["FIRST", "LAST", "Interpreter", "interpreter_in"]

FIRST: Final = (3, 11)
LAST: Final = (3, 14)
_COOKIE: Final = (
    b"xdebugpy"  # what _PyRuntime begins with from 3.13 on (Include/internal/pycore_debug_offsets.h)
)
_WORD: Final = 8


class Interpreter(NamedTuple):
    """A CPython: its version, whether it is built without the global lock, and the address of ``type``."""

    version: tuple[int, int]
    free_threaded: bool
    type_address: int

    @property
    def name(self) -> str:
        """Such as ``cpython-3.12``, ``cpython-3.13t`` where there is no global lock.

        >>> Interpreter((3, 13), True, 0).name
        'cpython-3.13t'
        """
        return f"cpython-{self.version[0]}.{self.version[1]}{'t' if self.free_threaded else ''}"

    @property
    def is_known(self) -> bool:
        """Whether its objects are laid out as :mod:`miniloader.lab.erosion.objects` reads them."""
        return FIRST <= self.version <= LAST and not self.free_threaded


def interpreter_in(files: Iterable[tuple[str, int, FileFacts | None]]) -> Interpreter | None:
    """The CPython among ``files``, each a path, a load bias and what the file says; None where there is none.

    Only files that are called after it are looked into: a program, a library, a plugin of a server.  The
    objects that are read are of 64 bits, so those of 32 are left alone.
    """
    for path, bias, facts in files:
        if facts is not None and facts.word == _WORD and "python" in path.rpartition("/")[2].lower():
            interpreter = _interpreter(facts, bias)
            if interpreter is not None:
                return interpreter
    return None


def _interpreter(facts: FileFacts, bias: int) -> Interpreter | None:
    version, type_type = (_vaddr(facts, name) for name in ("Py_Version", "PyType_Type"))
    if version is None or type_type is None:
        return None
    number = _bytes(facts, version, _WORD)  # PY_VERSION_HEX, from 3.11 on
    runtime = _vaddr(facts, "_PyRuntime")
    head = _bytes(facts, runtime, 3 * _WORD) if runtime is not None else b""
    if len(number) < _WORD:
        return None
    free_threaded = head.startswith(_COOKIE) and any(head[2 * _WORD :])
    return Interpreter((number[3], number[2]), free_threaded, bias + type_type)


def _vaddr(facts: FileFacts, name: str) -> int | None:
    symbols = facts.symbols
    try:
        index = symbols.find(name) if symbols is not None else None
    except ElfError:
        return None
    return int(symbols.rows["value"][index]) if symbols is not None and index is not None else None


def _bytes(facts: FileFacts, vaddr: int, length: int) -> bytes:
    """What the file has there; nothing where it has nothing."""
    try:
        return bytes(facts.image.read(vaddr, length)) if facts.image is not None else b""
    except ElfError:
        return b""
