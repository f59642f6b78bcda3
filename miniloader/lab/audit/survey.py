"""One look at one process for an audit: all its pages, and why those of its files were copied.

The process is never stopped, nor is anything mapped into it.  Its page table entries are read before and
after everything else; a copied page whose entry differs is ``unknown``, as "changed while we looked".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import ElfError, EvidenceError, ProcessGone
from miniloader.evidence.cause import Classified, Placed, Space, bit, classify
from miniloader.evidence.layout import Layouts
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.procfs import read_stat
from miniloader.kernel.smaps import read_rollup
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangement, Arrangements
from miniloader.lab.audit.mapped_files import Identity, MappedFile, MappedFiles
from miniloader.lab.audit.mappings import MappingNames, Mappings, mappings_of, pss_by_sums
from miniloader.lab.audit.process_pages import PageColumns, Pages, Rows, count_rows, count_set
from miniloader.lab.erosion.interpreter import Interpreter, interpreter_in
from miniloader.machine.stand_in_code import CODE, HEAD, TABLE, stand_ins
from miniloader.machine.stub_code import jumps_to
from miniloader.values import dataclass

__all__ = [
    "CHANGED",
    "SWAPPED_OUT",
    "FileInProcess",
    "Memo",
    "Survey",
    "locate",
    "mappings_in",
    "space_of",
    "stand_ins_in",
    "survey",
]

CHANGED: Final = "changed while we looked"
SWAPPED_OUT: Final = "swapped out: not read, as that would bring it in"
_TOP: Final = 1 << 63  # above is the kernel's half
_MOST_CODE: Final = 1 << 16
_NO_VADDRS: Final = np.empty(0, np.uint64)
_NO_CAUSES: Final = np.empty(0, np.uint8)
_NOTHING_WRITTEN: Final = np.empty((0, 3), np.int64)


@dataclasses.dataclass(slots=True, eq=False)
class FileInProcess:
    """A file as it lies in one process; its copied pages and its own ones are rows of what the process has.

    ``base`` is the load bias.  ``mapped`` counts pages, ``mappings`` are which of the process's mappings.
    ``swapped_vaddrs`` are the copies that are swapped
    out, ``bss_vaddrs`` the present anonymous pages of the image's bss.  ``causes`` are sets of bits, one for
    each copied page (none where nobody asked); ``reasons`` says of some copied pages (by index) why they are
    unknown; ``written`` has a row (page, symbol number, cause bit) for each symbol that was written to.
    ``beforehand`` is how many present pages are not the file's but a prepared copy's, relocated and shared
    (:mod:`miniloader.lab.audit.prepared_pages`).
    """

    file: MappedFile
    base: int
    start: int
    end: int
    mapped: int
    mappings: Sequence[int]
    swapped_vaddrs: NDArray[np.uint64]
    bss_vaddrs: NDArray[np.uint64]
    copies: PageColumns
    copied: Rows
    originals: PageColumns
    own: Rows
    causes: NDArray[np.uint8]
    reasons: dict[int, str]
    written: NDArray[np.int64]
    beforehand: int = 0

    @property
    def private(self) -> int:
        """How many pages are copies."""
        return count_rows(self.copied)

    @property
    def shared(self) -> int:
        """How many present pages are the file's own."""
        return count_rows(self.own)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The address of each copied page, ascending."""
        return self.copies.addresses[self.copied]

    @property
    def vaddrs(self) -> NDArray[np.uint64]:
        """The vaddr of each copied page."""
        return self.addresses - np.uint64(self.base % 2**64)

    @property
    def file_offsets(self) -> NDArray[np.uint64]:
        """The place in the file that each copied page is a copy of."""
        return self.copies.file_offsets[self.copied]

    @property
    def frames(self) -> NDArray[np.uint64]:
        """The frame of each copied page; 0 where it is hidden."""
        return self.copies.frames[self.copied]

    @property
    def is_common(self) -> NDArray[np.bool_]:
        """Which copied pages are mapped elsewhere, too: by relatives, or by KSM."""
        return ~self.copies.exclusive[self.copied]

    @property
    def several_frames(self) -> NDArray[np.uint64]:
        """The frames of the copied pages that are mapped elsewhere, too."""
        if not len(self.copies.several):
            return self.copies.several
        return self.frames[self.is_common]

    @property
    def file_frames(self) -> NDArray[np.uint64]:
        """The frames of the pages that are the file's own; 0 where they are hidden."""
        return self.originals.frames[self.own]

    @property
    def own_offsets(self) -> NDArray[np.uint64]:
        """The place in the file of each page that is the file's own."""
        return self.originals.file_offsets[self.own]


