"""What a test looks at: the pages of chosen libraries in some processes, and who wrote to the copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan
from miniloader.elf.debug_file import read_all_symbols
from miniloader.elf.symbols import SHN_ABS, SHN_UNDEF, STT_TLS
from miniloader.elf.tables import Table
from miniloader.errors import EvidenceError, ProcessGone, UsageError
from miniloader.evidence.cause import WORD_DTYPE, classify
from miniloader.evidence.cause_names import Cause, bit, cause_names
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.sharing import COPIED, COPIED_SHARED, Sharing, analyse
from miniloader.evidence.snapshot import ProcessRange, Snapshot, take
from miniloader.evidence.space import Space
from miniloader.forking import cached_property
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import has_merged
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.probe import best_level
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.explain import CHANGED, space_of
from miniloader.lab.audit.file_in_process import FileInProcess
from miniloader.lab.audit.mappings import AuditedMapping, mappings_over
from miniloader.lab.audit.select import matches
from miniloader.lab.audit.survey import Memo, locate, mappings_in
from miniloader.lab.erosion.erode import erosion_of
from miniloader.lab.erosion.memory import memory_in
from miniloader.lab.erosion.result import Erosion
from miniloader.values import dataclass

__all__ = ["CopiedPages", "LibraryMemory", "MemorySnapshot", "address_of", "snapshot"]

_BY_PROGRAM: Final = bit("write") | bit("overwritten") | bit("bss")


@dataclass(frozen=True, eq=False)
class CopiedPages:
    """The copied pages of one library's file in one process, by vaddr.

    ``causes`` has each of them, with what :mod:`miniloader.evidence.cause` says; ``reasons`` why some are
    unknown; ``words`` (WORD_DTYPE) what the program has written.
    """

    pid: int
    causes: Mapping[int, tuple[Cause, ...]]
    reasons: Mapping[int, str]
    words: Table


@dataclass(frozen=True, eq=False)
class LibraryMemory:
    """One library in several processes; ``look`` has a row for each of them, as ``copies`` has."""

    path: str
    facts: FileFacts
    plan: LoadPlan
    look: Snapshot
    sharing: Sharing
    copies: tuple[CopiedPages, ...]

    @property
    def name(self) -> str:
        """The file's name without directories."""
        return self.path.rpartition("/")[2]

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that have the library, each once, however often it is mapped there."""
        return tuple(dict.fromkeys(process.pid for process in self.look.processes))

    @property
    def of_file(self) -> NDArray[np.bool_]:
        """Which pages are mapped from a file, shape (processes, pages)."""
        return _of_file(self.look)

    @property
    def elsewhere(self) -> NDArray[np.bool_]:
        """Which pages are copies that a process not looked at has as well, a relative by fork; same shape."""
        exclusive = np.stack([process.pages["exclusive"] for process in self.look.processes])
        elsewhere: NDArray[np.bool_] = (self.sharing.states == COPIED) & ~exclusive
        return elsewhere

    def pages(self, section: str | None, symbols: Collection[str]) -> NDArray[np.bool_]:
        """Which pages have a byte of the section or of a symbol; all pages, when there is neither.

        Raises UsageError for a section or symbol that this library does not have.
        """
        spans = [span for name in symbols for span in self.symbol(name)]
        if section is not None:
            named = [(start, end) for start, end, name in self.facts.section_spans if name == section]
            if not named:
                names = ", ".join(name for _, _, name in self.facts.section_spans) or "none at all"
                raise UsageError(f"{self.path}: no section {section} in memory; it has {names}")
            spans += named
        starts = self.sharing.vaddrs
        if section is None and not symbols:
            return np.ones(len(starts), np.bool_)
        chosen = np.zeros(len(starts), np.bool_)
        for start, end in spans:
            chosen |= (starts < end) & (starts + np.uint64(PAGE_SIZE) > start)
        return chosen

    def symbol(self, name: str) -> list[tuple[int, int]]:
        """Where the symbol ``name`` lies: vaddrs [start, end), several when files had statics of that name.

        Raises UsageError when there is none, as of a library that was stripped.
        """
        image, spans = self.facts.image, set()
        for table in () if image is None else (read_all_symbols(image), self.facts.symbols):
            if table is None:
                continue
            real = ~np.isin(table.rows["shndx"], (SHN_UNDEF, SHN_ABS)) & (table.type != STT_TLS)
            for index in np.flatnonzero(real).tolist():
                if table.name(index) == name:
                    start = int(table.rows["value"][index])
                    spans.add((start, start + max(int(table.rows["size"][index]), 1)))
        if not spans:
            raise UsageError(f"{self.path}: no symbol {name} in memory")
        return sorted(spans)


@dataclass(frozen=True, eq=False)
class MemorySnapshot:
    """The chosen libraries in the processes ``pids`` at one moment; ``step`` is a name for it.

    ``level`` is the level of evidence.  Below ``flags`` nothing is known of pages: then there are no
    ``libraries``, and ``sums`` has the bytes of anonymous memory that ``smaps`` counts in each file's
    mappings, by path and pid.  ``mappings`` are all memory of the processes, by kind and name; their PSS is
    left out.  ``erosion`` is what relatives among them have no longer in common; None where frames are not
    known.
    """

    step: str
    level: LevelName
    pids: tuple[int, ...]
    libraries: tuple[LibraryMemory, ...]
    sums: Mapping[str, Mapping[int, int]]
    mappings: tuple[AuditedMapping, ...] = ()
    erosion: tuple[Erosion, ...] | None = None

    def __repr__(self) -> str:
        names = ", ".join(sorted(path.rpartition("/")[2] for path in self.paths))
        return f"<MemorySnapshot {self.step!r} of {len(self.pids)} processes, level {self.level}: {names}>"

    @property
    def paths(self) -> tuple[str, ...]:
        """The files."""
        return tuple(self.sums) or tuple(library.path for library in self.libraries)

    def path(self, library: str | None) -> str:
        """The one file that ``library`` names: by its path, its name, a part of it or a shell pattern.

        Raises UsageError when that is none, or several.
        """
        paths = [path for path in self.paths if library in (None, path, path.rpartition("/")[2])]
        paths = paths or [path for path in self.paths if _fits(path, library)]
        if len(paths) != 1:
            names = ", ".join(paths or self.paths)
            trouble = "several libraries" if len(paths) > 1 else f"no library {library!r}"
            raise UsageError(f"{trouble} in this snapshot, expected one of: {names}")
        return paths[0]

    def library(self, library: str | None = None) -> LibraryMemory:
        """The one library that ``library`` names, see :meth:`path`."""
        path = self.path(library)
        return next(memory for memory in self.libraries if memory.path == path)


def snapshot(
    pids: Iterable[int], step: str = "", *, library: str | None = None, level: LevelName | None = None
) -> MemorySnapshot:
    """Look at processes: those of a crew, or any others that may be read.

    ``library`` chooses files by a path, a part of it or a shell pattern; by default all that are mapped.
    ``level`` looks no closer than that (by default as close as is possible here).

    Raises UsageError when no process has such a library, ProcessGone when one has ended, EvidenceError when
    one may not be read or the level is not to be had here.
    """
    processes = tuple(dict.fromkeys(pids))
    chosen = level or best_level()
    if chosen in ("totals", "none"):
        return MemorySnapshot(step, chosen, processes, (), _sums(processes, library))
    memo = Memo()
    looks = [_ProcessFiles(pid, memo, library, frames=chosen == "frames") for pid in processes]
    by_path: dict[str, list[tuple[_ProcessFiles, FileInProcess]]] = {}
    for process in looks:
        for mapped in process.chosen:
            by_path.setdefault(mapped.file.identity.path, []).append((process, mapped))
    if not by_path:
        raise _nowhere(library, {mapped.file.identity.path for process in looks for mapped in process.found})
    libraries = tuple(_library(path, found, step, level) for path, found in sorted(by_path.items()))
    mappings = mappings_over(process.mappings.rows(process.pid, None) for process in looks)
    memories = [process.memory for process in looks if process.memory is not None]
    merged = None if has_merged() else np.empty(0, np.uint64)
    erosion = erosion_of(memories, merged) if chosen == "frames" else None
    return MemorySnapshot(step, chosen, processes, libraries, {}, mappings, erosion)


def address_of(pid: int, library: str, symbol: str) -> tuple[int, int]:
    """Where a symbol of a library lies in process ``pid``, and its size in bytes."""
    memory = snapshot([pid], library=library).library(library)
    start, end = memory.symbol(symbol)[0]
    return memory.look.processes[0].base + start, end - start


def _fits(path: str, library: str | None) -> bool:
    """Whether a file is what somebody calls ``library``; a path may look like a pattern and be none."""
    return library is None or library == path or matches(library, path, path.rpartition("/")[2])


def _nowhere(library: str | None, mapped: Iterable[str]) -> UsageError:
    names = ", ".join(sorted(path.rpartition("/")[2] for path in mapped))
    return UsageError(f"library {library!r}: none of these processes has one mapped, only {names}")


def _sums(pids: Sequence[int], library: str | None) -> dict[str, dict[int, int]]:
    """What ``smaps`` says, where pages cannot be told apart."""
    sums: dict[str, dict[int, int]] = {}
    mapped = set()
    for pid in pids:
        for mapping in read_smaps(pid):
            path = mapping.vma.path
            if not mapping.vma.is_file or mapping.vma.shared:
                continue
            mapped.add(path)
            if _fits(path, library):
                by_pid = sums.setdefault(path, dict.fromkeys(pids, 0))
                by_pid[pid] += mapping.sizes.get("Anonymous", 0) + mapping.sizes.get("Swap", 0)
    if not sums:
        raise _nowhere(library, mapped)
    return sums


class _ProcessFiles:
    """What is mapped in one process, which of it was chosen, and why its copies are copies."""

    def __init__(self, pid: int, memo: Memo, library: str | None, *, frames: bool) -> None:
        self.pid, self.layouts = pid, memo.layouts
        with PageMap(pid) as pagemap:
            self.vmas, pages, self.found = locate(pid, pagemap, memo, frames=frames)
        self.memory = memory_in(pid, pages) if frames else None
        self.mappings = mappings_in(pid, self.vmas, pages, self.found, memo)
        self.chosen = [mapped for mapped in self.found if self._wanted(mapped, library)]

    def _wanted(self, mapped: FileInProcess, library: str | None) -> bool:
        path = mapped.file.identity.path
        if library is None:
            return mapped.file.facts is not None and mapped.file.facts.plan is not None
        if not _fits(path, library):
            return False
        if mapped.file.facts is None:
            raise EvidenceError(f"{path}: {mapped.file.trouble}")
        return mapped.file.facts.plan is not None

    @cached_property
    def space(self) -> Space:
        """What is where."""
        return space_of(self.pid, self.vmas, self.found)


def _library(
    path: str, mapped: Sequence[tuple[_ProcessFiles, FileInProcess]], step: str, level: LevelName | None
) -> LibraryMemory:
    facts = mapped[0][1].file.facts
    if facts is None or facts.plan is None:
        raise AssertionError(f"{path} was chosen, so its file could be read")
    plan = facts.plan
    copies = [_copies(process, file) for process, file in mapped]
    targets = [ProcessRange(process.pid, file.base, plan.start, plan.end) for process, file in mapped]
    look = take(targets, step=step, level=level)
    for process in look.processes:
        if process.gone:
            raise ProcessGone(process.pid, f"has ended before it could be looked at: {process.reason}")
        if process.reason:
            raise EvidenceError(f"process {process.pid}: {process.reason}")
    sharing = analyse(look)
    copied = np.isin(sharing.states, (COPIED, COPIED_SHARED)) & _of_file(look)
    settled = (
        _settled(present, sharing.vaddrs[row].tolist()) for present, row in zip(copies, copied, strict=True)
    )
    return LibraryMemory(path, facts, plan, look, sharing, tuple(settled))


def _of_file(look: Snapshot) -> NDArray[np.bool_]:
    """Which pages are mapped from a file, shape (processes, pages)."""
    rows = []
    for process in look.processes:
        named = np.array([backing.vma.is_file for backing in process.mappings] + [False])
        rows.append(named[process.pages["mapping"]])
    return np.stack(rows)


def _copies(process: _ProcessFiles, mapped: FileInProcess) -> CopiedPages:
    """Why the pages that were copies when the process was located are that."""
    vaddrs, facts = mapped.vaddrs, mapped.file.facts
    nothing = np.empty(0, WORD_DTYPE)
    if facts is None or not len(vaddrs):
        return CopiedPages(process.pid, {}, {}, nothing)
    try:
        with ProcessMemory(process.pid) as memory:
            live, read = memory.pages(mapped.addresses)
    except ProcessGone:
        raise
    except EvidenceError as error:
        unread = vaddrs.tolist()
        return CopiedPages(
            process.pid, dict.fromkeys(unread, ("unknown",)), dict.fromkeys(unread, str(error)), nothing
        )
    answer = classify(
        facts, process.space, mapped.base, vaddrs, mapped.file_offsets, live, layouts=process.layouts
    )
    trouble = facts.trouble or "a relocation's value lies in a file that cannot be read"
    causes = zip(vaddrs.tolist(), map(cause_names, answer.causes.tolist()), strict=True)
    return CopiedPages(
        process.pid,
        {vaddr: names for (vaddr, names), was_read in zip(causes, read.tolist(), strict=True) if was_read},
        dict.fromkeys(vaddrs[answer.unreadable].tolist(), trouble),
        answer.words[(answer.words["cause"] & _BY_PROGRAM).astype(np.bool_) & read[answer.words["page"]]],
    )


def _settled(copies: CopiedPages, copied: Sequence[int]) -> CopiedPages:
    """``copies`` of the pages that were copies when they were looked at afterwards, ``copied``."""
    causes = {vaddr: copies.causes.get(vaddr, ("unknown",)) for vaddr in copied}
    changed = dict.fromkeys([vaddr for vaddr in copied if vaddr not in copies.causes], CHANGED)
    return replace(copies, causes=causes, reasons={**changed, **copies.reasons})
