"""Code that finds addresses in slots: PLT stubs and functions, beside what their slots hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np

from miniloader.elf import LoadPlan
from miniloader.elf.symbols import STT_FUNC
from miniloader.errors import MiniloaderError
from miniloader.lab.page_bytes import Contents, file_page
from miniloader.machine.disassembly import Instruction, disassemble
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmarks, Slot
from miniloader.values import dataclass

__all__ = ["Jump", "jumps"]

_MOST_STUBS: Final = 4
_MOST_FUNCTIONS: Final = 2
_MOST_TRIED: Final = 300  # functions, the shortest first
_LONGEST: Final = 96  # bytes of a function
_WORD: Final = 8


@dataclass(frozen=True)
class Jump:
    """The ``code`` of a stub or a function, and the slot where it finds an address.

    ``at`` is the vaddr of the instruction that reads the slot, ``meaning`` says whose address it holds;
    ``before`` is its value in the file, ``after`` in the memory of each process that was looked into.
    """

    name: str
    code: tuple[Instruction, ...]
    at: int
    slot: Slot
    meaning: str
    place: str
    before: str
    after: tuple[str, ...]


def jumps(landmarks: Landmarks, plan: LoadPlan, contents: Sequence[Contents]) -> tuple[Jump, ...]:
    """The first PLT stubs and the shortest functions whose slot was looked at; none where the processor is
    not known.
    """
    if not contents:
        return ()
    try:
        return (
            *islice(_found(landmarks, plan, contents[-1], _stubs(landmarks)), _MOST_STUBS),
            *islice(_found(landmarks, plan, contents[-1], _functions(landmarks)), _MOST_FUNCTIONS),
        )
    except MiniloaderError:  # a processor that cannot be disassembled: the page has one part less
        return ()


def _stubs(landmarks: Landmarks) -> Iterator[tuple[CodeRange, Slot | None]]:
    for stub in landmarks.stubs():
        name = f"{landmarks.meaning(stub.slot)}@plt"
        yield CodeRange(name, stub.vaddr, stub.end - stub.vaddr), stub.slot


def _functions(landmarks: Landmarks) -> Iterator[tuple[CodeRange, Slot | None]]:
    table = landmarks.image.symbols
    sizes = table.rows["size"]
    functions = np.flatnonzero(table.defined & (table.type == STT_FUNC) & (sizes > 0) & (sizes <= _LONGEST))
    for index in functions[np.argsort(sizes[functions], kind="stable")][:_MOST_TRIED].tolist():
        yield locate(landmarks, f"{int(table.rows['value'][index]):#x}"), None


def _found(
    landmarks: Landmarks, plan: LoadPlan, contents: Contents, spans: Iterator[tuple[CodeRange, Slot | None]]
) -> Iterator[Jump]:
    """A jump for each of ``spans`` whose slot lies on a page that was read; each slot once."""
    told: set[int] = set()
    for span, of_stub in spans:
        if of_stub is not None and _page(plan, of_stub) not in contents.vaddrs:
            continue
        code = disassemble(landmarks, span)
        reads = [
            (instruction.vaddr, instruction.target.slot)
            for instruction in code
            if instruction.target and instruction.target.kind == "got"
        ]
        for at, slot in reads[:1]:
            if slot is not None and slot.vaddr not in told and _page(plan, slot) in contents.vaddrs:
                told.add(slot.vaddr)
                yield _jump(landmarks, plan, contents, span, code, at, slot)


def _jump(
    landmarks: Landmarks,
    plan: LoadPlan,
    contents: Contents,
    span: CodeRange,
    code: tuple[Instruction, ...],
    at: int,
    slot: Slot,
) -> Jump:
    page = _page(plan, slot)
    row, offset = contents.vaddrs.index(page), slot.vaddr - page
    section = landmarks.image.section_at(slot.vaddr)
    return Jump(
        name=span.name,
        code=code,
        at=at,
        slot=slot,
        meaning=landmarks.meaning(slot),
        place=section.name if section else "GOT",
        before=_number(file_page(landmarks.image, plan, page), offset),
        after=tuple(_number(pages[row], offset) for pages in contents.pages),
    )


def _page(plan: LoadPlan, slot: Slot) -> int:
    return slot.vaddr // plan.page_size * plan.page_size


def _number(page: bytes | None, offset: int) -> str:
    return "not known" if page is None else f"{int.from_bytes(page[offset : offset + _WORD], 'little'):#x}"
