"""How a proof looks in the terminal: the grid of the decisive step, the claims, the memory, what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.text import Text

from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import Claim, Verdict
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.lab.proof.proof import DECISIVE, STEPS, Proof, Step
from miniloader.report.grid import Mark, grid_legend, page_grid
from miniloader.report.output import count, drawing_width, heading, pairs, safe, size, table

__all__ = ["show"]

_SIGNS: Final[dict[Verdict, tuple[str, str]]] = {
    "proven": ("✔", "bold green"),
    "refuted": ("✘", "bold red"),
    "unknown": ("?", "bold yellow"),
}

#: What is not seen below the best level of evidence.
_CANNOT: Final[dict[LevelName, str]] = {
    "flags": "show the frames themselves: that two pages are one follows from their place in the same file, "
    "that a copy is nobody else's from its being mapped once",
    "totals": "tell one page from another: a sum is right for more than one reason",
}


def show(proof: Proof, out: Console, *, all_steps: bool = False) -> None:
    """Print ``proof``: the snapshot of the decisive step, or of all of them, then what follows from it."""
    out.print(_title(proof))
    steps = [step for step in STEPS if all_steps or step.name == DECISIVE]
    for step in steps:
        out.print()
        out.print(_step(step))
        out.print(_picture(proof, proof.snapshot(step.name), drawing_width(out)))
    if proof.evidence in ("frames", "flags"):
        out.print()
        out.print(grid_legend([proof.snapshot(step.name) for step in steps], proof.plan))
    out.print()
    for claim in proof.claims:
        out.print(_claim(claim))
    out.print()
    out.print(pairs([*_summary(proof, all_steps=all_steps)], indent=0))


def _title(proof: Proof) -> Group:
    sign, style = _SIGNS[proof.verdict]
    mapped = sum(mapping.length for mapping in proof.plan.mappings if mapping.kind != "gap")
    pages = f"{count(mapped // proof.plan.page_size, 'page')} of {size(proof.plan.page_size)}"
    return Group(
        Text.assemble((f"{sign} {proof.verdict}", style), "  ", safe(proof.path, "bold")),
        Text(f"{pages}, loaded by {len(proof.processes)} processes, {_where(proof)}"),
    )


def _step(step: Step) -> Text:
    return heading(f"Step {STEPS.index(step) + 1} of {len(STEPS)}: {step.name}", step.help)


def _picture(proof: Proof, snapshot: Snapshot, width: int) -> RenderableType:
    if snapshot.level not in ("frames", "flags"):
        return _sums(snapshot)
    mark = None
    if proof.word is not None and snapshot.step == DECISIVE:
        page = proof.word.vaddr // proof.plan.page_size * proof.plan.page_size
        mark = Mark(page, f"where each wrote: vaddr {proof.word.vaddr:#x}, {proof.word.place}")
    return page_grid(snapshot, proof.plan, width, mark)


def _sums(snapshot: Snapshot) -> RenderableType:
    """What ``smaps`` says of the library in each process, where pages cannot be told apart."""
    names = ("Rss", "Pss", "Private_Dirty", "Anonymous")
    sums = table("pid", "base", *(f">{name}" for name in names))
    for process in snapshot.processes:
        totals = process.totals or {}
        cells = (size(totals[name]) if name in totals else "?" for name in names)
        sums.add_row(str(process.pid), f"{process.base:x}", *cells)
    return sums


def _claim(claim: Claim) -> RenderableType:
    sign, style = _SIGNS[claim.verdict]
    title = Text.assemble((sign, style), " ", (claim.id, "bold"), f"  {claim.statement}")
    rows: list[tuple[str, Text | str]] = [("expected", claim.expected), ("observed", safe(claim.observed))]
    if claim.reason:
        rows.append(("unknown", safe(claim.reason)))
    return Group(title, pairs(rows))


def _where(proof: Proof) -> str:
    alike = len({process.base for process in proof.processes}) == 1
    return "all at the address it is prepared for" if alike else "each at an address of its own"


def _summary(proof: Proof, *, all_steps: bool) -> Iterator[tuple[str, Text | str]]:
    memory, processes = proof.memory, len(proof.processes)
    used = Text.assemble(
        (size(memory.used), "bold"), f" used; {processes} copies would use {size(memory.unshared)}"
    )
    if memory.estimated:
        used.append(" (estimated from the kernel's sums, Pss and Rss)")
    elif memory.unshared:
        used.append(f": sharing saves {size(memory.saved)}, {memory.saved / memory.unshared:.0%}")
    yield "memory", used
    position = next(index for index, level in enumerate(LEVELS) if level.name == proof.evidence)
    yield "evidence", Text.assemble((proof.evidence, "bold"), f": {LEVELS[position].shows}")
    if position:
        yield "cannot", _CANNOT[proof.evidence]
        above = LEVELS[position - 1]
        yield "for more", Text.assemble((above.name, "bold"), f" {above.shows}: {above.get}")
    options = "" if all_steps else " --steps"
    command = f"miniloader {'inspect' if all_steps else 'prove'} {shlex.quote(proof.path)}{options}"
    why = "what the file says of all this" if all_steps else "the same grid after every step"
    yield "next", Text.assemble(safe(command, "bold"), f"  ({why})")
