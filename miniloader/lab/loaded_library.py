"""A library that this process has loaded, as the kernel has it mapped, and what calls of it returned."""

from __future__ import annotations

import os
from collections.abc import Sequence

from miniloader.kernel.maps import Vma, read_maps, within
from miniloader.loader import Library
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.call import Outcome
from miniloader.values import dataclass

__all__ = ["LoadedLibrary", "UsedLibrary", "look_at"]


@dataclass(frozen=True)
class UsedLibrary:
    """A library in use; ``ours`` when it was not the system's loader that loaded it."""

    name: str
    path: str
    base: int
    ours: bool


@dataclass(frozen=True)
class LoadedLibrary:
    """A library as it was while loaded.  ``mappings`` are the kernel's, of the library's span."""

    path: str
    base: int
    mappings: tuple[Vma, ...]
    libraries: tuple[UsedLibrary, ...]
    stages_ms: dict[str, float]
    outcomes: tuple[Outcome, ...]


def look_at(library: Library, outcomes: Sequence[Outcome] = ()) -> LoadedLibrary:
    """Ask the kernel how ``library`` is mapped, and gather the rest."""
    start, end = library.base + library.plan.start, library.base + library.plan.end
    libraries = tuple(
        UsedLibrary(os.path.basename(used.name), used.name, used.bias, not isinstance(used, HostLibrary))
        for used in library.libraries
    )
    mappings = within(read_maps(), start, end)
    return LoadedLibrary(
        library.path, library.base, mappings, libraries, dict(library.stages_ms), tuple(outcomes)
    )
