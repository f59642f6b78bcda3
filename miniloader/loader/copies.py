"""Two copies of one library: the one that the process has from ld.so, and another that a search finds.

The process's own is used, as dlopen(3) would, since it is called so; who brought the other is told of both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from miniloader.elf import Source, read_image
from miniloader.elf.versions import Version
from miniloader.errors import ElfError
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.values import dataclass

__all__ = ["Copies", "copies_of", "newest"]

_NUMBERED: Final = re.compile(r"(.*?)(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Copies:
    """The process's own library ``name`` is at ``used``, a search finds ``found``: two files.

    The versions are the newest that each defines; of a library without any, what its file's name says;
    ``None`` where that says nothing.
    """

    name: str
    used: str
    used_version: str | None
    found: str
    found_version: str | None

    def text(self) -> str:
        """Both, in a sentence's part.

        >>> Copies("libz.so.1", "/lib/libz.so.1", "ZLIB_1.2.12", "/opt/libz.so.1", None).text()
        'the process has /lib/libz.so.1 (ZLIB_1.2.12) already, and not /opt/libz.so.1 (no version) is used'
        """
        used, found = self.used_version or "no version", self.found_version or "no version"
        return f"the process has {self.used} ({used}) already, and not {self.found} ({found}) is used"


def copies_of(name: str, library: HostLibrary, path: str | None) -> Copies | None:
    """What to say where ``library`` is used for ``name`` and ``path`` is found; ``None`` if they are one."""
    if path is None or not library.path:
        return None
    source = Source.open(path)
    try:
        if library.identity == source.identity:
            return None
        found = _version(lambda: read_image(source).versions, path)
    finally:
        source.close()
    return Copies(name, library.path, _version(lambda: library.versions, library.path), path, found)


def newest(versions: Iterable[str]) -> str | None:
    """The newest of the largest family of ``versions``.

    >>> newest(["CXXABI_1.3", "GLIBCXX_3.4.9", "GLIBCXX_3.4.30", "GLIBCXX_TUNABLES"])
    'GLIBCXX_3.4.30'
    """
    families: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    largest: list[tuple[tuple[int, ...], str]] = []
    for version in versions:
        match = _NUMBERED.fullmatch(version)
        if match is not None:
            family = families.setdefault(match[1], [])
            family.append((tuple(int(part[:9]) for part in match[2].split(".")), version))
            largest = max(largest, family, key=len)
    return max(largest)[1] if largest else None


def _version(read: Callable[[], Mapping[int, Version]], path: str) -> str | None:
    try:
        defined = [version for version in read().values() if version.file is None and not version.base]
    except ElfError:  # its tables are wrong: whoever loads it will say so
        defined = []
    version = newest(version.name for version in defined)
    return version or os.path.realpath(path).partition(".so.")[2] or None
