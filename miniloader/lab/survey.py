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
from miniloader.kernel.pagemap import EXCLUSIVE, FILE, FRAME, GUARD, PRESENT, SWAPPED, PageMap
from miniloader.kernel.procfs import read_process_file
from miniloader.kernel.scan import IS_HUGE, IS_PRESENT, IS_SWAPPED, IS_ZERO, scan
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.mapped import Identity, MappedFile, MappedFiles
from miniloader.values import dataclass

__all__ = ["CHANGED", "FileInProcess", "Pages", "Survey", "locate", "space_of", "survey"]

CHANGED: Final = "changed while we looked"
_SETTLED: Final = PRESENT | SWAPPED | GUARD | FILE | FRAME
_LARGE: Final = 64 << 20  # bytes; of a larger mapping only what is populated is read
_NOT_PAGES: Final = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]"})  # counted by nobody
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
        return pages.survey(pid, name, parent, started, tuple(chosen))


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
            one.beforehand = _number(np.isin(pages.vma[own], list(beforehand)))
    return vmas, pages, found


def _mappings(pid: int, files: MappedFiles) -> tuple[tuple[Vma, ...], frozenset[int]]:
    """All mappings, and which of them have pages relocated beforehand."""
    vmas = read_maps(pid)
    return files.beforehand.in_place(pid, vmas[:-1] if vmas and vmas[-1].start >= _TOP else vmas)


def _status(pid: int) -> tuple[str, int, int]:
    """The name, the parent and the start time (clock ticks since boot), from ``stat`` (proc_pid_stat(5))."""
    text = os.fsdecode(read_process_file(pid, "stat"))
    fields = text[text.rindex(")") + 2 :].split()
    return text[text.index("(") + 1 : text.rindex(")")], int(fields[1]), int(fields[19])


