"""One look at one process for an audit: all its pages, and why those of its files were copied.

The process is never stopped, nor is anything mapped into it.  Its page table entries are read before and
after everything else; a copied page whose entry differs is ``unknown``, as "changed while we looked".
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import ElfError, EvidenceError, ProcessGone
from miniloader.evidence.cause import Classified, Placed, Space, bit, classify
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.memory import ProcessMemory
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.procfs import read_process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.mapped import Identity, MappedFile, MappedFiles
from miniloader.lab.process_pages import Pages, number
from miniloader.values import dataclass

__all__ = ["CHANGED", "FileInProcess", "Survey", "locate", "space_of", "survey"]

CHANGED: Final = "changed while we looked"
_TOP: Final = 1 << 63  # above is the kernel's half
_LOW: Final = 1 << 40  # below, there may be no room for a load bias


@dataclasses.dataclass(slots=True, eq=False)
class FileInProcess:
    """A file as it lies in one process; all arrays are by copied page, ascending by vaddr.

    ``base`` is the load bias.  ``frames`` are 0 where they are hidden.  ``causes`` are sets of bits, 0 where
    nobody asked; ``reasons`` says of some pages (by index) why they are unknown; ``written`` has a row
    (page, symbol number, cause bit) for each symbol that was written to.  ``file_frames`` are the frames of
    the pages that are still the file's own, ``own_offsets`` their places in it.
    ``bss_vaddrs`` are the present anonymous pages of the image's bss.  ``beforehand`` is how many present
    pages are not the file's but a prepared copy's, relocated and shared (:mod:`miniloader.lab.beforehand`).
    """

    file: MappedFile
    base: int
    start: int
    end: int
    mapped: int
    present: int
    swapped: int
    vaddrs: NDArray[np.uint64]
    file_offsets: NDArray[np.uint64]
    frames: NDArray[np.uint64]
    exclusive: NDArray[np.bool_]
    file_frames: NDArray[np.uint64]
    own_offsets: NDArray[np.uint64]
    bss_vaddrs: NDArray[np.uint64]
    causes: NDArray[np.uint8]
    reasons: dict[int, str]
    written: NDArray[np.int64]
    beforehand: int = 0

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The address of each copied page."""
        return self.vaddrs + np.uint64(self.base % 2**64)


@dataclass(frozen=True, eq=False)
class Survey:
    """One process; page counts over all its mappings.

    ``rss``, ``exclusive`` (mapped by it alone), ``anonymous`` and ``anonymous_shared`` (mapped more
    than once, by a family of forks or by KSM) count pages as ``smaps`` does; ``frames`` are those of
    the rss pages that are not exclusive.
    """

    pid: int
    name: str
    parent: int
    started: int
    rss: int
    exclusive: int
    anonymous: int
    anonymous_shared: int
    zero: int
    huge: int
    swapped: int
    frames: NDArray[np.uint64]
    anonymous_frames: NDArray[np.uint64]
    files: tuple[FileInProcess, ...]


def survey(
    pid: int,
    files: MappedFiles,
    *,
    causes: bool = True,
    frames: bool = True,
    wanted: Callable[[Identity], bool] = lambda _: True,
) -> Survey:
    """Look at process ``pid``; ``wanted`` chooses the files to tell about one by one.

    Raises ProcessGone when it ends or executes another program meanwhile, EvidenceError when it may not be
    looked at.
    """
    with PageMap(pid) as pagemap:
        name, parent, started = _status(pid)
        vmas, pages, found = locate(pid, pagemap, files, frames=frames)
        chosen = [one for one in found if wanted(one.file.identity)]
        if causes:
            _explain(pid, files, vmas, pages, found, chosen)
        pagemap.read(vmas[0].start, vmas[0].start + PAGE_SIZE)  # raises, when it has ended meanwhile
        return _summed(pages, pid, name, parent, started, tuple(chosen))


def locate(
    pid: int, pagemap: PageMap, files: MappedFiles, *, frames: bool
) -> tuple[tuple[Vma, ...], Pages, list[FileInProcess]]:
    """The mappings of a process, its pages, and where each file lies in it; without causes yet."""
    vmas, beforehand = _mappings(pid, files)
    pages = Pages(pagemap, vmas, frames=frames)
    found = [one for indices in _by_file(vmas) for one in _placed(pid, files, vmas, indices, pages)]
    if beforehand:
        for one in found:
            inside = (pages.addresses >= one.start) & (pages.addresses < one.end)
            own = inside & pages.own
            one.beforehand = number(np.isin(pages.vma[own], list(beforehand)))
    return vmas, pages, found


