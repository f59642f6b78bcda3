"""The relocations of programs that no loader relocates: their own start-up code applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from miniloader.elf.image import ElfImage
from miniloader.elf.tables import Table, decode_relocations

__all__ = ["static_tables"]

_TABLES: Final = {"SHT_REL": False, "SHT_RELA": True}  # whether the rows have addends


def static_tables(image: ElfImage) -> Iterator[tuple[Table, bool]]:
    """The tables that a program without a dynamic section relocates itself by: IRELATIVE.

    Of each the rows, and whether they have addends (else those lie in the words).  Its start-up code finds
    them between ``__rela_iplt_start`` and ``__rela_iplt_end``; here they are found by the section, which a
    stripped program keeps.
    """
    header = image.header
    if image.segment("PT_DYNAMIC") is not None:
        return
    for section in image.sections:
        addends = _TABLES.get(section.type)
        if addends is not None and section.allocated:
            row = (3 if addends else 2) * header.word
            data = image.source.read(section.file_offset, section.size - section.size % row, section.name)
            yield (
                decode_relocations(
                    data, header.elf_class, header.order, addends=addends, machine=header.machine
                ),
                addends,
            )
