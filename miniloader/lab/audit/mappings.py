"""What every mapping of a process costs: files, heap, stacks, anonymous and shared memory, devices.

A row stands for all mappings of one kind and name, in bytes.  What the kernel counts is counted: over all
rows of a process at rest, ``own`` is its USS (Private_* of smaps_rollup) and ``resident`` its RSS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.kernel.frames import distinct, map_counts
from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import EXCLUSIVE, FRAME
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.process_pages import Pages
from miniloader.lab.audit.survey import FileInProcess
from miniloader.values import dataclass

__all__ = [
    "AuditedMapping",
    "MappingKind",
    "MappingName",
    "MappingProcess",
    "images_of",
    "mappings_of",
    "name_of",
    "processes_of",
    "pss_by_frames",
    "pss_by_sums",
]

MappingKind = Literal["file", "heap", "stack", "anonymous", "shared-memory", "device", "special"]

_SHARED_MEMORY: Final = ("/memfd:", "/SYSV", "/anon_hugepage", "[anon_shmem:")
_IN_MEMORY: Final = ("tmpfs", "hugetlbfs", "ramfs")
_DEVICES: Final = ("/dev/", "anon_inode:", "socket:", "/dmabuf:")


class MappingName(NamedTuple):
    """What mappings have in common that stand in one row; the name is "" for memory that nobody named."""

    kind: MappingKind
    name: str


@dataclass(frozen=True)
class MappingProcess:
    """The mappings of one kind and name in one process, in bytes.

    ``resident`` = ``own`` (mapped once, by this process) + ``inherited`` (anonymous copies that others have,
    too: by fork, or KSM) + ``shared`` (pages of files and of shared memory that are mapped more than once, by
    whomever).  ``pss`` is None where it is not known.  ``huge`` is the part that huge entries map.  ``zero``
    (mappings of the page of zeros) and ``swapped`` are outside, and so is all of hugetlbfs.
    """

    pid: int
    resident: int
    own: int
    inherited: int
    shared: int
    pss: int | None
    zero: int
    huge: int
    swapped: int


@dataclass(frozen=True)
class AuditedMapping:
    """All mappings of one kind and name, in each process that has them."""

    kind: MappingKind
    name: str
    processes: tuple[MappingProcess, ...]


def name_of(
    vma: Vma,
    images: Iterable[tuple[int, int, str]] = (),
    file_system: Callable[[Vma], str] = lambda vma: "",
) -> MappingName:
    """The kind and the name of a mapping.

    ``images`` are the addresses [start, end) and the name of each ELF image that is mapped: anonymous memory
    within is bss, or has taken the place of its pages.  Memory that the kernel has joined with more behind an
    image is not within.  ``file_system`` gives the kind of file system that a mapped file is on, or "" where
    that is not known.

    >>> from miniloader.kernel.maps import parse_vma
    >>> name_of(parse_vma(b"7f0000-7f8000 rw-s 00000000 00:01 8 /memfd:pool (deleted)"))
    MappingName(kind='shared-memory', name='/memfd:pool')
    >>> name_of(parse_vma(b"7f0000-7f8000 rw-p 00000000 00:00 0"), [(0x7e0000, 0x7f9000, "/lib/libz.so.1")])
    MappingName(kind='anonymous', name='/lib/libz.so.1')
    """
    path = vma.path
    if path.startswith(_SHARED_MEMORY):
        return MappingName("shared-memory", path)
    if vma.is_file:
        system = file_system(vma)
        if path.startswith("/dev/zero"):
            return MappingName("shared-memory" if vma.shared else "anonymous", path)
        in_memory = system in _IN_MEMORY or path.startswith("/dev/shm/")
        if system == "hugetlbfs" or (in_memory and vma.shared):
            return MappingName("shared-memory", path)
        return MappingName("device" if path.startswith(_DEVICES) and not in_memory else "file", path)
    if path == "[heap]":
        return MappingName("heap", path)
    if path.startswith("[stack"):
        return MappingName("stack", path)
    if path and not path.startswith("[anon:"):
        return MappingName("special", path)
    inside = (name for start, end, name in images if start <= vma.start and vma.end <= end)
    return MappingName("anonymous", path or next(inside, ""))


def images_of(files: Iterable[FileInProcess]) -> list[tuple[int, int, str]]:
    """The addresses [start, end) and the name of each ELF image among the files that a process has mapped."""
    images = []
    for placed in files:
        plan = placed.file.facts.plan if placed.file.facts is not None else None
        if plan is not None:
            images.append((placed.start, max(placed.end, placed.base + plan.end), placed.file.identity.path))
    return images


def processes_of(
    pid: int, names: Sequence[MappingName], pages: Pages, pss: NDArray[np.float64] | None
) -> dict[MappingName, MappingProcess]:
    """What the mappings of one process come to, by kind and name.

    ``names`` has one element for each mapping that ``pages`` were read of, and so has ``pss`` (bytes, None
    where they are not known).
    """
    rows: dict[MappingName, int] = {}
    row_of = np.array([rows.setdefault(name, len(rows)) for name in names], np.intp)
    row = row_of[pages.vma]
    exclusive = (pages.entries & EXCLUSIVE).astype(np.bool_)

    def counted(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(row[mask], minlength=len(rows)) * PAGE_SIZE

    def summed(by_mapping: NDArray[np.int64]) -> NDArray[np.int64]:
        added = np.zeros(len(rows), np.int64)
        np.add.at(added, row_of, by_mapping)
        return added * PAGE_SIZE

    zeros_among = summed(pages.zeros_among)
    columns = {
        "resident": counted(pages.counted) - zeros_among,
        "own": counted(pages.counted & exclusive),
        "inherited": counted(pages.copied & ~exclusive) - zeros_among,
        "shared": counted(pages.own & ~exclusive),
        "zero": counted(pages.zero) + zeros_among,
        "huge": summed(pages.huge_in),
        "swapped": counted(pages.swapped),
    }
    proportional = None if pss is None else np.bincount(row_of, pss, len(rows))
    return {
        name: MappingProcess(
            pid=pid,
            pss=None if proportional is None else round(float(proportional[index])),
            **{column: int(values[index]) for column, values in columns.items()},
        )
        for name, index in rows.items()
    }


def pss_by_frames(pages: Pages, mappings: int) -> NDArray[np.float64]:
    """The PSS of each of so many ``mappings``, in bytes: each page by how often its frame is mapped.

    Raises EvidenceError where ``/proc/kpagecount`` may not be read.
    """
    frames = pages.entries[pages.counted] & FRAME
    exclusive = (pages.entries[pages.counted] & EXCLUSIVE).astype(np.bool_)
    different = distinct(frames)
    counts = np.maximum(map_counts(different), np.uint64(1))[np.searchsorted(different, frames)]
    shares = PAGE_SIZE / np.where(exclusive, 1, counts).astype(np.float64)
    return np.asarray(np.bincount(pages.vma[pages.counted], shares, mappings), np.float64)


def pss_by_sums(pid: int, vmas: Sequence[Vma]) -> NDArray[np.float64] | None:
    """The PSS of each mapping as smaps tells it, in bytes; None where smaps may not be read."""
    try:
        sums = read_smaps(pid)
    except EvidenceError:
        return None
    pss = {(mapping.vma.start, mapping.vma.end): mapping.sizes.get("Pss", 0) for mapping in sums}
    return np.array([pss.get((vma.start, vma.end), 0) for vma in vmas], np.float64)


def mappings_of(processes: Iterable[Mapping[MappingName, MappingProcess]]) -> tuple[AuditedMapping, ...]:
    """One row for each kind and name over all processes, those with the most of their own first."""
    rows: dict[MappingName, list[MappingProcess]] = {}
    for process in processes:
        for name, mapping in process.items():
            rows.setdefault(name, []).append(mapping)
    found = [AuditedMapping(kind, name, tuple(mappings)) for (kind, name), mappings in rows.items()]
    return tuple(sorted(found, key=_order))


def _order(mapping: AuditedMapping) -> tuple[int, int, str, str]:
    own = sum(process.own for process in mapping.processes)
    resident = sum(process.resident for process in mapping.processes)
    return -own, -resident, mapping.kind, mapping.name
