"""What does the file say?  ELF files, decoded into frozen values and numpy tables; nothing is mapped."""

from miniloader.elf.image import ElfImage, Tls, inspect, read_image
from miniloader.elf.plan import LoadPlan, PlannedCall, PlannedMapping, Span
from miniloader.elf.source import Source

__all__ = [
    "ElfImage",
    "LoadPlan",
    "PlannedCall",
    "PlannedMapping",
    "Source",
    "Span",
    "Tls",
    "inspect",
    "read_image",
]
