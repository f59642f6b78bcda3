"""What the page about a proof shows: values for ``templates/proof.html``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np

from miniloader.elf import LoadPlan
from miniloader.elf.plan import PlannedMapping
from miniloader.evidence.sharing import analyse
from miniloader.lab.library_study import LibraryStudy
from miniloader.lab.proof.proof import DECISIVE, STEPS, Proof
from miniloader.report.matrix_data import Film, Group, Scene
from miniloader.report.page_notes import bytes_of_pages, ranges

__all__ = ["groups_of", "view_of"]

_WHAT: Final = {
    "r--": "constants",
    "r-x": "code",
    "rw-": "data",
    "rwx": "writable code",
    "---": "nothing",
}


def view_of(proof: Proof) -> dict[str, Any]:
    """Everything that the template asks for."""
    study = proof.study
    command = ["miniloader", "prove", proof.path, "-n", str(len(proof.processes))]
    return {
        "proof": proof,
        "name": os.path.basename(proof.path),
        "film": _film(proof, study) if proof.evidence in ("frames", "flags") else None,
        "decisive": DECISIVE,
        "memory": proof.memory,
        "names": names_of(proof),
        "jumps": study.jumps if study else (),
        "command": shlex.join(command),
        "image": study.image if study else None,
    }


def _film(proof: Proof, study: LibraryStudy | None) -> Film:
    about = {step.name: step.help for step in STEPS}
    steps = [snapshot.step for snapshot in proof.snapshots]
    vaddrs, plan = analyse(proof.snapshots[0]).vaddrs, proof.plan

    def shown(page: int) -> int:
        """Where a page of the plan, or the next one that is shown, is among those shown."""
        return int(np.searchsorted(vaddrs, np.uint64(plan.start + page * plan.page_size)))

    groups = [replace(group, start=shown(group.start), stop=shown(group.stop)) for group in groups_of(plan)]
    notes = ranges(study.image, plan, proof.word) if study else ()
    contents = bytes_of_pages(study.landmarks, plan, study.pages, proof.word) if study else {}
    return Film(
        title=f"The pages of {os.path.basename(proof.path)} in {len(proof.processes)} processes",
        rows=names_of(proof),
        groups=tuple(group for group in groups if group.start < group.stop),
        scenes=tuple(
            Scene(snapshot.step, about.get(snapshot.step, ""), snapshot) for snapshot in proof.snapshots
        ),
        start=steps.index(DECISIVE) if DECISIVE in steps else 0,
        ranges=tuple((shown(first), shown(last), heading, text) for first, last, heading, text in notes),
        pages={shown(page): facts for page, facts in contents.items()},
    )


def names_of(proof: Proof) -> tuple[str, ...]:
    """What the page calls the processes."""
    return tuple(f"process {number}" for number in range(1, len(proof.processes) + 1))


def groups_of(plan: LoadPlan) -> tuple[Group, ...]:
    """The mappings of ``plan`` without its gaps, each a group of pages; RELRO is one of its own."""
    return tuple(
        Group(
            (start - plan.start) // plan.page_size,
            (end - plan.start) // plan.page_size,
            *_named(mapping, relro),
        )
        for mapping in plan.mappings
        if mapping.kind != "gap"
        for start, end, relro in _parts(mapping, plan)
    )


def _parts(mapping: PlannedMapping, plan: LoadPlan) -> Iterator[tuple[int, int, bool]]:
    """The mapping in at most three parts: before RELRO, RELRO (True), and after it."""
    page = plan.page_size
    low, high = plan.relro.start // page * page, plan.relro.end // page * page
    edges = sorted({mapping.start, mapping.end, *(e for e in (low, high) if mapping.start < e < mapping.end)})
    for start, end in pairwise(edges):
        yield start, end, "w" in mapping.protection and low <= start < high


def _named(mapping: PlannedMapping, relro: bool) -> tuple[str, str]:
    """What a group is called, and what is said about it."""
    if mapping.kind == "zero":
        return f"{mapping.protection} bss", "anonymous memory"
    name = "r-- relro" if relro else f"{mapping.protection} {_WHAT.get(mapping.protection, '')}".strip()
    return name, f"file offset {mapping.file_offset:#x}"
