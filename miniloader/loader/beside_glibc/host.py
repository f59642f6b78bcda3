"""The libraries that the process has from its own dynamic linker (glibc's ld.so).

They are found with dl_iterate_phdr(3) and read where they lie in memory, because the file on disk may be
another by now.  Handles come from dlopen(3); nothing here looks at glibc's private structures.
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Mapping
from itertools import takewhile
from operator import itemgetter
from typing import Final

from miniloader import forking
from miniloader.elf.dynamic import (
    DT_RPATH,
    DT_RUNPATH,
    DT_STRSZ,
    DT_STRTAB,
    Dynamic,
)
from miniloader.elf.layout import DYN, PHDR
from miniloader.elf.symbols import SymbolTable, read_symbols
from miniloader.elf.versions import Version, read_versions
from miniloader.errors import ElfError, LoadError
from miniloader.forking import cached_property
from miniloader.loader.beside_glibc.dynamic_linker import (
    close_host,
    declared,
    global_handle,
    in_global_scope,
    load_address,
    open_host,
)
from miniloader.loader.symbol_lookup import MappedSymbols
from miniloader.native import Stopped, address_of
from miniloader.values import dataclass

__all__ = ["HostLibrary", "HostListing", "libraries", "listing"]

_PT_LOAD, _PT_DYNAMIC = 1, 2


_RECORD: Final = struct.Struct("<QQ QQQH6xQQQQ")  # lengths, and struct dl_phdr_info
_PHDR: Final = PHDR.packing
_USED_AND_SIZE: Final = struct.Struct("<QQ")
_START: Final = _USED_AND_SIZE.size
_iterate: Final = declared("dl_iterate_phdr", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True, eq=False)
class HostLibrary:
    """A library that ld.so loaded.  ``path`` is ld.so's name for it: empty for the main program.

    ``headers`` are its program headers, ``soname`` is its ``DT_SONAME``, ``needed`` its ``DT_NEEDED`` in
    order.  ``build_id`` is the note in hexadecimal, as it is in memory: the file may be another by now.
    """

    path: str
    bias: int
    headers: bytes
    tls_module: int
    soname: str | None
    needed: tuple[str, ...]
    build_id: str | None

    @cached_property
    def _segments(self) -> list[tuple[int, int, int, int]]:
        """Kind, flags, vaddr and size in memory of each segment."""
        rows = _PHDR.iter_unpack(self.headers)
        return [(kind, flags, vaddr, memsz) for kind, flags, _, vaddr, _, _, memsz, _ in rows]

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The vaddrs of its readable segments.

        Those that touch are one: patchelf leaves tables that go on in the next one.
        """
        ranges: list[tuple[int, int]] = []
        for kind, flags, vaddr, memsz in self._segments:
            if kind == _PT_LOAD and flags & 4:
                start = ranges.pop()[0] if ranges and ranges[-1][1] == vaddr else vaddr
                ranges.append((start, vaddr + memsz))
        return tuple(ranges)

    @property
    def dynamic_place(self) -> tuple[int, int]:
        """The vaddr and the size of its dynamic section; zeros without one."""
        return next((row[2:] for row in self._segments if row[0] == _PT_DYNAMIC), (0, 0))

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.path or "the main program"

    @property
    def file_name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    def read(self, vaddr: int, length: int, what: str = "bytes") -> bytes:
        """``length`` bytes of it in memory; :class:`ElfError` when they are not within one segment."""
        for start, end in self.ranges:
            if start <= vaddr and vaddr + length <= end:
                return ctypes.string_at(self.bias + vaddr, length)
        raise ElfError(self.name, what, f"vaddrs {vaddr:#x} to {vaddr + length:#x}", "inside one segment")

    @cached_property
    def dynamic(self) -> Dynamic:
        """Its dynamic section with all pointers as vaddrs (ld.so turns most of them into addresses)."""
        vaddr, size = self.dynamic_place
        if not size:
            return Dynamic()
        words = array("Q", self.read(vaddr, size // DYN.size * DYN.size, "PT_DYNAMIC"))
        low, high = self.bias, self.bias + max([end for _, end in self.ranges])
        values = [value - low if low <= value < high else value for value in words[1::2]]
        entries = tuple(takewhile(itemgetter(0), zip(words[::2], values, strict=True)))  # up to DT_NULL
        return Dynamic(entries, dict(entries))

    @cached_property
    def symbols(self) -> SymbolTable:
        """Its dynamic symbols, as they lie in memory."""
        return read_symbols(self.read, self.dynamic.tags, elf_class=64, order="<", name=self.name)

    @cached_property
    def names(self) -> MappedSymbols:
        """Its dynamic symbols where they lie in memory, to be looked up by name."""
        try:
            return MappedSymbols(self.bias, self.ranges, self.dynamic.tags)
        except Stopped as stopped:
            reason = stopped.reason.name.lower().replace("_", " ")
            raise ElfError(self.name, "dynamic symbols", reason, "tables inside its segments") from None

    @cached_property
    def versions(self) -> Mapping[int, Version]:
        """The versions that it needs and defines, as they lie in memory, by their index."""
        tags = self.dynamic.tags
        strings = self.read(tags[DT_STRTAB], tags.get(DT_STRSZ, 0)) if DT_STRTAB in tags else b""
        return read_versions(self.read, tags, strings, order="<", name=self.name)

    @cached_property
    def rpath(self) -> tuple[str, ...]:
        """``DT_RPATH``, as written; it does not count beside a ``DT_RUNPATH``."""
        tags = self.dynamic.tags
        if DT_RPATH not in tags or DT_RUNPATH in tags:
            return ()
        return tuple(self._string(tags[DT_RPATH]).split(":"))

    @cached_property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of its file, as they were when first asked for; None where it is gone."""
        try:
            status = os.stat(self.path) if self.path else None
        except OSError:
            return None
        return (status.st_dev, status.st_ino) if status is not None else None

    @cached_property
    def runpath(self) -> tuple[str, ...]:
        """``DT_RUNPATH``, as written."""
        tags = self.dynamic.tags
        return tuple(self._string(tags[DT_RUNPATH]).split(":")) if DT_RUNPATH in tags else ()

    @cached_property
    def handle(self) -> int:
        """A dlopen handle of it, kept for the life of the process."""
        if not self.path:
            return global_handle()
        handle = open_host(self.path, load=False)
        if handle is None:
            raise LoadError(f"{self.path}: the process has unloaded it meanwhile")
        return handle

    @cached_property
    def is_global(self) -> bool:
        """Whether its symbols are in the process's global scope.

        There is no call that tells; so some of its symbols are looked up there.  When all of them are
        found in other libraries, being in the scope would make no difference.
        """
        return not self.path or in_global_scope(self.bias, self.headers)

    def _string(self, offset: int) -> str:
        vaddr = self.dynamic.tags[DT_STRTAB] + offset  # of a library that ld.so has read already
        return os.fsdecode(ctypes.string_at(self.bias + vaddr))


@dataclass(frozen=True)
class HostListing:
    """What ld.so had loaded when it had loaded ``adds`` libraries and unloaded ``subs``.

    ``places`` are the addresses of the program headers of those ``found``; the ``vdso``, which the kernel
    gives, is none of them, and is there for whoever asks for it by its name.
    """

    adds: int
    subs: int
    places: tuple[int, ...]
    found: tuple[HostLibrary, ...]
    vdso: HostLibrary | None

    @cached_property
    def by_bias(self) -> dict[int, HostLibrary]:
        """By load bias; without the main program, whose bias may be that of nothing, 0."""
        vdso = [self.vdso] if self.vdso is not None else []
        return {library.bias: library for library in (*self.found, *vdso) if library.path}

    @cached_property
    def by_name(self) -> dict[str, HostLibrary]:
        """By soname and by file name; the first of each."""
        pairs = [(name, library) for library in self.found for name in (library.soname, library.file_name)]
        return {name: library for name, library in reversed(pairs) if name}

    def edges(self, library: HostLibrary) -> list[tuple[HostLibrary, bool]]:
        """What ld.so found for the needs of its ``library``, by soname or file name; none is a filtee."""
        if library not in self._edges:
            found = [self.by_name[name] for name in library.needed if name in self.by_name]
            self._edges[library] = [(needed, False) for needed in found]
        return self._edges[library]

    @cached_property
    def _edges(self) -> dict[HostLibrary, list[tuple[HostLibrary, bool]]]:
        """The libraries that each needs, of those whose needs were asked for."""
        return {}

    @cached_property
    def global_scope(self) -> tuple[HostLibrary, ...]:
        """The libraries whose symbols are in the process's global scope."""
        return tuple(library for library in self.found if library.is_global)

    def that_stays(self, name: str) -> HostLibrary | None:
        """The library whose SONAME is ``name``, if the program needs it, so that it cannot go."""
        return self._that_stay.get(name)

    @cached_property
    def _that_stay(self) -> dict[str, HostLibrary]:
        """What the program needs, and what that needs, by soname, where that is the name of one only."""
        needed = list(self.found[:1])
        for library in needed:  # grows meanwhile
            needed += (found for found, _ in self.edges(library) if found not in needed)
        return {
            library.soname: library
            for library in needed[1:]
            if library.soname and self._by_call[library.soname] is library
        }

    @cached_property
    def by_identity(self) -> dict[tuple[int, int], HostLibrary]:
        """By device and inode of their files."""
        pairs = ((library.identity, library) for library in reversed(self.found))
        return {identity: library for identity, library in pairs if identity is not None}

    @cached_property
    def _by_call(self) -> dict[str, HostLibrary]:
        """By soname and by path; the first of each."""
        pairs = [(name, library) for library in self.found for name in (library.soname, library.path)]
        return {name: library for name, library in reversed(pairs) if name is not None}

    def called(self, name: str) -> HostLibrary | None:
        """The library that is called ``name``: by its SONAME, or as it was opened.

        ld.so does not tell by which names it was asked for a library; a file's name is one if ld.so has the
        library by that name, too.
        """
        if name in self._by_call:
            return self._by_call[name]
        if self.vdso is not None and name == self.vdso.soname:
            return self.vdso
        candidate = self.by_name.get(name)
        handle = open_host(name, load=False) if candidate is not None else None
        if candidate is None or handle is None:
            return None
        try:
            return candidate if load_address(handle) == candidate.bias else None
        finally:
            close_host(handle)


_last: list[HostListing] = []
_room: list[int] = [1 << 16]  # bytes that all records take, and some more
_FIRST: Final = 1 << 11  # that the first of them takes, the main program's


def libraries() -> tuple[HostLibrary, ...]:
    """What ld.so has loaded, in its order, the main program first; the vDSO is left out."""
    return listing().found


def listing() -> HostListing:
    """What ld.so has loaded, in its order, and what finds a library of it by bias or name."""
    last = next(iter(_last), None)  # read once: another thread may renew it meanwhile
    if last is not None and _counts(_collect_into(_FIRST)[0]) == (last.adds, last.subs):
        return last
    room, used = _collected()
    adds, subs = _counts(room)
    earlier = {} if last is None else dict(zip(last.places, last.found, strict=True))
    all_stay = last is not None and last.subs == subs
    present: dict[int, HostLibrary] = {}
    vdso = None
    data, at = bytes(memoryview(room)[:used]), _START
    while at < used:
        length, texts_end, bias, _, place, count, _, _, module, _ = _RECORD.unpack_from(data, at)
        old = earlier.get(place)
        if old is None or not all_stay:  # of what stays nothing is looked at
            headers = at + _RECORD.size, at + _RECORD.size + count * _PHDR.size
            parts = (
                data[slice(*headers)],
                data[headers[1] : at + texts_end],
                data[at + texts_end : at + length],
            )
            old = _described(bias, module, *parts, old)
        if old.path.startswith("linux-vdso"):
            vdso = old
        else:
            present[place] = old
        at += -(-length // 8) * 8
    last = HostListing(adds, subs, tuple(present), tuple(present.values()), vdso)
    _last[:] = [last]
    return last


def _described(
    bias: int, module: int, headers: bytes, texts: bytes, build_id: bytes, old: HostLibrary | None
) -> HostLibrary:
    """The library that these parts of its record describe: ``old`` if it is that one."""
    path, soname, *needed, _ = os.fsdecode(texts).split("\0")
    if old is not None and (old.path, old.bias, old.headers) == (path, bias, headers):
        return old
    return HostLibrary(path, bias, headers, module, soname or None, tuple(needed), build_id.hex() or None)


def _collected() -> tuple[bytearray, int]:
    """A buffer of records (see ``collect`` in native/host.c), and where the last one ends."""
    while True:
        room, used = _collect_into(_room[0])
        if used <= len(room):
            return room, used
        _room[0] = 4 * used


def _collect_into(size: int) -> tuple[bytearray, int]:
    """The first records, as many as fit into ``size`` bytes; and where the last one ends, or would."""
    room = bytearray(size)
    _USED_AND_SIZE.pack_into(room, 0, _START, size)
    callback, place = address_of("collect"), ctypes.addressof(ctypes.c_char.from_buffer(room))
    with forking.listing:
        _iterate(callback, place)
    return room, _USED_AND_SIZE.unpack_from(room)[0]


def _counts(room: bytearray) -> tuple[int, int]:
    """How many libraries have been loaded, and unloaded; zeros if not even the first record fits."""
    _, _, _, _, _, _, adds, subs, _, _ = _RECORD.unpack_from(room, _START)
    return adds, subs
