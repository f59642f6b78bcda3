"""The relocations of programs that no loader relocates: their own start-up code applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from miniloader.elf.image import ElfImage
from miniloader.elf.tables import Table, decode_relocations

__all__ = ["static_tables"]

_RELA: Final = 24  # bytes of an Elf64_Rela


def static_tables(image: ElfImage) -> Iterator[Table]:
    """The rows of the RELA tables that a program without a dynamic section relocates itself by: IRELATIVE.

    Its start-up code finds them between ``__rela_iplt_start`` and ``__rela_iplt_end``; here they are found by
    the section, which a stripped program keeps.
    """
    header = image.header
    if image.segment("PT_DYNAMIC") is not None:
        return
    for section in image.sections:
        if section.type == "SHT_RELA" and section.allocated:
            data = image.source.read(section.file_offset, section.size - section.size % _RELA, section.name)
            yield decode_relocations(
                data, header.elf_class, header.order, addends=True, machine=header.machine
            )
