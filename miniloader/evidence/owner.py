"""Whose is an address: which mapping of this process it is in, and what its file calls what is there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from miniloader.elf import Source, read_image
from miniloader.elf.symbols import STT_GNU_IFUNC
from miniloader.errors import ElfError
from miniloader.kernel.maps import Vma
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.machine.names_at import Landmarks
from miniloader.values import dataclass

__all__ = ["Owner", "owner_of"]


@dataclass(frozen=True)
class Owner:
    """Whose an address is.

    ``path`` is the mapping's file, or the kernel's name for it (``[vdso]``), "" for anonymous memory that
    belongs to no file.  ``vaddr`` and ``name`` are the file's, None where it cannot be read.  With ``ifunc``
    the resolver of the IFUNC symbol ``name`` chose the function there.
    """

    path: str
    vaddr: int | None = None
    name: str | None = None
    ifunc: bool = False


def owner_of(
    address: int, vmas: Sequence[Vma], symbol: str | None = None, version: str | None = None
) -> Owner | None:
    """Whose ``address`` is, going by ``vmas`` (all of this process's, by address); None for nobody's.

    ``symbol`` is the name by which it was bound: of several names of one place, it is the one to give.
    """
    place = bisect_right(vmas, address, key=lambda vma: vma.start) - 1
    if place < 0 or address not in vmas[place]:
        return None
    first = place
    # The anonymous part of bss lies behind its file's last pages.
    while not vmas[first].path and first and vmas[first - 1].end == vmas[first].start:
        first -= 1
    vma = vmas[first]
    if not vma.is_file or vma.deleted:
        return Owner(vmas[place].path)
    landmarks = _landmarks(vma.path)
    vaddr = None if landmarks is None else _vaddr(landmarks, vma, address)
    if landmarks is None or vaddr is None:
        return Owner(vmas[place].path)
    try:
        bound = landmarks.symbol(symbol, version) if symbol is not None else None
        if bound is not None and bound.type == STT_GNU_IFUNC and bound.vaddr != vaddr:
            return Owner(vma.path, vaddr, bound.name, ifunc=True)
        if bound is not None and bound.vaddr == vaddr:
            return Owner(vma.path, vaddr, bound.name)
        target = landmarks.at(vaddr)
    except ElfError:
        target = None
    return Owner(vma.path, vaddr, None if target is None else target.name)


@cache
def _landmarks(path: str) -> Landmarks | None:
    try:
        return Landmarks(read_image(Source.open(path)))
    except ElfError:
        return None  # mapped, but no ELF file


def _vaddr(landmarks: Landmarks, vma: Vma, address: int) -> int | None:
    """The vaddr of ``address``, which is in ``vma`` or follows it; None where no segment has it."""
    loads = landmarks.image.loads
    # A page that two segments share is in the file once and mapped twice: what it may do tells them apart.
    for load in sorted(loads, key=lambda load: ("x" in load.flags) != ("x" in vma.protection)):
        if load.file_offset & -PAGE_SIZE <= vma.file_offset < load.file_offset + max(load.filesz, 1):
            vaddr = address - vma.start + vma.file_offset - load.file_offset + load.vaddr
            if any(segment.vaddr <= vaddr < segment.end for segment in loads):
                return vaddr
    return None
