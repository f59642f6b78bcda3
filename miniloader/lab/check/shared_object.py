"""A file as a dynamic linker sees it: what it needs, what it defines, and what its relocations look up.

Read once, kept small, its descriptor closed: a run over all programs of a machine has some thousand of them.
Names are looked up by :mod:`miniloader.native`, whatever class and byte order the file has: its tables are
laid out once more, as a 64-bit little-endian file has them, by :func:`lookup_tables`; where its code does
not run, by Python (:mod:`miniloader.lab.check.names`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.checks import outcomes
from miniloader.elf.dynamic import (
    DF_1_PIE,
    DT_FLAGS_1,
    DT_GNU_HASH,
    DT_HASH,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMTAB,
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERSYM,
)
from miniloader.elf.header import Header
from miniloader.elf.image import notes_in
from miniloader.elf.kinds.file_kind import refuse_unlinked
from miniloader.elf.relocations import Relocations, kind_name
from miniloader.elf.source import unreadable
from miniloader.elf.symbols import GnuHash, SymbolTable, shown_name
from miniloader.elf.tables import distinct, symbol_dtype
from miniloader.elf.versions import VERSION_HIDDEN, Version
from miniloader.errors import ElfError
from miniloader.lab.check.names import Names, names_of
from miniloader.loader.root import Root
from miniloader.native import Stopped
from miniloader.values import dataclass

__all__ = ["SharedObject", "Shelf", "SymbolUses", "lookup_tables", "symbol_uses"]

T = TypeVar("T")
_VERDEF: Final = struct.Struct("<4H3I")  # Elf64_Verdef
_VERDAUX: Final = struct.Struct("<2I")  # Elf64_Verdaux
_TOLD_BY_KIND: Final = ("file-type", "relr-marker")  # rules that a kind of problem of its own tells
_SYMBOL: Final = symbol_dtype(64, "<")
_ALL_PASS: Final = b"\xff" * 8  # a Bloom filter of one word, which lets every hash pass
_STATIC_TLS: Final = ("_TPOFF", "_TPREL")  # not DTPOFF, DTPREL
_DESCRIPTORS: Final = ("TLSDESC", "TLS_DESC")
_FDO_DLOPEN: Final = "0x407c0c0a"
_NOTES: Final = 16  # segments of notes that are looked at
_LARGEST_NOTE: Final = 1 << 20  # bytes


# ---------------------------------------------------------------------------------------------- tables
def lookup_tables(symbols: SymbolTable) -> tuple[bytearray, dict[int, int]]:
    """The tables by which names are found, in the layout of a 64-bit little-endian file, and where each is.

    What is defined is found as in the file's own hash table; without one nothing is, as in glibc.  All
    versions stand in one ``DT_VERDEF``: whoever looks names up asks no more than what each is called.
    """
    strings = bytearray(symbols.strings)
    if not strings or strings[-1]:
        strings.append(0)
    records, versions = bytearray(), sorted(symbols.versions.items())
    for number, (index, version) in enumerate(versions, 1):
        step = 0 if number == len(versions) else _VERDEF.size + _VERDAUX.size
        records += _VERDEF.pack(1, int(version.base), index, 1, 0, _VERDEF.size, step)
        records += _VERDAUX.pack(len(strings), 0)
        strings += version.name.encode("utf-8", "surrogateescape") + b"\0"
    rows = symbols.rows if symbols.rows.dtype == _SYMBOL else _as_symbols(symbols.rows)
    hashed = DT_GNU_HASH if isinstance(symbols.hash, GnuHash) else DT_HASH
    parts = (
        (DT_SYMTAB, rows.tobytes()),
        (hashed, _hash_table(symbols)),
        (DT_VERSYM, symbols.versym.astype("<u2").tobytes()),
        (DT_VERDEF, bytes(records)),
        (DT_STRTAB, bytes(strings)),
    )
    buffer, tags = bytearray(8), {DT_STRSZ: len(strings), DT_VERDEFNUM: len(versions)}
    for tag, data in parts:
        if data:
            tags[tag] = len(buffer)
            buffer += data + bytes(-len(data) % 8)
    return buffer, tags


def _as_symbols(rows: NDArray[np.void]) -> NDArray[np.void]:
    table = np.zeros(len(rows), _SYMBOL)
    for name in _SYMBOL.names or ():
        table[name] = rows[name]
    return table


def _hash_table(symbols: SymbolTable) -> bytes:
    table = symbols.hash
    if table is None:
        return struct.pack("<2I", 0, 0)
    words = table.buckets.astype("<u4").tobytes() + table.chains.astype("<u4").tobytes()
    if isinstance(table, GnuHash):
        wide = table.bloom.dtype == np.dtype("<u8")
        bloom, shift = (table.bloom.tobytes(), table.shift) if wide else (_ALL_PASS, 0)
        return struct.pack("<4I", len(table.buckets), table.first, len(bloom) // 8, shift) + bloom + words
    return struct.pack("<2I", len(table.buckets), len(table.chains)) + words


# ------------------------------------------------------------------------------------------ references
@dataclass(frozen=True, eq=False)
class SymbolUses:
    """The symbols (indices, ascending) that relocations look up.

    All of them; those called through the PLT; those used in any other way; those of copy relocations, of
    static thread-local storage (0: the file's own block), of descriptors of thread-local storage.
    ``resolvers`` counts relocations of IFUNCs without a symbol.
    """

    symbols: NDArray[np.int64]
    calls: NDArray[np.int64]
    pointers: NDArray[np.int64]
    copies: NDArray[np.int64]
    static_tls: NDArray[np.int64]
    tls_descriptors: NDArray[np.int64]
    resolvers: int


def symbol_uses(relocations: Relocations) -> SymbolUses:
    """What the ``relocations`` of a file look up."""
    kinds: dict[str, list[NDArray[np.int64]]] = {
        name: [] for name in ("copy", "static", "descriptor", "call", "resolver", "")
    }
    for table in relocations.tables:
        rows = table.behind_head
        codes, _ = distinct(rows["type"])
        for code in codes.tolist():
            if code:
                numbers = rows["symbol"][rows["type"] == code].astype(np.int64)
                kinds[_sort(kind_name(relocations.machine, code))].append(numbers)

    def of(*names: str) -> NDArray[np.int64]:
        arrays = [array for name in names for array in kinds[name]]
        return distinct(np.concatenate(arrays))[0] if arrays else np.empty(0, np.int64)

    looked_up = of("", "call", "static", "descriptor")
    pointers = of("", "static", "descriptor")
    return SymbolUses(
        looked_up[looked_up > 0],
        of("call"),
        pointers[pointers > 0],
        of("copy"),
        of("static"),
        of("descriptor"),
        sum(map(len, kinds["resolver"])),
    )


def _sort(kind: str) -> str:
    if kind.endswith("_COPY"):
        return "copy"
    if kind.endswith("_IRELATIVE"):
        return "resolver"
    if kind.endswith(("JUMP_SLOT", "JMP_SLOT")):
        return "call"
    if any(part in kind for part in _DESCRIPTORS):
        return "descriptor"
    return "static" if any(part in kind for part in _STATIC_TLS) else ""


# --------------------------------------------------------------------------------------------- objects
@dataclass(frozen=True, eq=False)
class SharedObject:
    """A library or program: ``path`` inside of its root, ``file`` as seen from here.

    ``image`` says what is in the headers and the dynamic section; its descriptor is closed (see
    :meth:`reopened`).  ``versions`` are by index, needed and defined ones.  ``faults`` are the rules of
    :mod:`miniloader.elf.checks` that it breaks: field, found, expected.
    """

    path: str
    file: str
    identity: tuple[int, int]
    image: ElfImage
    uses: SymbolUses
    versions: dict[int, Version]
    versym: NDArray[np.uint16]
    names: Names
    rows: NDArray[np.void]
    faults: tuple[tuple[str, str, str], ...]
    tables: bytearray

    @property
    def header(self) -> Header:
        """The ELF header."""
        return self.image.header

    @cached_property
    def is_program(self) -> bool:
        """Whether it is started, not opened by another: ET_EXEC, or position-independent with DF_1_PIE."""
        if self.header.type == "EXEC" or self.image.dynamic.flag(DT_FLAGS_1, DF_1_PIE):
            return True
        return self.image.segment("PT_INTERP") is not None and self.image.soname is None

    @cached_property
    def bind(self) -> NDArray[np.uint8]:
        """``ELF_ST_BIND`` of every symbol."""
        return np.asarray(self.rows["info"] >> 4, np.uint8)

    def name(self, symbol: int) -> str:
        """The name of a symbol as it is shown; "" where it is outside of the strings, as a rule tells."""
        try:
            return shown_name(self.names.name(symbol))
        except Stopped:
            return ""

    def version(self, symbol: int) -> Version | None:
        """The version of a symbol, as :meth:`miniloader.elf.symbols.SymbolTable.version`."""
        if not len(self.versym):
            return None
        version = self.versions.get(int(self.versym[symbol]) & ~VERSION_HIDDEN)
        return None if version is None or version.base else version

    @cached_property
    def needs(self) -> tuple[tuple[int, str, Version], ...]:
        """Every version that it needs: index, library, version."""
        return tuple(
            (i, version.file, version) for i, version in self.versions.items() if version.file is not None
        )

    @cached_property
    def defines(self) -> frozenset[str]:
        """Every version that it defines, the name of the file itself (the base version) included."""
        return frozenset(version.name for version in self.versions.values() if version.file is None)

    def names_of(self, index: int) -> tuple[str, ...]:
        """The names of the undefined symbols that are of the version with this index."""
        wanted = (self.versym & ~np.uint16(VERSION_HIDDEN)) == index if len(self.versym) else self.versym == 1
        undefined = wanted & (self.rows["shndx"][: len(wanted)] == 0)
        return tuple(self.name(symbol) for symbol in np.flatnonzero(undefined).tolist())

    def reopened(self) -> ElfImage:
        """The image with an open descriptor; :class:`ElfError` where the file is gone."""
        return read_image(Source.open(self.file))


class Shelf:
    """The files of one run inside ``root``, each read once."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._read: dict[tuple[int, int], SharedObject | ElfError] = {}
        self._identities: dict[str, tuple[int, int]] = {}
        self._once: dict[object, Any] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for ``key``."""
        if key not in self._once:
            self._once[key] = make()
        value: T = self._once[key]
        return value

    def take(self, path: str) -> SharedObject:
        """The file ``path`` (inside of the root); :class:`ElfError` where it cannot be read or linked."""
        try:
            if path not in self._identities:
                self._identities[path] = self.root.identity(path)
            identity = self._identities[path]
            if identity not in self._read:
                self._read[identity] = _read(path, self.root.outside(path), identity)
        except (OSError, ValueError) as error:
            raise unreadable(path, "file", error) from None
        item = self._read[identity]
        if isinstance(item, ElfError):
            raise item
        return item


def _read(path: str, file: str, identity: tuple[int, int]) -> SharedObject | ElfError:
    try:
        source = Source.open(file)
    except ElfError as error:
        return error
    try:
        header = read_image(source)
        refuse_unlinked(header)
        large = ElfImage(path, source, header.header, header.segments)  # with all tables: it is not kept
        image = ElfImage(path, source, header.header, header.segments)
        # What is asked for later, while the descriptor is open.
        _ = image.dynamic, image.needed, image.soname, image.rpath, image.runpath, image.interpreter
        symbols = large.symbols
        faults = (
            ()
            if not image.dynamic.entries
            else tuple(
                (problem.field, problem.found, problem.expected)
                for rule, problems in outcomes(large)
                if rule.severity == "error" and rule.name not in _TOLD_BY_KIND
                for problem in problems
            )
        )
        tables, tags = lookup_tables(symbols)
        rows = (
            np.frombuffer(tables, _SYMBOL, len(symbols), tags[DT_SYMTAB])
            if len(symbols)
            else np.empty(0, _SYMBOL)
        )
        names = names_of(symbols, rows, tables, tags)
        uses = symbol_uses(large.relocations)
        return SharedObject(
            path, file, identity, image,
            uses, dict(symbols.versions), symbols.versym, names, rows, faults, tables,
        )  # fmt: skip
    except ElfError as error:
        return error
    except Stopped as stopped:
        return ElfError(path, "DT_SYMTAB", f"broken tables ({stopped.reason.name})", "tables in the file")
    finally:
        source.close()


def dlopen_notes(image: ElfImage) -> Iterator[bytes]:
    """The descriptions of the notes of type ``FDO_DLOPEN``: JSON of libraries that may be opened later.

    Source: systemd's "ELF Dlopen Metadata".
    """
    for segment in [segment for segment in image.segments if segment.type == "PT_NOTE"][:_NOTES]:
        if segment.filesz <= _LARGEST_NOTE:
            data = image.source.read(segment.file_offset, segment.filesz, "PT_NOTE")
            for owner, kind, description in notes_in(
                data, image.header.order, 8 if segment.align == 8 else 4
            ):
                if owner == b"FDO\0" and kind == _FDO_DLOPEN:
                    yield description
