"""Who was first to write to the pages that forked processes have inherited, as frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.erosion.causes import ErosionCause
from miniloader.lab.erosion.result import Spans, spans_of
from miniloader.lab.erosion.writers import CodePlace, FirstWrites
from miniloader.values import dataclass

__all__ = ["FamilyWrites", "ForkedWrites", "HowEnded", "WrittenPages", "by_cause_and_place"]

HowEnded = Literal["exited", "killed", "executed", "running", "ended"]
"""How a process is at the end: ``executed`` another program, or ``ended`` as nobody was told."""


@dataclass(frozen=True)
class WrittenPages:
    """Pages that a function (``place``) was the first to write to, for one ``cause``."""

    cause: ErosionCause
    place: CodePlace
    spans: Spans

    @property
    def pages(self) -> int:
        """How many."""
        return sum(end - start for start, end in self.spans) // PAGE_SIZE


@dataclass(frozen=True)
class ForkedWrites:
    """What became of the ``inherited`` pages of process ``pid``, forked by ``parent``.

    ``status`` is the exit status, or the number of the signal that ended it; None where nobody was told.
    ``replaced`` were mapped anew before anybody wrote to them.  ``unknown`` says why nothing is told of the
    others, "" where it is.
    """

    pid: int
    parent: int
    end: HowEnded
    status: int | None
    inherited: int
    replaced: int
    written: tuple[WrittenPages, ...]
    unknown: str = ""

    def pages(self, cause: ErosionCause | None = None) -> int:
        """How many pages were written to, for that cause or for any."""
        return sum(part.pages for part in self.written if cause in (None, part.cause))


@dataclass(frozen=True)
class FamilyWrites:
    """All processes that a program has forked, by time; ``unseen`` says which writes are not told, "": none.

    ``refused`` says why none is, where the kernel does not allow to look.  ``others`` is how many are not
    among them, as nothing is known of what they inherited: who forks without Python's knowledge, as a library
    in C may, leaves no copy.  Who executed another program does not count.
    """

    processes: tuple[ForkedWrites, ...]
    unseen: str = ""
    refused: str = ""
    others: int = 0


def by_cause_and_place(writes: FirstWrites) -> tuple[WrittenPages, ...]:
    """The pages of ``writes``, by cause and function; the most pages first."""
    pages: dict[tuple[ErosionCause, CodePlace], list[int]] = {}
    for write, cause, place in zip(writes.writes, writes.causes, writes.places, strict=True):
        pages.setdefault((cause, place), []).append(write.address & -PAGE_SIZE)
    return most_first(
        [WrittenPages(*key, spans_of(np.array(addresses, np.uint64))) for key, addresses in pages.items()]
    )


def most_first(parts: Sequence[WrittenPages]) -> tuple[WrittenPages, ...]:
    """By the number of pages, the most first."""
    return tuple(sorted(parts, key=lambda part: (-part.pages, part.cause, part.place)))
