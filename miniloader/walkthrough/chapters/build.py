"""Chapter 15: a loader of one's own, in seven steps; the reference solution is what runs here."""

from __future__ import annotations

import ast
import ctypes
import inspect
import os
import zlib
from collections.abc import Generator
from typing import Any, Final

from miniloader.kernel.maps import read_maps, within
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass
from miniloader.walkthrough import given, loader_check
from miniloader.walkthrough import reference_loader as loader
from miniloader.walkthrough.chapter import Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.loader_check import STEPS, Studied, check_loader, first_difference, studied
from miniloader.walkthrough.step import ChapterStep, Figures
from miniloader.walkthrough.traced_calls import flag_text
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "BuiltLoader", "skeleton"]

_HELLO: Final = b"hello"
_MOST_ROWS: Final = 6
_KINDS: Final = {
    given.PT_LOAD: "PT_LOAD",
    given.PT_DYNAMIC: "PT_DYNAMIC",
    given.PT_GNU_RELRO: "PT_GNU_RELRO",
    4: "PT_NOTE",
    7: "PT_TLS",
    0x6474E550: "PT_GNU_EH_FRAME",
    0x6474E551: "PT_GNU_STACK",
    0x6474E553: "PT_GNU_PROPERTY",
}
_PROTECTIONS: Final = {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4}
_SIGNS: Final = ((4, "r"), (2, "w"), (1, "x"))


@dataclass(frozen=True)
class BuiltLoader:
    """What the reference loader made of libz, beside what ld.so did.

    ``differences`` are those of each step, "" for none.  ``relocated`` and ``bound`` count the words that
    were written and those of them that ld.so has, too, less each one's base.
    """

    differences: tuple[str, ...]
    relocated: tuple[int, int]
    bound: tuple[int, int]
    crc: int


def _run(bench: Workbench) -> Generator[ChapterStep, None, BuiltLoader]:
    library = studied()
    headers = loader.program_headers(library.content)
    yield ChapterStep(
        "read the program headers",
        f"{library.name} is read, {len(library.content):,} bytes; its program headers say how to map it.",
        bench.taken(),
        ("Three kinds matter here: what to map, where the dynamic section is, and what to freeze.",),
        tables=(
            Figures("Program headers", _HEADER_COLUMNS, tuple(_header_row(header) for header in headers)),
        ),
    )
    mappings = loader.plan(headers)
    yield ChapterStep(
        "plan",
        "Each PT_LOAD becomes one mapping of whole pages, or two, where it is longer in memory.",
        bench.taken(),
        ("Start and file offset round down together: both leave the same remainder.",),
        tables=(Figures("The plan", _PLAN_COLUMNS, tuple(_plan_row(*mapping) for mapping in mappings)),),
    )
    base = yield from _mapped(bench, library, mappings)
    loader.zero(base, headers)
    end = next(vaddr + filesz for kind, _, _, vaddr, filesz, memsz in headers if memsz > filesz and kind == 1)
    bench.note(f"library[{end:#x}:{given.up(end):#x}] = zeros", access=True)
    yield ChapterStep(
        "zero",
        "The last page of the data has bytes of the file behind it; bss begins there, and has to be zero.",
        bench.taken(),
        (f"From base + {end:#x} to the end of that page all bytes are zero now.",),
    )
    relocated, bound = yield from _linked(bench, library, base, headers)
    crc = yield from _started(bench, library, base, headers)
    return BuiltLoader(
        differences=tuple(first_difference(vars(loader), library, step) or "" for step in STEPS),
        relocated=relocated,
        bound=bound,
        crc=crc,
    )


_HEADER_COLUMNS = ("type", "flags", ">file offset", ">vaddr", ">in file", ">in memory")
_PLAN_COLUMNS = (">start", ">length", "mode", "what is behind")


def _header_row(header: given.Header) -> tuple[str, ...]:
    kind, flags, *numbers = header
    letters = "".join(sign if flags & bit else "-" for bit, sign in _SIGNS)
    return _KINDS.get(kind, f"{kind:#x}"), letters, *map(hex, numbers)


def _plan_row(start: int, length: int, protection: int, offset: int | None) -> tuple[str, ...]:
    letters = "".join(sign if protection & bit else "-" for bit, sign in ((1, "r"), (2, "w"), (4, "x")))
    return hex(start), hex(length), letters, "zeros" if offset is None else f"the file from {offset:#x}"


def _mapped(
    bench: Workbench, library: Studied, mappings: list[loader.Mapping]
) -> Generator[ChapterStep, None, int]:
    fd = bench.opened(library.path)
    base = loader.map_library(fd, mappings)
    first = min(start for start, *_ in mappings)
    end = max(start + length for start, length, *_ in mappings)
    bench.note(
        f"mmap(NULL, {end - first}, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0)", f"{base + first:#x}"
    )
    for start, length, protection, offset in mappings:
        source = (
            "MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS, -1, 0"
            if offset is None
            else f"MAP_PRIVATE|MAP_FIXED, {fd}, {offset}"
        )
        mode = flag_text(protection, _PROTECTIONS, "PROT_NONE")
        bench.note(f"mmap({base + start:#x}, {length}, {mode}, {source})", f"{base + start:#x}")
    vmas = within(read_maps(), base, base + end)
    rows = tuple((hex(vma.start - base), hex(vma.end - base), vma.protection) for vma in vmas)
    yield ChapterStep(
        "map",
        "One mapping reserves the whole span; then each mapping of the plan takes its place in it.",
        bench.taken(),
        (f"base is {base:#x}. ld.so has this library at {library.by_ld_so:#x}: both may be there at once.",),
        tables=(Figures("/proc/self/maps, less base", ("from", "to", "mode"), rows),),
    )
    return base


