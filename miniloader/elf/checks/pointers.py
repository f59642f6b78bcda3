"""Rules of the functions that a library has called when it is loaded and unloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from miniloader.arrays import NDArray, np
from miniloader.elf.checks.rule import Fault, rule
from miniloader.elf.dynamic import (
    DT_FINI,
    DT_INIT,
    FUNCTION_ARRAYS,
    tag_name,
)
from miniloader.elf.image import ElfImage
from miniloader.elf.relocations import kind_name
from miniloader.elf.tables import blocks

#: Where a pointer to a function points to data that describes it.
_DESCRIPTORS: Final = frozenset({"PPC64", "IA_64", "PARISC"})


@rule("from calling what is no function pointer", source="gABI 5, DT_INIT_ARRAY")
def init_arrays(image: ElfImage) -> Iterator[Fault]:
    """The arrays of constructors and destructors are inside a segment."""
    word, tags = image.header.word, image.dynamic.tags
    for start, size in FUNCTION_ARRAYS:
        length = tags.get(size, 0)
        if start not in tags or not length:
            continue
        if length % word:
            yield tag_name(size), f"{length} bytes", f"a multiple of {word}"
        vaddr = tags[start]
        load = image.load_at(vaddr)
        if load is None or vaddr + length > load.end:
            yield tag_name(start), f"{vaddr:#x}, {length} bytes", "inside one PT_LOAD"


@rule("from calling what is no code at start and end", source="gABI 5, DT_INIT, DT_FINI")
def code_pointers(image: ElfImage) -> Iterator[Fault]:
    """DT_INIT and DT_FINI."""
    if image.header.machine in _DESCRIPTORS:
        return
    for tag in (DT_INIT, DT_FINI):
        vaddr = image.dynamic.tags.get(tag)
        load = image.load_at(vaddr) if vaddr else None
        if vaddr and (load is None or "x" not in load.flags):
            yield tag_name(tag), f"{vaddr:#x}", "inside an executable PT_LOAD"


@rule(
    "from calling what is no code, listed as a constructor or destructor",
    source="gABI 5, DT_INIT_ARRAY",
    when_linked=True,
)
def array_pointers(image: ElfImage) -> Iterator[Fault]:
    """What relocation will write to the arrays of constructors and destructors."""
    if image.header.machine in _DESCRIPTORS:
        return
    tags = image.dynamic.tags
    arrays = [
        (tag_name(start), tags[start], tags[size])
        for start, size in FUNCTION_ARRAYS
        if tags.get(start) and tags.get(size)
    ]
    if not arrays:
        return
    low, high = min(start for _, start, _ in arrays), max(start + size for _, start, size in arrays)
    vaddrs, functions = _relative(image, low, min(high - low, (1 << 64) - 1))
    bad = ~_are_code(image, functions)
    for name, start, size in arrays if bad.any() else ():
        outside = np.flatnonzero(bad & (vaddrs - np.uint64(start) < np.uint64(size)))
        if len(outside):
            field = f"{name} at {int(vaddrs[outside[0]]):#x}"
            found = f"a function at {int(functions[outside[0]]):#x}"
            yield field, found, "inside an executable PT_LOAD"


def _relative(image: ElfImage, start: int, length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The words of these ``length`` bytes that get the load bias, and what it is added to."""
    relr, word = image.relocations.relr, image.header.word
    relr = relr[relr - np.uint64(start) < np.uint64(length)]
    added = [
        int.from_bytes(image.read(vaddr, word, "DT_RELR"), image.header.byte_order) for vaddr in relr.tolist()
    ]
    vaddrs, values = [relr], [np.array(added, np.uint64)]
    for table in image.relocations.tables:
        for rows in blocks(table.rows) if table.addends else ():
            # What is before wraps to far behind.
            inside = rows[rows["offset"] - np.uint64(start) < np.uint64(length)]
            if len(inside):
                kinds = [kind_name(image.header.machine, code) for code in inside["type"].tolist()]
                inside = inside[["_RELATIVE" in kind for kind in kinds]]
                vaddrs.append(inside["offset"])
                values.append(inside["addend"].view(np.uint64))
    return np.concatenate(vaddrs), np.concatenate(values)


def _are_code(image: ElfImage, vaddrs: NDArray[np.uint64]) -> NDArray[np.bool_]:
    found = np.zeros(len(vaddrs), np.bool_)
    for load in image.loads:
        if "x" in load.flags:
            last = min(load.end, 1 << 64) - 1
            found |= (vaddrs >= np.uint64(load.vaddr)) & (vaddrs <= np.uint64(last))
    return found
