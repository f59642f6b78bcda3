"""A file as it lies in one process: which of its pages are copies there, which are its own, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import Vma
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangement
from miniloader.lab.audit.mapped_files import MappedFile
from miniloader.lab.audit.process_pages import Narrow, PageColumns, Pages, Rows, count_rows, rows_of

__all__ = ["SWAPPED_OUT", "FileInProcess", "files_in_process", "image_end", "image_start"]

SWAPPED_OUT: Final = "swapped out: not read, as that would bring it in"
_NO_VADDRS: Final = np.empty(0, np.uint64)
_NO_CAUSES: Final = np.empty(0, np.uint8)
_NOTHING_WRITTEN: Final = np.empty((0, 3), np.int32)


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
    written: NDArray[np.int32]
    beforehand: int = 0

    def __reduce__(self) -> tuple[type[FileInProcess], tuple[Any, ...]]:
        """Pickled by hand: an audit has thousands, and Python goes through the fields of each one."""
        return FileInProcess, _IN_ORDER(self)

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
        return self.copies.addresses_in(self.mappings)

    @property
    def vaddrs(self) -> NDArray[np.uint64]:
        """The vaddr of each copied page."""
        return self.addresses - np.uint64(self.base % 2**64)

    @property
    def file_offsets(self) -> NDArray[np.uint64]:
        """The place in the file that each copied page is a copy of."""
        return self.copies.file_offsets_in(self.mappings)

    @property
    def frames(self) -> NDArray[np.uint64]:
        """The frame of each copied page; 0 where it is hidden."""
        return self.copies.frames_at(self.copied)

    @property
    def is_common(self) -> NDArray[np.bool_]:
        """Which copied pages are mapped elsewhere, too: by relatives, or by KSM."""
        return ~self.copies.exclusive[self.copied]

    @property
    def several_frames(self) -> Narrow:
        """The frames of the copied pages that are mapped elsewhere, too."""
        return self.copies.several(self.copied)

    @property
    def file_frames(self) -> Narrow:
        """The frames of the pages that are the file's own; 0 where they are hidden."""
        return self.originals.numbers[self.own]

    @property
    def own_offsets(self) -> NDArray[np.uint64]:
        """The place in the file of each page that is the file's own."""
        return self.originals.file_offsets_in(self.mappings)


_IN_ORDER: Final = attrgetter(*FileInProcess.__slots__)


def image_start(placed: FileInProcess) -> int:
    """Where the image of a file begins in a process, if its first part is not the file's any more, either.

    Who has mapped one part of the file alone has no image.
    """
    plan = placed.file.facts.plan if placed.file.facts is not None else None
    if plan is None or len(placed.mappings) < 2:
        return placed.start
    return min(placed.start, placed.base + plan.start)


def image_end(placed: FileInProcess) -> int:
    """Where the image of a file ends in a process, with its bss."""
    plan = placed.file.facts.plan if placed.file.facts is not None else None
    return max(placed.end, placed.base + plan.end) if plan is not None else placed.end


def files_in_process(
    arrangements: Sequence[Arrangement], vmas: Sequence[Vma], pages: Pages
) -> list[FileInProcess]:
    """Every file as it lies in a process whose mappings are ``vmas``; without causes yet."""
    copies, originals = pages.copies, pages.originals
    swapped = pages.swapped.nonzero()[0]
    swapped_from = np.searchsorted(pages.vma[swapped], np.arange(len(vmas) + 1))
    starts_of_copies, starts = copies.starts.tolist(), originals.starts.tolist()
    files = [
        FileInProcess(
            file=file,
            base=bias,
            start=vmas[indices[0]].start,
            end=vmas[indices[-1]].end,
            mapped=size // PAGE_SIZE,
            mappings=indices,
            # Copies, as pages that are the file's own would not be swapped out.
            swapped_vaddrs=pages.addresses[swapped[rows_of(indices, swapped_from)]] - np.uint64(bias % 2**64)
            if len(swapped)
            else _NO_VADDRS,
            bss_vaddrs=_NO_VADDRS,
            copies=copies,
            copied=rows_of(indices, starts_of_copies),
            originals=originals,
            own=rows_of(indices, starts),
            causes=_NO_CAUSES,
            reasons={},
            written=_NOTHING_WRITTEN,
        )
        for file, bias, indices, size in arrangements
    ]
    _find_bss(files, vmas, pages.anonymous)
    return files


def _find_bss(files: Sequence[FileInProcess], vmas: Sequence[Vma], anonymous: NDArray[np.uint64]) -> None:
    """Set the vaddrs of the present anonymous pages of each image's bss.

    A page is looked for in one image alone, the one of which a mapping, or the first bss, begins most closely
    before it: bss is behind the data of its own image.  So no page is counted twice, however many images say
    that their bss is there, and it takes time in proportion to mappings and pages.
    """
    owners = [placed for placed in files if placed.file.facts is not None and len(placed.file.facts.zeros)]
    begins = [vmas[index].start for placed in owners for index in placed.mappings]
    begins += [_first_bss(placed) for placed in owners]
    starts = np.array(begins, np.uint64)
    numbers = np.arange(len(owners))
    number = np.append(numbers.repeat([len(placed.mappings) for placed in owners]), numbers)
    order = np.lexsort((number, starts))
    at = np.append(anonymous.searchsorted(starts[order]), len(anonymous))
    parts: dict[int, list[NDArray[np.uint64]]] = {}
    for place in (at[1:] != at[:-1]).nonzero()[0].tolist():
        which, between = int(number[order[place]]), anonymous[at[place] : at[place + 1]]
        parts.setdefault(which, []).append(_bss_among(between, owners[which]))
    for which, vaddrs in parts.items():
        owners[which].bss_vaddrs = np.concatenate(vaddrs)


def _first_bss(placed: FileInProcess) -> int:
    """Where the first bss of an image begins in a process."""
    assert placed.file.facts is not None
    return (placed.base + placed.file.facts.zeros.span[0]) % 2**64


def _bss_among(addresses: NDArray[np.uint64], placed: FileInProcess) -> NDArray[np.uint64]:
    """The vaddrs of those of the ``addresses``, which ascend, that are in the bss of an image."""
    assert placed.file.facts is not None
    zeros = placed.file.facts.zeros
    end = np.uint64((placed.base + zeros.span[1]) % 2**64)
    vaddrs = addresses[: addresses.searchsorted(end)] - np.uint64(placed.base % 2**64)
    return vaddrs[zeros.meet(vaddrs, 1)]