@dataclass(frozen=True, eq=False)
class Survey:
    """One process; page counts over all its mappings.

    ``rss``, ``exclusive`` (mapped by it alone), ``anonymous`` and ``anonymous_shared`` (mapped more than
    once, by a family of forks or by KSM) count pages as ``smaps`` does.  ``copies`` are the anonymous pages,
    ``originals`` the other ones; of these the rows ``writable`` lie in private mappings that may be written
    to.  ``stack`` is where the program's stack began.  ``pss`` is what the kernel
    tells (bytes), of the process and of each mapping; None where frames tell it, or nobody.  ``interpreter``
    is the CPython that it runs, None where it runs none, or nobody asked for causes.
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
    copies: PageColumns
    originals: PageColumns
    writable: Rows
    files: tuple[FileInProcess, ...]
    mappings: Mappings
    stack: int
    pss: tuple[int, NDArray[np.float64]] | None = None
    interpreter: Interpreter | None = None


class Memo:
    """What processes have in common, worked out once for all of them.

    Their ``files`` are opened and read once, how these lie in a process (``arrangements``) and how the slots
    lie on the pages that were copied (``layouts``) is kept for the next process that has the same.
    """

    def __init__(self) -> None:
        self.files = MappedFiles()
        self.arrangements = Arrangements()
        self.layouts = Layouts()
        self.names = MappingNames()


def survey(
    pid: int,
    memo: Memo,
    *,
    causes: bool = True,
    frames: bool = True,
    wanted: Callable[[Identity], bool] = lambda _: True,
) -> Survey:
    """Look at process ``pid``; ``wanted`` chooses the files to tell about one by one.

    >>> import os
    >>> found = survey(os.getpid(), Memo(), causes=False, frames=False)
    >>> found.pid == os.getpid(), found.rss >= found.exclusive > 0
    (True, True)

    Raises ProcessGone when it ends or executes another program meanwhile, EvidenceError when it may not be
    looked at.
    """
    name, parent, started, stack = _status(pid)
    with PageMap(pid) as pagemap:
        vmas, pages, files = locate(pid, pagemap, memo, frames=frames)
        _check_program(pid, vmas, stack)
        chosen = [placed for placed in files if wanted(placed.file.identity)]
        if causes:
            _explain(pid, memo, vmas, pages, files, chosen)
        pagemap.read(vmas[0].start, vmas[0].start + PAGE_SIZE)  # raises, when it has ended meanwhile
        mappings = mappings_in(pid, vmas, pages, files, memo)
        pss = None if frames else _told_pss(pid, vmas)
        interpreter = _interpreter(files) if causes else None
        return _summed(pages, pid, name, parent, started, tuple(chosen), mappings, stack, pss, interpreter)


def locate(
    pid: int, pagemap: PageMap, memo: Memo, *, frames: bool
) -> tuple[tuple[Vma, ...], Pages, list[FileInProcess]]:
    """The mappings of a process, its pages, and where each file lies in it; without causes yet."""
    vmas, prepared = _mappings(pid, memo.files)
    pages = Pages(pagemap, vmas, frames=frames)
    files = _files_in_process(list(memo.arrangements.of_process(pid, memo.files, vmas)), vmas, pages)
    if prepared:
        for placed in files:
            inside = (pages.addresses >= placed.start) & (pages.addresses < placed.end)
            own = inside & pages.own
            placed.beforehand = count_set(np.isin(pages.vma[own], list(prepared)))
    return vmas, pages, files


def mappings_in(
    pid: int, vmas: Sequence[Vma], pages: Pages, found: Iterable[FileInProcess], memo: Memo
) -> Mappings:
    """What each mapping of a process costs, where the files ``found`` lie in it."""
    images = sorted(
        (placed.start, _image_end(placed), placed.file.identity.path)
        for placed in found
        if placed.file.facts is not None and placed.file.facts.plan is not None
    )
    return mappings_of(memo.names.of(pid, vmas, images), pages)


def _told_pss(pid: int, vmas: Sequence[Vma]) -> tuple[int, NDArray[np.float64]] | None:
    """The PSS that the kernel tells the owner of a process: exactly, and cut to KiB for each mapping."""
    of_mappings = pss_by_sums(pid, vmas)
    if of_mappings is None:
        return None
    try:
        return read_rollup(pid)["Pss"], of_mappings
    except ProcessGone:
        raise
    except EvidenceError:  # before 4.14
        return int(of_mappings.sum()), of_mappings


def _image_end(placed: FileInProcess) -> int:
    """Where the image of a file ends in a process, with its bss."""
    plan = placed.file.facts.plan if placed.file.facts is not None else None
    return max(placed.end, placed.base + plan.end) if plan is not None else placed.end


def _mappings(pid: int, files: MappedFiles) -> tuple[tuple[Vma, ...], frozenset[int]]:
    """All mappings, and which of them have pages relocated beforehand."""
    vmas = read_maps(pid)
    return files.prepared.in_place(pid, vmas[:-1] if vmas and vmas[-1].start >= _TOP else vmas)


def _summed(
    pages: Pages,
    pid: int,
    name: str,
    parent: int,
    started: int,
    files: tuple[FileInProcess, ...],
    mappings: Mappings,
    stack: int,
    pss: tuple[int, NDArray[np.float64]] | None,
    interpreter: Interpreter | None,
) -> Survey:
    """What the pages of the whole process come to."""
    zeros_among = int(pages.zeros_among.sum())
    return Survey(
        pid=pid,
        name=name,
        parent=parent,
        started=started,
        rss=count_set(pages.counted) - zeros_among,
        exclusive=count_set(pages.copies.exclusive) + count_set(pages.originals.exclusive),
        anonymous=len(pages.copies.exclusive) - zeros_among,
        anonymous_shared=count_set(~pages.copies.exclusive) - zeros_among,
        zero=count_set(pages.zero) + zeros_among,
        huge=int(pages.huge_in.sum()),
        swapped=count_set(pages.swapped),
        copies=pages.copies,
        originals=pages.originals,
        writable=pages.writable,
        files=files,
        mappings=mappings,
        stack=stack,
        pss=pss,
        interpreter=interpreter,
    )


def _interpreter(files: Iterable[FileInProcess]) -> Interpreter | None:
    return interpreter_in((placed.file.identity.path, placed.base, placed.file.facts) for placed in files)


def _status(pid: int) -> tuple[str, int, int, int]:
    """The name, the parent, the start time (clock ticks since boot), and where the stack began."""
    name, fields = read_stat(pid)
    return name, int(fields[1]), int(fields[19]), int(fields[25])


def _check_program(pid: int, vmas: Sequence[Vma], stack: int) -> None:
    """Raise ProcessGone when the mappings are not those of the program whose stack began at ``stack``.

    A page table that was opened before stays the old one, and is alive where the process was made by
    vfork(2): its parent has it.  The kernel calls ``[stack]`` what holds that address.
    """
    stacks = [vma for vma in vmas if vma.path == "[stack]"]
    if stack and stacks and not any(stack in vma for vma in stacks):
        raise ProcessGone(pid, "has executed another program meanwhile")


def _files_in_process(
    arrangements: Sequence[Arrangement], vmas: Sequence[Vma], pages: Pages
) -> list[FileInProcess]:
    copies, originals, swapping = pages.copies, pages.originals, any(pages.swapped_in)
    found = [
        FileInProcess(
            file=file,
            base=bias,
            start=vmas[indices[0]].start,
            end=vmas[indices[-1]].end,
            mapped=sum([vmas[index].end - vmas[index].start for index in indices]) // PAGE_SIZE,
            mappings=indices,
            swapped_vaddrs=_swapped_vaddrs(pages, indices, bias) if swapping else _NO_VADDRS,
            bss_vaddrs=_NO_VADDRS,
            copies=copies,
            copied=copies.rows(indices),
            originals=originals,
            own=originals.rows(indices),
            causes=_NO_CAUSES,
            reasons={},
            written=_NOTHING_WRITTEN,
        )
        for file, bias, indices in arrangements
    ]
    _find_bss(found, pages.anonymous)
    return found


def _swapped_vaddrs(pages: Pages, indices: list[int], bias: int) -> NDArray[np.uint64]:
    """Where the pages of these mappings are that are swapped out: copies, as the file's own would not be."""
    rows = np.flatnonzero(pages.swapped & np.isin(pages.vma, indices))
    return np.asarray(pages.addresses[rows] - np.uint64(bias % 2**64))


