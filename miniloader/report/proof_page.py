"""What the page about a proof shows: values for ``templates/proof.html``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.plan import PlannedMapping
from miniloader.errors import MiniloaderError
from miniloader.lab.proof.proof import DECISIVE, STEPS, Proof
from miniloader.loader import inspect
from miniloader.machine.names_at import Landmarks
from miniloader.report.got_slots import jumps
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
    landmarks = _landmarks(proof)
    film = _film(proof, landmarks)
    command = ["miniloader", "prove", proof.path, "-n", str(len(proof.processes))]
    return {
        "proof": proof,
        "name": os.path.basename(proof.path),
        "film": film if proof.evidence in ("frames", "flags") else None,
        "decisive": DECISIVE,
        "memory": proof.memory,
        "names": names_of(proof),
        "jumps": jumps(landmarks, proof.plan, proof.contents) if landmarks else (),
        "command": shlex.join(command),
        "image": landmarks.image if landmarks else None,
    }


def _landmarks(proof: Proof) -> Landmarks | None:
    """The names of what is in the library; None where its file has gone or changed meanwhile."""
    try:
        image: ElfImage = inspect(proof.path)
        return Landmarks(image) if image.plan(proof.plan.page_size) == proof.plan else None
    except MiniloaderError:
        return None


def _film(proof: Proof, landmarks: Landmarks | None) -> Film:
    about = {step.name: step.help for step in STEPS}
    steps = [snapshot.step for snapshot in proof.snapshots]
    image = landmarks.image if landmarks else None
    return Film(
        title=f"The pages of {os.path.basename(proof.path)} in {len(proof.processes)} processes",
        rows=names_of(proof),
        groups=groups_of(proof.plan),
        scenes=tuple(Scene(one.step, about.get(one.step, ""), one) for one in proof.snapshots),
        start=steps.index(DECISIVE) if DECISIVE in steps else 0,
        ranges=ranges(image, proof.plan, proof.word) if image else (),
        pages=bytes_of_pages(landmarks, proof.plan, proof.contents, proof.word) if landmarks else {},
    )


def names_of(proof: Proof) -> tuple[str, ...]:
    """What the page calls the processes."""
    return tuple(f"process {number}" for number in range(1, len(proof.processes) + 1))


def groups_of(plan: LoadPlan) -> tuple[Group, ...]:
    """The mappings of ``plan`` without its gaps, each a group of pages; RELRO is one of its own."""
    return tuple(
        Group(
            (start - plan.start) // plan.page_size, (end - plan.start) // plan.page_size, *_named(one, relro)
        )
        for one in plan.mappings
        if one.kind != "gap"
        for start, end, relro in _parts(one, plan)
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
