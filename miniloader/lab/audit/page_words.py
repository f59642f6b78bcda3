"""One page of one process, word by word: what the file has, what the process has, and who wrote it."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from miniloader.errors import UsageError
from miniloader.evidence.cause import classify
from miniloader.evidence.cause_names import Cause, cause_names
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.slots import RELATIVE, SYMBOL
from miniloader.evidence.space import Space
from miniloader.json_schema import COUNT, HEX, INT, TEXT, array, keys, nullable, record, words
from miniloader.kernel.pagemap import FRAME, PRESENT, PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.explain import CHANGED, space_of
from miniloader.lab.audit.file_in_process import SWAPPED_OUT, FileInProcess, image_start
from miniloader.lab.audit.select import matches
from miniloader.lab.audit.survey import Memo, locate
from miniloader.values import dataclass

__all__ = ["PAGE_SCHEMA", "PageView", "PageWord", "view_page"]


@dataclass(frozen=True)
class PageWord:
    """A word of a page that the loader writes or that differs; ``cause`` "" while it is as in the file.

    ``file`` is what the file has, ``old`` what was there before the program wrote (what relocation put
    there, where that can be computed, else what the file has), ``new`` what is there now.
    """

    vaddr: int
    size: int
    cause: Cause | str
    symbol: str
    kind: str
    file: int
    old: int
    new: int


@dataclass(frozen=True)
class PageView:
    """A page of a file in process ``pid``.

    ``state`` is ``private`` (a copy), ``swapped`` (a copy that is swapped out, which is not read, as that
    would bring it in), ``shared`` (the file's own page), ``anonymous`` (memory of no file at this place: bss,
    or what the program has put there) or ``absent``; only of a private page there are ``words``.
    ``unknown``: the file cannot be read, which alone says where in it a vaddr is.
    """

    pid: int
    path: str
    build_id: str | None
    base: int
    vaddr: int
    section: str
    state: str
    causes: tuple[Cause, ...]
    words: tuple[PageWord, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The object that ``audit --page --json`` prints."""
        return asdict(self)


PAGE_SCHEMA: Final = record(
    {"pid": COUNT, "path": TEXT, "build_id": nullable(HEX), "base": INT, "vaddr": COUNT, "section": TEXT},
    {
        "state": words("private swapped shared anonymous absent unknown"),
        "causes": array(TEXT),
        "reason": TEXT,
    },
    {"words": array(record(keys(TEXT, "cause symbol kind"), keys(COUNT, "vaddr size file old new")))},
)
"""What :meth:`PageView.to_json` gives."""


def view_page(pid: int, vaddr: int, library: str) -> PageView:
    """The page that holds ``vaddr`` of the one file that the pattern ``library`` chooses.

    Raises UsageError when that is none or several, or the vaddr is not in it; ProcessGone, EvidenceError.
    """
    with PageMap(pid) as pagemap:
        vmas, _, files = locate(pid, pagemap, Memo(), frames=True)
        placed = _place(files, library, vaddr & -PAGE_SIZE)
        vaddr = vaddr & -PAGE_SIZE
        entry = pagemap.read(placed.base + vaddr, placed.base + vaddr + PAGE_SIZE)
        facts, causes, words, reason = placed.file.facts, tuple[Cause, ...](), tuple[PageWord, ...](), ""
        rows, swapped = np.flatnonzero(placed.vaddrs == vaddr), bool((placed.swapped_vaddrs == vaddr).any())
        if len(rows) and facts is not None:
            with ProcessMemory(pid) as memory:  # all copies: they show whether the image has been relocated
                live, _ = memory.pages(placed.addresses)
            space, page = space_of(pid, vmas, files), int(rows[0])
            answer = classify(
                facts, space, placed.base, placed.vaddrs, placed.file_offsets, live, words="every"
            )
            causes = cause_names(int(answer.causes[page]))
            of_page = answer.words[answer.words["page"] == page]
            words = tuple(_word(facts, space, placed.base, row) for row in of_page)
            reason = facts.trouble
        elif facts is None:
            causes, reason = ("unknown",), placed.file.trouble
        elif swapped:
            causes, reason = ("unknown",), SWAPPED_OUT
        after = pagemap.read(placed.base + vaddr, placed.base + vaddr + PAGE_SIZE)
        if int((entry[0] ^ after[0]) & (PRESENT | FRAME)):
            causes, words, reason = ("unknown",), (), CHANGED
    of_file = any(placed.base + vaddr in vma and vma.is_file for vma in vmas)
    present = "shared" if of_file else "anonymous"
    state = "unknown" if facts is None else present if entry[0] & PRESENT else "absent"
    return PageView(
        pid=pid,
        path=placed.file.identity.path,
        build_id=placed.file.build_id,
        base=placed.base,
        vaddr=vaddr,
        section=facts.section_on(vaddr) if facts is not None else "",
        state="private" if len(rows) and facts is not None else "swapped" if swapped else state,
        causes=causes,
        words=words,
        reason=reason,
    )


def _place(files: list[FileInProcess], library: str, vaddr: int) -> FileInProcess:
    """Where the one file that the pattern ``library`` chooses has the page at ``vaddr``."""
    named = [
        placed
        for placed in files
        if matches(library, placed.file.identity.path, os.path.basename(placed.file.identity.path))
    ]
    inside = [placed for placed in named if image_start(placed) <= placed.base + vaddr < placed.end]
    if not named:
        raise UsageError(f"--library {library!r}: this process has no such file mapped")
    if len({placed.file.number for placed in named}) > 1:
        names = ", ".join(sorted(placed.file.identity.path for placed in named))
        raise UsageError(f"--library {library!r}: fits several files: {names}")
    if not inside and named[0].file.facts is None:
        return named[0]  # whose file nobody can read: what is where in it, and where it ends, is not known
    if not inside:
        end = max(placed.end - placed.base for placed in named)
        raise UsageError(f"--page {vaddr:#x}: not in {named[0].file.identity.path}, which ends at {end:#x}")
    return inside[0]


def _word(facts: FileFacts, space: Space, base: int, row: np.void) -> PageWord:
    number = int(facts.symbols_at(np.array([row["vaddr"]], np.uint64))[0])
    slot = facts.slots[row["slot"]] if row["slot"] >= 0 else None
    put = base if slot is not None and slot["what"] == RELATIVE else None
    if slot is not None and slot["what"] == SYMBOL and slot["symbol"] < len(facts.name_numbers):
        put = space.address_of(int(facts.name_numbers[slot["symbol"]]))
    old = (
        int(row["file"])
        if slot is None or put is None
        else (put + int(slot["addend"])) % 2 ** (8 * int(row["size"]))
    )
    return PageWord(
        vaddr=int(row["vaddr"]),
        size=int(row["size"]),
        cause=next(iter(cause_names(int(row["cause"]))), ""),
        symbol=facts.symbol_name(number) if number >= 0 else "",
        kind=facts.kind_name(int(slot["kind"])) if slot is not None else "",
        file=int(row["file"]),
        old=old,
        new=int(row["live"]),
    )
