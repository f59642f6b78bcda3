"""Where a file breaks a rule: one function for each rule of :mod:`miniloader.elf.checks`.

Each yields a :data:`Fault` for every place, or raises :class:`ElfError` where a table cannot be read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf.dynamic import (
    DF_1_PIE,
    DT_FINI,
    DT_FINI_ARRAY,
    DT_FINI_ARRAYSZ,
    DT_FLAGS_1,
    DT_GNU_HASH,
    DT_INIT,
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
    tag_name,
)
from miniloader.elf.image import ElfImage
from miniloader.elf.relocations import kind_name
from miniloader.elf.symbols import SysvHash
from miniloader.elf.tables import blocks, distinct
from miniloader.errors import ElfError

Fault = tuple[str, str, str]
"""Field, found, expected."""

_MOST_SPAN: Final = 1 << 36
_MOST_ALIGN: Final = 1 << 32
#: What EI_OSABI says of files for Linux: nothing, GNU; ARM's own value, which its old ABI asked for.
_OS_ABIS: Final[dict[int, str | None]] = {0: None, 3: None, 97: "ARM"}

#: Where a pointer to a function points to data that describes it.
_DESCRIPTORS: Final = frozenset({"PPC64", "IA_64", "PARISC"})


def identification(image: ElfImage) -> Iterator[Fault]:
    """Magic, class, byte order and version were found right when the image was read, or it would not be."""
    abi = image.header.os_abi
    if abi not in _OS_ABIS or _OS_ABIS[abi] not in (None, image.header.machine):
        yield "EI_OSABI", str(abi), "0 (System V) or 3 (GNU/Linux)"


def header_sizes(image: ElfImage) -> Iterator[Fault]:
    """e_phentsize, e_phnum and the table's extent were found right when the image was read."""
    yield from ()


def file_type(image: ElfImage) -> Iterator[Fault]:
    """Only shared objects are libraries."""
    if image.header.type != "DYN":
        yield "e_type", f"ET_{image.header.type}", "ET_DYN, a shared object"


def segments_in_file(image: ElfImage) -> Iterator[Fault]:
    """What a PT_LOAD takes from the file is there."""
    for load in image.loads:
        if load.file_offset + load.filesz > image.source.size and load.filesz:
            end = load.file_offset + load.filesz
            yield (
                f"PT_LOAD[{load.index}].p_filesz",
                f"bytes to {end:#x}",
                f"a file that long ({image.source.size:#x} bytes)",
            )


def plan(image: ElfImage) -> Iterator[Fault]:
    """The PT_LOADs can be mapped: sorted, congruent, without overlap, within bounds."""
    try:
        plan = image.plan(4096)
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


def dynamic(image: ElfImage) -> Iterator[Fault]:
    """There is a dynamic section, and it is that of a library."""
    if image.segment("PT_DYNAMIC") is None:
        yield "PT_DYNAMIC", "none", "one (a statically linked file cannot be loaded as a library)"
        return
    if not image.dynamic.entries:
        yield "PT_DYNAMIC", "no entries", "at least DT_SYMTAB and DT_STRTAB"
    if image.dynamic.flag(DT_FLAGS_1, DF_1_PIE):
        yield "DT_FLAGS_1", "DF_1_PIE, an executable", "a shared object"


def one_of_each(image: ElfImage) -> Iterator[Fault]:
    """No two segments of a kind of which there may be one."""
    kinds = [segment.type for segment in image.segments]
    for kind in ("PT_DYNAMIC", "PT_TLS", "PT_GNU_RELRO", "PT_INTERP"):
        count = kinds.count(kind)
        if count > 1:
            yield kind, f"{count} of them", "at most one"


def strings(image: ElfImage) -> Iterator[Fault]:
    """Every name is inside the string table, and ends there."""
    _ = image.needed, image.soname, image.runpath, image.rpath
    strings = image.symbols.strings
    size = len(strings)
    if size and strings[-1:] != b"\0":
        yield "DT_STRTAB", f"a last byte of {strings[-1]:#x}", "0, which ends the last string"
    beyond = np.flatnonzero(image.symbols.rows["name"] >= max(size, 1))
    if len(beyond):
        offset = int(image.symbols.rows["name"][beyond[0]])
        yield (
            f"DT_SYMTAB[{int(beyond[0])}].st_name",
            f"{offset:#x}",
            f"inside the string table of {size:#x} bytes",
        )


def symbols(image: ElfImage) -> Iterator[Fault]:
    """The symbol, hash and version tables are inside the image."""
    _ = image.symbols  # reading them checks every extent
    yield from ()


def hash_links(image: ElfImage) -> Iterator[Fault]:
    """Those of DT_GNU_HASH are bounded by its layout, and were when it was read."""
    if DT_GNU_HASH in image.dynamic.tags or not isinstance(table := image.symbols.hash, SysvHash):
        return
    count = len(table.chains)
    for name, links in (("bucket", table.buckets), ("chain", table.chains)):
        if len(links) and int(links.max()) >= count:
            yield f"DT_HASH {name}", f"symbol {int(links.max())}", f"one of the {count} symbols"
            return
    reached = table.chains.copy()
    reached[:1] = 0  # the end of every chain
    for _ in range(count.bit_length()):
        reached = reached[reached]
    if reached.any():
        yield "DT_HASH chain", f"a cycle, with symbol {int(reached.max())} in it", "chains that end"


