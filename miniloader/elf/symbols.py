"""The dynamic symbol table: symbols, their versions, and the hash tables that find them.

Everything comes from ``PT_DYNAMIC``, through a function ``read(vaddr, length, field) -> bytes``, so that the
same code reads a file and a library that lies in memory.  Sources: gABI chapter 5 (symbol table, hash
table), the LSB (symbol versions), and binutils' description of ``DT_GNU_HASH``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, Final

from miniloader.arrays import NDArray, np
from miniloader.elf.dynamic import (
    DT_GNU_HASH,
    DT_HASH,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMENT,
    DT_SYMTAB,
    DT_VERSYM,
    Reader,
    string_at,
)
from miniloader.elf.source import Bytes
from miniloader.elf.tables import Table, symbol_dtype
from miniloader.elf.versions import VERSION_HIDDEN, Version, read_versions
from miniloader.errors import ElfError, shortened
from miniloader.forking import cached_property
from miniloader.values import dataclass

__all__ = [
    "GnuHash",
    "SymbolTable",
    "SysvHash",
    "check_names",
    "gnu_hash",
    "read_symbols",
    "shown_name",
    "sysv_hash",
]

STB_LOCAL: Final = 0
STB_WEAK: Final = 2
STB_GNU_UNIQUE: Final = 10
STT_NOTYPE: Final = 0
STT_OBJECT: Final = 1
STT_FUNC: Final = 2
STT_SECTION: Final = 3
STT_FILE: Final = 4
STT_COMMON: Final = 5
STT_TLS: Final = 6
STT_GNU_IFUNC: Final = 10
SHN_UNDEF: Final = 0
_LONG_NAMES: Final = 1 << 24
_LONGEST_NAME: Final = 1 << 17  # characters: MAX_ARG_STRLEN
_LONG_NAME: Final = 1 << 12  # bytes; those of C++ templates come near
_MOST_CHAIN: Final = 1 << 20  # bytes of a hash chain: to look a name up in it would take as many comparisons
SHN_ABS: Final = 0xFFF1


def shown_name(name: bytes) -> str:
    """A symbol's name as it is shown, in JSON, too: of a longer one than anybody can type its two ends.

    Thousands of symbols may share one name of a megabyte.

    >>> shown_name(b"printf"), shown_name(b"\\xff")
    ('printf', '\\\\xff')
    """
    return shortened(name.decode("utf-8", "backslashreplace"), _LONGEST_NAME)


def gnu_hash(name: bytes) -> int:
    """The hash of ``DT_GNU_HASH`` (Bernstein's, times 33, from 5381), 32 bits.

    >>> hex(gnu_hash(b"printf"))
    '0x156b2bb8'
    """
    value = 5381
    for octet in name:
        value = (value * 33 + octet) & 0xFFFFFFFF
    return value


def sysv_hash(name: bytes) -> int:
    """The hash of ``DT_HASH`` (gABI figure 5-13), 28 bits.

    >>> hex(sysv_hash(b"printf"))
    '0x77905a6'
    """
    value = 0
    for octet in name:
        value = (value << 4) + octet
        value = (value ^ ((value & 0xF0000000) >> 24)) & 0x0FFFFFFF
    return value


@dataclass(frozen=True, eq=False)
class GnuHash:
    """``DT_GNU_HASH``.  ``chains[i]`` is the hash of symbol ``first + i``; bit 0 marks the end of a chain."""

    first: int
    shift: int
    bloom: NDArray[Any]  # words of the class's width
    buckets: NDArray[np.uint32]
    chains: NDArray[np.uint32]

    def may_have(self, hashed: int) -> bool:
        """Whether the Bloom filter lets a hash pass."""
        bits = self.bloom.itemsize * 8
        word = int(self.bloom[(hashed // bits) % len(self.bloom)])
        return bool((word >> (hashed % bits)) & (word >> ((hashed >> self.shift) % bits)) & 1)

    def candidates(self, name: bytes) -> list[int]:
        """The symbols that have the hash of ``name``, in chain order."""
        hashed = gnu_hash(name)
        if not self.may_have(hashed):
            return []
        symbols: list[int] = []
        at = int(self.buckets[hashed % len(self.buckets)]) - self.first
        while 0 <= at < len(self.chains):
            value = int(self.chains[at])
            if value | 1 == hashed | 1:
                symbols.append(at + self.first)
            if value & 1:
                break
            at += 1
        return symbols


@dataclass(frozen=True, eq=False)
class SysvHash:
    """``DT_HASH``."""

    buckets: NDArray[np.uint32]
    chains: NDArray[np.uint32]

    def candidates(self, name: bytes) -> list[int]:
        """The symbols in ``name``'s bucket, in chain order."""
        if not len(self.buckets):
            return []
        at = int(self.buckets[sysv_hash(name) % len(self.buckets)])
        symbols: list[int] = []
        while 0 < at < len(self.chains) and len(symbols) < len(self.chains):  # a cycle ends, too
            symbols.append(at)
            at = int(self.chains[at])
        return symbols


@dataclass(frozen=True, eq=False)
class SymbolTable:
    """The dynamic symbols of one image.

    ``rows`` has the fields of :func:`~miniloader.elf.tables.symbol_dtype` (name, info, other, shndx, value,
    size); ``versym`` is as long as ``rows``, or empty when the image has no versions.
    """

    rows: Table
    strings: Bytes
    hash: GnuHash | SysvHash | None
    versym: NDArray[np.uint16]
    versions: Mapping[int, Version] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def name_bytes(self, index: int) -> bytes:
        """The name of symbol ``index``."""
        return self.string(int(self.rows["name"][index]))

    def names(self, indices: NDArray[np.int64]) -> list[bytes]:
        """The names of the symbols ``indices``."""
        return [string_at(self.strings, at) for at in self.rows["name"][indices].tolist()]

    def name(self, index: int) -> str:
        """The name of symbol ``index`` as it is shown (:func:`shown_name`)."""
        return shown_name(self.name_bytes(index))

    def string(self, offset: int) -> bytes:
        """The string at ``offset`` of the string table; empty when ``offset`` is outside it."""
        return string_at(self.strings, offset)

    def version(self, index: int) -> Version | None:
        """The version of symbol ``index``: the one it has, or the one it needs; ``None`` for none.

        The base version is the name of the file: symbols that have it are not versioned.
        """
        if not len(self.versym):
            return None
        version = self.versions.get(int(self.versym[index]) & ~VERSION_HIDDEN)
        return None if version is None or version.base else version

    @cached_property
    def bind(self) -> NDArray[np.uint8]:
        """``ELF_ST_BIND`` of every symbol."""
        return np.asarray(self.rows["info"] >> 4, np.uint8)

    @cached_property
    def type(self) -> NDArray[np.uint8]:
        """``ELF_ST_TYPE`` of every symbol."""
        return np.asarray(self.rows["info"] & 0xF, np.uint8)

    @cached_property
    def defined(self) -> NDArray[np.bool_]:
        """Which symbols are defined here and can be bound to by name (global, weak or unique)."""
        rows = self.rows
        real = (rows["shndx"] != SHN_UNDEF) & (self.bind != STB_LOCAL)
        return np.asarray(real & (self.type != STT_SECTION) & (self.type != STT_FILE))

    @cached_property
    def undefined(self) -> NDArray[np.bool_]:
        """Which symbols are needed from elsewhere."""
        rows = self.rows
        return np.asarray((rows["shndx"] == SHN_UNDEF) & (self.bind != STB_LOCAL) & (rows["name"] != 0))

    def find(self, name: str | bytes, version: str | None = None) -> int | None:
        """The index of the defined symbol ``name``: of ``version``, or of its default version.

        A hidden version (``name@V``, not ``name@@V``) is found by its version only, as ``dlvsym(3)`` does;
        where a library has no versions at all, its symbols are found by any.
        """
        candidates = self.definitions(
            name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
        )
        if version is None or not len(self.versym):
            return next((index for index in candidates if not self.hidden(index)), None)
        named = (index for index in candidates if (self.version(index) or _NO_VERSION).name == version)
        return next(named, None)

    def definitions(self, name: bytes) -> list[int]:
        """The indices of the defined symbols ``name``, of whatever version, as the hash table has them."""
        if self.hash is None:
            places: Iterable[int] = np.flatnonzero(self.defined).tolist()
        else:
            places = (index for index in self.hash.candidates(name) if index < len(self.rows))
        return [index for index in places if self.defined[index] and self.name_bytes(index) == name]

    def versions_of(self, name: bytes) -> list[str]:
        """Each version in which ``name`` is defined, such as ``["GLIBC_2.2.5", "GLIBC_2.14"]``."""
        indices = np.flatnonzero(self.defined).tolist()
        versions = (self.version(index) for index in indices if self.name_bytes(index) == name)
        return [version.name for version in versions if version is not None]

    def hidden(self, index: int) -> bool:
        """Whether symbol ``index`` is found only by who asks for its version."""
        return bool(len(self.versym)) and bool(int(self.versym[index]) & VERSION_HIDDEN)

    @cached_property
    def by_address(self) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """Values in ascending order and the symbol each belongs to: defined, with an address, no TLS."""
        usable = self.defined & (self.type != STT_TLS) & (self.rows["shndx"] != SHN_ABS)
        indices = np.flatnonzero(usable)
        values = self.rows["value"][indices].astype(np.uint64)
        order = np.lexsort((self.rows["size"][indices], values))
        return values[order], indices[order]

    def at(self, vaddr: int) -> tuple[int, int] | None:
        """The defined symbol that covers ``vaddr`` and the distance from its start, or ``None``."""
        values, indices = self.by_address
        place = int(np.searchsorted(values, np.uint64(vaddr), side="right")) - 1
        while place >= 0:
            index = int(indices[place])
            distance = vaddr - int(values[place])
            if distance < max(int(self.rows["size"][index]), 1):
                return index, distance
            if place == 0 or values[place - 1] != values[place]:
                return None
            place -= 1
        return None


_NO_VERSION: Final = Version("", None)


def read_symbols(
    read: Reader,
    tags: Mapping[int, int],
    *,
    elf_class: int,
    order: str,
    at_least: int = 0,
    name: str | None = None,
    machine: str = "",
    strings: Bytes | None = None,
) -> SymbolTable:
    """Read the dynamic symbol table that the dynamic section ``tags`` describes.

    Its length is nowhere in the file: it is what the hash table reaches, and ``at_least`` (the highest index
    that a relocation uses, plus one).  ``strings`` is the string table, where it has been read before.
    Raises :class:`ElfError` for tables that leave the image.
    """
    dtype = symbol_dtype(elf_class, order)
    if strings is None:
        strings = read(tags[DT_STRTAB], tags.get(DT_STRSZ, 0), "DT_STRTAB") if DT_STRTAB in tags else b""
    if DT_SYMTAB not in tags and at_least > 1:
        raise ElfError(name, "DT_SYMTAB", "none", f"a table of {at_least} symbols, which relocations use")
    if DT_SYMTAB not in tags:
        return SymbolTable(np.empty(0, dtype), strings, None, np.empty(0, np.uint16))
    if tags.get(DT_SYMENT, dtype.itemsize) != dtype.itemsize:
        raise ElfError(name, "DT_SYMENT", str(tags[DT_SYMENT]), str(dtype.itemsize))
    table: GnuHash | SysvHash | None = None
    count = at_least
    if DT_GNU_HASH in tags:
        table = _read_gnu_hash(read, tags[DT_GNU_HASH], elf_class, order, name)
        count = max(count, table.first + len(table.chains))
    if DT_HASH in tags:
        # s390x and alpha have 8-byte words here (their psABIs), and no others.
        wide = elf_class == 64 and machine in ("S390", "ALPHA")
        sysv = _read_sysv_hash(read, tags[DT_HASH], f"{order}u{8 if wide else 4}")
        count = max(count, len(sysv.chains))
        table = table or sysv
    rows = np.frombuffer(read(tags[DT_SYMTAB], count * dtype.itemsize, "DT_SYMTAB"), dtype)
    check_names(rows, strings, name)
    versym = np.empty(0, np.uint16)
    versions: Mapping[int, Version] = {}
    if DT_VERSYM in tags:
        versym = np.frombuffer(read(tags[DT_VERSYM], count * 2, "DT_VERSYM"), f"{order}u2")
        versions = read_versions(read, tags, strings, order=order, name=name)
    return SymbolTable(rows, strings, table, versym, versions)


def check_names(rows: Table, strings: Bytes, name: str | None) -> None:
    """Raise :class:`ElfError` where the names together are far longer than the table they lie in.

    Linkers let names share their ends; that every symbol has one as long as the file is an attack.
    """
    if len(rows) * len(strings) <= _LONG_NAMES or not _has_long(strings):
        return
    ends = np.flatnonzero(np.frombuffer(strings, np.uint8) == 0)
    offsets = np.minimum(rows["name"], len(strings)).astype(np.int64)
    places = np.searchsorted(ends, offsets)
    total = int((np.append(ends, len(strings))[places] - offsets).sum())
    most = 16 * len(strings) + _LONG_NAMES
    if total > most:
        raise ElfError(name, "DT_STRTAB", f"names of {total:#x} bytes in all", f"at most {most:#x}")


def _has_long(strings: Bytes) -> bool:
    """Whether any stretch without NUL is longer than names are; in steps of that length, from its end."""
    at = 0
    while at + _LONG_NAME < len(strings):
        end = strings.rfind(b"\0", at, at + _LONG_NAME)
        if end < 0:
            return True
        at = end + 1
    return False


def _read_gnu_hash(read: Reader, vaddr: int, elf_class: int, order: str, name: str | None) -> GnuHash:
    nbuckets, first, bloom_words, shift = np.frombuffer(read(vaddr, 16, "DT_GNU_HASH"), f"{order}u4").tolist()
    if nbuckets == 0:
        raise ElfError(name, "DT_GNU_HASH", "0 buckets", "at least one")
    if bloom_words == 0 or bloom_words & (bloom_words - 1):
        raise ElfError(name, "DT_GNU_HASH", f"{bloom_words} Bloom filter words", "a power of two")
    word = elf_class // 8
    if shift >= 32:
        raise ElfError(name, "DT_GNU_HASH", f"a Bloom filter shift of {shift}", "less than 32")
    at = vaddr + 16
    bloom = np.frombuffer(read(at, bloom_words * word, "DT_GNU_HASH Bloom filter"), f"{order}u{word}")
    at += bloom_words * word
    buckets = np.frombuffer(read(at, nbuckets * 4, "DT_GNU_HASH buckets"), f"{order}u4")
    at += nbuckets * 4
    last = int(buckets.max())
    if last == 0:
        return GnuHash(first, shift, bloom, buckets, np.empty(0, np.uint32))
    if int(buckets[buckets > 0].min()) < first:
        raise ElfError(name, "DT_GNU_HASH", "a bucket before the first hashed symbol", f"at least {first}")
    chains = bytes(read(at, (last - first) * 4, "DT_GNU_HASH chains"))
    chains += _last_chain(read, at + len(chains), f"{order}u4", name)
    return GnuHash(first, shift, bloom, buckets, np.frombuffer(chains, f"{order}u4"))


def _last_chain(read: Reader, at: int, dtype: str, name: str | None) -> bytes:
    """The words from ``at`` to the first with the end mark, looked for in blocks that double or shrink."""
    pieces: list[bytes] = []
    size = 64
    while True:
        try:
            block = bytes(read(at, size, "DT_GNU_HASH chains"))
        except ElfError:
            if size == 4:
                raise
            size //= 2
            continue
        ends = np.flatnonzero(np.frombuffer(block, dtype) & 1)
        if len(ends):
            return b"".join([*pieces, block[: 4 * int(ends[0]) + 4]])
        pieces.append(block)
        at += size
        if sum(map(len, pieces)) > _MOST_CHAIN:
            found = f"a chain of more than {_MOST_CHAIN // 4} symbols without an end mark"
            raise ElfError(name, "DT_GNU_HASH", found, f"at most {_MOST_CHAIN // 4}")
        size *= 2


def _read_sysv_hash(read: Reader, vaddr: int, dtype: str) -> SysvHash:
    size = int(dtype[-1])
    nbuckets, nchains = np.frombuffer(read(vaddr, 2 * size, "DT_HASH"), dtype).tolist()
    words = np.frombuffer(read(vaddr + 2 * size, (nbuckets + nchains) * size, "DT_HASH"), dtype)
    return SysvHash(words[:nbuckets].astype(np.uint32), words[nbuckets:].astype(np.uint32))