def _find_bss(found: Sequence[FileInProcess], anonymous: NDArray[np.uint64]) -> None:
    """Set the vaddrs of the present anonymous pages of each image's bss: all are looked up at once."""
    owners, ends = list[FileInProcess](), list[int]()
    for placed in found:
        for start, end in placed.file.facts.zeros if placed.file.facts is not None else ():
            owners.append(placed)
            ends += ((placed.base + start) % 2**64, (placed.base + end) % 2**64)
    at = np.searchsorted(anonymous, np.array(ends, np.uint64)).tolist()
    for placed, low, high in zip(owners, at[::2], at[1::2], strict=True):
        if low < high:
            vaddrs = anonymous[low:high] - np.uint64(placed.base % 2**64)
            bss = placed.bss_vaddrs
            placed.bss_vaddrs = np.concatenate([bss, vaddrs]) if len(bss) else vaddrs


def _explain(
    pid: int,
    memo: Memo,
    vmas: Sequence[Vma],
    pages: Pages,
    found: list[FileInProcess],
    chosen: list[FileInProcess],
) -> None:
    """Fill in the causes, and take back what may have changed meanwhile."""
    for placed in chosen:
        placed.causes = np.zeros(placed.private, np.uint8)
    try:
        space = space_of(pid, vmas, found)
        with ProcessMemory(pid) as memory:
            for placed in chosen:
                _explain_file(placed, memory, space, memo.layouts)
    except ProcessGone:
        raise
    except EvidenceError as error:
        for placed in chosen:
            _unknown(placed, np.arange(placed.private), str(error))
        return
    changed = pages.addresses[pages.changed()]
    after = {vma.start: vma for vma in _mappings(pid, memo.files)[0]}
    moved = [vma for vma in vmas if vma.is_file and after.get(vma.start) != vma]
    for placed in chosen:
        addresses = placed.addresses
        doubtful = np.isin(addresses, changed)
        for vma in moved:
            doubtful |= (addresses >= vma.start) & (addresses < vma.end)
        _unknown(placed, np.flatnonzero(doubtful), CHANGED)


