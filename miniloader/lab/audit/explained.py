"""Copies that relatives still have in common are explained once: one frame at one address holds one content.

A server forks after its libraries were relocated, so most copies of its workers are the server's, frame by
frame; what was found for the first of them holds for all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.evidence.cause_names import bit
from miniloader.lab.audit.file_in_process import FileInProcess
from miniloader.values import NamedTuple

__all__ = ["Explained"]

_UNKNOWN: Final = np.uint8(bit("unknown"))


class _OfFile(NamedTuple):
    """The explained copies of a file at one base: frames ascending, where and what each is, what was written.

    ``written`` are rows (which of ``frames``, symbol number, cause bit).
    """

    frames: NDArray[np.uint64]
    addresses: NDArray[np.uint64]
    causes: NDArray[np.uint8]
    written: NDArray[np.int32]


class Explained:
    """What was found of copies that are mapped more than once, by file, base, frame and address.

    Frames must be known (level ``frames``): else nothing is kept, and nothing recalled.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], _OfFile] = {}

    def recall(self, placed: FileInProcess) -> NDArray[np.intp]:
        """Fill in what is known of a file's copies in one process; which of them are still to explain."""
        known = self._known.get((placed.file.number, placed.base))
        if known is None or not len(known.frames):
            return np.arange(placed.private)
        frames = placed.frames
        at = np.minimum(np.searchsorted(known.frames, frames), len(known.frames) - 1)
        same = (known.frames[at] == frames) & (known.addresses[at] == placed.addresses) & placed.is_common
        page_of = np.full(len(known.frames), -1, np.int64)
        page_of[at[same]] = np.flatnonzero(same)
        placed.causes[same] = known.causes[at[same]]
        written = known.written[page_of[known.written[:, 0]] >= 0]
        placed.written = np.column_stack([page_of[written[:, 0]], written[:, 1:]]).astype(np.int32)
        return np.flatnonzero(~same)

    def keep(self, placed: FileInProcess) -> None:
        """Remember what was found of a file in one process, once nothing of it is in doubt any more."""
        key = placed.file.number, placed.base
        known = self._known.get(key)
        frames, common = placed.frames, placed.is_common
        told = common & (frames != 0) & (placed.causes & _UNKNOWN == 0)
        if known is not None and len(known.frames):
            at = np.minimum(np.searchsorted(known.frames, frames), len(known.frames) - 1)
            told &= known.frames[at] != frames
        if not told.any():
            return
        pages = np.flatnonzero(told)
        row_of = np.full(len(frames), -1, np.int64)
        row_of[pages] = np.arange(len(pages))
        written = placed.written[row_of[placed.written[:, 0]] >= 0]
        written = np.column_stack([row_of[written[:, 0]], written[:, 1:]]).astype(np.int32)
        new = _OfFile(frames[pages], placed.addresses[pages], placed.causes[pages], written)
        self._known[key] = _sorted(new if known is None else _joined(known, new))


def _joined(first: _OfFile, second: _OfFile) -> _OfFile:
    moved = second.written + np.array([len(first.frames), 0, 0], np.int32)
    return _OfFile(
        np.concatenate([first.frames, second.frames]),
        np.concatenate([first.addresses, second.addresses]),
        np.concatenate([first.causes, second.causes]),
        np.concatenate([first.written, moved]),
    )


def _sorted(known: _OfFile) -> _OfFile:
    """By frame; one that is there twice, at two addresses, once."""
    frames, order = np.unique(known.frames, return_index=True)
    row_of = np.full(len(known.frames), -1, np.int64)
    row_of[order] = np.arange(len(order))
    written = known.written[row_of[known.written[:, 0]] >= 0]
    written = np.column_stack([row_of[written[:, 0]], written[:, 1:]]).astype(np.int32)
    return _OfFile(frames, known.addresses[order], known.causes[order], written)
