"""Why the pages of files were copied in one process: what they hold now, against what their files say.

What may have changed while it was looked at is ``unknown``, as "changed while we looked".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import inspect
from miniloader.errors import ElfError, EvidenceError, MiniloaderError, ProcessGone
from miniloader.evidence.address_ranges import AddressRanges
from miniloader.evidence.cause import Classified, classify
from miniloader.evidence.cause_names import bit
from miniloader.evidence.layout import Layouts
from miniloader.evidence.space import Placed, Space
from miniloader.kernel.maps import Vma
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.explained import Explained
from miniloader.lab.audit.file_in_process import FileInProcess, image_end
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.lab.audit.process_pages import Pages
from miniloader.machine.stub_code import jumps_to
from miniloader.native import LOOPS_SONAME, STAND_INS

__all__ = ["CHANGED", "NOT_WRITABLE", "explain", "space_of", "stand_ins_in"]

CHANGED: Final = "changed while we looked"
NOT_WRITABLE: Final = (
    "not writable: a debugger's breakpoint, a uprobe, or the program had changed the protection"
)
_WRITE: Final = np.uint8(bit("write"))
_MOST_CODE: Final = 1 << 16
_PAIR: Final = 16  # bytes of an address and what it stands for
_TOP: Final = 1 << 63  # where no process has memory; a file may say that its table lies anywhere
_RELOCATION: Final = np.uint8(bit("relocation"))


def explain(
    pid: int,
    files: MappedFiles,
    layouts: Layouts,
    explained: Explained,
    vmas: Sequence[Vma],
    pages: Pages,
    found: list[FileInProcess],
    chosen: list[FileInProcess],
) -> None:
    """Fill in the causes, and take back what may have changed meanwhile.

    ``explained`` has what was found of the copies that relatives have in common, and gets what is found now.
    """
    for placed in chosen:
        placed.causes = np.zeros(placed.private, np.uint8)
    try:
        space = space_of(pid, vmas, found)
        with ProcessMemory(pid) as memory:
            for placed in chosen:
                _explain_file(placed, memory, space, layouts, explained)
    except ProcessGone:
        raise
    except EvidenceError as error:
        for placed in chosen:
            _unknown(placed, np.arange(placed.private), str(error))
        return
    changed = pages.addresses[pages.changed()]
    after = {vma.start: vma for vma in files.mappings_of(pid)[0]}
    moved = [vma for vma in vmas if vma.is_file and after.get(vma.start) != vma]
    for placed in chosen:
        addresses = placed.addresses
        doubtful = np.isin(addresses, changed)
        for vma in moved:
            doubtful |= (addresses >= vma.start) & (addresses < vma.end)
        _unknown(placed, np.flatnonzero(doubtful), CHANGED)
        explained.keep(placed)
        _say_how_written(placed, vmas)


def space_of(pid: int, vmas: Sequence[Vma], found: Sequence[FileInProcess]) -> Space:
    """What is where in a process; raises ProcessGone, or EvidenceError where its memory must not be read."""
    extents = [Placed(placed.base, placed.start, image_end(placed), placed.file.facts) for placed in found]
    code = [(vma.start, vma.end) for vma in vmas if "x" in vma.protection]
    vdso = next(((vma.start, vma.end) for vma in vmas if vma.path == "[vdso]"), (0, 0))
    return Space(extents, code, vdso, stand_ins_in(pid, vmas))


def stand_ins_in(pid: int, vmas: Sequence[Vma]) -> dict[int, int]:
    """The functions that code of miniloader's stands for in a process, by where it is.

    Such code is C, or in a few anonymous pages of its own; who makes code by the megabyte is somebody else.
    """
    addresses = _in_loops(pid, vmas)
    code = [vma for vma in vmas if not vma.path and vma.protection == "r-x" and vma.size <= _MOST_CODE]
    if not code:
        return addresses
    starts = np.array([at for vma in code for at in range(vma.start, vma.end, PAGE_SIZE)], np.uint64)
    with ProcessMemory(pid) as memory:
        for start, page in zip(starts.tolist(), memory.pages(starts)[0], strict=True):
            function = jumps_to(page.tobytes())
            if function is not None:
                addresses[start] = function
    return addresses


def _in_loops(pid: int, vmas: Sequence[Vma]) -> dict[int, int]:
    """What is C of the functions that miniloader's code stands for: its own library has a table of them."""
    loops = next((vma for vma in vmas if "/native/loops-" in vma.path and not vma.file_offset), None)
    if loops is None:
        return {}
    try:
        image = inspect(loops.path)
        place = image.symbols.find(STAND_INS) if image.soname == LOOPS_SONAME else None
    except MiniloaderError:  # of a process that sees other files, or of somebody else's library
        return {}
    if place is None or not image.loads:  # of an older miniloader
        return {}
    row = image.symbols.rows[place]
    start, size = loops.start - image.loads[0].vaddr + int(row["value"]), int(row["size"])
    with ProcessMemory(pid) as memory:
        data = memory.read(start, min(size, PAGE_SIZE)) if loops.start <= start < _TOP else b""
    pairs = np.frombuffer(data[: len(data) // _PAIR * _PAIR], np.uint64).reshape(-1, 2)
    return {address: function for address, function in pairs.tolist() if address}


def _explain_file(
    placed: FileInProcess, memory: ProcessMemory, space: Space, layouts: Layouts, explained: Explained
) -> None:
    if placed.file.facts is None:
        _unknown(placed, np.arange(placed.private), placed.file.trouble)
        return
    rows = explained.recall(placed)
    if not len(rows):
        return
    live, read = memory.pages(placed.addresses[rows])
    try:
        answer: Classified = classify(
            placed.file.facts,
            space,
            placed.base,
            placed.vaddrs[rows],
            placed.file_offsets[rows],
            live,
            words="none",
            layouts=layouts,
            relocated=bool((placed.causes & _RELOCATION).any()),
        )
    except ElfError as error:  # cut short, or not readable any more: a trouble of this file's alone
        _unknown(placed, rows, str(error))
        return
    placed.causes[rows] = answer.causes
    written = np.column_stack([rows[answer.written[:, 0]], answer.written[:, 1:]])
    placed.written = np.concatenate([placed.written, written]).astype(np.int32)
    trouble = placed.file.facts.trouble or "a relocation's value lies in a file that cannot be read"
    placed.reasons |= dict.fromkeys(rows[answer.unreadable].tolist(), trouble)
    _unknown(placed, rows[~read], CHANGED)


def _say_how_written(placed: FileInProcess, vmas: Sequence[Vma]) -> None:
    """Say of pages that were written, though neither file nor mapping lets anybody, how that can be."""
    facts = placed.file.facts
    image = facts.image if facts is not None else None
    if facts is None or image is None or facts.has_text_relocations:
        return
    written = np.flatnonzero(placed.causes & _WRITE)
    if not len(written):
        return
    writable = [vmas[index] for index in placed.mappings if "w" in vmas[index].protection]
    mapped = AddressRanges((vma.start, vma.end) for vma in writable)
    allowed = facts.writable.meet(placed.vaddrs[written], PAGE_SIZE)
    allowed |= mapped.meet(placed.addresses[written], PAGE_SIZE)
    for row in written[~allowed].tolist():
        placed.reasons.setdefault(row, NOT_WRITABLE)


def _unknown(placed: FileInProcess, pages: NDArray[np.intp], reason: str) -> None:
    """Take back what was said about these pages."""
    if len(pages):
        placed.causes[pages] = bit("unknown")
        placed.reasons |= dict.fromkeys(pages.tolist(), reason)
        placed.written = placed.written[~np.isin(placed.written[:, 0], pages)]
