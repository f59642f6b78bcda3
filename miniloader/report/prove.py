"""How a proof looks in the terminal: the grid of the decisive step, the claims, the memory, what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from miniloader.errors import printable
from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import Claim
from miniloader.kernel.features import LevelName
from miniloader.lab.proof.proof import DECISIVE, STEPS, Proof
from miniloader.report.grid import Mark, grid_legend, page_grid
from miniloader.report.levels import evidence
from miniloader.report.numbers import count, size
from miniloader.report.text import VERDICT_SIGNS, Cell, Line, Part, Piece, Table, heading, pairs

__all__ = ["lines", "verdicts"]

#: What is not seen below the best level of evidence.
_CANNOT: Final[dict[LevelName, str]] = {
    "flags": "show the frames themselves: that two pages are one follows from their place in the same file, "
    "that a copy is nobody else's from its being mapped once",
    "totals": "tell one page from another: a sum is right for more than one reason",
}


def lines(proof: Proof, drawing: int, *, all_steps: bool = False) -> Iterator[Part]:
    """``proof``: the snapshot of the decisive step, or of all of them, then what follows from it.

    Grids are ``drawing`` columns wide at most.
    """
    yield from _title(proof)
    steps = [step for step in STEPS if all_steps or step.name == DECISIVE]
    for step in steps:
        yield ()
        yield heading(f"Step {STEPS.index(step) + 1} of {len(STEPS)}: {step.name}", step.help)
        yield from _picture(proof, proof.snapshot(step.name), drawing)
    if proof.evidence in ("frames", "flags"):
        yield ()
        yield grid_legend([proof.snapshot(step.name) for step in steps], proof.plan)
    yield ()
    for claim in proof.claims:
        yield from _claim(claim)
    yield ()
    yield pairs(_summary(proof, all_steps=all_steps))


def verdicts(proof: Proof) -> Iterator[Part]:
    """``proof`` in short: a line for it, one for each claim, and what the memory costs."""
    yield from _title(proof)
    rows: list[list[Cell]] = [
        [VERDICT_SIGNS[claim.verdict], claim.id, claim.statement] for claim in proof.claims
    ]
    yield Table((), rows, indent=2, gap=1)
    yield from (pairs([row], indent=2) for row in _summary(proof, all_steps=True) if row[0] == "memory")


def _title(proof: Proof) -> Iterator[Line]:
    sign, style = VERDICT_SIGNS[proof.verdict]
    mapped = sum(mapping.length for mapping in proof.plan.mappings if mapping.kind != "gap")
    pages = f"{count(mapped // proof.plan.page_size, 'page')} of {size(proof.plan.page_size)}"
    yield (f"{sign} {proof.verdict}", style), "  ", (printable(proof.path), "bold")
    yield (f"{pages}, loaded by {len(proof.processes)} processes, {_where(proof)}",)
    if left_out := sum(pages for _, pages in proof.left_out):
        yield (f"not shown: {count(left_out, 'page')} of bss that no process had at any step",)


def _picture(proof: Proof, snapshot: Snapshot, width: int) -> Iterator[Part]:
    if snapshot.level not in ("frames", "flags"):
        yield _sums(snapshot)
        return
    mark = None
    if proof.word is not None and snapshot.step == DECISIVE:
        page = proof.word.vaddr // proof.plan.page_size * proof.plan.page_size
        mark = Mark(page, f"where each wrote: vaddr {proof.word.vaddr:#x}, {proof.word.place}")
    yield from page_grid(snapshot, proof.plan, width, mark)


def _sums(snapshot: Snapshot) -> Table:
    """What ``smaps`` says of the library in each process, where pages cannot be told apart."""
    names = ("Rss", "Pss", "Private_Dirty", "Anonymous")
    rows = []
    for process in snapshot.processes:
        totals = process.totals or {}
        sums = (size(totals[name]) if name in totals else "?" for name in names)
        rows.append((str(process.pid), f"{process.base:x}", *sums))
    return Table(("pid", "base", *(f">{name}" for name in names)), rows)


def _claim(claim: Claim) -> Iterator[Part]:
    yield VERDICT_SIGNS[claim.verdict], " ", (claim.id, "bold"), f"  {claim.statement}"
    rows = [("expected", claim.expected), ("observed", claim.observed), (claim.verdict, claim.reason)]
    yield pairs(((name, printable(text)) for name, text in rows if text), indent=2)


def _where(proof: Proof) -> str:
    alike = len({process.base for process in proof.processes}) == 1
    return "all at the address it is prepared for" if alike else "each at an address of its own"


def _summary(proof: Proof, *, all_steps: bool) -> Iterator[tuple[str, Cell]]:
    memory, processes = proof.memory, len(proof.processes)
    used: list[Piece] = [
        (size(memory.used), "bold"),
        f" used; {processes} copies would use {size(memory.unshared)}",
    ]
    if memory.estimated:
        used.append(" (estimated from the kernel's sums, Pss and Rss)")
    elif memory.unshared:
        used.append(f": sharing saves {size(memory.saved)}, {memory.saved / memory.unshared:.0%}")
    yield "memory", used
    yield from evidence(proof.evidence, _CANNOT.get(proof.evidence, ""))
    options = "" if all_steps else " --steps"
    command = f"miniloader {'inspect' if all_steps else 'prove'} {shlex.quote(proof.path)}{options}"
    why = "what the file says of all this" if all_steps else "the same grid after every step"
    yield "next", [(printable(command), "bold"), f"  ({why})"]
