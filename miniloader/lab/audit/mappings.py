"""What every mapping of a process costs: files, heap, stacks, anonymous and shared memory, devices.

A row stands for all mappings of one kind and name, in bytes.  What the kernel counts is counted: over all
rows of a process at rest, ``own`` is its USS (Private_* of smaps_rollup) and ``resident`` its RSS.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError
from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record
from miniloader.kernel.frames import distinct, map_counts
from miniloader.kernel.maps import Vma
from miniloader.kernel.mounts import mount_of
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.outline import Outline
from miniloader.lab.audit.process_pages import Narrow, PageColumns, Pages
from miniloader.values import NamedTuple, dataclass

__all__ = [
    "KIND_SCHEMA",
    "MAPPING_SCHEMA",
    "AuditedMapping",
    "MappingKind",
    "MappingName",
    "MappingNames",
    "MappingProcess",
    "Mappings",
    "mappings_of",
    "mappings_over",
    "name_of",
    "pss_by_frames",
    "pss_by_sums",
]

MappingKind = Literal["file", "heap", "stack", "anonymous", "shared-memory", "device", "special"]

_SUMMED: Final = ("resident", "own", "inherited", "shared", "zero", "huge", "swapped", "hugetlb")
_TABLE: Final = 6  # bits of a frame's number: neighbours are often mapped together
_MOST_TOGETHER: Final = 1 << 15  # pages: so few that what is reckoned with stays in the cache
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
    (mappings of the page of zeros), ``swapped`` and ``hugetlb`` (pages of hugetlbfs) are outside.
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
    hugetlb: int = 0


@dataclass(frozen=True)
class AuditedMapping:
    """All mappings of one kind and name, in each process that has them."""

    kind: MappingKind
    name: str
    processes: tuple[MappingProcess, ...]


KIND_SCHEMA: Final = {"enum": [*get_args(MappingKind)]}
MAPPING_SCHEMA: Final = record(
    {"kind": KIND_SCHEMA, "name": TEXT},
    {"processes": array(record(
        keys(COUNT, "pid resident own inherited shared zero huge hugetlb swapped"), {"pss": nullable(COUNT)},
    ))},
)  # fmt: skip
"""An :class:`AuditedMapping` in ``--json``."""


def name_of(
    vma: Vma,
    images: Sequence[tuple[int, int, str]] = (),
    file_system: Callable[[Vma], str] = lambda vma: "",
) -> MappingName:
    """The kind and the name of a mapping.

    ``images`` are the addresses [start, end) and the name of each ELF image that is mapped, ascending:
    anonymous memory within is bss, or has taken the place of its pages.  Memory that the kernel has joined
    with more behind an image is not within.  ``file_system`` gives the kind of file system that a mapped file
    is on, or "" where that is not known.

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
    at = bisect_right(images, vma.start, key=itemgetter(0)) - 1
    inside = not path and at >= 0 and vma.end <= images[at][1]
    return MappingName("anonymous", images[at][2] if inside else path)


class MappingNames:
    """The kinds and names of mappings, as :func:`name_of` has them: of a line worked out once for all."""

    def __init__(self) -> None:
        self._names: dict[int, MappingName] = {}  # by line
        self._file_systems: dict[tuple[int, int], str] = {}

    def of(
        self, pid: int, vmas: Sequence[Vma], images: Sequence[tuple[int, int, str]], outline: Outline
    ) -> list[MappingName]:
        """The name of each mapping of process ``pid``, where ``images`` lie in it; ``outline`` is theirs."""
        names = [*map(self._names.get, outline.lines)]
        for index in outline.unnamed:
            names[index] = name_of(vmas[index], images)
        for index in [index for index, name in enumerate(names) if name is None]:
            names[index] = name = name_of(vmas[index], (), partial(self._file_system, pid))
            self._names[outline.lines[index]] = name
        return names  # type: ignore[return-value]  # none is None now

    def _file_system(self, pid: int, vma: Vma) -> str:
        """The kind for a file that process ``pid`` has mapped, such as ``tmpfs``; "" where not known."""
        if vma.device not in self._file_systems:
            try:
                mount = mount_of(pid, vma.path)
            except EvidenceError:
                return ""
            self._file_systems[vma.device] = "" if mount is None else mount.kind
        return self._file_systems[vma.device]


@dataclass(frozen=True, eq=False)
class Mappings:
    """What the mappings of one process cost.

    ``names`` are the different kinds and names, ``row_of`` says for each mapping which of them it has.
    ``sums`` are in bytes, a row for each of the names, with the columns of ``_SUMMED``.
    """

    names: tuple[MappingName, ...]
    row_of: NDArray[np.intp]
    sums: NDArray[np.int64]

    def rows(self, pid: int, pss: NDArray[np.float64] | None) -> dict[MappingName, MappingProcess]:
        """The mappings of each kind and name together; ``pss`` (bytes) has an element for each mapping."""
        proportional = None if pss is None else np.bincount(self.row_of, pss, len(self.names)).round()
        takes = repeat(None) if proportional is None else map(int, proportional.tolist())
        return {  # in the order of its fields: by name they take half as long again, and there are thousands
            name: MappingProcess(pid, resident, own, inherited, shared, share, zero, huge, swapped, hugetlb)
            for name, (resident, own, inherited, shared, zero, huge, swapped, hugetlb), share in zip(
                self.names, self.sums.tolist(), takes, strict=False
            )
        }


