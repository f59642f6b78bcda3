"""``audit``: look at running processes, and put together what they cost and what their libraries share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cmp_to_key, partial
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.forking import importing
from miniloader.kernel.features import LevelName
from miniloader.kernel.frames import KPF, distinct, frame_flags, has_merged, marks_merged
from miniloader.kernel.probe import level_for
from miniloader.kernel.procfs import read_process_file, require_proc
from miniloader.kernel.smaps import read_rollup
from miniloader.kernel.syscalls import PAGE_SIZE, compare_memory
from miniloader.lab.audit.library import libraries_of
from miniloader.lab.audit.mapped_files import Identity, MappedFiles
from miniloader.lab.audit.mappings import mappings_over, pss_by_frames
from miniloader.lab.audit.occurrences import occurrences_of
from miniloader.lab.audit.result import Audit, AuditedProcess, Unreadable
from miniloader.lab.audit.sparing import sparing
from miniloader.lab.audit.survey import Memo, Survey, survey
from miniloader.lab.erosion.result import Erosion
from miniloader.lab.workers.fork_map import share_out
from miniloader.lab.workers.patient import Blocked, PatientCalls
from miniloader.shortage import shortage_behind

__all__ = ["audit", "jobs_for"]

_WHO_ANSWERS: Final = "see who fills its pages (userfaultfd) or serves its files (FUSE, NFS)"
_WORTH_A_JOB: Final = 12  # processes; to look at fewer takes no longer than to ask for help


def audit(
    pids: Iterable[int],
    *,
    library: str | None = None,
    causes: bool = True,
    level: LevelName | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> Audit:
    """Look at the processes ``pids`` and say what all their memory is, and of every file what is shared.

    Processes with one address space (vfork(2), CLONE_VM) are one memory, which is counted once.
    ``library`` chooses files by a shell pattern, or a part of the path.  ``causes=False`` only counts.
    ``level`` asks for less evidence than the best that works here.  ``on_progress`` is told how many
    processes are done, about, and of how many.  At most so many ``jobs`` look at once (see :func:`jobs_for`):
    more than one forks, which is not for a program with threads (fork(2)).  Nothing is stopped, nothing
    written, nothing mapped into the processes.

    A process that ends meanwhile or may not be read is listed as unreadable.  Raises EvidenceError where
    the kernel tells nothing about pages (below level ``flags``), or less than ``level``.

    >>> import os
    >>> found = audit([os.getpid()], library="libc.so*", causes=False)
    >>> [library.name for library in found.libraries]
    ['libc.so.6']
    >>> found.libraries[0].private < found.libraries[0].present
    True
    """
    require_proc()
    chosen = level_for(level, at_least="flags")
    memo, processes, when = Memo(), list(dict.fromkeys(pids)), time.time()
    look = partial(survey, memo=memo, causes=causes, frames=chosen == "frames", wanted=_wanted(library))
    shares = max(1, min(jobs, jobs_for(processes)))
    done, auditor = 0, os.getpid()

    def tell(more: int) -> None:
        nonlocal done
        done = min(done + more, len(processes))
        if on_progress is not None and os.getpid() == auditor:  # and not in a helper
            on_progress(done, len(processes))

    def look_at(part: Sequence[int], step: int = shares) -> list[Survey | Unreadable]:
        answers = dict[int, Survey | Unreadable]()
        if auditor in part:  # before there is a thread more; and nobody else fills its pages
            answers[auditor] = _look(auditor, look)
            tell(step)
        others = [pid for pid in part if pid != auditor]
        with PatientCalls() as calls:
            surveys = calls.call_each([partial(_look, pid, look) for pid in others], partial(tell, step))
        for pid, answer in zip(others, surveys, strict=True):
            answers[pid] = _unreadable(pid, answer) if isinstance(answer, Blocked) else answer
        return [answers[pid] for pid in part]

    tell(0)
    # The first is looked at before anybody helps: most of the files are known then.
    answers = look_at(processes[:1], 1)
    answers += (answer for part in share_out(look_at, processes[1:], shares) for answer in part)
    if done < len(processes):  # helpers have done more than this one
        tell(len(processes))
    surveys = [answer for answer in answers if isinstance(answer, Survey)]
    unreadable = [answer for answer in answers if isinstance(answer, Unreadable)]
    assemble = partial(_assembled, files=memo.files, level=chosen, when=when, causes=causes)
    with PatientCalls() as calls:
        result, left_out = sparing(surveys, lambda part: calls.call(partial(assemble, part)))
    unreadable += [_unreadable(process.pid, error) for process, error in left_out]
    return replace(result, unreadable=tuple(unreadable))


def _assembled(
    surveys: Sequence[Survey], *, files: MappedFiles, level: LevelName, when: float, causes: bool
) -> Audit:
    """What the looks at processes come to together."""
    _settle(surveys, files)
    leaders = _address_spaces(surveys)
    distinct_memory = [process for process in surveys if leaders[process.pid] == process.pid]
    pss = _pss(distinct_memory, level)
    occurrences = occurrences_of(distinct_memory, [pss[process.pid][1] for process in distinct_memory])
    merged = _merged(surveys, level)
    return Audit(
        level=level,
        when=when,
        page_size=PAGE_SIZE,
        explained=causes,
        processes=tuple(
            _cost(process, leaders[process.pid], pss[leaders[process.pid]][0], merged) for process in surveys
        ),
        libraries=libraries_of(occurrences, level, merged, causes=causes),
        unreadable=(),
        mappings=mappings_over(
            process.mappings.rows(process.pid, pss[process.pid][1]) for process in distinct_memory
        ),
        erosion=_eroded(distinct_memory, merged, contents=causes) if level == "frames" else None,
    )


def _eroded(
    surveys: Sequence[Survey], merged: NDArray[np.uint64] | None, *, contents: bool
) -> tuple[Erosion, ...]:
    """What relatives have no longer in common; who has none is spared the import of what looks for it."""
    if len({process.known.stack for process in surveys}) == len(surveys):
        return ()
    with importing:
        from miniloader.lab.erosion.erode import erosion

    return erosion(surveys, merged, contents=contents)


def jobs_for(pids: Collection[int]) -> int:
    """How many jobs are worth their while for ``pids``.

    One where this process is among them: the helpers that it forks would share its memory.

    >>> jobs_for(range(1 << 22, (1 << 22) + 100))
    8
    """
    return 1 if os.getpid() in pids else max(1, len(pids) // _WORTH_A_JOB)


def _settle(surveys: Sequence[Survey], files: MappedFiles) -> None:
    """Have all ``surveys`` refer to the same ``files``: those that a helper met are its own.

    What a helper could read may be gone by now, with the process: then the causes stay, without names.
    """
    for process in surveys:
        for placed in process.files:
            placed.file = file = files.same(placed.file)
            if file.facts is None:
                placed.reasons = dict.fromkeys(range(len(placed.causes)), file.trouble) | placed.reasons


def _look(pid: int, look: Callable[[int], Survey]) -> Survey | Unreadable:
    try:
        return look(pid)
    except Exception as error:  # noqa: BLE001 - whatever one process has, the others are judged
        return _unreadable(pid, error)


def _unreadable(pid: int, error: Exception) -> Unreadable:
    """What is said of a process in place of a look at it, which raised ``error``."""
    if isinstance(error, EvidenceError):
        gone = isinstance(error, ProcessGone)
        return Unreadable(pid, error.message, "" if gone else error.hint or "", gone=gone)
    if isinstance(error, Blocked):
        said = f"process {pid}: its memory, or a file that it has mapped, cannot be read: {error}"
        return Unreadable(pid, said, _WHO_ANSWERS)
    if short := shortage_behind(error):
        return Unreadable(pid, short, "")
    said = f"a fault of miniloader's own: {type(error).__name__}: {error}"
    return Unreadable(pid, said, "please report it, with what this process has mapped")


def _wanted(library: str | None) -> Callable[[Identity], bool]:
    if library is None:
        return lambda _: True
    with importing:
        from miniloader.lab.audit.select import matches

    return lambda file: matches(library, file.path, file.path.rpartition("/")[2])


def _cost(process: Survey, leader: int, pss: int | None, merged: NDArray[np.uint64] | None) -> AuditedProcess:
    """What a process costs; ``leader`` is whose memory it is."""
    return AuditedProcess(
        pid=process.pid,
        name=process.known.name,
        parent=process.known.parent,
        started=process.known.started,
        rss=process.rss * PAGE_SIZE,
        pss=pss,
        uss=process.exclusive * PAGE_SIZE,
        anonymous=process.anonymous,
        anonymous_shared=process.anonymous_shared,
        ksm=_number_merged(process, merged),
        zero=process.zero,
        huge=process.huge,
        swapped=process.swapped,
        memory_of=None if leader == process.pid else leader,
        user=process.known.user,
        command=process.known.command,
        cgroup=process.known.cgroup,
        arenas_free=process.arenas_free,
        stack=process.known.stack,
    )


def _pss(
    surveys: Sequence[Survey], level: LevelName
) -> dict[int, tuple[int | None, NDArray[np.float64] | None]]:
    """The PSS in bytes of each process, and of each of its mappings, by pid."""
    if level == "frames":
        with suppress(EvidenceError):  # kpagecount is for root alone
            by_mapping = pss_by_frames([(process.copies, process.originals) for process in surveys])
            return {
                process.pid: (round(float(pss.sum())), pss)
                for process, pss in zip(surveys, by_mapping, strict=True)
            }
    return {process.pid: process.pss or (None, None) for process in surveys}


def _address_spaces(surveys: Sequence[Survey]) -> dict[int, int]:
    """For each process the first one that has the same address space: most often itself.

    Who has been cloned with its memory has its stack at the same place, too, as children of fork(2) have:
    these are put into the kernel's order of address spaces, where equal ones are neighbours.
    """
    leaders = {process.pid: process.pid for process in surveys}
    families: dict[int, list[int]] = {}
    for process in surveys:
        families.setdefault(process.known.stack, []).append(process.pid)
    try:
        for family in families.values():
            ordered = sorted(family, key=cmp_to_key(_memory_order))
            for first, second in pairwise(ordered):
                if _memory_order(first, second) == 0:
                    leaders[second] = leaders[first]
    except OSError:  # no kcmp(2), or not for these; or somebody has ended
        return {process.pid: process.pid for process in surveys}
    return leaders


def _memory_order(first: int, second: int) -> int:
    return (0, -1, 1)[compare_memory(first, second)]


def _merged(surveys: Sequence[Survey], level: LevelName) -> NDArray[np.uint64] | None:
    """The frames that KSM has merged pages into; None where the kernel does not tell which they are."""
    if not has_merged():
        return np.empty(0, np.uint64)
    try:
        if level != "frames" or not marks_merged():
            return None
        copies = [process.copies.frames for process in surveys]
        anonymous = distinct(np.concatenate([np.empty(0, np.uint64), *copies]))
        return anonymous[(frame_flags(anonymous) & KPF["ksm"].mask).astype(np.bool_)]
    except EvidenceError:  # kpageflags is for root alone
        return None


def _number_merged(process: Survey, merged: NDArray[np.uint64] | None) -> int | None:
    """How many pages of a process KSM has merged: by their frames, else by the kernel's sums (6.6; 5.19)."""
    if merged is not None:
        return int(np.isin(process.copies.frames, merged).sum()) if len(merged) else 0
    try:
        sizes = read_rollup(process.pid)
        if "KSM" in sizes:
            return sizes["KSM"] // PAGE_SIZE
        return int(read_process_file(process.pid, "ksm_merging_pages"))
    except EvidenceError:
        return None
