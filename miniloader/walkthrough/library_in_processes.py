"""One library in several processes, for chapters: a proof step by step, and the text as smaps sums it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from miniloader.elf import LoadPlan
from miniloader.kernel.smaps import read_smaps, sum_sizes
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.proof.proof import DECISIVE, Proof
from miniloader.lab.proof.prove import prove
from miniloader.values import dataclass
from miniloader.walkthrough.model import Call, Grid, Part, Step, Table
from miniloader.walkthrough.workbench import Bench, View, views

__all__ = ["PROCESSES", "Several", "in_several", "memory_table", "parts_of", "shown_steps"]

PROCESSES = 4

_DID = {
    "mapped": "{} fresh processes map the library by miniloader; nothing of it is read yet.",
    "touched": "Each of them reads every page once.",
    "relocated": "Each fills in the addresses that depend on where the library lies, and runs constructors.",
    "written": "Each writes its own process id to one word of data.",
    "exited": "One process ends, the others go on.",
}


@dataclass(frozen=True)
class Several:
    """What was seen of all processes when each has written, and of the steps before and after.

    ``states`` and ``groups`` have a tuple of pages for each process; equal groups are equal frames, 0: not
    known.  ``text`` has (Rss, Pss) in bytes of the executable mapping for each process, ``()`` where smaps
    does not tell.  ``claims`` are those of the proof, by id.
    """

    bases: tuple[int, ...]
    code: tuple[int, ...]  # pages
    relocated: tuple[int, ...]  # pages that relocating writes
    states: tuple[tuple[str, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    text: tuple[tuple[int, int], ...]
    used: int  # bytes
    unshared: int
    claims: dict[str, tuple[bool | None, str]]  # whether it holds, what was observed or why not


def in_several(
    bench: Bench, path: str, *, text_relocations: bool = False, prepared: bool = False
) -> tuple[Proof, Several]:
    """Load ``path`` in PROCESSES processes, step by step.

    Raises what :func:`miniloader.lab.proof.prove.prove` raises.
    """
    text: list[tuple[int, int]] = []

    def listen(step: str, pids: tuple[int, ...]) -> None:
        if step == "exited":  # about to be: until now all have written and are there
            text.extend(_text(pid, path) for pid in pids)

    proof = prove(
        path,
        PROCESSES,
        level=bench.level,
        on_step=listen,
        text_relocations=text_relocations,
        prepared=prepared,
    )
    seen = views(Grid("", _names(proof), proof.snapshot(DECISIVE)))
    sharing = seen[0].grid.sharing
    memory = proof.memory
    return proof, Several(
        bases=tuple(one.base for one in proof.processes),
        code=_code(proof.plan),
        relocated=_relocated(path, proof.plan),
        states=tuple(view.states for view in seen),
        groups=tuple(tuple(row) for row in sharing.frame_group.tolist()),
        text=tuple(text),
        used=memory.used,
        unshared=memory.unshared,
        claims={
            claim.id: (
                None if claim.verdict == "unknown" else claim.verdict == "proven",
                claim.reason or claim.observed,
            )
            for claim in proof.claims
        },
    )


def _text(pid: int, path: str) -> tuple[int, int]:
    sizes = sum_sizes(
        one for one in read_smaps(pid) if one.vma.path == path and "x" in one.vma.protection
    )  # in kB, rounded down by the kernel
    return sizes.get("Rss", 0), sizes.get("Pss", 0)


def _names(proof: Proof) -> tuple[str, ...]:
    return tuple(f"process {one.pid}" for one in proof.processes)


def _code(plan: LoadPlan) -> tuple[int, ...]:
    """The pages of executable mappings, counted from the first of the image."""
    return tuple(
        (vaddr - plan.start) // PAGE_SIZE
        for one in plan.mappings
        if "x" in one.protection
        for vaddr in range(one.start, one.end, PAGE_SIZE)
    )


def _relocated(path: str, plan: LoadPlan) -> tuple[int, ...]:
    from miniloader.elf import inspect

    targets = inspect(path).relocations.targets()
    return tuple(sorted({(int(vaddr) - plan.start) // PAGE_SIZE for vaddr in targets}))


def parts_of(plan: LoadPlan) -> tuple[Part, ...]:
    """Its mappings, named by protection."""
    return tuple(Part(one.start, one.protection) for one in plan.mappings)


def shown_steps(
    proof: Proof, saw: dict[str, Sequence[str]], tables: dict[str, Sequence[Table]]
) -> Generator[Step, None, None]:
    """A step with its grid for each of the proof; ``saw`` and ``tables`` by the step's name."""
    names = _names(proof)
    for snapshot in proof.snapshots:
        grid = Grid(snapshot.step, names, snapshot, parts_of(proof.plan))
        calls: tuple[Call, ...] = ()
        if snapshot.step == "mapped":
            calls = tuple(
                Call(f"load at {one.base:#x}", "", name, access=True)
                for one, name in zip(proof.processes, names, strict=True)
            )
        if snapshot.step == "written" and proof.word is not None:
            calls = tuple(
                Call(f"store {one.pid} {proof.word.place}", "", name, access=True)
                for one, name in zip(proof.processes, names, strict=True)
            )
        yield Step(
            snapshot.step,
            _DID[snapshot.step].format(len(names)),
            calls,
            (_counted(views(grid)), *saw.get(snapshot.step, ())),
            tables=tuple(tables.get(snapshot.step, ())),
            grid=grid,
        )


def _counted(seen: Sequence[View]) -> str:
    grid = seen[0].grid
    if grid.sharing.level not in ("frames", "flags"):
        return "Of single pages the kernel says nothing here."
    sharing = grid.sharing
    return f"{sharing.present_pages} page table entries, {sharing.distinct_frames} frames behind them."


def memory_table(several: Several) -> Table:
    """What smaps says of the text of each process."""
    rows = [
        (str(number), f"{rss // 1024} kB", f"{pss // 1024} kB")
        for number, (rss, pss) in enumerate(several.text, 1)
    ]
    total = tuple(f"{sum(column) // 1024} kB" for column in zip(*several.text, strict=True))
    return Table(
        "The text, as /proc/PID/smaps has it",
        ("process", ">Rss", ">Pss"),
        (*rows, ("together", *total)) if rows else (),
    )