def _mappings(pid: int, files: MappedFiles) -> tuple[tuple[Vma, ...], frozenset[int]]:
    """All mappings, and which of them have pages relocated beforehand."""
    vmas = read_maps(pid)
    return files.beforehand.in_place(pid, vmas[:-1] if vmas and vmas[-1].start >= _TOP else vmas)


def _summed(
    pages: Pages, pid: int, name: str, parent: int, started: int, files: tuple[FileInProcess, ...]
) -> Survey:
    """What the pages of the whole process come to."""
    return Survey(
        pid=pid,
        name=name,
        parent=parent,
        started=started,
        rss=number(pages.counted),
        exclusive=number(pages.counted & pages.exclusive),
        anonymous=number(pages.copied),
        anonymous_shared=number(pages.copied & ~pages.exclusive),
        zero=number(pages.zero),
        huge=number(pages.huge & pages.counted),
        swapped=number(pages.swapped),
        frames=pages.frames[pages.counted & ~pages.exclusive],
        anonymous_frames=pages.frames[pages.copied],
        files=files,
    )


def _status(pid: int) -> tuple[str, int, int]:
    """The name, the parent and the start time (clock ticks since boot), from ``stat`` (proc_pid_stat(5))."""
    text = os.fsdecode(read_process_file(pid, "stat"))
    fields = text[text.rindex(")") + 2 :].split()
    return text[text.index("(") + 1 : text.rindex(")")], int(fields[1]), int(fields[19])


def _by_file(vmas: Sequence[Vma]) -> Iterable[list[int]]:
    """The private mappings of each file, by address."""
    found: dict[tuple[object, ...], list[int]] = {}  # as Identity, of which it would be one for each mapping
    for index, vma in enumerate(vmas):
        if vma.inode and not vma.shared:
            found.setdefault((vma.device, vma.inode, vma.path, vma.deleted), []).append(index)
    return found.values()


def _placed(
    pid: int, files: MappedFiles, vmas: Sequence[Vma], indices: list[int], pages: Pages
) -> list[FileInProcess]:
    """Where the file of these mappings lies: once, or several times."""
    file = files.of(pid, vmas[indices[0]])
    found, left = [], indices
    while left:
        bias, places = _together(file, [vmas[index] for index in left])
        mine = [left[place] for place in places]
        found.append(_file_in_process(file, bias, vmas, mine, pages))
        left = [index for index in left if index not in mine] if len(mine) < len(left) else []
    return found


def _together(file: MappedFile, vmas: Sequence[Vma]) -> tuple[int, list[int]]:
    """The load bias of the first mapping, and which ones (by place) belong to the same image.

    The same file is mapped in the same way by most processes, but for where it begins.
    """
    first = vmas[0].start
    known = file.arrangements
    key = tuple([(vma.start - first, vma.end - first, vma.file_offset) for vma in vmas])
    if key not in known or first < _LOW:
        bias, span = _bias(file, vmas[0])
        places = [at for at, vma in enumerate(vmas) if at == 0 or _belongs(file, vma, bias, span)]
        known[key] = bias - first, places
    past, places = known[key]
    return first + past, places


def _bias(file: MappedFile, vma: Vma) -> tuple[int, tuple[int, int]]:
    """The load bias that puts the file's image where its first mapping is, and its addresses."""
    plan = file.facts.plan if file.facts is not None else None
    for mapping in plan.mappings if plan is not None else ():
        past = vma.file_offset - mapping.file_offset
        if plan is not None and mapping.kind == "file" and 0 <= past < mapping.length:
            bias = vma.start - mapping.start - past
            if bias >= 0:
                return bias, (bias + plan.start, bias + plan.end)
    return vma.start - vma.file_offset, (vma.start, vma.end)


def _belongs(file: MappedFile, vma: Vma, bias: int, span: tuple[int, int]) -> bool:
    """Whether a mapping is part of the image at ``bias``: where it should be, with what should be there."""
    plan = file.facts.plan if file.facts is not None else None
    if plan is None:
        return vma.start - vma.file_offset == bias
    if not (span[0] <= vma.start and vma.end <= span[1]):
        return False
    mapping = plan.at(vma.start - bias)
    if mapping is None or mapping.kind != "file":
        return True  # a gap, which is reserved by a mapping of the file
    return vma.file_offset == mapping.file_offset + (vma.start - bias - mapping.start)


