"""Where the files that a process has mapped lie in it: the load bias of each, and its mappings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from miniloader.elf import LoadPlan
from miniloader.kernel.maps import Vma
from miniloader.lab.audit.mapped_files import MappedFile, MappedFiles
from miniloader.lab.audit.outline import Outline, Outlines
from miniloader.values import NamedTuple

__all__ = ["Arrangement", "Arrangements"]

_LOW: Final = 1 << 40  # below, there may be no room for a load bias
_NEAR: Final = 16  # images of one file that lie within each other
_WORD: Final = 8
_WAY: Final = 3 * _WORD  # bytes of the way of one mapping


class Arrangement(NamedTuple):
    """A file in a process: its load bias (address - vaddr), its mappings (by index), and their bytes."""

    file: MappedFile
    bias: int
    indices: Sequence[int]
    size: int


class _Known(NamedTuple):
    """A file, and the images of it: load bias from the first mapping on, mappings (by place), their bytes."""

    file: MappedFile
    images: list[tuple[int, list[int], int]]


class Arrangements:
    """How files lie in processes: most processes map a file in the same way, but for where it begins.

    What was found for one process is kept for the next, as long as this object lives.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], _Known] = {}

    def of_process(
        self, pid: int, files: MappedFiles, vmas: Sequence[Vma], outline: Outline | None = None
    ) -> Iterable[Arrangement]:
        """Every file that process ``pid`` has mapped privately, as often as it has it.

        ``vmas`` are all mappings of the process, by address; ``outline`` is theirs, of the same outlines as
        those of the processes before.
        """
        outline = outline or Outlines().of(vmas)
        ways = _Ways(outline)
        for indices in outline.files:
            start = vmas[indices[0]].start
            key = ways.of(indices), start if start < _LOW else 0
            known = self._known.get(key)
            if known is None:
                file, mapped = files.of(pid, vmas[indices[0]]), [vmas[index] for index in indices]
                known = _Known(file, [*_images(file, mapped)])
                if file.facts is not None:  # else another process may offer a way to it
                    self._known[key] = known
            for distance, places, size in known.images:
                chosen = indices if len(places) == len(indices) else [indices[place] for place in places]
                yield Arrangement(known.file, start + distance, chosen, size)


class _Ways:
    """The way in which each file is mapped in a process: the lines, sizes and distances of its mappings."""

    def __init__(self, outline: Outline) -> None:
        self._starts = outline.starts
        self._rows = np.empty((len(outline.lines), 3), np.uint64)
        self._rows[:, 0], self._rows[:, 1] = outline.lines, outline.sizes
        self._rows[:-1, 2] = outline.starts[1:] - outline.starts[:-1]
        self._bytes = self._rows.tobytes()

    def of(self, indices: Sequence[int]) -> bytes:
        """The way of the mappings ``indices``, which most often follow one another."""
        first, last = indices[0], indices[-1]
        if last - first == len(indices) - 1:
            return self._bytes[first * _WAY : last * _WAY + _WAY - _WORD]  # not how far the next file is
        rows = self._rows[indices]
        rows[:-1, 2] = np.diff(self._starts[indices])
        return rows.tobytes()[:-_WORD]


def _images(file: MappedFile, vmas: Sequence[Vma]) -> Iterable[tuple[int, list[int], int]]:
    """Each image's load bias, from where the first mapping starts, its mappings (by place), their bytes."""
    plan = file.facts.plan if file.facts is not None else None
    for bias, places in _of_data(vmas) if plan is None else _of_images(plan, vmas):
        yield bias - vmas[0].start, places, sum([vmas[place].size for place in places])


def _of_data(vmas: Sequence[Vma]) -> Iterable[tuple[int, list[int]]]:
    """The load biases of a file that is no image, and which mappings (by place) have each."""
    images: dict[int, list[int]] = {}
    for place, vma in enumerate(vmas):
        images.setdefault(vma.start - vma.file_offset, []).append(place)
    return images.items()


def _of_images(plan: LoadPlan, vmas: Sequence[Vma]) -> Iterable[tuple[int, list[int]]]:
    """The load biases of the images of a file, and which mappings (by place) are part of each.

    A mapping is looked for in the last few images that reach so far: it takes time in proportion to how often
    the file is mapped.
    """
    parts = _FileParts(plan)
    images, near = list[tuple[int, list[int]]](), list[tuple[tuple[int, int], int, list[int]]]()
    for place, vma in enumerate(vmas):
        near = [image for image in near if image[0][1] > vma.start][-_NEAR:]
        for span, bias, places in near:
            if _belongs(plan, vma, bias, span):
                places.append(place)
                break
        else:
            bias, span = parts.bias(vma)
            images.append((bias, [place]))
            near.append((span, *images[-1]))
    return images


class _FileParts:
    """Which part of a plan has a place of its file: asked for each image, and there may be many of both."""

    def __init__(self, plan: LoadPlan) -> None:
        parts = [mapping for mapping in plan.mappings if mapping.kind == "file"]
        self._span = plan.start, plan.end
        self._start = np.array([part.start for part in parts], np.int64)
        self._offset = np.array([part.file_offset for part in parts], np.int64)
        self._length = np.array([part.length for part in parts], np.int64)

    def bias(self, vma: Vma) -> tuple[int, tuple[int, int]]:
        """The load bias that puts the file's image where its first mapping is, and its addresses."""
        distance = vma.file_offset - self._offset
        biases = vma.start - self._start - distance
        fits = np.flatnonzero((distance >= 0) & (distance < self._length) & (biases >= 0))
        if not len(fits):
            return vma.start - vma.file_offset, (vma.start, vma.end)
        bias = int(biases[fits[0]])
        return bias, (bias + self._span[0], bias + self._span[1])


def _belongs(plan: LoadPlan, vma: Vma, bias: int, span: tuple[int, int]) -> bool:
    """Whether a mapping is part of the image at ``bias``: where it should be, with what should be there."""
    if not (span[0] <= vma.start and vma.end <= span[1]):
        return False
    mapping = plan.at(vma.start - bias)
    if mapping is None or mapping.kind != "file":
        return True  # a gap, which is reserved by a mapping of the file
    return vma.file_offset == mapping.file_offset + (vma.start - bias - mapping.start)
