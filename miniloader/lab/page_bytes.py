"""The bytes of copied pages, as they are in the memory of a few processes: for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from miniloader.elf import ElfImage
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.evidence.sharing import COPIED, COPIED_SHARED, Sharing
from miniloader.kernel.procfs import process_file
from miniloader.values import dataclass

__all__ = ["Contents", "read_contents", "slot_vaddrs", "worth_reading"]

_MOST_PAGES: Final = 32
_MOST_PROCESSES: Final = 3


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
