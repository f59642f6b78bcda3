"""``/etc/ld.so.cache``: the libraries that ldconfig(8) has found, by name.

Format: glibc's ``sysdeps/generic/dl-cache.h``, "new format".
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np

__all__ = ["CACHE", "cached"]

CACHE: Final = "/etc/ld.so.cache"
_FLAGS: Final = {"x86_64": 0x0303, "aarch64": 0x0A03, "riscv64": 0x1003}
_HWCAP_EXTENSION: Final = 1 << 62


def cached(name: str, hwcaps: Sequence[str]) -> list[str]:
    """The paths that the cache has for ``name``, best first; none where there is no cache of this format.

    ``hwcaps`` are the ``glibc-hwcaps`` sub-directories that suit this processor, best first.
    """
    try:
        status = os.stat(CACHE)
        tables = _tables((status.st_mtime_ns, status.st_ino))
    except (OSError, ValueError):
        return []
    if tables is None:
        return []
    rows, data, capabilities = tables
    fitting = np.isin(rows["key"], _places(data, name)) & (rows["flags"] == _FLAGS.get(platform.machine()))
    ranked = []
    for _, _, value, _, hwcap in rows[fitting].tolist():
        label = capabilities[hwcap & 0xFFFFFFFF] if hwcap & _HWCAP_EXTENSION else ""
        if label in hwcaps:
            ranked.append((hwcaps.index(label), _text(data, value)))
        elif not hwcap:  # other numbers are the legacy hwcaps, which current glibc ignores
            ranked.append((len(hwcaps), _text(data, value)))
    return [path for _, path in sorted(ranked, key=lambda item: item[0])]


def _places(data: bytes, name: str) -> list[int]:
    """Where in the cache ``name`` is a whole text, or the end of one: a name may be the end of a path."""
    key = os.fsencode(name) + b"\0"
    places, place = [], data.find(key)
    while place >= 0:
        places.append(place)
        place = data.find(key, place + 1)
    return places


@lru_cache(maxsize=1)
def _tables(_stamp: tuple[int, int]) -> tuple[np.ndarray, bytes, tuple[str, ...]] | None:
    """The entries of the cache, all its bytes, and the names of its hwcaps; ``None`` for another format."""
    with open(CACHE, "rb") as file:
        data = file.read()
    start = data.find(b"glibc-ld.so.cache1.1")
    if start < 0:
        return None
    data = data[start:]
    count, _, _, extension = np.frombuffer(data, "<u4", 4, 20).tolist()
    entry = np.dtype([("flags", "<i4"), ("key", "<u4"), ("value", "<u4"), ("os", "<u4"), ("hwcap", "<u8")])
    return np.frombuffer(data, entry, count, 48), data, _hwcap_names(data, extension) if extension else ()


def _hwcap_names(data: bytes, extension: int) -> tuple[str, ...]:
    """The names in the section ``cache_extension_tag_glibc_hwcaps`` of the extensions at ``extension``."""
    count = np.frombuffer(data, "<u4", 2, extension).tolist()[1]
    sections = np.frombuffer(data, "<u4", 4 * count, extension + 8).reshape(-1, 4)
    for tag, _, offset, size in sections.tolist():
        if tag == 1:
            texts = np.frombuffer(data, "<u4", size // 4, offset)
            return tuple(_text(data, place) for place in texts.tolist())
    return ()


def _text(data: bytes, offset: int) -> str:
    return os.fsdecode(data[offset : data.index(b"\0", offset)])
