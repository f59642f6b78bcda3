"""Pages relocated beforehand, among the mappings of a process: whose they are, and where in it.

A process that uses a prepared library (:mod:`miniloader.loader.prepared.pages`) has pages
of the cache's file where the library's own would be.  An audit counts them as the library's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniloader.elf import LoadPlan, inspect
from miniloader.errors import MiniloaderError
from miniloader.files import open_regular
from miniloader.forking import importing
from miniloader.kernel.maps import Vma
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.prepared import store
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["PreparedPages"]


@dataclass(frozen=True, eq=False)
class _CacheFile:
    """A file of the cache, how the library it is of is mapped, and the inode of that."""

    ready: Prepared
    plan: LoadPlan
    inode: int


class PreparedPages:
    """The files of caches that an audit has met; each is read once."""

    def __init__(self) -> None:
        self._indexes: dict[tuple[tuple[int, int], int], _CacheFile | None] = {}

    def in_place(self, pid: int, vmas: Sequence[Vma]) -> tuple[tuple[Vma, ...], frozenset[int]]:
        """``vmas`` as if each prepared page were the library's own, and which (by index) are not really.

        What cannot be told stays what it is: a mapping of a file of that name.
        """
        if not [vma for vma in vmas if vma.path.endswith(store.SUFFIX)]:
            return tuple(vmas), frozenset()
        placed = [self._placed(pid, vma, vmas) if vma.path.endswith(store.SUFFIX) else None for vma in vmas]
        return (
            tuple(new or old for new, old in zip(placed, vmas, strict=True)),
            frozenset(index for index, new in enumerate(placed) if new is not None),
        )

    def _placed(self, pid: int, vma: Vma, vmas: Sequence[Vma]) -> Vma | None:
        cached = self._cached(pid, vma)
        page = (vma.file_offset - cached.ready.at) // PAGE_SIZE if cached is not None else -1
        if cached is None or not 0 <= page < len(cached.ready.pages):
            return None
        vaddr = int(cached.ready.pages[page])
        mapping = cached.plan.at(vaddr)
        bias = vma.start - vaddr
        # Its device and path as maps has them, which may not be those of stat.
        start = bias + cached.plan.start
        own = next((image for image in vmas if image.is_file and image.start == start), None)
        if own is None or mapping is None or own.inode != cached.inode:
            return None
        return vma._replace(
            file_offset=mapping.file_offset + vaddr - mapping.start,
            device=own.device,
            inode=own.inode,
            path=own.path,
            deleted=own.deleted,
        )

    def _cached(self, pid: int, vma: Vma) -> _CacheFile | None:
        key = (vma.device, vma.inode)
        if key not in self._indexes:
            self._indexes[key] = _read(process_file(pid, "root") + vma.path, vma) or _read(vma.path, vma)
        return self._indexes[key]


def _read(path: str, vma: Vma) -> _CacheFile | None:
    """What ``path`` says, if it is the file mapped at ``vma``: it may be anybody's, and hold anything."""
    with importing:
        from miniloader.loader.prepared.index import read_index

    try:
        fd = open_regular(path)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if status.st_ino != vma.inode:
            return None
        ready = read_index(fd, status.st_size)
        return _CacheFile(ready, inspect(ready.path).plan(PAGE_SIZE), ready.file[2])
    except (MiniloaderError, OSError, ValueError, LookupError, TypeError):
        return None
    finally:
        os.close(fd)
