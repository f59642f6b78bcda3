"""Where the files that a process has mapped lie in it: the load bias of each, and its mappings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from miniloader.elf import LoadPlan
from miniloader.evidence.file_facts import FileFacts
from miniloader.kernel.maps import Vma
from miniloader.lab.audit.mapped_files import MappedFile, MappedFiles

__all__ = ["Arrangement", "Arrangements"]

_LOW: Final = 1 << 40  # below, there may be no room for a load bias
_NEAR: Final = 16  # images of one file that lie within each other

#: Start and end of each mapping from the first one's start on, and its file offset.
_Shape = tuple[tuple[int, int, int], ...]


class Arrangement(NamedTuple):
    """A file in a process: its load bias (address - vaddr), and its mappings (by index)."""

    file: MappedFile
    bias: int
    indices: list[int]


class Arrangements:
    """How files lie in processes: most processes map a file in the same way, but for where it begins.

    What was found for one process is kept for the next, as long as this object lives.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[FileFacts | None, _Shape], list[tuple[int, list[int]]]] = {}

    def of_process(self, pid: int, files: MappedFiles, vmas: Sequence[Vma]) -> Iterable[Arrangement]:
        """Every file that process ``pid`` has mapped privately, as often as it has it.

        ``vmas`` are all mappings of the process, by address.
        """
        for indices in _by_file(vmas):
            file = files.of(pid, vmas[indices[0]])
            start = vmas[indices[0]].start
            for distance, places in self._images(file, [vmas[index] for index in indices]):
                yield Arrangement(file, start + distance, [indices[place] for place in places])

    def _images(self, file: MappedFile, vmas: Sequence[Vma]) -> list[tuple[int, list[int]]]:
        """Each image's load bias, from the start of the first mapping on, and its mappings (by place)."""
        start = vmas[0].start
        shape = tuple([(vma.start - start, vma.end - start, vma.file_offset) for vma in vmas])
        key = file.facts, shape
        if key not in self._known or start < _LOW:
            plan = file.facts.plan if file.facts is not None else None
            images = _of_data(vmas) if plan is None else _of_images(plan, vmas)
            self._known[key] = [(bias - start, places) for bias, places in images]
        return self._known[key]


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


def _by_file(vmas: Sequence[Vma]) -> Iterable[list[int]]:
    """The private mappings of each file, by address."""
    files: dict[tuple[object, ...], list[int]] = {}  # as Identity, of which it would be one for each mapping
    for index, vma in enumerate(vmas):
        if vma.inode and not vma.shared:
            files.setdefault((vma.device, vma.inode, vma.path, vma.deleted), []).append(index)
    return files.values()


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
