"""The files of all processes of an audit: where each is, and the frames of its own pages there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.frames import distinct
from miniloader.lab.audit.file_in_process import FileInProcess
from miniloader.lab.audit.mapped_files import MappedFile
from miniloader.lab.audit.process_pages import Narrow
from miniloader.lab.audit.survey import Survey
from miniloader.values import NamedTuple

__all__ = ["Occurrence", "Occurrences", "distinct_in", "occurrences_of"]


class Occurrence(NamedTuple):
    """A file in process ``pid``; ``pss`` is what it takes there in proportion, in bytes; None: not known.

    ``number`` counts those of all files, as the processes have them.
    """

    number: int
    pid: int
    placed: FileInProcess
    pss: int | None

    @property
    def file(self) -> MappedFile:
        """The file."""
        return self.placed.file


class Occurrences(NamedTuple):
    """A file and all the ``places`` where it is, as the processes have them; the frames of its own pages."""

    file: MappedFile
    places: list[Occurrence]
    frames: Narrow


def occurrences_of(surveys: Sequence[Survey], pss: Sequence[NDArray[np.float64] | None]) -> list[Occurrences]:
    """The files of all processes; ``pss`` is, for each process, that of each of its mappings in bytes."""
    files, numbers = dict[int, list[Occurrence]](), count()
    for process, pss_of in zip(surveys, pss, strict=True):
        pid, by_mapping = process.pid, None if pss_of is None else pss_of.tolist()
        for placed in process.files:
            takes = None if by_mapping is None else round(_sum_at(by_mapping, placed.mappings))
            occurrence = Occurrence(next(numbers), pid, placed, takes)
            files.setdefault(placed.file.number, []).append(occurrence)
    return [
        Occurrences(
            places[0].file, places, distinct_in([occurrence.placed.file_frames for occurrence in places])
        )
        for places in files.values()
    ]


def _sum_at(values: Sequence[float], indices: Sequence[int]) -> float:
    """The sum of the values at ``indices``, which ascend and most often follow one another."""
    first, last = indices[0], indices[-1]
    if last - first == len(indices) - 1:
        return sum(values[first : last + 1])
    return sum([values[index] for index in indices])


def distinct_in(arrays: Iterable[Narrow]) -> Narrow:
    """The different values in all arrays, sorted."""
    return distinct(np.concatenate([np.empty(0, np.uint32), *arrays]))