def relocation_targets(image: ElfImage) -> Iterator[Fault]:
    """Every word that is relocated is inside a segment that can be written to."""
    for name, offsets, size in _target_arrays(image):
        outside = _outside(image, offsets, size, writable=not image.dynamic.text_relocations)
        if len(outside):
            where = "a writable segment" if not image.dynamic.text_relocations else "a segment"
            yield f"{name} r_offset", f"{int(offsets[outside[0]]):#x}", f"{size} bytes inside {where}"


def _target_arrays(image: ElfImage) -> Iterator[tuple[str, NDArray[np.uint64], int]]:
    """Of each table the vaddrs that are relocated, and how many bytes each."""
    word = image.header.word
    yield "DT_RELR", image.relocations.relr, word
    for table in image.relocations.tables:
        offsets, kinds = table.rows["offset"], table.rows["type"]
        # R_*_NONE relocates nothing, wherever it points.
        yield table.name, offsets[kinds != 0] if not kinds.all() else offsets, word
        for code in distinct(kinds)[0].tolist():
            if "TLSDESC" in kind_name(image.header.machine, code):
                yield table.name, offsets[kinds == code], 2 * word


def _outside(image: ElfImage, offsets: NDArray[np.uint64], size: int, *, writable: bool) -> NDArray[np.intp]:
    """The positions in ``offsets`` of which ``size`` bytes are not within one (writable) PT_LOAD."""
    if not len(offsets):
        return np.empty(0, np.intp)
    low, high = int(offsets.min()), int(offsets.max())
    inside = np.zeros(len(offsets), bool)
    for load in image.loads:
        if load.memsz < size or load.end > 1 << 64 or (writable and "w" not in load.flags):
            continue
        if load.vaddr <= low and high <= load.end - size:
            return np.empty(0, np.intp)
        inside |= (offsets >= np.uint64(load.vaddr)) & (offsets <= np.uint64(load.end - size))
    return np.flatnonzero(~inside)


def relocation_symbols(image: ElfImage) -> Iterator[Fault]:
    """Every symbol that is relocated by is in the table."""
    count = len(image.symbols)
    for table in image.relocations.tables:
        if len(table.rows) and int(table.rows["symbol"].max()) >= count:
            yield (
                f"{table.name} r_info",
                f"symbol {int(table.rows['symbol'].max())}",
                f"one of the {count} symbols",
            )


def arrays(image: ElfImage) -> Iterator[Fault]:
    """The arrays of constructors and destructors are inside a segment."""
    word = image.header.word
    for start, size in ((DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ)):
        length = image.dynamic.tags.get(size, 0)
        if start not in image.dynamic.tags or not length:
            continue
        if length % word:
            yield tag_name(size), f"{length} bytes", f"a multiple of {word}"
        vaddr = image.dynamic.tags[start]
        if not any(load.vaddr <= vaddr and vaddr + length <= load.end for load in image.loads):
            yield tag_name(start), f"{vaddr:#x}, {length} bytes", "inside one PT_LOAD"


def relative_head(image: ElfImage) -> Iterator[Fault]:
    """The rows that DT_RELACOUNT counts do nothing but add the load bias."""
    for table in image.relocations.tables:
        for code in distinct(table.rows["type"][: table.head])[0].tolist():
            kind = kind_name(image.header.machine, code)
            if "_RELATIVE" not in kind:
                yield "DT_RELACOUNT", f"{table.head} rows, {kind} among them", "R_*_RELATIVE alone"


def code_pointers(image: ElfImage) -> Iterator[Fault]:
    """DT_INIT and DT_FINI."""
    if image.header.machine in _DESCRIPTORS:
        return
    for tag in (DT_INIT, DT_FINI):
        vaddr = image.dynamic.tags.get(tag)
        code = (load for load in image.loads if "x" in load.flags)
        if vaddr and not any(load.vaddr <= vaddr < load.end for load in code):
            yield tag_name(tag), f"{vaddr:#x}", "inside an executable PT_LOAD"


def array_pointers(image: ElfImage) -> Iterator[Fault]:
    """What relocation will write to the arrays of constructors and destructors."""
    if image.header.machine in _DESCRIPTORS:
        return
    tags = image.dynamic.tags
    arrays = [
        (tag_name(start), tags[start], tags[size])
        for start, size in ((DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ))
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
            what = f"{name} at {int(vaddrs[outside[0]]):#x}"
            found = f"a function at {int(functions[outside[0]]):#x}"
            yield what, found, "inside an executable PT_LOAD"


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


def tls(image: ElfImage) -> Iterator[Fault]:
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


def relro(image: ElfImage) -> Iterator[Fault]:
    """What is protected after relocation is inside a segment."""
    relro = image.segment("PT_GNU_RELRO")
    if relro is None or not relro.memsz:
        return
    # Linkers may pad it to the end of its segment's last page.
    ends = (-(-load.end // 4096) * 4096 for load in image.loads if load.vaddr <= relro.vaddr < load.end)
    if not any(relro.end <= end for end in ends):
        yield "PT_GNU_RELRO", f"{relro.vaddr:#x} to {relro.end:#x}", "inside a PT_LOAD"


def executable_stack(image: ElfImage) -> Iterator[Fault]:
    """No code on the stack."""
    if image.executable_stack:
        yield "PT_GNU_STACK.p_flags", "executable", "a stack that is not executable"


def writable_code(image: ElfImage) -> Iterator[Fault]:
    """No segment that can be written to and run."""
    for load in image.loads:
        if "w" in load.flags and "x" in load.flags:
            yield f"PT_LOAD[{load.index}].p_flags", load.flags, "writable or executable, not both"


def text_relocations(image: ElfImage) -> Iterator[Fault]:
    """No relocation of code."""
    if image.dynamic.text_relocations:
        yield "DT_TEXTREL", "set", "code that needs no relocation, so that it can be shared"
