"""Rules of what is protected from whom: thread-local storage, RELRO, the stack, code."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import PAGESIZE
from typing import Final

from miniloader.elf.checks.rule import Fault, rule
from miniloader.elf.image import ElfImage

_MOST_SPAN: Final = 1 << 36
_MOST_ALIGN: Final = 1 << 32


@rule("from copying a template that is not there", source="gABI 5, PT_TLS")
def tls_template(image: ElfImage) -> Iterator[Fault]:
    """The template of thread-local storage is there, and of a size that can be."""
    tls = image.tls
    if tls is None:
        return
    if tls.align & (tls.align - 1):
        yield "PT_TLS.p_align", f"{tls.align:#x}", "0 or a power of two"
    if tls.filesz > tls.memsz:
        yield "PT_TLS.p_filesz", f"{tls.filesz:#x}", f"at most p_memsz, {tls.memsz:#x}"
    if tls.memsz > _MOST_SPAN or tls.align > _MOST_ALIGN:
        yield "PT_TLS", f"{tls.memsz:#x} bytes aligned to {tls.align:#x}", "less than the address space"
    if tls.filesz:
        image.read(tls.vaddr, tls.filesz, "PT_TLS")


@rule("from protecting pages of something else", source="psABI, PT_GNU_RELRO")
def relro(image: ElfImage) -> Iterator[Fault]:
    """What is protected after relocation is inside a segment."""
    relro = image.segment("PT_GNU_RELRO")
    if relro is None or not relro.memsz:
        return
    # Linkers may pad it to the end of its segment's last page.
    load = image.load_at(relro.vaddr)
    if load is None or relro.end > -(-load.end // PAGESIZE) * PAGESIZE:
        yield "PT_GNU_RELRO", f"{relro.vaddr:#x} to {relro.end:#x}", "inside a PT_LOAD"


@rule("from a stack that can run injected code", source="psABI, PT_GNU_STACK", severity="warning")
def executable_stack(image: ElfImage) -> Iterator[Fault]:
    """No code on the stack."""
    if image.executable_stack:
        found = "executable" if image.segment("PT_GNU_STACK") else "none, which means executable"
        yield "PT_GNU_STACK.p_flags", found, "a stack that is not executable"


@rule("from code that can be overwritten", source="gABI 5, p_flags", severity="warning")
def writable_code(image: ElfImage) -> Iterator[Fault]:
    """No segment that can be written to and run."""
    for load in image.loads:
        if "w" in load.flags and "x" in load.flags:
            yield f"PT_LOAD[{load.index}].p_flags", load.flags, "writable or executable, not both"


@rule("from code that every process has its own copy of", source="gABI 5, DT_TEXTREL", severity="warning")
def text_relocations(image: ElfImage) -> Iterator[Fault]:
    """No relocation of code."""
    if image.dynamic.text_relocations:
        yield "DT_TEXTREL", "set", "code that needs no relocation, so that it can be shared"
