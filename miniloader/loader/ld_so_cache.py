"""``/etc/ld.so.cache``: the libraries that ldconfig(8) has found, by name.

Format: glibc's ``sysdeps/generic/dl-cache.h``, "new format".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from miniloader.files import read_regular

__all__ = ["CACHE", "Cache", "read_cache"]

CACHE: Final = "/etc/ld.so.cache"
#: What the entries for a machine are marked with, by the number of its ``e_machine``: FLAG_ELF_LIBC6 with the
#: bits of glibc's ``sysdeps/generic/ldconfig.h``.
_FLAGS: Final = {62: 0x0303, 183: 0x0A03, 3: 0x0003, 243: 0x1003, 40: 0x0903, 21: 0x0503, 22: 0x0403}
_MAGIC: Final = b"glibc-ld.so.cache1.1"
_HWCAP_EXTENSION: Final = 1 << 62
_HEADER: Final = 48
_ENTRY: Final = "iIIIQ"  # flags, key, value, os version, hwcap
_HWCAPS_TAG: Final = 1
_LARGEST: Final = 1 << 26  # bytes; one of 10,000 libraries has a fiftieth of that


class Cache:
    """The entries of one cache for the machine with the number ``machine``; ``order`` is ``<`` or ``>``.

    What does not make sense in it is as if it were not there.
    """

    def __init__(self, data: bytes, machine: int, order: str = "<") -> None:
        start = data.find(_MAGIC)
        self._data = data[start:] if start >= 0 else b""
        self._order, self._flags = order, _FLAGS.get(machine)
        self._entry = struct.Struct(order + _ENTRY)
        self._end = _HEADER  # of the entries
        self._names: tuple[str, ...] = ()
        if len(self._data) >= _HEADER:
            count, _, _, extension = struct.unpack_from(f"{order}4I", self._data, len(_MAGIC))
            size = self._entry.size
            self._end += min(count, (len(self._data) - _HEADER) // size) * size
            if extension:
                self._names = self._hwcap_names(extension)

    def best(self, name: str, hwcaps: Sequence[str] = ()) -> str | None:
        """The path that ld.so takes for ``name``, if the cache has any.

        ``hwcaps`` are the ``glibc-hwcaps`` sub-directories that suit the processor, best first.
        """
        ranked = []
        for place in self._places(name):
            for value, hwcap in self._entries_of(place):
                if hwcap & _HWCAP_EXTENSION:
                    number = hwcap & 0xFFFFFFFF
                    label = self._names[number] if number < len(self._names) else ""
                    if label in hwcaps:
                        ranked.append((hwcaps.index(label), value))
                elif not hwcap:  # other numbers are the legacy hwcaps, which current glibc ignores
                    ranked.append((len(hwcaps), value))
        return self._text(min(ranked, key=lambda entry: entry[0])[1]) if ranked else None

    def names(self) -> list[str]:
        """The names of all libraries in it, in order, each once."""
        rows = self._entry.iter_unpack(memoryview(self._data)[_HEADER : self._end])
        return sorted({self._text(key) for flags, key, *_ in rows if flags == self._flags})

    def _places(self, name: str) -> Iterator[int]:
        """Where in the cache ``name`` is a whole text, or the end of one: a name may be the end of a path."""
        return _found(self._data, os.fsencode(name) + b"\0", self._end, len(self._data))

    def _entries_of(self, key: int) -> Iterator[tuple[int, int]]:
        """Value and hwcap of each entry for the machine whose name lies at ``key``."""
        if self._flags is None:
            return
        for place in _found(
            self._data, struct.pack(f"{self._order}iI", self._flags, key), _HEADER, self._end
        ):
            if (place - _HEADER) % self._entry.size == 0:
                _, _, value, _, hwcap = self._entry.unpack_from(self._data, place)
                yield value, hwcap

    def _hwcap_names(self, extension: int) -> tuple[str, ...]:
        """The names in ``cache_extension_tag_glibc_hwcaps``, of the extensions at ``extension``."""
        data, section = self._data, struct.Struct(f"{self._order}4I")
        if extension + 8 > len(data):
            return ()
        count = struct.unpack_from(f"{self._order}2I", data, extension)[1]
        end = extension + 8 + min(count, (len(data) - extension - 8) // section.size) * section.size
        for tag, _, offset, size in section.iter_unpack(memoryview(data)[extension + 8 : end]):
            if tag == _HWCAPS_TAG and offset + size <= len(data):
                texts = struct.unpack_from(f"{self._order}{size // 4}I", data, offset)
                return tuple(self._text(place) for place in texts)
        return ()

    def _text(self, offset: int) -> str:
        end = self._data.find(b"\0", offset)
        return os.fsdecode(self._data[offset:end]) if end >= 0 else ""


def _found(data: bytes, text: bytes, start: int, end: int) -> Iterator[int]:
    """Each place of ``text`` within ``data[start:end]``."""
    place = data.find(text, start, end)
    while place >= 0:
        yield place
        place = data.find(text, place + 1, end)


def read_cache(path: str, machine: int, order: str = "<") -> Cache | None:
    """The cache in the file ``path`` (as seen from here); None where there is none, or what cannot be one."""
    try:
        data = read_regular(path, _LARGEST)
    except OSError:
        return None
    return None if data is None else Cache(data, machine, order)
