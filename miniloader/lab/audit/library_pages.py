"""The libraries of an audit page by page, looked at once or again, for a person to see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from miniloader.elf import ElfImage, LoadPlan
from miniloader.errors import ElfError, EvidenceError
from miniloader.evidence.sharing import analyse
from miniloader.evidence.snapshot import ProcessRange, Snapshot, take
from miniloader.forking import cached_property
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.lab.audit.result import Audit, AuditedLibrary, LibraryProcess
from miniloader.lab.library_study import LibraryStudy
from miniloader.lab.page_bytes import Contents, read_contents, slot_vaddrs, worth_reading
from miniloader.values import dataclass

__all__ = ["Sight", "look", "look_again"]

_MOST_LIBRARIES: Final = 6
_MOST_PROCESSES: Final = 16
_MOST_LOOKS: Final = 12
_MOST_PAGES: Final = 1 << 20  # of one library


@dataclass(frozen=True, eq=False)
class Sight:
    """One library of an audit in the first ``processes`` that have it, those with the most copies first.

    ``snapshots`` and ``contents`` have one element for each look.
    """

    library: AuditedLibrary
    image: ElfImage
    plan: LoadPlan
    processes: tuple[LibraryProcess, ...]
    snapshots: tuple[Snapshot, ...]
    contents: tuple[Contents, ...]

    @cached_property
    def study(self) -> LibraryStudy:
        """What its file says of its pages, beside what they hold."""
        return LibraryStudy(self.image, self.plan, self.contents)


def look(audit: Audit, step: str = "now") -> tuple[Sight, ...]:
    """The first libraries of ``audit`` page by page, as they are now; without what is no ELF image.

    Raises EvidenceError where the kernel does not tell as much as the audit had.
    """
    sights, files = list[Sight](), MappedFiles()
    for library in audit.libraries:
        sight = _sight(library, files)
        if sight is not None:
            sights.append(_looked(sight, step, audit))
        if len(sights) == _MOST_LIBRARIES:
            break
    return tuple(sights)


def look_again(sights: tuple[Sight, ...], audit: Audit, step: str) -> tuple[Sight, ...]:
    """The pages of ``sights`` once more, after a later ``audit`` of the same processes.

    Of many looks every second one is forgotten: the first, and a dozen at most, are kept.
    """
    libraries = {(library.path, library.build_id): library for library in audit.libraries}
    later = []
    for sight in sights:
        library = libraries.get((sight.library.path, sight.library.build_id), sight.library)
        later.append(_looked(_thinned(replace(sight, library=library)), step, audit))
    return tuple(later)


def _thinned(sight: Sight) -> Sight:
    if len(sight.snapshots) < _MOST_LOOKS:
        return sight
    return replace(sight, snapshots=sight.snapshots[::2], contents=sight.contents[::2])


def _sight(library: AuditedLibrary, files: MappedFiles) -> Sight | None:
    processes = sorted(library.processes, key=lambda process: -process.private)
    for process in processes[:_MOST_PROCESSES]:
        for image in _images(process.pid, library, files):
            plan = image.plan(PAGE_SIZE)
            # Of who has the end of it alone, at a low address, the image would begin below 0.
            whole = [process for process in processes if process.base + plan.end < 1 << 63]
            chosen = tuple(whole[:_MOST_PROCESSES])
            until = max((_end(plan, library.path, process) for process in chosen), default=0)
            return Sight(library, image, _until(plan, until), chosen, (), ()) if chosen else None
    return None


def _end(plan: LoadPlan, path: str, process: LibraryProcess) -> int:
    """The vaddr up to which an image is mapped in a process: how much bss there is its file only claims."""
    end, most = plan.start, min(plan.end, plan.start + _MOST_PAGES * PAGE_SIZE)
    try:
        vmas = read_maps(process.pid, start=process.base + plan.start, end=process.base + most)
    except EvidenceError:  # it has ended: the look will say so
        return end
    for vma in vmas:
        if vma.path != path and (vma.is_file or vma.start > process.base + end):
            break
        end = vma.end - process.base
    return min(end, most)


def _until(plan: LoadPlan, end: int) -> LoadPlan:
    """``plan`` without what lies behind ``end``; its first page stays."""
    end = max(end, plan.start + PAGE_SIZE)
    kept = [mapping for mapping in plan.mappings if mapping.start < end]
    return replace(plan, mappings=(*kept[:-1], replace(kept[-1], end=min(kept[-1].end, end))))


def _images(pid: int, library: AuditedLibrary, files: MappedFiles) -> Iterator[ElfImage]:
    """The library's file as it is mapped in the process; nothing where it cannot be read, or is no image."""
    try:
        vmas = read_maps(pid)
    except EvidenceError:  # it has ended: maybe another one has it
        return
    for vma in vmas:
        if vma.is_file and not vma.shared and vma.path == library.path:
            file = files.of(pid, vma)
            image = file.facts.image if file.facts is not None else None
            if image is not None and file.build_id == library.build_id and _makes_sense(image):
                yield image


def _makes_sense(image: ElfImage) -> bool:
    """Whether all is in order that is said of pages beside what they hold."""
    try:
        _ = image.symbols, image.relocations, image.sections, slot_vaddrs(image)
    except ElfError:
        return False
    return True


def _looked(sight: Sight, step: str, audit: Audit) -> Sight:
    """``sight`` with one more look."""
    plan, places = sight.plan, [(process.pid, process.base) for process in sight.processes]
    targets = [ProcessRange(pid, base, plan.start, plan.end) for pid, base in places]
    snapshot = take(targets, step=step, level=audit.level)
    vaddrs = worth_reading(analyse(snapshot), slot_vaddrs(sight.image), PAGE_SIZE)
    contents = read_contents(step, places, vaddrs, PAGE_SIZE)
    return replace(sight, snapshots=(*sight.snapshots, snapshot), contents=(*sight.contents, contents))