def space_of(pid: int, vmas: Sequence[Vma], found: Sequence[FileInProcess]) -> Space:
    """What is where in a process; raises ProcessGone, or EvidenceError where its memory must not be read."""
    extents = [Placed(placed.base, placed.start, _image_end(placed), placed.file.facts) for placed in found]
    code = [(vma.start, vma.end) for vma in vmas if "x" in vma.protection]
    vdso = next(((vma.start, vma.end) for vma in vmas if vma.path == "[vdso]"), (0, 0))
    return Space(extents, code, vdso, stand_ins_in(pid, vmas))


def stand_ins_in(pid: int, vmas: Sequence[Vma]) -> dict[int, int]:
    """The functions that code of miniloader's stands for in a process, by where it is.

    Such code is in a few anonymous pages of its own; who makes code by the megabyte is somebody else.
    """
    code = [vma for vma in vmas if not vma.path and vma.protection == "r-x" and vma.size <= _MOST_CODE]
    if not code:
        return {}
    addresses: dict[int, int] = {}
    starts = np.array([at for vma in code for at in range(vma.start, vma.end, PAGE_SIZE)], np.uint64)
    with ProcessMemory(pid) as memory:
        for start, page in zip(starts.tolist(), memory.pages(starts)[0], strict=True):
            function = jumps_to(page.tobytes())
            if function is not None:
                addresses[start] = function
            elif page.tobytes().startswith(CODE):
                (table,), _ = memory.pages(np.array([start + TABLE], np.uint64))
                pairs = stand_ins(start, table[: HEAD.size].tobytes())
                addresses |= {stand_in: function for function, stand_in in pairs.items()}
    return addresses


def _explain_file(placed: FileInProcess, memory: ProcessMemory, space: Space, layouts: Layouts) -> None:
    if not placed.private:
        return
    if placed.file.facts is None:
        _unknown(placed, np.arange(placed.private), placed.file.trouble)
        return
    live, read = memory.pages(placed.addresses)
    try:
        answer: Classified = classify(
            placed.file.facts,
            space,
            placed.base,
            placed.vaddrs,
            placed.file_offsets,
            live,
            words="none",
            layouts=layouts,
        )
    except ElfError as error:  # cut short, or not readable any more: a trouble of this file's alone
        _unknown(placed, np.arange(placed.private), str(error))
        return
    placed.causes, placed.written = answer.causes, answer.written
    trouble = placed.file.facts.trouble or "a relocation's value lies in a file that cannot be read"
    placed.reasons |= dict.fromkeys(np.flatnonzero(answer.unreadable).tolist(), trouble)
    _unknown(placed, np.flatnonzero(~read), CHANGED)


def _unknown(placed: FileInProcess, pages: NDArray[np.intp], reason: str) -> None:
    """Take back what was said about these pages."""
    if len(pages):
        placed.causes[pages] = bit("unknown")
        placed.reasons |= dict.fromkeys(pages.tolist(), reason)
        placed.written = placed.written[~np.isin(placed.written[:, 0], pages)]
