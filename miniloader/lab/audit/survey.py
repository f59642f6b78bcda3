"""One look at one process for an audit: all its pages, and why those of its files were copied.

The process is never stopped, nor is anything mapped into it.  Its page table entries are read before and
after everything else; a copied page whose entry differs is ``unknown``, as "changed while we looked".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.forking import cached_property, importing
from miniloader.kernel.maps import Vma
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.smaps import read_rollup
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangements
from miniloader.lab.audit.equal_arrays import EqualArrays
from miniloader.lab.audit.explained import Explained
from miniloader.lab.audit.file_in_process import FileInProcess, files_in_process, image_end, image_start
from miniloader.lab.audit.known_by import KnownBy, Users, known_by
from miniloader.lab.audit.mapped_files import Identity, MappedFiles
from miniloader.lab.audit.mappings import MappingNames, Mappings, mappings_of, pss_by_sums
from miniloader.lab.audit.outline import Outline, Outlines
from miniloader.lab.audit.process_pages import PageColumns, Pages, count_set
from miniloader.values import dataclass

if TYPE_CHECKING:
    from miniloader.evidence.layout import Layouts
    from miniloader.lab.erosion.interpreter import Interpreter

__all__ = ["Memo", "Survey", "locate", "mappings_in", "survey"]


@dataclass(frozen=True, eq=False)
class Survey:
    """One process; page counts over all its mappings.

    ``rss``, ``exclusive`` (mapped by it alone), ``anonymous`` and ``anonymous_shared`` (mapped more than
    once, by a family of forks or by KSM) count pages as ``smaps`` does.  ``copies`` are the anonymous pages,
    ``originals`` the other ones; mappings ``writable`` are private ones of files that may be written
    to.  ``pss`` is what the kernel tells (bytes), of the process and of each mapping; None where frames tell
    it, or nobody.  ``interpreter`` is the CPython that it runs, None where it runs none, or nobody asked for
    causes.  ``arenas_free`` is what threads' arenas of malloc hold free, in bytes; None where nobody knows.
    """

    known: KnownBy
    rss: int
    exclusive: int
    anonymous: int
    anonymous_shared: int
    zero: int
    huge: int
    swapped: int
    copies: PageColumns
    originals: PageColumns
    writable: Sequence[int]
    files: tuple[FileInProcess, ...]
    mappings: Mappings
    pss: tuple[int, NDArray[np.float64]] | None = None
    interpreter: Interpreter | None = None
    arenas_free: int | None = None

    @property
    def pid(self) -> int:
        """Which process."""
        return self.known.pid

    @property
    def present(self) -> NDArray[np.uint64]:
        """The addresses of all pages that are counted, ascending."""
        return np.sort(np.concatenate([self.copies.addresses, self.originals.addresses]))


class Memo:
    """What processes have in common, worked out once for all of them.

    What maps says of their mappings but for addresses (``outlines``) is understood once.  Their ``files`` are
    opened and read once, how these lie in a process (``arrangements``), how the slots lie
    on the pages that were copied (``layouts``), and why copies in common are what they are (``explained``)
    is kept for the next process that has the same.  ``arrays`` that are equal are kept once.
    """

    def __init__(self) -> None:
        self.files = MappedFiles()
        self.outlines = Outlines()
        self.arrangements = Arrangements()
        self.explained = Explained()
        self.names = MappingNames()
        self.arrays = EqualArrays()
        self.users = Users()

    @cached_property
    def layouts(self) -> Layouts:
        """How slots lie on pages: asked for by who explains them, and imported then."""
        with importing:
            from miniloader.evidence.layout import Layouts
        return Layouts()


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
    known = known_by(pid, memo.users)
    with PageMap(pid) as pagemap:
        vmas, pages, files = locate(pid, pagemap, memo, frames=frames)
        _check_program(pid, vmas, pages.outline, known.stack)
        chosen = [placed for placed in files if wanted(placed.file.identity)]
        interpreter = arenas_free = None
        if causes:
            interpreter, arenas_free = _causes(pid, memo, vmas, pages, files, chosen)
        pagemap.read(vmas[0].start, vmas[0].start + PAGE_SIZE)  # raises, when it has ended meanwhile
        mappings = mappings_in(pid, vmas, pages, files, memo)
        pss = None if frames else _told_pss(pid, vmas)
        return _summed(known, pages, tuple(chosen), mappings, pss, interpreter, arenas_free)


def _causes(
    pid: int,
    memo: Memo,
    vmas: Sequence[Vma],
    pages: Pages,
    files: list[FileInProcess],
    chosen: list[FileInProcess],
) -> tuple[Interpreter | None, int | None]:
    """Explain the copies of the files ``chosen``; which CPython runs, and what arenas of malloc hold free."""
    with importing:  # what an audit that only counts does without
        from miniloader.lab.audit.explain import explain
        from miniloader.lab.erosion.arenas import free_in_arenas
        from miniloader.lab.erosion.interpreter import interpreter_in

    explain(pid, memo.files, memo.layouts, memo.explained, vmas, pages, files, chosen)
    for placed in chosen:
        placed.causes = memo.arrays.first(placed.causes)
        placed.written = memo.arrays.first(placed.written)
    located = ((placed.file.identity.path, placed.base, placed.file.facts) for placed in files)
    return interpreter_in(located), free_in_arenas(pid, pages.copies)


def locate(
    pid: int, pagemap: PageMap, memo: Memo, *, frames: bool
) -> tuple[tuple[Vma, ...], Pages, list[FileInProcess]]:
    """The mappings of a process, its pages, and where each file lies in it; without causes yet."""
    vmas, prepared = memo.files.mappings_of(pid)
    outline = memo.outlines.of(vmas)
    pages = Pages(pagemap, vmas, frames=frames, arrays=memo.arrays, outline=outline)
    arrangements = [*memo.arrangements.of_process(pid, memo.files, vmas, outline)]
    files = files_in_process(arrangements, vmas, pages)
    if prepared:
        of_copies = np.append(0, np.cumsum(pages.own & np.isin(pages.vma, list(prepared))))
        ends = [(placed.start, placed.end) for placed in files]
        before = of_copies[np.searchsorted(pages.addresses, np.array(ends, np.uint64))]
        for placed, (first, last) in zip(files, before.tolist(), strict=True):
            placed.beforehand = last - first
    return vmas, pages, files


def mappings_in(
    pid: int, vmas: Sequence[Vma], pages: Pages, found: Iterable[FileInProcess], memo: Memo
) -> Mappings:
    """What each mapping of a process costs, where the files ``found`` lie in it."""
    images = sorted(
        (image_start(placed), image_end(placed), placed.file.identity.path)
        for placed in found
        if placed.file.facts is not None and placed.file.facts.plan is not None
    )
    return mappings_of(memo.names.of(pid, vmas, images, pages.outline), pages)


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


def _summed(
    known: KnownBy,
    pages: Pages,
    files: tuple[FileInProcess, ...],
    mappings: Mappings,
    pss: tuple[int, NDArray[np.float64]] | None,
    interpreter: Interpreter | None,
    arenas_free: int | None,
) -> Survey:
    """What the pages of the whole process come to."""
    zeros_among = int(pages.zeros_among.sum())
    return Survey(
        known=known,
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
        pss=pss,
        interpreter=interpreter,
        arenas_free=arenas_free,
    )


def _check_program(pid: int, vmas: Sequence[Vma], outline: Outline, stack: int) -> None:
    """Raise ProcessGone when the mappings are not those of the program whose stack began at ``stack``.

    A page table that was opened before stays the old one, and is alive where the process was made by
    vfork(2): its parent has it.  The kernel calls ``[stack]`` what holds that address.
    """
    stacks = [vmas[index] for index in outline.stacks]
    if stack and stacks and not any(stack in vma for vma in stacks):
        raise ProcessGone(pid, "has executed another program meanwhile")
