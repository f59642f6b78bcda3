"""One library in several processes, for chapters: a proof told step by step, its text summed by smaps."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

from miniloader.elf import LoadPlan, inspect
from miniloader.kernel.smaps import read_smaps, sum_sizes
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.proof.proof import DECISIVE, Proof
from miniloader.lab.proof.prove import prove
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Finding
from miniloader.walkthrough.mapping_views import views_of
from miniloader.walkthrough.step import NOTHING_OF_PAGES, ChapterStep, Figures, Grid, Part
from miniloader.walkthrough.traced_calls import TracedCall
from miniloader.walkthrough.workbench import Workbench

__all__ = [
    "PROCESSES",
    "LibraryInProcesses",
    "code_pages",
    "in_processes",
    "memory_table",
    "parts_of",
    "told_steps",
]

PROCESSES = 4

_DID = {
    "mapped": "{} fresh processes map the library by miniloader; nothing of it is read yet.",
    "touched": "Each of them reads every page once.",
    "relocated": "Each fills in the addresses that depend on where the library lies, and runs constructors.",
    "written": "Each writes its own process id to one word of data.",
    "exited": "One process ends, the others go on.",
}


@dataclass(frozen=True)
class LibraryInProcesses:
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

    def one_copy(self, pages: Collection[int]) -> int:
        """How many of ``pages`` are the page cache's, in one frame for all processes."""
        return self._alike(pages, "shared", 1)

    def own_copies(self, pages: Collection[int]) -> int:
        """How many of ``pages`` are a copy of its own in each process."""
        return self._alike(pages, "copied", len(self.states))

    def _alike(self, pages: Collection[int], state: str, frames: int) -> int:
        return sum(
            {row[page] for row in self.states} == {state}
            and len({row[page] for row in self.groups}) == frames
            for page in pages
        )

    def proven(self, claim: str, expected: str) -> Finding:
        """What the proof itself found of one of its claims."""
        holds, observed = self.claims[claim]
        return Finding(holds, expected, observed, observed)


def in_processes(
    bench: Workbench, path: str, *, text_relocations: bool = False, prepared: bool = False
) -> tuple[Proof, LibraryInProcesses]:
    """Load ``path`` in PROCESSES processes, step by step.

    Raises what :func:`miniloader.lab.proof.prove.prove` raises.
    """
    text: list[tuple[int, int]] = []

    def listen(step: str, pids: tuple[int, ...]) -> None:
        if step == "exited":  # about to be: until then all have written and are there
            text.extend(_text(pid, path) for pid in pids)

    proof = prove(
        path,
        PROCESSES,
        level=bench.level,
        on_step=listen,
        text_relocations=text_relocations,
        prepared=prepared,
    )
    views = views_of(Grid("", _names(proof), proof.snapshot(DECISIVE)))
    targets = inspect(path).relocations.targets()
    return proof, LibraryInProcesses(
        bases=tuple(process.base for process in proof.processes),
        code=code_pages(proof.plan),
        relocated=tuple(sorted({(int(vaddr) - proof.plan.start) // PAGE_SIZE for vaddr in targets})),
        states=tuple(view.states for view in views),
        groups=tuple(tuple(row) for row in views[0].grid.sharing.frame_group.tolist()),
        text=tuple(text),
        used=proof.memory.used,
        unshared=proof.memory.unshared,
        claims={
            claim.id: (
                {"proven": True, "refuted": False}.get(claim.verdict),
                claim.reason or claim.observed,
            )
            for claim in proof.claims
        },
    )


def _text(pid: int, path: str) -> tuple[int, int]:
    areas = (area for area in read_smaps(pid) if area.vma.path == path and "x" in area.vma.protection)
    sizes = sum_sizes(areas)  # in kB, rounded down by the kernel
    return sizes.get("Rss", 0), sizes.get("Pss", 0)


def _names(proof: Proof) -> tuple[str, ...]:
    return tuple(f"process {process.pid}" for process in proof.processes)


def code_pages(plan: LoadPlan) -> tuple[int, ...]:
    """The pages of executable mappings, counted from the first of the image."""
    return tuple(
        (vaddr - plan.start) // PAGE_SIZE
        for mapping in plan.mappings
        if "x" in mapping.protection
        for vaddr in range(mapping.start, mapping.end, PAGE_SIZE)
    )


def parts_of(plan: LoadPlan) -> tuple[Part, ...]:
    """The mappings of a plan as parts of a grid, named by protection."""
    return tuple(Part(mapping.start, mapping.protection) for mapping in plan.mappings)


def told_steps(
    proof: Proof, saw: dict[str, Sequence[str]], tables: dict[str, Sequence[Figures]]
) -> Generator[ChapterStep, None, None]:
    """A step with its grid for each step of the proof; ``saw`` and ``tables`` by the step's name."""
    for snapshot in proof.snapshots:
        grid = Grid(snapshot.step, _names(proof), snapshot, parts_of(proof.plan))
        yield ChapterStep(
            snapshot.step,
            _DID[snapshot.step].format(len(proof.processes)),
            _calls(proof, snapshot.step),
            (_counted(grid), *saw.get(snapshot.step, ())),
            tables=tuple(tables.get(snapshot.step, ())),
            grid=grid,
        )


def _calls(proof: Proof, step: str) -> tuple[TracedCall, ...]:
    """What each process did in ``step``."""
    if step == "mapped":
        doing = [f"load at {process.base:#x}" for process in proof.processes]
    elif step == "written" and proof.word is not None:
        doing = [f"store {process.pid} {proof.word.place}" for process in proof.processes]
    else:
        return ()
    return tuple(TracedCall(text, "", name, True) for text, name in zip(doing, _names(proof), strict=True))


def _counted(grid: Grid) -> str:
    sharing = grid.sharing
    if sharing.level not in ("frames", "flags"):
        return NOTHING_OF_PAGES
    return f"{sharing.present_pages} page table entries, {sharing.distinct_frames} frames behind them."


def memory_table(library: LibraryInProcesses) -> tuple[Figures, ...]:
    """A table of what smaps says of the text of each process; none where smaps does not tell."""
    if not library.text:
        return ()
    rows = [
        (str(number), f"{rss // 1024} kB", f"{pss // 1024} kB")
        for number, (rss, pss) in enumerate(library.text, 1)
    ]
    total = [f"{sum(column) // 1024} kB" for column in zip(*library.text, strict=True)]
    title = "The text, as /proc/PID/smaps has it"
    return (Figures(title, ("process", ">Rss", ">Pss"), (*rows, ("together", total[0], total[1]))),)