def _file_in_process(
    file: MappedFile, bias: int, vmas: Sequence[Vma], indices: list[int], pages: Pages
) -> FileInProcess:
    copied, own = pages.copies.of(indices), pages.originals.of(indices)
    count = len(copied.frames)
    return FileInProcess(
        file=file,
        base=bias,
        start=vmas[indices[0]].start,
        end=vmas[indices[-1]].end,
        mapped=sum([vmas[index].end - vmas[index].start for index in indices]) // PAGE_SIZE,
        present=count + len(own.frames),
        swapped=sum([pages.swapped_in[index] for index in indices]),
        vaddrs=copied.addresses - np.uint64(bias % 2**64),
        file_offsets=copied.file_offsets,
        frames=copied.frames,
        exclusive=copied.exclusive,
        file_frames=own.frames,
        own_offsets=own.file_offsets,
        bss_vaddrs=_bss(file, bias, pages),
        causes=np.zeros(count, np.uint8),
        reasons={},
        written=np.empty((0, 3), np.int64),
    )


def _bss(file: MappedFile, bias: int, pages: Pages) -> NDArray[np.uint64]:
    """The vaddrs of the present anonymous pages of the image's bss."""
    plan = file.facts.plan if file.facts is not None else None
    found = [np.empty(0, np.uint64)]
    for mapping in plan.mappings if plan is not None else ():
        if mapping.kind == "zero":
            ends = np.array([bias + mapping.start, bias + mapping.end], np.uint64)
            low, high = np.searchsorted(pages.anonymous, ends)
            found.append(pages.anonymous[low:high] - np.uint64(bias))
    return np.concatenate(found) if len(found) > 1 else found[0]


def _explain(
    pid: int,
    files: MappedFiles,
    vmas: Sequence[Vma],
    pages: Pages,
    found: list[FileInProcess],
    chosen: list[FileInProcess],
) -> None:
    """Fill in the causes, and take back what may have changed meanwhile."""
    space = space_of(vmas, found)
    try:
        with ProcessMemory(pid) as memory:
            for one in chosen:
                _explain_one(one, memory, space)
    except ProcessGone:
        raise
    except EvidenceError as error:
        for one in chosen:
            _unknown(one, np.arange(len(one.vaddrs)), str(error))
        return
    changed = pages.addresses[pages.changed()]
    after = {vma.start: vma for vma in _mappings(pid, files)[0]}
    moved = [vma for vma in vmas if vma.is_file and after.get(vma.start) != vma]
    for one in chosen:
        addresses = one.addresses
        now = np.isin(addresses, changed)
        for vma in moved:
            now |= (addresses >= vma.start) & (addresses < vma.end)
        _unknown(one, np.flatnonzero(now), CHANGED)


def space_of(vmas: Sequence[Vma], found: Sequence[FileInProcess]) -> Space:
    """What is where in a process."""
    placed = []
    for one in found:
        plan = one.file.facts.plan if one.file.facts is not None else None
        end = max(one.end, one.base + plan.end) if plan is not None else one.end
        placed.append(Placed(one.base, one.start, end, one.file.facts))
    code = [(vma.start, vma.end) for vma in vmas if "x" in vma.protection]
    vdso = next(((vma.start, vma.end) for vma in vmas if vma.path == "[vdso]"), (0, 0))
    return Space(placed, code, vdso)


def _explain_one(one: FileInProcess, memory: ProcessMemory, space: Space) -> None:
    if not len(one.vaddrs):
        return
    if one.file.facts is None:
        _unknown(one, np.arange(len(one.vaddrs)), one.file.trouble)
        return
    live, read = memory.pages(one.addresses)
    try:
        answer: Classified = classify(
            one.file.facts, space, one.base, one.vaddrs, one.file_offsets, live, words="none"
        )
    except ElfError as error:  # cut short, or not readable any more: a trouble of this file's alone
        _unknown(one, np.arange(len(one.vaddrs)), str(error))
        return
    one.causes[:], one.written = answer.causes, answer.written
    trouble = one.file.facts.trouble or "a relocation's value lies in a file that cannot be read"
    one.reasons |= dict.fromkeys(np.flatnonzero(answer.unreadable).tolist(), trouble)
    _unknown(one, np.flatnonzero(~read), CHANGED)


def _unknown(one: FileInProcess, pages: NDArray[np.intp], reason: str) -> None:
    """Take back what was said about these pages."""
    if len(pages):
        one.causes[pages] = bit("unknown")
        one.reasons |= dict.fromkeys(pages.tolist(), reason)
        one.written = one.written[~np.isin(one.written[:, 0], pages)]
