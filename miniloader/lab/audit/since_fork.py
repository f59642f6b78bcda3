"""Who has had a library since the fork: a copy of its own is younger than that, whatever it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miniloader.lab.audit.result import AuditedLibrary, AuditedProcess

__all__ = ["had_at_fork", "parents_in"]


def parents_in(processes: Sequence[AuditedProcess]) -> dict[int, int]:
    """The parent of each process that has executed no program since that forked it, where both are there."""
    stacks = {process.pid: process.stack for process in processes}
    return {
        process.pid: process.parent
        for process in processes
        if process.stack and stacks.get(process.parent) == process.stack
    }


def had_at_fork(library: AuditedLibrary, parents: Mapping[int, int]) -> dict[int, int]:
    """Of ``parents`` those of whom it is sure that they had ``library`` when they forked, by child.

    Both have it at one place, and a copy in common there.  Where each has loaded it after the fork, that may
    be at one place, too, but only pages of the file are in common.
    """
    places: dict[int, set[int]] = {}
    for process in library.processes:
        if process.inherited:
            places.setdefault(process.pid, set()).add(process.base)
    return {
        pid: parents[pid]
        for pid, bases in places.items()
        if pid in parents and not bases.isdisjoint(places.get(parents[pid], ()))
    }
