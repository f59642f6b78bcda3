"""One library of an audit: its files, its processes, and how many pages of memory it takes.

Files are one library where they have the same build-id and segments, or a frame in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.header import Segment
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import distinct
from miniloader.lab.audit.occurrences import Occurrence, Occurrences, distinct_in
from miniloader.lab.audit.private_pages import bss_pages, private_pages, swapped_pages
from miniloader.lab.audit.process_pages import Narrow
from miniloader.lab.audit.result import AuditedLibrary, LibraryProcess

__all__ = ["libraries_of"]


def libraries_of(
    files: Sequence[Occurrences],
    level: LevelName,
    merged: NDArray[np.uint64] | None,
    *,
    causes: bool,
) -> tuple[AuditedLibrary, ...]:
    """The libraries of all processes, whose ``files`` are given; those with the most own pages first.

    ``merged`` are the frames that KSM has merged pages into, None where that is not known.  Without
    ``causes`` no private page is told one by one.
    """
    libraries = [_library(group, level, causes, merged) for group in _grouped(files)]
    return tuple(sorted(libraries, key=_order))


def _order(library: AuditedLibrary) -> tuple[int, int, int, str]:
    return -library.own, -library.private, -library.present, library.path


def _grouped(files: Sequence[Occurrences]) -> Iterable[list[Occurrences]]:
    """What belongs to one library: files with one build-id and the same segments, or with a frame in common.

    A build-id is what a file says of itself, and any file can say any.
    """
    leader: dict[int, int] = {}

    def root(number: int) -> int:
        while leader.setdefault(number, number) != number:
            number = leader[number]
        return number

    alike: dict[tuple[str, tuple[Segment, ...]], int] = {}
    for file, _, _ in files:
        if file.build_id is not None:
            image = file.facts.image if file.facts is not None else None
            claim = file.build_id, image.loads if image is not None else ()
            leader[root(file.number)] = root(alike.setdefault(claim, file.number))
    for first, second in _with_common_frames(files):
        leader[root(first)] = root(second)
    groups: dict[int, list[Occurrences]] = {}
    for of_file in files:
        groups.setdefault(root(of_file.file.number), []).append(of_file)
    return groups.values()


def _with_common_frames(files: Sequence[Occurrences]) -> Iterable[tuple[int, int]]:
    """Pairs of file numbers that have a frame of the page cache in common: one file under two names."""
    arrays = [of_file.frames for of_file in files]
    frames = np.concatenate([np.empty(0, np.uint32), *arrays])
    numbers = np.array([of_file.file.number for of_file in files], np.int64)
    number = numbers.repeat([len(array) for array in arrays])
    frames, number = frames[frames != 0], number[frames != 0]
    order = frames.argsort(kind="stable")
    frames, number = frames[order], number[order]
    common = (frames[1:] == frames[:-1]) & (number[1:] != number[:-1])
    pairs = distinct(number[:-1][common] << 32 | number[1:][common])
    return [(pair >> 32, pair & 0xFFFFFFFF) for pair in pairs.tolist()]


def _library(
    files: Sequence[Occurrences], level: LevelName, causes: bool, merged: NDArray[np.uint64] | None
) -> AuditedLibrary:
    paths = Counter[str]()
    for of_file in files:
        paths[of_file.file.identity.path] += len(of_file.places)
    occurrences = _in_order(files)
    several = [occurrence.placed.several_frames for occurrence in occurrences]
    processes = tuple(map(_in_process, occurrences, several, repeat(merged)))
    return AuditedLibrary(
        path=max(paths, key=paths.__getitem__),
        build_id=next((of_file.file.build_id for of_file in files if of_file.file.build_id), None),
        files=_separate_files(files),
        frames=_frames(files, several, sum([process.private for process in processes]), level),
        processes=processes,
        private_pages=private_pages(occurrences) if causes else (),
        bss_pages=bss_pages(occurrences) if causes else (),
        swapped_pages=swapped_pages(occurrences) if causes else (),
    )


def _in_order(files: Sequence[Occurrences]) -> list[Occurrence]:
    """The occurrences of files, as the processes have them."""
    if len(files) == 1:
        return files[0].places
    return sorted(
        (occurrence for of_file in files for occurrence in of_file.places), key=attrgetter("number")
    )


def _in_process(occurrence: Occurrence, several: Narrow, merged: NDArray[np.uint64] | None) -> LibraryProcess:
    """What a file costs in one process, where copies in the frames ``several`` are mapped elsewhere, too."""
    placed = occurrence.placed
    shared, private, bss, swapped = placed.shared, placed.private, placed.bss_vaddrs, placed.swapped_vaddrs
    by_ksm = int(np.isin(several, merged).sum()) if merged is not None and len(merged) else 0
    inherited, by_ksm_known = len(several) - by_ksm, merged is not None or not len(several)
    return LibraryProcess(  # in the order of its fields: by name they take twice as long
        occurrence.pid, placed.base % 2**64, placed.mapped, shared + private, shared, private, inherited,
        len(bss), len(swapped), placed.beforehand, by_ksm if by_ksm_known else None, occurrence.pss,
    )  # fmt: skip


def _separate_files(files: Sequence[Occurrences]) -> int:
    """How many files a library is: those with a frame in common are one."""
    if len(files) == 1:
        return 1
    joined = {of_file.file.number: of_file.file.number for of_file in files}
    for first, second in _with_common_frames(files):
        old, new = joined[second], joined[first]
        joined = {number: new if leader == old else leader for number, leader in joined.items()}
    # The same device and inode under several names (containers, a deleted name) is one file, too.
    inodes = {of_file.file.identity[:2] for of_file in files}
    return min(len(set(joined.values())), len(inodes))


def _frames(files: Sequence[Occurrences], several: Sequence[Narrow], private: int, level: LevelName) -> int:
    """The pages of memory behind all present pages, of which so many are ``private``.

    ``several`` are the frames of copies that others have, too.
    """
    if level == "frames":
        # A copy that is mapped once is a frame of its own; the others may be anybody's.
        frames = [*(of_file.frames for of_file in files), *several]
        return private - sum(map(len, several)) + len(distinct_in(frames))
    places = ([occurrence.placed.own_offsets for occurrence in of_file.places] for of_file in files)
    return private + sum(len(distinct_in(offsets)) for offsets in places)
