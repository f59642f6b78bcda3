"""A loader in seven steps, for x86-64: what is left of ld.so when only the necessary is kept.

A library is known by ``base`` and its program ``headers``.  A vaddr is an address as the library was linked;
in the process that byte is at base + vaddr.  Numbers in the file have their lowest byte first ("<" for
struct).  The numbers of elf.h and functions for memory are given: help("miniloader.walkthrough.given") lists
them.  The seven steps follow, and load() takes them one after the other.
"""

# ruff: noqa: I001 - a long import, in lines that one can read
import struct
from collections.abc import Iterator, Sequence

from miniloader.walkthrough.given import DT_GNU_HASH, DT_INIT, DT_INIT_ARRAY, DT_INIT_ARRAYSZ
from miniloader.walkthrough.given import DT_JMPREL, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_STRTAB, DT_SYMTAB
from miniloader.walkthrough.given import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE
from miniloader.walkthrough.given import PROT_EXEC, PROT_READ, PROT_WRITE, PT_GNU_RELRO, PT_LOAD
from miniloader.walkthrough.given import R_64, R_GLOB_DAT, R_JUMP_SLOT, R_RELATIVE, Header, call, down
from miniloader.walkthrough.given import dlsym, dynamic, mmap, mprotect, peek, poke, text, up, word

Headers = Sequence[Header]
Mapping = tuple[int, int, int, int | None]


def program_headers(file: bytes) -> list[Header]:
    """Step 1.  From the bytes of a file: its program headers, in their order.

    Each is a tuple (type, flags, file offset, vaddr, filesz, memsz).  e_phoff is the 8 bytes at 32,
    e_phentsize and e_phnum the 2 bytes at 54 and 56; a header is p_type, p_flags (4 bytes each), p_offset,
    p_vaddr, p_paddr, p_filesz, p_memsz, p_align (8 bytes each).
    """
    start = struct.unpack_from("<Q", file, 32)[0]
    size, number = struct.unpack_from("<HH", file, 54)
    headers: list[Header] = []
    for at in range(start, start + size * number, size):
        kind, flags, offset, vaddr, _, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", file, at)
        headers.append((kind, flags, offset, vaddr, filesz, memsz))
    return headers


def plan(headers: Headers) -> list[Mapping]:
    """Step 2.  From the program headers: the mappings to make.

    Each is a tuple (start, length, protection, file offset): whole pages, start a vaddr, file offset None
    for pages that come from no file (those of bss beyond the file's last page).  Flags of a header are
    PF_X 1, PF_W 2, PF_R 4.
    """
    mappings: list[Mapping] = []
    for kind, flags, offset, vaddr, filesz, memsz in headers:
        if kind != PT_LOAD:
            continue
        protection = (flags & 4) // 4 * PROT_READ | (flags & 2) // 2 * PROT_WRITE | (flags & 1) * PROT_EXEC
        start, file_end, end = down(vaddr), up(vaddr + filesz), up(vaddr + memsz)
        if file_end > start:
            mappings.append((start, file_end - start, protection, down(offset)))
        if end > file_end:
            mappings.append((file_end, end - file_end, protection, None))
    return mappings


def map_library(fd: int, mappings: Sequence[Mapping]) -> int:
    """Step 3.  Make the mappings of a plan, of the file ``fd``; return base.

    First reserve room for all of them with one mapping that nobody can use; then map each in its place.
    """
    first = min(start for start, *_ in mappings)
    length = max(start + length for start, length, *_ in mappings) - first
    base = mmap(0, length, 0, MAP_PRIVATE | MAP_ANONYMOUS) - first
    for start, length, protection, offset in mappings:
        flags = MAP_PRIVATE | MAP_FIXED
        if offset is None:
            mmap(base + start, length, protection, flags | MAP_ANONYMOUS)
        else:
            mmap(base + start, length, protection, flags, fd, offset)
    return base


def zero(base: int, headers: Headers) -> None:
    """Step 4.  Zero the bss in the last page of the file's part of each segment that has any.

    The page has whatever comes next in the file there.  The segment has memsz > filesz.
    """
    for kind, _, _, vaddr, filesz, memsz in headers:
        if kind == PT_LOAD and memsz > filesz:
            end = vaddr + filesz
            poke(base + end, bytes(up(end) - end))


