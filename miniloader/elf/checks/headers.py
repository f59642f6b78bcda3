"""Rules of the headers and of the dynamic section: what kind of file it is, and whether it can be mapped."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import PAGESIZE
from operator import attrgetter
from typing import Final

from miniloader.elf.checks.rule import Fault, rule
from miniloader.elf.dynamic import DF_1_PIE, DT_FLAGS_1
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError

_TYPE: Final = attrgetter("type")
_MOST_SPAN: Final = 1 << 36
_MOST_ALIGN: Final = 1 << 32
#: What EI_OSABI says of files for Linux: nothing, GNU; ARM's own value, which its old ABI asked for.
_OS_ABIS: Final[dict[int, str | None]] = {0: None, 3: None, 97: "ARM"}


@rule("from reading what is no ELF file, or one for another system", source="gABI 4, ELF Identification")
def identification(image: ElfImage) -> Iterator[Fault]:
    """Magic, class, byte order and version were found right when the image was read, or it would not be."""
    abi = image.header.os_abi
    if abi not in _OS_ABIS or _OS_ABIS[abi] not in (None, image.header.machine):
        yield "EI_OSABI", str(abi), "0 (System V) or 3 (GNU/Linux)"


@rule("from program headers that are not there, or of another layout", source="gABI 4, e_phentsize, e_phnum")
def header_sizes(image: ElfImage) -> Iterator[Fault]:
    """e_phentsize, e_phnum and the table's extent were found right when the image was read."""
    yield from ()


@rule("from mapping a program or an object file as a library", source="gABI 4, e_type")
def file_type(image: ElfImage) -> Iterator[Fault]:
    """Only shared objects are libraries; a program may have their type, too, and says so in DT_FLAGS_1."""
    if image.header.type != "DYN":
        yield "e_type", image.header.described_type, "ET_DYN, a shared object"
    elif image.dynamic.flag(DT_FLAGS_1, DF_1_PIE):
        yield "DT_FLAGS_1", "DF_1_PIE, an executable", "a shared object"


@rule("from SIGBUS on pages beyond the end of the file", source="gABI 5, p_filesz")
def segments_in_file(image: ElfImage) -> Iterator[Fault]:
    """What a PT_LOAD takes from the file is there; of one with zeros only, the page it begins in."""
    for load in image.loads:
        end = load.file_offset + load.filesz
        if not load.filesz and load.vaddr % PAGESIZE:
            end -= end % PAGESIZE - 1
        if end > image.source.size and (load.filesz or load.vaddr % PAGESIZE):
            yield (
                f"PT_LOAD[{load.index}].p_filesz",
                f"bytes to {end:#x}",
                f"a file that long ({image.source.size:#x} bytes)",
            )


@rule("from overlapping, unsorted, misaligned or endless mappings", source="gABI 5, PT_LOAD")
def segments_mappable(image: ElfImage) -> Iterator[Fault]:
    """The PT_LOADs can be mapped: sorted, congruent, without overlap, within bounds."""
    try:
        plan = image.plan()
    except ElfError as error:
        yield error.field, error.found, error.expected
        return
    if plan.length > _MOST_SPAN or plan.end > 1 << (47 if image.header.elf_class == 64 else 32):
        yield (
            "PT_LOAD",
            f"a span of {plan.length:#x} bytes to {plan.end:#x}",
            f"at most {_MOST_SPAN:#x} bytes",
        )
    if plan.alignment > _MOST_ALIGN:
        yield "PT_LOAD.p_align", f"{plan.alignment:#x}", f"at most {_MOST_ALIGN:#x}"


@rule("from linking by tables that are not there", source="gABI 5, Dynamic Section")
def dynamic_section(image: ElfImage) -> Iterator[Fault]:
    """There is a dynamic section, and there is something in it."""
    if image.segment("PT_DYNAMIC") is None:
        yield "PT_DYNAMIC", "none", "one (a statically linked file cannot be loaded as a library)"
        return
    if not image.dynamic.entries:
        yield "PT_DYNAMIC", "no entries", "at least DT_SYMTAB and DT_STRTAB"


@rule("from choosing between two templates or tables", source="gABI 5, Program Header")
def one_of_each(image: ElfImage) -> Iterator[Fault]:
    """No two segments of a kind of which there may be one."""
    kinds = [*map(_TYPE, image.segments)]
    for kind in ("PT_DYNAMIC", "PT_TLS", "PT_GNU_RELRO", "PT_INTERP"):
        count = kinds.count(kind)
        if count > 1:
            yield kind, f"{count} of them", "at most one"
