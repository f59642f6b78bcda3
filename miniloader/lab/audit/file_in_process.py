"""A file as it lies in one process: which of its pages are copies there, which are its own, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.maps import Vma
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangement
from miniloader.lab.audit.mapped_files import MappedFile
from miniloader.lab.audit.process_pages import PageColumns, Pages, Rows, count_rows, rows_of

__all__ = ["FileInProcess", "files_in_process", "image_end"]

_NO_VADDRS: Final = np.empty(0, np.uint64)
_NO_CAUSES: Final = np.empty(0, np.uint8)
_NOTHING_WRITTEN: Final = np.empty((0, 3), np.int32)
_MOST_OWNERS: Final = 16  # images that claim a page for their bss: images in the place of each other


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
    def several_frames(self) -> NDArray[np.uint64]:
        """The frames of the copied pages that are mapped elsewhere, too."""
        if not self.copies.any_several:
            return _NO_VADDRS
        return self.frames[self.is_common]

    @property
    def file_frames(self) -> NDArray[np.uint64]:
        """The frames of the pages that are the file's own; 0 where they are hidden."""
        return self.originals.frames_at(self.own)

    @property
    def own_offsets(self) -> NDArray[np.uint64]:
        """The place in the file of each page that is the file's own."""
        return self.originals.file_offsets_in(self.mappings)


def image_end(placed: FileInProcess) -> int:
    """Where the image of a file ends in a process, with its bss."""
    plan = placed.file.facts.plan if placed.file.facts is not None else None
    return max(placed.end, placed.base + plan.end) if plan is not None else placed.end


def files_in_process(
    arrangements: Sequence[Arrangement], vmas: Sequence[Vma], pages: Pages
) -> list[FileInProcess]:
    """Every file as it lies in a process whose mappings are ``vmas``; without causes yet."""
    copies, originals = pages.copies, pages.originals
    swapped = np.flatnonzero(pages.swapped)
    swapped_from = np.searchsorted(pages.vma[swapped], np.arange(len(vmas) + 1))
    found = [
        FileInProcess(
            file=file,
            base=bias,
            start=vmas[indices[0]].start,
            end=vmas[indices[-1]].end,
            mapped=sum([vmas[index].end - vmas[index].start for index in indices]) // PAGE_SIZE,
            mappings=indices,
            # Copies, as pages that are the file's own would not be swapped out.
            swapped_vaddrs=pages.addresses[swapped[rows_of(indices, swapped_from)]] - np.uint64(bias % 2**64)
            if len(swapped)
            else _NO_VADDRS,
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


def _find_bss(found: Sequence[FileInProcess], anonymous: NDArray[np.uint64]) -> None:
    """Set the vaddrs of the present anonymous pages of each image's bss.

    All images are asked at once whether there are any between the first and the last of its bss; which of
    these are in it takes time in proportion to them, and no page is in the bss of many images.
    """
    placed_zeros = [(placed, placed.file.facts.zeros) for placed in found if placed.file.facts is not None]
    owners = [(placed, zeros) for placed, zeros in placed_zeros if len(zeros)]
    ends = [(placed.base + end) % 2**64 for placed, zeros in owners for end in zeros.span]
    at = np.searchsorted(anonymous, np.array(ends, np.uint64)).tolist()
    most = _MOST_OWNERS * len(anonymous)
    for (placed, zeros), low, high in zip(owners, at[::2], at[1::2], strict=True):
        most -= max(high - low, 0)
        if low < high and most >= 0:
            vaddrs = anonymous[low:high] - np.uint64(placed.base % 2**64)
            placed.bss_vaddrs = vaddrs[zeros.meet(vaddrs, 1)]
