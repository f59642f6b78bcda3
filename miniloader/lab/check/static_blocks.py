"""Where glibc has the blocks of static thread-local storage: those of a program, and what it opens later.

They lie below a thread's pointer or above it, as the processor's ABI has it.  Source: glibc's
``elf/dl-tls.c``, _dl_determine_tlsoffset and _dl_try_allocate_static_tls, with its tunables as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

from miniloader.elf.image import Tls
from miniloader.machine.relocation import BELOW_THREAD_POINTER
from miniloader.values import dataclass, replace

__all__ = ["StaticBlocks"]

_SURPLUS: Final = 1664  # bytes: _dl_tls_static_surplus_init
_TCB_ALIGN: Final = {"X86_64": 64}  # TCB_ALIGNMENT; for restartable sequences it is 32 at least
_TCB_SIZE: Final = {"AARCH64": 16, "ARM": 8}  # TLS_TCB_SIZE, where the blocks come after it
_RSEQ: Final = 32  # bytes of restartable sequences, and their alignment, as of Linux 6.3
_RSEQ_APART: Final = (2, 41)  # the glibc from which on they are the last block: _dl_extra_tls_get_size


def _up(number: int, align: int) -> int:
    return -(-number // align) * align


@dataclass(frozen=True)
class StaticBlocks:
    """What blocks take of each thread's ``size`` bytes: ``used`` are taken; ``align`` is the most there is.

    ``below`` says whether they grow downwards from the thread pointer.
    """

    below: bool
    used: int
    size: int
    align: int

    @classmethod
    def of_program(cls, blocks: Sequence[Tls], machine: str, glibc: tuple[int, ...]) -> Self:
        """The blocks of a program that starts with these ``PT_TLS`` on ``machine``, with that ``glibc``.

        >>> block = Tls(vaddr=0, filesz=0, memsz=144, align=16)
        >>> StaticBlocks.of_program([block], "X86_64", (2, 36)).free  # 1664, and what is over to 64
        1712
        >>> StaticBlocks.of_program([block], "AARCH64", (2, 36)).free
        1664
        """
        tcb_align = _TCB_ALIGN.get(machine, 32)
        align = max([tcb_align, *(tls.align for tls in blocks)])
        below = machine in BELOW_THREAD_POINTER
        used = _downwards(blocks) if below else _upwards(blocks, _TCB_SIZE.get(machine, 0))
        if glibc >= _RSEQ_APART:
            used = _up(used, _RSEQ) + _RSEQ
        return cls(below, used, _up(used + _SURPLUS, align if below else tcb_align), align)

    @property
    def free(self) -> int:
        """How many bytes nobody has."""
        return self.size - self.used

    def with_block(self, tls: Tls) -> Self | None:
        """With the block of a library that is opened then; None where there is no such room."""
        align = max(tls.align, 1)
        first = tls.vaddr & (align - 1)
        if self.below:
            spare = self.free - tls.memsz - first
            used = self.size - spare // align * align - first
        else:
            used = _up(self.used - first, align) + first + tls.memsz
            spare = self.size - used
        return replace(self, used=used) if spare >= 0 and align <= self.align else None


def _downwards(blocks: Sequence[Tls]) -> int:
    """Bytes that the blocks of a program take below the thread pointer; small ones fill gaps."""
    offset = top = bottom = 0
    for tls in blocks:
        align = max(tls.align, 1)
        first = -tls.vaddr & (align - 1)
        if bottom - top >= tls.memsz:
            end = _up(top + tls.memsz - first, align) + first
            if end <= bottom:
                top = end
                continue
        end = _up(offset + tls.memsz - first, align) + first
        if end > offset + tls.memsz + (bottom - top):
            bottom, top = end - tls.memsz, offset
        offset = end
    return offset


def _upwards(blocks: Sequence[Tls], offset: int) -> int:
    """Bytes that the blocks of a program take above the thread pointer, after ``offset`` bytes of glibc's."""
    top = bottom = 0
    for tls in blocks:
        align = max(tls.align, 1)
        first = -tls.vaddr & (align - 1)
        start = _up(bottom + first, align) - first
        if start + tls.memsz <= top:
            bottom = start + tls.memsz
            continue
        start = _up(offset + first, align) - first
        if start - offset > top - bottom:
            bottom, top = offset, start
        offset = start + tls.memsz
    return offset
