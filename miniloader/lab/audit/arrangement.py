"""Where the files that a process has mapped lie in it: the load bias of each, and its mappings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from miniloader.evidence.slots import FileFacts
from miniloader.kernel.maps import Vma
from miniloader.lab.audit.mapped_files import MappedFile, MappedFiles

__all__ = ["Arrangement", "Arrangements"]

_LOW: Final = 1 << 40  # below, there may be no room for a load bias

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
        self._known: dict[tuple[FileFacts | None, _Shape], tuple[int, list[int]]] = {}

    def of_process(self, pid: int, files: MappedFiles, vmas: Sequence[Vma]) -> Iterable[Arrangement]:
        """Every file that process ``pid`` has mapped privately, as often as it has it.

        ``vmas`` are all mappings of the process, by address.
        """
        for indices in _by_file(vmas):
            file = files.of(pid, vmas[indices[0]])
            while indices:
                bias, places = self._first(file, [vmas[index] for index in indices])
                belonging = [indices[place] for place in places]
                yield Arrangement(file, bias, belonging)
                indices = [index for index in indices if index not in belonging]

    def _first(self, file: MappedFile, vmas: Sequence[Vma]) -> tuple[int, list[int]]:
        """The load bias of the first mapping, and which ones (by place) belong to the same image."""
        start = vmas[0].start
        shape = tuple([(vma.start - start, vma.end - start, vma.file_offset) for vma in vmas])
        key = file.facts, shape
        if key not in self._known or start < _LOW:
            bias, span = _bias(file, vmas[0])
            places = [at for at, vma in enumerate(vmas) if at == 0 or _belongs(file, vma, bias, span)]
            self._known[key] = bias - start, places
        distance, places = self._known[key]
        return start + distance, places


def _by_file(vmas: Sequence[Vma]) -> Iterable[list[int]]:
    """The private mappings of each file, by address."""
    files: dict[tuple[object, ...], list[int]] = {}  # as Identity, of which it would be one for each mapping
    for index, vma in enumerate(vmas):
        if vma.inode and not vma.shared:
            files.setdefault((vma.device, vma.inode, vma.path, vma.deleted), []).append(index)
    return files.values()


def _bias(file: MappedFile, vma: Vma) -> tuple[int, tuple[int, int]]:
    """The load bias that puts the file's image where its first mapping is, and its addresses."""
    plan = file.facts.plan if file.facts is not None else None
    for mapping in plan.mappings if plan is not None else ():
        distance = vma.file_offset - mapping.file_offset
        if plan is not None and mapping.kind == "file" and 0 <= distance < mapping.length:
            bias = vma.start - mapping.start - distance
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
