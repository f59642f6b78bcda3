"""What a proof is: the snapshots of the steps, the claims judged by them, and how both become JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan
from miniloader.errors import MiniloaderError
from miniloader.evidence.sharing import STATES, analyse
from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import CLAIM_SCHEMA, VERDICT_SCHEMA, Claim, Verdict, combine
from miniloader.forking import cached_property
from miniloader.json_schema import BOOL, COUNT, INT, TEXT, array, by_name, keys, nullable, record
from miniloader.kernel.features import LEVEL_SCHEMA, LevelName
from miniloader.lab.library_study import LibraryStudy
from miniloader.lab.page_bytes import Contents
from miniloader.lab.proof.spare_word import Word
from miniloader.loader import inspect
from miniloader.showing import REPORT, Showing, dataframe
from miniloader.values import dataclass

__all__ = ["DECISIVE", "PROOF_SCHEMA", "STEPS", "MemoryUse", "OnStep", "Proof", "ProofStep", "Worked"]


@dataclass(frozen=True)
class ProofStep:
    """One step that all processes take together: its name, and what has happened when it is done."""

    name: str
    help: str


STEPS: Final = (
    ProofStep("mapped", "every segment is mapped, nothing is read or written yet"),
    ProofStep("touched", "every readable page has been read once"),
    ProofStep("relocated", "addresses are filled in, constructors have run"),
    ProofStep("written", "each process has written a value of its own to one word"),
    ProofStep("exited", "one process has ended, the others go on"),
)
"""The steps of a proof, in order."""

OnStep = Callable[[str, tuple[int, ...]], None]
"""Called before each of :data:`STEPS`: its name, and the processes' pids."""

DECISIVE: Final = "written"
"""The step whose snapshot decides: all processes are there, and all have written."""


@dataclass(frozen=True)
class Worked:
    """A process that took part, and its load bias."""

    pid: int
    base: int


@dataclass(frozen=True)
class MemoryUse:
    """Bytes: what the library's pages really ``use``, and what they would use ``unshared``.

    From frames or flags they are counted; ``estimated`` when they are sums of the kernel's (Pss, Rss).
    """

    used: int
    unshared: int
    estimated: bool

    @property
    def saved(self) -> int:
        """Bytes that sharing saves.

        >>> MemoryUse(used=4096, unshared=16384, estimated=False).saved
        12288
        """
        return self.unshared - self.used


