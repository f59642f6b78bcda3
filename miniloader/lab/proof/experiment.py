"""The experiment behind a proof: what the workers do, and when the kernel is asked about them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from miniloader.elf import ElfImage, LoadPlan, Source
from miniloader.elf.source import unreadable
from miniloader.errors import ElfError, EvidenceError, LoadError
from miniloader.evidence.sharing import SHARED, SOLE, analyse
from miniloader.evidence.snapshot import ProcessRange, Snapshot, on_same_pages, take
from miniloader.files import open_regular
from miniloader.forking import importing
from miniloader.kernel.features import LevelName
from miniloader.kernel.probe import best_level
from miniloader.kernel.procfs import process_file, read_process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.page_bytes import read_contents, slot_vaddrs, worth_reading
from miniloader.lab.proof.claims import Evidence, FileState, judge_claims
from miniloader.lab.proof.proof import OnStep, Proof, Worked
from miniloader.lab.proof.spare_word import choose_word
from miniloader.lab.workers.crew import Crew
from miniloader.loader.policy import Policy, open_image
from miniloader.loader.surroundings import find_path

if TYPE_CHECKING:
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["experiment"]

_MOST_BSS: Final = 1 << 17  # bytes of bss that are touched, and of which pages that nobody has are shown
_PART: Final = 1 << 20  # bytes of the file that are read at once


def experiment(
    crew: Crew, path: str, level: LevelName | None, on_step: OnStep | None, allow: Mapping[str, Any]
) -> Proof:
    """Lead a fresh ``crew`` through the steps of a proof: see :func:`miniloader.lab.proof.prove.prove`."""
    path = os.path.abspath(find_path(path))
    image = open_image(Source.open(path), Policy(**allow))
    plan = image.plan(PAGE_SIZE)
    level = level or _best_level()
    prepared = _prepared(image) if allow.get("prepared") else None
    before = _state_of(path)
    readable = [
        (m.start, min(m.end, m.start + _MOST_BSS) if m.kind == "zero" else m.end)
        for m in plan.mappings
        if "r" in m.protection
    ]
    led = _LedCrew(crew, plan, level, on_step)

    led.begin("mapped")
    replies = crew.ask("map", step="mapped", path=path, **allow)
    led.bases = [reply["base"] for reply in replies]
    mapped = led.look("mapped")

    led.begin("touched")
    crew.ask("touch", step="touched", ranges=readable)
    touched = led.look("touched")

    led.begin("relocated")
    crew.ask("link", step="relocated")
    linked = led.look("linked")
    crew.ask("initialise", step="relocated")
    loaded = led.look("relocated")

    led.begin("written")
    sharing = analyse(loaded)
    fresh = np.logical_and.reduce(np.isin(sharing.states, (SHARED, SOLE)), axis=0)
    fresh_pages = frozenset(sharing.vaddrs[fresh].tolist())
    word = choose_word(image, plan, fresh_pages, idle=all(_threads(pid) == 1 for pid in led.pids))
    shown = worth_reading(sharing, [*slot_vaddrs(image), *([word.vaddr] if word else [])], PAGE_SIZE)
    contents = [read_contents("relocated", led.processes, shown, PAGE_SIZE)]
    stored, read = [], []
    if word is not None:
        writes = [{"vaddr": word.vaddr, "value": pid} for pid in led.pids]
        stored = [reply["before"] for reply in crew.ask_each("store", writes, step="written")]
        read = [reply["value"] for reply in crew.ask("fetch", step="written", vaddr=word.vaddr)]
    crew.ask("touch", step="written", ranges=readable)  # the kernel may have taken pages back meanwhile
    written = led.look("written")
    contents.append(read_contents("written", led.processes, shown, PAGE_SIZE))
    if word is not None:
        restores = [{"vaddr": word.vaddr, "value": value} for value in stored]
        crew.ask_each("store", restores, step="written")

    led.begin("exited")
    crew.dismiss(crew.workers[-1])
    exited = led.look("exited")

    snapshots = on_same_pages([mapped, touched, linked, loaded, written, exited])
    mapped, touched, linked, loaded, written, exited = snapshots
    evidence = Evidence(
        image=image,
        plan=plan,
        linked=linked,
        loaded=loaded,
        written=written,
        exited=exited,
        word=word,
        read=read,
        before=before,
        after=_state_if_there(path),
        prepared=prepared,
    )
    return Proof(
        path=path,
        plan=plan,
        evidence=level,
        processes=tuple(Worked(pid, base) for pid, base in zip(led.pids, led.bases, strict=True)),
        snapshots=(mapped, touched, loaded, written, exited),
        word=word,
        claims=judge_claims(evidence),
        contents=tuple(contents),
    )


def _prepared(image: ElfImage) -> Prepared:
    """What the cache has of the library; LoadError."""
    with importing:
        from miniloader.loader.prepared.index import find

    try:
        return find(image)
    except LoadError as error:
        raise LoadError(f"{image.path}: {error.message}", hint=error.hint) from None


class _LedCrew:
    """A crew that is led through the steps: who they are, and how to look at them."""

    def __init__(self, crew: Crew, plan: LoadPlan, level: LevelName, on_step: OnStep | None) -> None:
        self.pids = tuple(worker.pid for worker in crew.workers)
        self.bases: Sequence[int] = ()
        self._crew, self._plan, self._level, self._on_step = crew, plan, level, on_step

    @property
    def processes(self) -> tuple[tuple[int, int], ...]:
        """The pid and load bias of each."""
        return tuple(zip(self.pids, self.bases, strict=True))

    def begin(self, step: str) -> None:
        """Tell whoever listens."""
        if self._on_step is not None:
            self._on_step(step, self.pids)

    def look(self, step: str) -> Snapshot:
        """A snapshot of all, also of who has been dismissed; WorkerError when another one has died."""
        targets = [
            ProcessRange(pid, base, self._plan.start, self._plan.end)
            for pid, base in zip(self.pids, self.bases, strict=True)
        ]
        snapshot = take(targets, step=step, level=self._level, most_empty=_MOST_BSS // PAGE_SIZE)
        self._crew.check(step)
        return snapshot


def _best_level() -> LevelName:
    level = best_level()
    if level == "none":
        read_process_file(None, "smaps")  # says why not
        raise EvidenceError("/proc/self/smaps: does not tell what is mapped")
    return level


def _threads(pid: int) -> int:
    """How many threads a process has; 0 where that cannot be told."""
    try:
        return len(os.listdir(process_file(pid, "task")))
    except OSError:
        return 0


def _state_of(path: str) -> FileState:
    """The state of a file; holes are not read, since any length of them costs nothing to make.

    Beyond the size that it had as it was opened nothing is read, either: somebody may be writing to it.
    """
    digest, whole = hashlib.sha256(), True
    try:
        fd = open_regular(path)
        status = os.fstat(fd)
        if status.st_size == 0:
            os.close(fd)
        else:
            with closing(Source(fd, path)) as source:
                whole = list(islice(source.parts(0, status.st_size), 2)) == [(0, status.st_size)]
                for start, end in source.parts(0, status.st_size):
                    if not whole:
                        digest.update(f"{start}-{end}:".encode())
                    while start < end and (part := os.pread(fd, min(end - start, _PART), start)):
                        digest.update(part)
                        start += len(part)
    except OSError as error:
        raise unreadable(path, "file", error) from None
    return FileState(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, digest.hexdigest(), whole
    )


def _state_if_there(path: str) -> FileState | None:
    try:
        return _state_of(path)
    except ElfError:
        return None