def mappings_of(names: Iterable[MappingName], pages: Pages) -> Mappings:
    """What each mapping of a process costs, whose ``pages`` were read; ``names`` has one for each mapping."""
    rows: dict[MappingName, int] = {}
    row_of = np.array([rows.setdefault(name, len(rows)) for name in names], np.intp)
    copies, originals = pages.copies.number, pages.originals.number
    alone, alone_of_files = pages.copies.number_alone, pages.originals.number_alone
    by_mapping = (
        copies + originals - pages.zeros_among,
        alone + alone_of_files,
        copies - alone - pages.zeros_among,
        originals - alone_of_files,
        np.bincount(pages.vma[pages.zero], minlength=len(row_of)) + pages.zeros_among,
        pages.huge_in,
        pages.swapped_in,
        pages.hugetlb_in,
    )
    order = row_of.argsort(kind="stable")
    first = np.searchsorted(row_of[order], np.arange(len(rows)))
    sums = np.add.reduceat(np.array(by_mapping)[:, order], first, axis=1).T * PAGE_SIZE
    return Mappings(tuple(rows), row_of, sums)


def pss_by_frames(
    processes: Sequence[tuple[PageColumns, PageColumns]],
) -> list[NDArray[np.float64]]:
    """The PSS of each mapping of each process, in bytes: each page by how often its frame is mapped.

    A process is the columns of its copies and of its other pages.  The kernel is asked once about the frames
    of all; a page that was given up since counts as the process's own.  Raises EvidenceError where
    ``/proc/kpagecount`` may not be read.
    """
    columns = [column for process in processes for column in process]
    groups = [*_groups(columns)]
    frames: Narrow = np.empty(0, np.uint32)
    for group in groups:  # never the frames of all at once
        frames = distinct(np.concatenate([frames, *[column.several() for column in group]]))
    counts = np.maximum(map_counts(frames.astype(np.uint64)), np.uint64(1))
    shares = _ByFrame(frames, PAGE_SIZE / counts.astype(np.float64))
    pss = [of_column for group in groups for of_column in _proportional(group, shares)]
    return [copies + originals for copies, originals in zip(pss[::2], pss[1::2], strict=True)]


class _ByFrame:
    """A value for each of some different frames, found as a processor finds a page: by a table of tables.

    To search all frames for each page of each process takes ten times as long.
    """

    def __init__(self, frames: Narrow, values: NDArray[np.float64]) -> None:
        tables = distinct(frames.astype(np.intp) >> _TABLE)
        self._begin = np.zeros(int(tables[-1]) + 1 if len(tables) else 0, np.intp)
        self._begin[tables] = np.arange(len(tables)) << _TABLE
        self._values = np.zeros(len(tables) << _TABLE)
        self._values[self._place(frames)] = values

    def of(self, frames: Narrow) -> NDArray[np.float64]:
        """The values of ``frames``, all of which have one."""
        return self._values.take(self._place(frames))

    def _place(self, frames: Narrow) -> NDArray[np.intp]:
        numbers = frames.astype(np.intp)
        place = self._begin.take(numbers >> _TABLE)
        place += numbers & ((1 << _TABLE) - 1)
        return place


def _groups(columns: Iterable[PageColumns]) -> Iterable[list[PageColumns]]:
    """The columns, in order: so many together as are reckoned with in one step."""
    group, number = list[PageColumns](), 0
    for column in columns:
        if group and number + len(column) > _MOST_TOGETHER:
            yield group
            group, number = [], 0
        group.append(column)
        number += len(column)
    if group:
        yield group


def _proportional(group: Sequence[PageColumns], shares: _ByFrame) -> Iterable[NDArray[np.float64]]:
    """The PSS of each mapping, for each of the columns.

    ``shares`` are the bytes of each page that is mapped more than once.
    """
    several = shares.of(np.concatenate([column.several() for column in group]))
    totals = np.zeros(len(several) + 1)
    several.cumsum(out=totals[1:])
    number, alone = (
        np.concatenate(counts)
        for counts in zip(*[(column.number, column.number_alone) for column in group], strict=True)
    )
    sums = totals[(number - alone).cumsum()]
    sums[1:] -= sums[:-1].copy()
    pss = alone * float(PAGE_SIZE) + sums
    ends = np.cumsum([len(column.number) for column in group])
    return np.split(pss, ends[:-1])


def pss_by_sums(pid: int, vmas: Sequence[Vma]) -> NDArray[np.float64] | None:
    """The PSS of each mapping as smaps tells it, in bytes; None where smaps may not be read."""
    try:
        sums = read_smaps(pid)
    except EvidenceError:
        return None
    pss = {mapping.vma.start: mapping.sizes.get("Pss", 0) for mapping in sums}
    return np.array([pss.get(vma.start, 0) for vma in vmas], np.float64)


def mappings_over(processes: Iterable[Mapping[MappingName, MappingProcess]]) -> tuple[AuditedMapping, ...]:
    """One row for each kind and name over all processes, those with the most of their own first."""
    rows: dict[MappingName, list[MappingProcess]] = {}
    for process in processes:
        for name, mapping in process.items():
            rows.setdefault(name, []).append(mapping)
    audited = [AuditedMapping(kind, name, tuple(mappings)) for (kind, name), mappings in rows.items()]
    return tuple(sorted(audited, key=_order))


def _order(mapping: AuditedMapping) -> tuple[int, int, str, str]:
    own = sum(process.own for process in mapping.processes)
    resident = sum(process.resident for process in mapping.processes)
    return -own, -resident, mapping.kind, mapping.name