def _linked(
    bench: Workbench, library: Studied, base: int, headers: list[given.Header]
) -> Generator[ChapterStep, None, tuple[tuple[int, int], tuple[int, int]]]:
    """Steps 5 and 6; how many words each wrote, and how many of them ld.so has as well."""
    entries = [*loader.relocations(base, given.dynamic(base, headers))]
    relative = [offset for offset, info, _ in entries if info & 0xFFFFFFFF == given.R_RELATIVE]
    symbolic = [offset for offset, info, _ in entries if info & 0xFFFFFFFF != given.R_RELATIVE]
    rows = [(f"{offset:#x}", f"{given.word(base + offset):#x}") for offset in relative[:_MOST_ROWS]]
    loader.relocate(base, headers)
    same = _like_ld_so(library, base, relative)
    yield ChapterStep(
        "relocate",
        f"{len(relative)} words hold vaddrs: base is added to each.",
        bench.taken(),
        (f"ld.so has the same words, less its base, in {same} of {len(relative)}.",),
        tables=(
            Figures(
                f"The first {len(rows)}",
                (">slot", ">in the file", ">now"),
                tuple((*row, f"base + {given.word(base + int(row[0], 16)) - base:#x}") for row in rows),
            ),
        ),
    )
    loader.bind(base, headers)
    told = [
        (f"{at:#x}", name, _leads_to(library, base, given.word(base + at)))
        for at, name in _named(library, base, entries)
    ]
    bound = _like_ld_so(library, base, symbolic)
    yield ChapterStep(
        "bind",
        f"{len(symbolic)} slots want the address of a name: from this library's hash table, or from dlsym.",
        bench.taken(),
        (f"ld.so has the same in {bound} of {len(symbolic)}{_later(len(symbolic) - bound)}.",),
        tables=(Figures(f"{len(told)} of them", (">slot", "name", "leads to"), tuple(told)),),
    )
    return (len(relative), same), (len(symbolic), bound)


def _later(others: int) -> str:
    """What is to be said of slots that ld.so has not filled in."""
    return f"; the other {others} it fills in at their first call" if others else ""


def _named(library: Studied, base: int, entries: list[tuple[int, int, int]]) -> list[tuple[int, str]]:
    """Some slots with their names: the first few of PLT slots."""
    names = dict(loader_check.slots(library, base))
    slots = [offset for offset, info, _ in entries if info & 0xFFFFFFFF == given.R_JUMP_SLOT]
    return [(offset, names[offset]) for offset in slots[:_MOST_ROWS]]


def _leads_to(library: Studied, base: int, address: int) -> str:
    return (
        f"base + {address - base:#x}"
        if 0 <= address - base < library.image.plan(PAGE_SIZE).end
        else f"{address:#x}, another library"
    )


def _like_ld_so(library: Studied, base: int, slots: list[int]) -> int:
    """How many of the slots hold what ld.so's copy holds: a place in the library, or an address."""
    words = [(given.word(base + slot), given.word(library.by_ld_so + slot)) for slot in slots]
    return sum(word == other or word - base == other - library.by_ld_so for word, other in words)


def _started(
    bench: Workbench, library: Studied, base: int, headers: list[given.Header]
) -> Generator[ChapterStep, None, int]:
    loader.start(base, headers)
    relro = library.image.plan(PAGE_SIZE).relro
    bench.note(f"mprotect(base + {relro.start:#x}, {relro.end - relro.start}, PROT_READ)", "0")
    address = loader.find_symbol(base, headers, b"crc32")
    prototype = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_uint)
    crc = int(prototype(address)(0, _HELLO, len(_HELLO)))
    bench.note('crc32(0, "hello", 5)', f"{crc:#x}", access=True)
    yield ChapterStep(
        "protect and start",
        "What is relocated for good is made read-only, the constructors run, and crc32 is called.",
        bench.taken(),
        (f"{os.path.basename(library.path)} works, and ld.so knows nothing of it.",),
    )
    return crc


# ---------------------------------------------------------------------------------------- claims
def _step_claim(number: int, id: str, text: str) -> Any:
    """That a step of the reference loader gives what it should."""

    def finding(seen: BuiltLoader) -> Finding:
        difference = seen.differences[number - 1]
        return Finding(not difference, "no difference", difference or "no difference")

    return claim(id, text)(finding)


