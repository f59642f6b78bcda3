"""Rules of the tables by which a library is linked: symbols, hash tables, strings, relocations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from miniloader.arrays import NDArray, np
from miniloader.elf.checks.rule import Fault, rule
from miniloader.elf.dynamic import DT_GNU_HASH, DT_RELR
from miniloader.elf.image import ElfImage
from miniloader.elf.relocations import kind_name
from miniloader.elf.symbols import SysvHash
from miniloader.elf.tables import distinct

_RELR_MARKER: Final = "GLIBC_ABI_DT_RELR"


@rule(
    "from reading symbols, hashes and versions outside the image",
    source="gABI 5, Hash Table; LSB",
    when_linked=True,
)
def symbol_tables(image: ElfImage) -> Iterator[Fault]:
    """The symbol, hash and version tables are inside the image."""
    _ = image.symbols  # reading them checks every extent
    yield from ()


@rule("from chains that leave the table or never end", source="gABI 5, Hash Table")
def hash_links(image: ElfImage) -> Iterator[Fault]:
    """The links of DT_HASH stay in the table, and its chains end.

    Links of DT_GNU_HASH are bounded by its layout, and were when it was read.
    """
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


@rule("from words that an old ld.so would not relocate", source="glibc's elf/dl-version.c, DT_RELR")
def relr_marker(image: ElfImage) -> Iterator[Fault]:
    """Who has DT_RELR, and needs versions of libc.so, needs the one that says that it knows DT_RELR."""
    if DT_RELR not in image.dynamic.tags:
        return
    names = [v.name for v in image.versions.values() if v.file is not None and v.file.startswith("libc.so.")]
    if names and _RELR_MARKER not in names:
        yield (
            "DT_VERNEED",
            f"no need of {_RELR_MARKER} beside DT_RELR",
            "one; link with -z pack-relative-relocs",
        )


@rule("from names outside the string table", source="gABI 4, String Table", when_linked=True)
def strings(image: ElfImage) -> Iterator[Fault]:
    """Every name is inside the string table, and ends there; what no name uses does not matter."""
    _ = image.needed, image.soname, image.runpath, image.rpath
    size = len(image.symbols.strings)
    beyond = np.flatnonzero(image.symbols.rows["name"] >= max(size, 1))
    if len(beyond):
        offset = int(image.symbols.rows["name"][beyond[0]])
        yield (
            f"DT_SYMTAB[{int(beyond[0])}].st_name",
            f"{offset:#x}",
            f"inside the string table, whose last NUL ends {size:#x} bytes",
        )


@rule("from writing outside the image", source="gABI 4, r_offset", when_linked=True)
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


@rule("from symbols outside their table", source="gABI 4, r_info", when_linked=True)
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


@rule(
    "from taking relocations of another kind for those that only add the load bias",
    source="glibc's elf/dynamic-link.h, DT_RELACOUNT",
    when_linked=True,
)
def relative_relocations(image: ElfImage) -> Iterator[Fault]:
    """The rows that DT_RELACOUNT counts do nothing but add the load bias."""
    for table in image.relocations.tables:
        for code in distinct(table.rows["type"][: table.head])[0].tolist():
            kind = kind_name(image.header.machine, code)
            if "_RELATIVE" not in kind:
                yield "DT_RELACOUNT", f"{table.head} rows, {kind} among them", "R_*_RELATIVE alone"
