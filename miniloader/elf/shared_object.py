"""A file that has to be a shared object: :func:`inspect`."""

from __future__ import annotations

import os

from miniloader.elf.checks import refuse_other_types
from miniloader.elf.image import ElfImage, read_image
from miniloader.elf.source import Source
from miniloader.errors import ElfError

__all__ = ["inspect"]


def inspect(path: str | os.PathLike[str] | Source) -> ElfImage:
    """Read the shared object ``path``: nothing is mapped, nothing is run, any machine will do.

    Raises :class:`ElfError` when the file is no ELF shared object or its headers make no sense; what else
    is wrong with it :func:`miniloader.elf.checks.problems_of` lists.

    >>> inspect("/proc/self/exe")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    miniloader.errors.ElfError: /proc/self/exe: ...
    """
    source = path if isinstance(path, Source) else Source.open(path)
    try:
        image = read_image(source)
        refuse_other_types(image)
    except ElfError:
        source.close()
        raise
    return image
