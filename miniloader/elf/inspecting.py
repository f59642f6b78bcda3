"""An ELF file of any kind: :func:`inspect`, and of which: :func:`kind_of`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from miniloader.elf.source import Source
from miniloader.forking import importing

if TYPE_CHECKING:
    from miniloader.elf.image import ElfImage
    from miniloader.elf.kinds.file_kind import FileKind

__all__ = ["inspect", "kind_of"]


def inspect(path: str | os.PathLike[str] | Source) -> ElfImage:
    """Read the ELF file ``path``, of any kind: nothing is mapped, nothing is run, any machine will do.

    ``libx.a(member.o)`` is that member of an archive.  :func:`miniloader.elf.kind_of` says of what kind a
    file is.  Raises :class:`ElfError` when it is no ELF file or its headers make no sense; what else is wrong
    with a library :func:`miniloader.elf.checks.problems_of` lists.

    >>> inspect("/proc/self/exe").header.type in ("EXEC", "DYN")
    True
    """
    # What only loads libraries needs nothing of it; nor may a child be forked while it is being imported.
    with importing:
        from miniloader.elf.kinds.opening import open_image

    return open_image(path)


def kind_of(image: ElfImage) -> FileKind:
    """Of what kind the file of ``image`` is: a row of :data:`miniloader.elf.kinds.file_kind.KINDS_OF_FILE`.

    >>> kind_of(inspect("/proc/self/exe")).is_program
    True
    """
    with importing:
        from miniloader.elf.kinds import file_kind

    return file_kind.kind_of(image)