class Pages:
    """Every page of a process that is worth a word: flat arrays over all mappings."""

    def __init__(self, pagemap: PageMap, vmas: Sequence[Vma], *, frames: bool) -> None:
        self._pagemap = pagemap
        self._ranges = _ranges(pagemap, vmas)
        self.entries = self._read()
        index, start, end = np.array(self._ranges, np.uint64).reshape(-1, 3).T
        lengths = ((end - start) // np.uint64(PAGE_SIZE)).astype(np.int64)
        self.vma = np.repeat(index.astype(np.int64), lengths)
        # Of each range the address of a page 0, were it that long: one sum gives all addresses.
        before = (np.cumsum(lengths) - lengths).astype(np.uint64) * np.uint64(PAGE_SIZE)
        zeroth = start - before
        self.addresses = np.arange(len(self.vma), dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self.addresses += np.repeat(zeroth, lengths)
        self._mappings = len(vmas)
        self.present = (self.entries & PRESENT).astype(np.bool_)
        self.file = (self.entries & FILE).astype(np.bool_)
        self.zero, self.huge = self._scanned(vmas)
        unreal = np.array([vma.path in _NOT_PAGES for vma in vmas])
        self.counted = self.present & ~self.zero & ~unreal[self.vma]
        self.copied = self.counted & ~self.file
        self.own = self.counted & self.file
        nameless = self.copied & np.array([not vma.inode for vma in vmas])[self.vma]
        self.anonymous = self.addresses[nameless]
        self.exclusive = (self.entries & EXCLUSIVE).astype(np.bool_)
        self.swapped = (self.entries & (SWAPPED | GUARD)) == SWAPPED
        self.swapped_in = np.bincount(self.vma[self.swapped], minlength=len(vmas)).tolist()
        self.frames = self.entries & FRAME if frames else np.zeros(len(self.entries), np.uint64)
        # What is to be added to an address for its place in the file.
        shift = np.array([(vma.file_offset - vma.start) % 2**64 for vma in vmas], np.uint64)
        self.copies, self.originals = self._some(self.copied, shift), self._some(self.own, shift)

    def _some(self, mask: NDArray[np.bool_], shift: NDArray[np.uint64]) -> _Some:
        rows = np.flatnonzero(mask)
        addresses, vma = self.addresses[rows], self.vma[rows]
        return _Some(
            addresses,
            addresses + shift[vma],
            self.frames[rows],
            self.exclusive[rows],
            np.searchsorted(vma, np.arange(self._mappings + 1)).tolist(),
        )

    def _read(self) -> NDArray[np.uint64]:
        """The entries of all ranges; those that touch are read at once."""
        found, start, end = [], 0, 0
        for _, first, last in self._ranges:
            if first != end:
                found.append(self._pagemap.read(start, end))
                start = first
            end = last
        found.append(self._pagemap.read(start, end))
        return np.concatenate(found)

    def changed(self) -> NDArray[np.bool_]:
        """Which entries are not what they were."""
        return ((self.entries ^ self._read()) & _SETTLED).astype(np.bool_)

    def _scanned(self, vmas: Sequence[Vma]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which are the page of zeros, and which are part of a huge page; as PAGEMAP_SCAN (6.7) says."""
        zero, huge = np.zeros((2, len(self.addresses)), np.bool_)
        try:
            kinds = IS_ZERO | IS_HUGE
            regions = scan(self._pagemap, vmas[0].start, vmas[-1].end, any_of=kinds, returned=kinds)
        except EvidenceError:
            return zero, huge
        first = np.searchsorted(self.addresses, regions["start"]).tolist()
        last = np.searchsorted(self.addresses, regions["end"]).tolist()
        for low, high, kind in zip(first, last, regions["categories"].tolist(), strict=True):
            zero[low:high] |= bool(kind & IS_ZERO)
            huge[low:high] |= bool(kind & IS_HUGE)
        return zero, huge

    def survey(
        self, pid: int, name: str, parent: int, started: int, files: tuple[FileInProcess, ...]
    ) -> Survey:
        """The counts of the whole process."""
        return Survey(
            pid=pid,
            name=name,
            parent=parent,
            started=started,
            rss=_number(self.counted),
            exclusive=_number(self.counted & self.exclusive),
            anonymous=_number(self.copied),
            anonymous_shared=_number(self.copied & ~self.exclusive),
            zero=_number(self.zero),
            huge=_number(self.huge & self.counted),
            swapped=_number(self.swapped),
            frames=self.frames[self.counted & ~self.exclusive],
            anonymous_frames=self.frames[self.copied],
            files=files,
        )


@dataclass(frozen=True, eq=False)
class _Some:
    """Some of the pages, a column for what is asked of each; those of mapping ``i`` begin at ``ends[i]``."""

    addresses: NDArray[np.uint64]
    file_offsets: NDArray[np.uint64]
    frames: NDArray[np.uint64]
    exclusive: NDArray[np.bool_]
    ends: Sequence[int] = ()

    def of(self, indices: Sequence[int]) -> _Some:
        """Those of these mappings, which are in order and most often follow one another."""
        first, last, ends = indices[0], indices[-1], self.ends
        rows: slice | NDArray[np.intp] = slice(ends[first], ends[last + 1])
        if last - first != len(indices) - 1:
            rows = np.concatenate([np.arange(ends[index], ends[index + 1]) for index in indices])
        return _Some(self.addresses[rows], self.file_offsets[rows], self.frames[rows], self.exclusive[rows])


def _number(mask: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))


def _ranges(pagemap: PageMap, vmas: Sequence[Vma]) -> list[tuple[int, int, int]]:
    """Which addresses to read: (mapping, start, end); of a very large mapping what is populated."""
    ranges = []
    for index, vma in enumerate(vmas):
        if vma.end - vma.start <= _LARGE:
            ranges.append((index, vma.start, vma.end))
            continue
        try:
            regions = scan(pagemap, vma.start, vma.end, any_of=IS_PRESENT | IS_SWAPPED, returned=0)
        except EvidenceError:
            ranges.append((index, vma.start, vma.end))
            continue
        ranges += [(index, start, end) for start, end, _ in regions.tolist()]
    return ranges


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