def relocate(base: int, headers: Headers) -> None:
    """Step 5.  Carry out the relocations R_RELATIVE: store base + addend at base + offset.

    DT_RELA is the vaddr of the table, DT_RELASZ its length in bytes; an entry is offset, info, addend (8
    bytes each, the addend signed), and the low 32 bits of info are the kind.
    """
    for offset, info, addend in relocations(base, dynamic(base, headers)):
        if info & 0xFFFFFFFF == R_RELATIVE:
            poke(base + offset, struct.pack("<Q", base + addend))


def relocations(base: int, tags: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """The entries of both tables: DT_RELA, and DT_JMPREL of DT_PLTRELSZ bytes."""
    for table, size in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
        if table in tags:
            yield from struct.iter_unpack("<QQq", peek(base + tags[table], tags[size]))


def find_symbol(base: int, headers: Headers, name: bytes) -> int:
    """Step 6, first half.  The address of a symbol (its name as bytes) that the library defines; 0 for none.

    DT_GNU_HASH: numbers of buckets, first symbol, Bloom words, a shift (4 bytes each); Bloom words (8 bytes
    each), buckets, chains (4 bytes each).  The hash begins with 5381; each byte makes it hash * 33 + byte,
    of which the low 32 bits stay.  A bucket has the first symbol; the chain word of a symbol is its hash,
    but the lowest bit says that it is the last.  A symbol has 24 bytes: name (4 bytes, in DT_STRTAB), info,
    other, section (2 bytes), value, size.
    """
    tags = dynamic(base, headers)
    table, symbols, strings = (base + tags[tag] for tag in (DT_GNU_HASH, DT_SYMTAB, DT_STRTAB))
    number_of_buckets, first, bloom_words, _ = struct.unpack("<IIII", peek(table, 16))
    buckets = table + 16 + 8 * bloom_words
    chains = buckets + 4 * number_of_buckets
    wanted = 5381
    for byte in name:
        wanted = (wanted * 33 + byte) & 0xFFFFFFFF
    symbol = struct.unpack("<I", peek(buckets + 4 * (wanted % number_of_buckets), 4))[0]
    while symbol:
        chain = struct.unpack("<I", peek(chains + 4 * (symbol - first), 4))[0]
        offset, _, _, _, value, _ = struct.unpack("<IBBHQQ", peek(symbols + 24 * symbol, 24))
        if chain | 1 == wanted | 1 and text(strings + offset) == name:
            return base + int(value)
        symbol = 0 if chain & 1 else symbol + 1
    return 0


def bind(base: int, headers: Headers) -> None:
    """Step 6, second half.  Carry out R_GLOB_DAT, R_JUMP_SLOT and R_64: store a symbol's address (+ addend).

    The high 32 bits of info are the number of the symbol.  Look in the library itself first; what it does
    not define ask dlsym for (libc's memcpy is chosen by the processor: only ld.so can tell).  A weak name
    that nobody has is 0.
    """
    tags = dynamic(base, headers)
    for offset, info, addend in relocations(base, tags):
        if info & 0xFFFFFFFF in (R_64, R_GLOB_DAT, R_JUMP_SLOT):
            at = struct.unpack("<I", peek(base + tags[DT_SYMTAB] + 24 * (info >> 32), 4))[0]
            name = text(base + tags[DT_STRTAB] + at)
            address = find_symbol(base, headers, name) or dlsym(name)
            poke(base + offset, struct.pack("<Q", address + addend if address else 0))


def start(base: int, headers: Headers) -> None:
    """Step 7.  Make PT_GNU_RELRO read-only, both ends rounded down to a page; then run the constructors.

    DT_INIT is one function, DT_INIT_ARRAY a table of DT_INIT_ARRAYSZ bytes, of addresses that step 5 has
    relocated.
    """
    for kind, _, _, vaddr, _, memsz in headers:
        if kind == PT_GNU_RELRO:
            mprotect(base + down(vaddr), down(vaddr + memsz) - down(vaddr), PROT_READ)
    tags = dynamic(base, headers)
    if DT_INIT in tags:
        call(base + tags[DT_INIT])
    for at in range(0, tags.get(DT_INIT_ARRAYSZ, 0), 8):
        call(word(base + tags[DT_INIT_ARRAY] + at))


def load(path: str) -> tuple[int, Headers]:
    """All seven steps; (base, headers) of the library."""
    with open(path, "rb") as file:
        headers = program_headers(file.read())
        base = map_library(file.fileno(), plan(headers))
    zero(base, headers)
    relocate(base, headers)
    bind(base, headers)
    start(base, headers)
    return base, headers
