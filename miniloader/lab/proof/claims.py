"""The five claims of a proof, each judged by a pure function of what was seen.

Which pages *must* have been copied is known without looking: those that hold relocations, those whose end
the loader zeroes, and the one that the workers wrote.  What else was copied while code of the library ran
(constructors, IFUNC resolvers) counts as written by it.  Every other page must still be the file's own,
or the claim about it is refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan, PlannedMapping
from miniloader.elf.symbols import STT_GNU_IFUNC
from miniloader.evidence.sharing import COPIED, COPIED_SHARED, SHARED, SOLE, ZERO, Sharing, analyse
from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import NOTHING_TO_JUDGE, Claim, Holds, judge
from miniloader.forking import cached_property
from miniloader.kernel.features import LEVELS
from miniloader.lab.proof.spare_word import Word
from miniloader.loader.relocation_groups import sort_relocations
from miniloader.values import NamedTuple, dataclass
from miniloader.whole_numbers import count

if TYPE_CHECKING:
    from miniloader.loader.prepared.pages import Prepared

__all__ = ["Evidence", "FileState", "judge_claims"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class FileState:
    """What must not change of the library's file: ``size`` in bytes, ``modified`` in ns since the epoch.

    ``sha256`` is of the ``whole`` file, or of where its data lie and of them alone, where holes of more than
    16 KiB are between them.
    """

    device: int
    inode: int
    size: int
    modified: int
    sha256: str
    whole: bool = True

    @property
    def checksum(self) -> str:
        """How the checksum is written in a sentence."""
        return f"SHA-256 {self.sha256[:16]}…{'' if self.whole else ' without its holes'}"


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that the claims are judged by, and the pages sorted by what is known of them beforehand.

    ``linked`` was taken when everything was relocated and no constructor had run.  Each process wrote its
    pid to ``word``; ``read`` is what each then read there.  ``after`` is None when the file is gone.
    ``prepared`` has the pages that were relocated beforehand.  A mask
    has an element for each page of :attr:`vaddrs`, and a row for each process where processes may differ.
    """

    image: ElfImage
    plan: LoadPlan
    linked: Snapshot
    loaded: Snapshot
    written: Snapshot
    exited: Snapshot
    word: Word | None
    read: Sequence[int]
    before: FileState
    after: FileState | None
    prepared: Prepared | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all processes."""
        return tuple(process.pid for process in self.written.processes)

    @cached_property
    def decisive(self) -> Sharing:
        """What is shared when all have written."""
        return analyse(self.written)

    @cached_property
    def rest(self) -> Sharing:
        """What is shared when the last process has ended."""
        return analyse(self.exited)

    @property
    def vaddrs(self) -> NDArray[np.uint64]:
        """The pages of ``plan`` that were looked at: all but those of bss that nobody had."""
        return self.decisive.vaddrs

    def _page(self, vaddrs: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The numbers of their pages among all of ``plan``."""
        return (vaddrs.astype(np.int64) - self.plan.start) // self.plan.page_size

    def _mask(self, vaddrs: NDArray[np.uint64]) -> Mask:
        mask = np.zeros(self.plan.length // self.plan.page_size, np.bool_)
        mask[self._page(vaddrs)] = True
        return np.asarray(mask[self._page(self.vaddrs)])

    def _mapped_as(self, wanted: Callable[[PlannedMapping], bool]) -> Mask:
        mask = np.zeros(self.plan.length // self.plan.page_size, np.bool_)
        for mapping in filter(wanted, self.plan.mappings):
            first, last = (
                (vaddr - self.plan.start) // self.plan.page_size for vaddr in (mapping.start, mapping.end)
            )
            mask[first:last] = True
        return np.asarray(mask[self._page(self.vaddrs)])

    @cached_property
    def code(self) -> Mask:
        """Pages of executable mappings."""
        return self._mapped_as(lambda mapping: "x" in mapping.protection)

    @cached_property
    def data(self) -> Mask:
        """Every other page that can be read: constants, data, bss."""
        return self._mapped_as(lambda mapping: "r" in mapping.protection and "x" not in mapping.protection)

    @cached_property
    def of_file(self) -> Mask:
        """Pages that come from the file."""
        return self._mapped_as(lambda mapping: mapping.kind == "file")

    @cached_property
    def beforehand(self) -> Mask:
        """Pages relocated beforehand that no process has to fill in."""
        if self.prepared is None:
            return self._mask(np.empty(0, np.uint64))
        return self._mask(self.prepared.pages[~self.prepared.differing])

    @cached_property
    def relocated(self) -> Mask:
        """Pages that hold a relocation which each process writes itself."""
        targets = [array for array in sort_relocations(self.image).targets() if len(array)]
        return self._mask(np.concatenate(targets or [np.empty(0, np.uint64)])) & ~self.beforehand

    @cached_property
    def zeroed(self) -> Mask:
        """Pages whose end the loader zeroes."""
        tails = np.array([span.start for span in self.plan.zeroed], dtype=np.uint64)
        return self._mask(tails) & ~self.beforehand

    @cached_property
    def worked(self) -> Mask:
        """The page that the workers wrote."""
        return self._mask(np.array([self.word.vaddr] if self.word else [], dtype=np.uint64))

    @cached_property
    def by_code(self) -> Mask:
        """By process: pages that were copied while code of the library ran, and for no other reason."""
        explained = self.relocated | self.zeroed
        copied = _copied(analyse(self.loaded)) & ~explained
        return copied if self._resolvers_ran else copied & ~_copied(analyse(self.linked))

    @property
    def _resolvers_ran(self) -> bool:
        """Whether code of the library ran already while it was relocated."""
        indirect = any(len(rows) for _, rows in sort_relocations(self.image).of("indirect"))
        return indirect or bool((self.image.symbols.type == STT_GNU_IFUNC).any())

    @cached_property
    def wrote(self) -> Mask:
        """By process: data pages that were written."""
        return self.data & (self.relocated | self.zeroed | self.worked | self.by_code)


class Finding(NamedTuple):
    """What became of one claim: the arguments of :func:`judge`."""

    holds: Holds
    expected: str
    observed: str
    reason: str = ""


def judge_claims(evidence: Evidence) -> tuple[Claim, ...]:
    """The claims, in the order of the tables below."""
    table = _CLAIMS if evidence.prepared is None else (*_CLAIMS, *_OF_PREPARED)
    return tuple(judge(id, statement, **finding(evidence)._asdict()) for id, statement, finding in table)


def _code_shared(evidence: Evidence) -> Finding:
    return _one_frame(evidence, evidence.code, "code")


def _untouched_data_shared(evidence: Evidence) -> Finding:
    untouched = evidence.data & evidence.of_file & ~evidence.wrote.any(axis=0) & ~evidence.beforehand
    return _one_frame(evidence, untouched, "data that nobody wrote")


def _relocated_shared(evidence: Evidence) -> Finding:
    pages = evidence.beforehand & ~evidence.wrote.any(axis=0)
    return _one_frame(evidence, pages, "page relocated beforehand that nobody wrote")


def _one_frame(evidence: Evidence, pages: Mask, content: str) -> Finding:
    """Whether ``pages`` are the file's own in all processes, also when one of them has ended."""
    processes, number = len(evidence.pids), int(pages.sum())
    same = _SAME.get(evidence.written.level, _SAME["frames"])
    expected = f"{count(number, 'page')}, each {same} in all {processes} processes"
    if number == 0:
        return Finding(NOTHING_TO_JUDGE, expected, "0 pages", f"the library has no {content}")
    unseen = _unseen(evidence)
    if unseen:
        return Finding(None, expected, *unseen)
    good, bad = _shared(evidence.decisive, pages)
    observed = f"{good.sum():,} of {number:,}"
    if processes > 2:
        good_after, bad_after = _shared(evidence.rest, pages, processes - 1)
        observed += f", and {good_after.sum():,} when one process has ended"
        good, bad = good & good_after, bad | bad_after
    if bad.any():
        where = int(evidence.decisive.vaddrs[int(np.flatnonzero(bad)[0])])
        return Finding(
            False, expected, f"{observed}; {count(int(bad.sum()), 'page')} not, the first at vaddr {where:#x}"
        )
    missing = number - int(good.sum())
    if missing:
        return Finding(
            None, expected, observed, f"{count(missing, 'page')} not in memory, or changing, at the time"
        )
    return Finding(True, expected, observed)


def _shared(sharing: Sharing, pages: Mask, processes: int | None = None) -> tuple[Mask, Mask]:
    """Which of ``pages`` are one frame in the first ``processes``, and which certainly are not."""
    states, groups = sharing.states[:processes], sharing.frame_group[:processes]
    highest, lowest = groups.max(axis=0), np.where(groups > 0, groups, groups.max(initial=0)).min(axis=0)
    same = (states == SHARED).all(axis=0) & (highest == lowest)
    differ = np.isin(states, (COPIED, COPIED_SHARED)).any(axis=0) | (highest > lowest)
    return pages & same, pages & differ


def _written_data_private(evidence: Evidence) -> Finding:
    unseen = _unseen(evidence)
    if unseen:
        return Finding(None, f"every page written, {_OWN['frames']} in each process", *unseen)
    sharing, processes, wrote = evidence.decisive, len(evidence.pids), evidence.wrote
    level = sharing.level
    number, total = int(wrote.any(axis=0).sum()), int(wrote.sum())
    expected = f"{count(number, 'page')}, each {_OWN[level]} in each of {processes} processes"
    expected += f": {', '.join(_writers(evidence))}"
    if number == 0:
        return Finding(NOTHING_TO_JUDGE, expected, "0 pages", "no page of the library is written")
    copied = wrote & (sharing.states == COPIED)
    never = (SHARED, SOLE, ZERO) if level == "flags" else (SHARED, SOLE, ZERO, COPIED_SHARED)
    bad = wrote & np.isin(sharing.states, never)
    observed = f"{copied.sum():,} of {total:,} copies" + _copied_now(evidence)
    if bad.any():
        process, page = (int(index[0]) for index in np.nonzero(bad))
        where = f"the first in process {evidence.pids[process]} at vaddr {int(sharing.vaddrs[page]):#x}"
        return Finding(False, expected, f"{observed}; {bad.sum():,} not, {where}")
    if copied.sum() < total:
        reason = f"{total - copied.sum():,} not in memory, changing, or mapped elsewhere as well at the time"
        return Finding(None, expected, observed, reason)
    return Finding(True, expected, observed)


def _writers(evidence: Evidence) -> Iterator[str]:
    """How many of the written pages each way of writing accounts for, a page once."""
    pages = evidence.wrote.any(axis=0)
    for mask, how in (
        (evidence.relocated, "relocated"),
        (evidence.zeroed, "with a tail of zeros"),
        (evidence.by_code.any(axis=0), "written by the library's own code"),
        (evidence.worked, "written by the workers"),
    ):
        if number := int((pages & mask).sum()):
            yield f"{number:,} {how}"
        pages = pages & ~mask


def _copied_now(evidence: Evidence) -> str:
    """What the write did to a page that was the file's own before it."""
    word = evidence.word
    if word is None or not word.fresh:
        return ""
    page_vaddr = word.vaddr & -evidence.plan.page_size
    page = int(np.searchsorted(evidence.vaddrs, np.uint64(page_vaddr)))
    copies = int((evidence.decisive.states[:, page] == COPIED).sum())
    return f"; page {page_vaddr:#x} was the file's own until then, now there are {copies} copies"


def _writes_isolated(evidence: Evidence) -> Finding:
    expected = f"each of {len(evidence.pids)} processes reads back its own pid"
    word = evidence.word
    if word is None:
        reason = "no page of the library may be written"
        return Finding(NOTHING_TO_JUDGE, expected, "nothing was written", reason)
    wrong = [(pid, value) for pid, value in zip(evidence.pids, evidence.read, strict=True) if pid != value]
    where = f"at vaddr {word.vaddr:#x} ({word.place})"
    if wrong:
        pid, value = wrong[0]
        return Finding(False, f"{expected} {where}", f"{len(wrong)} do not: process {pid} reads {value}")
    return Finding(True, f"{expected} {where}", f"{len(evidence.read)} of {len(evidence.pids)}")


def _file_unchanged(evidence: Evidence) -> Finding:
    before, after = evidence.before, evidence.after
    expected = f"{before.size:,} bytes, {before.checksum}, not modified"
    if after is None:
        return Finding(False, expected, "the file is gone")
    changed = [
        change
        for change, same in (
            ("another file", (before.device, before.inode) == (after.device, after.inode)),
            (f"{after.size:,} bytes", before.size == after.size),
            (after.checksum, before.sha256 == after.sha256),
            ("modified meanwhile", before.modified == after.modified),
        )
        if not same
    ]
    return Finding(not changed, expected, ", ".join(changed) or "the same")


_CLAIMS: Final[tuple[tuple[str, str, Callable[[Evidence], Finding]], ...]] = (
    ("code-shared", "Code is one copy for all processes", _code_shared),
    ("untouched-data-shared", "Data that nobody wrote is one copy as well", _untouched_data_shared),
    ("written-data-private", "A page that is written becomes a copy of its own", _written_data_private),
    ("writes-isolated", "What a process writes is seen by itself alone", _writes_isolated),
    ("file-unchanged", "The file on disk is as it was", _file_unchanged),
)

_OF_PREPARED: Final[tuple[tuple[str, str, Callable[[Evidence], Finding]], ...]] = (
    ("relocated-shared", "What was relocated beforehand is one copy, too", _relocated_shared),
)

_SAME: Final = {"frames": "one frame", "flags": "the page cache's own page"}
_OWN: Final = {"frames": "a frame of its own", "flags": "a copy that is mapped once"}


def _copied(sharing: Sharing) -> Mask:
    return np.isin(sharing.states, (COPIED, COPIED_SHARED))


def _unseen(evidence: Evidence) -> tuple[str, str] | None:
    """What was observed instead, and why no page can be judged; None where pages can be."""
    level = next(level for level in LEVELS if level.name == evidence.written.level)
    if level.name not in _SAME:
        return _sums(evidence.written), f"level {level.name}: {level.shows}"
    for snapshot in (evidence.linked, evidence.loaded, evidence.written):
        for process in snapshot.processes:
            if process.reason:
                return f"process {process.pid} could not be looked at", process.reason
    return None


def _sums(snapshot: Snapshot) -> str:
    """What ``smaps`` says of the library in all processes together."""
    totals = [process.totals or {} for process in snapshot.processes]
    sums = {name: sum(sizes.get(name, 0) for sizes in totals) for name in ("Rss", "Pss", "Anonymous")}
    return ", ".join(f"{name} {size // 1024:,} KiB" for name, size in sums.items())
