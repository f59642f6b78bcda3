"""What the file of a library says of its pages, beside what was found in memory: for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence

from miniloader.elf import ElfImage, LoadPlan
from miniloader.forking import cached_property
from miniloader.lab.got_slots import Jump, jumps
from miniloader.lab.page_bytes import ChangedPage, Contents, changed_pages
from miniloader.machine.names_at import Landmarks
from miniloader.values import dataclass

__all__ = ["LibraryStudy"]


@dataclass(frozen=True, eq=False)
class LibraryStudy:
    """A library, mapped as ``plan`` says, and ``contents``: what its pages held at one step or several."""

    image: ElfImage
    plan: LoadPlan
    contents: Sequence[Contents]

    @cached_property
    def landmarks(self) -> Landmarks:
        """The names of what lies in the library."""
        return Landmarks(self.image)

    @cached_property
    def pages(self) -> tuple[ChangedPage, ...]:
        """The pages that were read, beside the file's bytes."""
        return changed_pages(self.image, self.plan, self.contents)

    @cached_property
    def jumps(self) -> tuple[Jump, ...]:
        """Code beside the slots where it finds addresses, as they are in the file and in memory."""
        return jumps(self.landmarks, self.plan, self.contents)