@dataclass(frozen=True, eq=False)
class Proof(Showing):
    """What several processes share of the library ``path``, and how that was seen.

    ``evidence`` is the level of every snapshot; ``snapshots`` has one for each of STEPS.  ``word`` is what
    the workers wrote (None: nothing could be).  ``claims`` follow from all that, see
    :mod:`miniloader.lab.proof.claims`.  ``contents`` are the bytes of some copied pages, for a person to
    look at.
    """

    path: str
    plan: LoadPlan
    evidence: LevelName
    processes: tuple[Worked, ...]
    snapshots: tuple[Snapshot, ...]
    word: Word | None
    claims: tuple[Claim, ...]
    contents: tuple[Contents, ...] = ()

    def __repr__(self) -> str:
        return f"<Proof {self.verdict}: {self.path!r} in {len(self.processes)} processes, by {self.evidence}>"

    @property
    def verdict(self) -> Verdict:
        """Of all claims together."""
        return combine(self.claims)

    def snapshot(self, step: str) -> Snapshot:
        """The snapshot of one of STEPS; KeyError where there is none of that name."""
        return {snapshot.step: snapshot for snapshot in self.snapshots}[step]

    @property
    def memory(self) -> MemoryUse:
        """What the library costs all processes together, at the decisive step."""
        snapshot = self.snapshot(DECISIVE)
        if self.evidence == "totals":
            used, unshared = (
                sum((process.totals or {}).get(name, 0) for process in snapshot.processes)
                for name in ("Pss", "Rss")
            )
            return MemoryUse(used, unshared, estimated=True)
        sharing = analyse(snapshot)
        return MemoryUse(sharing.used_bytes, sharing.unshared_bytes, estimated=False)

    @cached_property
    def study(self) -> LibraryStudy | None:
        """What the library's file says of its pages; None where it has gone or changed since."""
        try:
            image = inspect(self.path)
            same = image.plan(self.plan.page_size) == self.plan
        except MiniloaderError:
            return None
        return LibraryStudy(image, self.plan, self.contents) if same else None

    def to_json(self) -> dict[str, Any]:
        """The object that ``miniloader prove --json`` prints.

        In ``steps[].pages[]`` each list has one element for each of ``processes``, null where the kernel does
        not say; ``flags`` are words of ``/proc/kpageflags``; ``state`` are names of STATES.
        """
        memory = self.memory
        return {
            "path": self.path,
            "verdict": self.verdict,
            "evidence": self.evidence,
            "page_size": self.plan.page_size,
            "processes": [{"pid": process.pid, "base": process.base} for process in self.processes],
            "claims": [claim.to_json() for claim in self.claims],
            "written": None if self.word is None else {"vaddr": self.word.vaddr, "place": self.word.place},
            "memory": {"used": memory.used, "unshared": memory.unshared, "estimated": memory.estimated},
            "left_out": [{"vaddr": vaddr, "pages": pages} for vaddr, pages in self.left_out],
            "steps": [_step_json(snapshot) for snapshot in self.snapshots],
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page of ``miniloader prove --html``; MiniloaderError when it cannot be written."""
        REPORT.write_proof(self, path)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """The runs of pages that no process had at any step, and that have no rows: first vaddr, pages."""
        size, start, end = self.plan.page_size, self.plan.start, self.plan.end
        vaddrs = analyse(self.snapshots[0]).vaddrs.astype(np.int64) if self.snapshots else np.arange(0)
        edges = np.concatenate([[start - size], vaddrs, [end]])
        gaps = np.flatnonzero(np.diff(edges) > size)
        return [
            (int(edges[gap]) + size, int(edges[gap + 1] - edges[gap]) // size - 1) for gap in gaps.tolist()
        ]

    def to_dataframe(self) -> Any:
        """A row for each page, process and step, as a pandas ``DataFrame``; MiniloaderError without pandas.

        Columns: ``step``, ``vaddr``, ``pid``, and those of ``steps[].pages[]`` in :meth:`to_json`.
        """
        pids = [process.pid for process in self.processes]
        return dataframe([
            {"step": step["name"], "vaddr": page["vaddr"], "pid": pid}
            | {name: page[name][number] for name in ("state", *_KNOWN)}
            for step in self.to_json()["steps"]
            for page in step["pages"]
            for number, pid in enumerate(pids)
        ])  # fmt: skip


def _step_json(snapshot: Snapshot) -> dict[str, Any]:
    if snapshot.level in ("frames", "flags"):
        return {"name": snapshot.step, "pages": _pages_json(snapshot)}
    totals = [None if process.totals is None else dict(process.totals) for process in snapshot.processes]
    return {"name": snapshot.step, "pages": [], "totals": totals}


def _pages_json(snapshot: Snapshot) -> list[dict[str, Any]]:
    """One object a page: its vaddr, and what each process's page table has for it."""
    sharing = analyse(snapshot)
    names = np.array([state.name for state in STATES], dtype=object)
    columns = {"state": names[sharing.states]}
    for field, is_known in _KNOWN.items():
        table = np.array([process.pages[field] for process in snapshot.processes]).astype(object)
        unknown = [
            ~is_known(process.pages) | (bool(process.reason) and not process.gone)
            for process in snapshot.processes
        ]
        table[np.array(unknown)] = None
        columns[field] = table
    cells = zip(*(column.T.tolist() for column in columns.values()), strict=True)
    return [
        {"vaddr": vaddr} | dict(zip(columns, row, strict=True))
        for vaddr, row in zip(sharing.vaddrs.tolist(), cells, strict=True)
    ]


#: The fields of a page that JSON shows, and where each has a meaning.
_KNOWN: Final[dict[str, Callable[[NDArray[np.void]], NDArray[np.bool_]]]] = {
    "present": lambda pages: np.ones(len(pages), dtype=np.bool_),
    "file": lambda pages: pages["present"],
    "exclusive": lambda pages: pages["present"],
    "frame": lambda pages: pages["frame"] != 0,
    "map_count": lambda pages: pages["map_count"] >= 0,
    "flags": lambda pages: pages["flags"] != 0,
}

_PAGE_SCHEMA: Final = record(
    {"vaddr": COUNT, "state": array(TEXT)},
    keys(array(nullable(BOOL)), "present file exclusive"),
    keys(array(nullable(COUNT)), "frame map_count flags"),
)

PROOF_SCHEMA: Final = record(
    {"path": TEXT, "verdict": VERDICT_SCHEMA, "evidence": LEVEL_SCHEMA, "page_size": COUNT},
    {"processes": array(record({"pid": COUNT, "base": INT})), "claims": array(CLAIM_SCHEMA)},
    {"written": nullable(record({"vaddr": COUNT, "place": TEXT}))},
    {"memory": record(keys(COUNT, "used unshared"), {"estimated": BOOL})},
    {"left_out": array(record(keys(COUNT, "vaddr pages")))},
    {"steps": array(record(
        {"name": TEXT, "pages": array(_PAGE_SCHEMA)},
        optional={"totals": array(nullable(by_name(COUNT)))},
    ))},
)  # fmt: skip
"""What :meth:`Proof.to_json` gives."""