_STEP_CLAIMS: Final = (
    _step_claim(1, "headers", "Six numbers a program header are all that mapping needs"),
    _step_claim(2, "plan", "The plan follows from the program headers alone"),
    _step_claim(3, "mapped", "The kernel's list of mappings is the plan"),
    _step_claim(4, "zeroed", "Past the data all bytes are zero, and no other byte has changed"),
    _step_claim(5, "relocated", "Relocation changes the words that it names, and no other"),
    _step_claim(6, "bound", "A hash table finds each name of the library, and no other"),
    _step_claim(7, "started", "RELRO alone is frozen, and each constructor has run, in its order"),
)


@claim("like-ld-so", "ld.so has written the same words")
def _like(seen: BuiltLoader) -> Finding:
    written, same = seen.relocated
    return Finding(written == same > 0, f"all {written}", f"{same} of {written}")


@equal("crc32", 'The library works: crc32 of "hello" is zlib\'s', zlib.crc32(_HELLO), "{:#x}")
def _crc(seen: BuiltLoader) -> int:
    return seen.crc


# -------------------------------------------------------------------------------------- the skeleton
def skeleton() -> str:
    """The reference loader without the bodies of its steps: what a learner begins with."""
    source = inspect.getsource(loader)
    lines = source.splitlines()
    wanted = {*(step.function for step in STEPS), "find_symbol"}
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in wanted and node.end_lineno is not None:
            first = node.body[1].lineno - 1  # below the docstring
            lines[first : node.end_lineno] = ["    raise NotImplementedError"]
    return "\n".join(lines) + "\n"


CHAPTER: Final[Chapter[BuiltLoader]] = Chapter(
    id="build",
    number=15,
    title="Write your own loader",
    claim="A loader for one library is seven steps: read, plan, map, zero, relocate, bind, start.",
    surprise="It is less than 200 lines, and libz runs in it.",
    claims=(*_STEP_CLAIMS, _like, _crc),
    question=Quiz(
        "What does a loader need to know of a library, to map it?",
        (
            Choice("Its sections", "Those are for linkers and debuggers. A file may have none, and load."),
            Choice("Its program headers", "Each PT_LOAD says which bytes belong to which addresses."),
            Choice("Its symbols", "They are for binding, once it is mapped."),
        ),
        1,
    ),
    explanation=(
        "The program headers say what to map; the dynamic section, mapped then, says all else: where "
        "the tables of relocations, symbols, strings and hashes are, and the constructors.",
        "The order matters. Zeroing and relocating write, so RELRO is frozen behind them. A constructor may "
        "call any function of the library, so it comes last.",
        "What ld.so does besides: it finds and loads the libraries that this one needs, looks names up in "
        "all of them, with versions, sets up thread-local storage, and tells debuggers and unwinders. "
        "miniloader does these things, too: read miniloader/loader/loading.py from the top.",
    ),
    sources=(
        "elf(5)",
        "System V gABI, Program Loading and Dynamic Linking",
        "System V psABI, AMD64, 4.4, Relocation, and 5.1, Program Loading",
        "glibc, elf/dl-lookup.c",
        "ld.so(8)",
    ),
    exercise=Exercise(
        "Write the seven functions that raise NotImplementedError, each as its docstring says. Check after "
        "every one: the first thing that your loader does otherwise than it should is told, with a hint.",
        skeleton(),
        inspect.getsource(loader),
        check_loader,
        hints=tuple(f"{step.function}: {step.hint}." for step in STEPS),
        where=loader_check.where,
    ),
    source_of={
        "headers": "elf(5), Program header (Phdr)",
        "plan": "System V gABI, Program Loading; System V psABI, AMD64, 5.1, Program Loading",
        "mapped": "System V psABI, AMD64, 5.1, Program Loading; mmap(2), MAP_FIXED",
        "zeroed": (
            "elf(5), PT_LOAD: the extra bytes are defined to hold the value 0; System V psABI, AMD64, "
            "5.1, Program Loading"
        ),
        "relocated": "System V psABI, AMD64, 4.4, R_X86_64_RELATIVE: B + A",
        "bound": (
            "glibc, elf/dl-lookup.c, do_lookup_x(); binutils, bfd/elf.c, bfd_elf_gnu_hash(): DT_GNU_HASH"
        ),
        "started": "System V gABI, Initialization and Termination Functions; ld(1), -z relro",
        "like-ld-so": "measured here: ld.so's own copy of the library in this process",
        "crc32": "zlib.h, crc32()",
    },
    run=_run,
    later=(
        Quiz(
            "A word of the file holds the vaddr 0x33f0. The library lies at base. What should the word be?",
            (
                Choice("0x33f0: it is right as it is", "That is an address of nothing in this process."),
                Choice("base + 0x33f0", "Which is what R_X86_64_RELATIVE asks for."),
                Choice("The file offset of 0x33f0", "Code has no use for file offsets."),
            ),
            1,
            step="relocate",
        ),
        Quiz(
            "Where does the address of memcpy come from?",
            (
                Choice("The library's own hash table", "It has only what this library defines."),
                Choice("libc's symbol table", "It has a function there that chooses one for this processor."),
                Choice("dlsym: it asks ld.so", "ld.so has libc loaded, and has had it choose."),
            ),
            2,
            step="bind",
        ),
    ),
)
