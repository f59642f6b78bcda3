"""The bytes of copied pages, as they are in the memory of a few processes: for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.evidence.sharing import COPIED, COPIED_SHARED, Sharing
from miniloader.kernel.procfs import process_file
from miniloader.values import dataclass

__all__ = [
    "ChangedPage", "Contents", "changed_pages", "file_page", "read_contents", "slot_vaddrs", "worth_reading",
]  # fmt: skip

_MOST_PAGES: Final = 32
_MOST_PROCESSES: Final = 3
_WORD: Final = 8  # bytes


@dataclass(frozen=True)
class Contents:
    """What some pages held at one ``step``.

    ``vaddrs`` are where the pages start; ``pages`` has for each of the first few processes the bytes of each
    page, None where they could not be read.
    """

    step: str
    vaddrs: tuple[int, ...]
    pages: tuple[tuple[bytes | None, ...], ...]


def slot_vaddrs(image: ElfImage) -> tuple[int, ...]:
    """Where the image keeps the addresses that its code asks for: the starts of its GOT."""
    tagged = [vaddr for tag, vaddr in image.dynamic.tags.items() if tag == DT_PLTGOT]
    return (*tagged, *(section.vaddr for section in image.sections if section.name in (".got", ".got.plt")))


def worth_reading(sharing: Sharing, also: Iterable[int], page_size: int) -> tuple[int, ...]:
    """The vaddrs of the first pages that were copied, and of the pages that hold the vaddrs ``also``."""
    copied = np.isin(sharing.states, (COPIED, COPIED_SHARED)).any(axis=0)
    vaddrs = sharing.vaddrs[copied][:_MOST_PAGES].tolist()
    return tuple(sorted({*vaddrs, *(vaddr // page_size * page_size for vaddr in also)}))


def read_contents(
    step: str, processes: Sequence[tuple[int, int]], vaddrs: tuple[int, ...], page_size: int
) -> Contents:
    """Read pages of the first few ``processes`` (pid, load bias): proc_pid_mem(5)."""
    shown = processes[:_MOST_PROCESSES]
    return Contents(step, vaddrs, tuple(_read(pid, base, vaddrs, page_size) for pid, base in shown))


def _read(pid: int, base: int, vaddrs: Sequence[int], page_size: int) -> tuple[bytes | None, ...]:
    try:
        memory = os.open(process_file(pid, "mem"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # not ours to look into: then a person sees none
        return (None,) * len(vaddrs)
    try:
        return tuple(_page(memory, base + vaddr, page_size) for vaddr in vaddrs)
    finally:
        os.close(memory)


def _page(memory: int, address: int, page_size: int) -> bytes | None:
    try:
        octets = os.pread(memory, page_size, address)
    except OSError:
        return None
    return octets if len(octets) == page_size else None


# ----------------------------------------------------------------------------- beside the file's bytes
Words = list[tuple[int, bytes]]


@dataclass(frozen=True)
class ChangedPage:
    """The page at ``vaddr``: its bytes ``in_file``, and what is not as there in memory.

    ``words`` has for each step a list with, for each process, the aligned words that differ (offset in the
    page, eight bytes); None where the page could not be read.
    """

    vaddr: int
    in_file: bytes
    words: dict[str, list[Words | None]]


def changed_pages(image: ElfImage, plan: LoadPlan, contents: Sequence[Contents]) -> tuple[ChangedPage, ...]:
    """The pages of ``contents``, each step's bytes beside the file's, in ascending order."""
    pages = []
    for vaddr in sorted({vaddr for content in contents for vaddr in content.vaddrs}):
        in_file = file_page(image, plan, vaddr)
        words = {
            content.step: [
                _differing(in_file, copies[content.vaddrs.index(vaddr)]) for copies in content.pages
            ]
            for content in contents
            if vaddr in content.vaddrs
        }
        pages.append(ChangedPage(vaddr, in_file, words))
    return tuple(pages)


def file_page(image: ElfImage, plan: LoadPlan, vaddr: int) -> bytes:
    """The page at ``vaddr`` as the file has it: zeros where it comes from no file."""
    mapping = plan.at(vaddr)
    if mapping is None or mapping.kind != "file":
        return bytes(plan.page_size)
    offset = mapping.file_offset + vaddr - mapping.start
    length = min(plan.page_size, image.source.size - offset)
    octets = bytes(image.source.read(offset, length, "page")) if length > 0 else b""
    return octets.ljust(plan.page_size, b"\0")


def _differing(in_file: bytes, copy: bytes | None) -> Words | None:
    if copy is None:
        return None
    differ = np.frombuffer(in_file, "<u8") != np.frombuffer(copy, "<u8")
    offsets = (np.flatnonzero(differ) * _WORD).tolist()
    return [(offset, copy[offset : offset + _WORD]) for offset in offsets]
