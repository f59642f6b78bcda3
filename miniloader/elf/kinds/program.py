"""How the kernel maps a program: the load plan of who is started, not loaded.

The mappings are those of :func:`miniloader.elf.plan.plan_segments`, but what no segment covers stays free, a
program for a fixed address lies at its own vaddrs, and bss is asked for as the heap is.  Source: Linux's
``fs/binfmt_elf.c``, ``elf_load`` and ``load_elf_binary``.
"""

from __future__ import annotations

from collections.abc import Iterator

from miniloader.elf.image import ElfImage
from miniloader.elf.kinds.file_kind import FileKind, kind_of
from miniloader.elf.plan import LoadPlan, PlannedCall, PlannedMapping

__all__ = ["kernel_calls", "kernel_mappings"]


def kernel_mappings(image: ElfImage, page_size: int) -> tuple[PlannedMapping, ...]:
    """What the kernel maps of the program, ascending; of the vaddrs between it maps nothing."""
    return tuple(mapping for mapping in image.plan(page_size).mappings if mapping.kind != "gap")


def kernel_calls(image: ElfImage, page_size: int) -> tuple[PlannedCall, ...]:
    """What the kernel does as it starts the program, and then its linker or itself, written as calls.

    ``start`` is a vaddr, which is the address of a program for a fixed one.
    """
    return tuple(_calls(image.plan(page_size), kind_of(image)))


def _calls(plan: LoadPlan, kind: FileKind) -> Iterator[PlannedCall]:
    fixed = kind.name in ("program", "static-program")
    mapped = 0
    for mapping in plan.mappings:
        extent = (mapping.start, mapping.length, mapping.protection)
        if mapping.kind == "file":
            flags: tuple[str, ...] = ("MAP_PRIVATE", "MAP_FIXED")
            why = f"{mapping.protection} pages of the file"
            if not mapped and fixed:
                flags = ("MAP_PRIVATE", "MAP_FIXED_NOREPLACE")
            elif not mapped:
                flags = ("MAP_PRIVATE",)
                why += "; the kernel chooses base, with room for all"
            mapped += 1
            yield PlannedCall("map", "mmap", *extent, flags, mapping.file_offset, why)
        elif mapping.kind == "zero":
            flags = ("MAP_PRIVATE", "MAP_FIXED", "MAP_ANONYMOUS")
            yield PlannedCall("map", "mmap", *extent, flags, None, "bss: pages of zeroes, of no file")
    for span in plan.zeroed:
        under = plan.at(span.start)
        if under is not None and under.kind == "file" and "w" in under.protection:
            why = "bss in the file's last page"
            yield PlannedCall("zero", "memset", span.start, span.end - span.start, "", (), None, why)
    if plan.relro:
        linker = "its own start-up code" if kind.is_static else "its linker"
        start, length = plan.relro.start, plan.relro.end - plan.relro.start
        why = f"RELRO, by {linker} once it is relocated"
        yield PlannedCall("protect", "mprotect", start, length, "r--", (), None, why)
