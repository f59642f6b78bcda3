"""Chapter 9: relocation, the GOT and the PLT."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from typing import Any, Final

from miniloader.elf import ElfImage, inspect
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import Event, Library, load
from miniloader.machine.disassembly import disassemble
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmarks, PltStub
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim
from miniloader.walkthrough.mapping_views import MappingView, before_and_after, in_words
from miniloader.walkthrough.proof_steps import code_pages
from miniloader.walkthrough.step import (
    BeforeAfter,
    ChangedWord,
    ChapterStep,
    CodeLine,
    CodeListing,
    OfPages,
    PageBytes,
    Part,
    Row,
)
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "CalledThroughSlot"]

_WORD = 8


@dataclass(frozen=True)
class CalledThroughSlot:
    """What was seen of one stub, its slot and the pages; addresses are less the load bias."""

    plt: tuple[int, int]  # vaddrs: its first, the one after its last byte
    slot: int
    named_by_code: int | None  # the slot that the stub's code refers to
    in_file: int
    unbound: int  # in the slot, before the first call
    bound: int  # and after it
    function: int
    result: int
    code_equal: bool  # memory and file, byte for byte
    code_states: tuple[str, ...]
    copied: tuple[int, ...]  # vaddrs of pages
    written: tuple[int, ...]  # vaddrs of pages that hold relocations or zeroed bytes


def _run(bench: Workbench) -> Generator[ChapterStep, None, CalledThroughSlot]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    landmarks = Landmarks(image)
    stub = next(stub for stub in landmarks.stubs() if stub.slot.symbol == "answer")
    slot = stub.slot.vaddr
    plt = next((each.vaddr, each.vaddr + each.size) for each in image.sections if each.name == ".plt")

    def note(event: Event) -> None:
        if event.stage not in ("parse", "search"):
            bench.note(f"{event.stage}: {event.text}", access=True)

    with load(path, bind="lazy", on_event=note) as library:
        loaded = yield from _relocated(bench, image, landmarks, library, slot)
        unbound = _value(library.base + slot) - library.base
        result = library.function("ask", ctypes.c_long, [ctypes.c_long])(2)
        bench.note("ask(2)", str(result), access=True)
        bound = _value(library.base + slot) - library.base
        code_equal = _code_equal(image, library.base)
        listing = _listing(landmarks, stub, library.base, unbound, bound)
        after = yield from _called(bench, library, stub, listing, loaded, code_equal)
        return CalledThroughSlot(
            plt=plt,
            slot=slot,
            named_by_code=next((line.slot for line in listing.lines if line.slot == slot), None),
            in_file=int.from_bytes(image.read(slot, _WORD), "little"),
            unbound=unbound,
            bound=bound,
            function=library.address("answer") - library.base,
            result=result,
            code_equal=code_equal,
            code_states=tuple(after.states[page] for page in code_pages(library.plan)),
            copied=_copied(library, loaded),
            written=_written(image, lazily=unbound != bound),
        )


def _value(address: int) -> int:
    return int(ctypes.c_uint64.from_address(address).value)


def _look(bench: Workbench, library: Library, title: str) -> MappingView:
    plan = library.plan
    parts = [Part(mapping.start - plan.start, mapping.protection) for mapping in plan.mappings]
    rows = [("this process", os.getpid(), library.base + plan.start)]
    return bench.look(rows, plan.length // PAGE_SIZE, title, parts)[0]


def _relocated(
    bench: Workbench, image: ElfImage, landmarks: Landmarks, library: Library, slot: int
) -> Generator[ChapterStep, None, MappingView]:
    """Touch every page of the file: which of them are copies, and what relocating has written to the GOT."""
    for mapping in library.plan.mappings:
        if mapping.kind == "file":
            for vaddr in range(mapping.start, mapping.end, PAGE_SIZE):
                ctypes.string_at(library.base + vaddr, 1)
    loaded = _look(bench, library, "loaded")
    got = max(slot // PAGE_SIZE * PAGE_SIZE, image.dynamic.tags[DT_PLTGOT])  # what is before is no table
    before = bytes(image.read(got, min(64, _in_page(image, got)), "GOT"))
    after = ctypes.string_at(library.base + got, len(before))
    words = _words(image, landmarks, got, len(before))
    copied = _copied(library, loaded)
    yield ChapterStep(
        "relocated",
        "A library is loaded by miniloader. Its code was linked for vaddr 0, and is somewhere else now; "
        "the loader writes the addresses that depend on that into data pages.",
        bench.taken(),
        (
            OfPages(
                f"Copied by that: {len(copied)} of {len(loaded.states)} pages "
                f"({', '.join(map(hex, copied))}). No page of code is among them."
            ),
        ),
        grid=loaded.grid,
        bytes=(PageBytes("the GOT: in the file, and loaded", got, before, after, words),),
    )
    return loaded


def _copied(library: Library, view: MappingView) -> tuple[int, ...]:
    """The vaddrs of pages that were copied."""
    return tuple(library.plan.start + page * PAGE_SIZE for page in view.pages("copied", "copied-shared"))


def _in_page(image: ElfImage, vaddr: int) -> int:
    """How many bytes of the file are at ``vaddr``, of a page at most."""
    segment = next(load for load in image.loads if load.vaddr < vaddr + PAGE_SIZE and vaddr < load.file_end)
    return min(segment.file_end, vaddr + PAGE_SIZE) - vaddr


def _words(image: ElfImage, landmarks: Landmarks, start: int, length: int) -> tuple[ChangedWord, ...]:
    """The relocated words among so many bytes from ``start`` on, named by what fills them."""
    slots = {
        vaddr: landmarks.slot_at(vaddr)
        for vaddr in sorted({int(target) for target in image.relocations.targets()})
        if start <= vaddr and vaddr + _WORD <= start + length
    }
    return tuple(
        ChangedWord(vaddr - start, _WORD, landmarks.meaning(slot) if slot else "relocated")
        for vaddr, slot in slots.items()
    )


def _called(
    bench: Workbench,
    library: Library,
    stub: PltStub,
    listing: CodeListing,
    loaded: MappingView,
    code_equal: bool,
) -> Generator[ChapterStep, None, MappingView]:
    """What the first call has changed."""
    after = _look(bench, library, "called")
    slot, _, *values = listing.slots[0]
    unbound, bound = (value.removeprefix("bias + ") for value in values)
    place = "inside the stub" if stub.vaddr <= int(unbound, 16) < stub.end else "the PLT's first entry"
    leads = f", {place}: a way to the loader" if unbound != bound else ""
    pages = (code_pages(library.plan)[0], (slot // PAGE_SIZE * PAGE_SIZE - library.plan.start) // PAGE_SIZE)
    yield ChapterStep(
        "called",
        "ask(2) calls answer through the PLT. The stub jumps to whatever its slot in the GOT holds.",
        bench.taken(),
        (
            f"Before the first call the slot held {unbound}{leads}; after it {bound}, which is answer. "
            "(All less the load bias.)",
            f"The code in memory is {'byte for byte' if code_equal else 'not'} that of the file.",
        ),
        evidence=(
            BeforeAfter("The slot", "memory of this process", (Row(f"GOT slot {slot:#x}", *values),)),
            before_and_after("Pages of code and GOT", loaded, after, pages),
        ),
        grid=after.grid,
        listing=listing,
    )
    return after


def _code_equal(image: ElfImage, bias: int) -> bool:
    return all(
        ctypes.string_at(bias + load.vaddr, load.filesz) == bytes(image.read(load.vaddr, load.filesz, "code"))
        for load in image.loads
        if "x" in load.flags
    )


def _written(image: ElfImage, *, lazily: bool) -> tuple[int, ...]:
    """The vaddrs of the pages that relocating and zeroing write.

    Binding ``lazily`` takes two words more, at the head of the PLT's slots: on aarch64 not always their page.
    """
    zeroed = [span.start for span in image.plan(PAGE_SIZE).zeroed]
    vaddrs = [*image.relocations.targets().tolist(), *zeroed]
    if lazily:
        vaddrs += [image.dynamic.tags[DT_PLTGOT] + _WORD, image.dynamic.tags[DT_PLTGOT] + 2 * _WORD]
    return tuple(sorted({vaddr // PAGE_SIZE * PAGE_SIZE for vaddr in vaddrs}))


def _listing(landmarks: Landmarks, stub: PltStub, bias: int, unbound: int, bound: int) -> CodeListing:
    """The caller and the stub, with the slot that the stub goes through."""
    lines = []
    for span in (locate(landmarks, "ask"), CodeRange("answer@plt", stub.vaddr, stub.end - stub.vaddr)):
        code = ctypes.string_at(bias + span.vaddr, span.size)
        for instruction in disassemble(landmarks, span, code):
            target = instruction.target
            text = f"{instruction.mnemonic} {instruction.operands}"
            text += f"   # {target.name}" if target is not None and target.name else ""
            slot = stub.slot.vaddr if target is not None and target.vaddr == stub.slot.vaddr else None
            lines.append(CodeLine(instruction.vaddr, instruction.bytes, text.strip(), slot))
    slots = ((stub.slot.vaddr, stub.slot.symbol or "", f"bias + {unbound:#x}", f"bias + {bound:#x}"),)
    return CodeListing("ask, and the PLT stub that it calls", tuple(lines), slots)


# ---------------------------------------------------------------------------------------- claims
@claim("code-unchanged", "Code in memory is the file's, page for page", "flags")
def _code(seen: CalledThroughSlot) -> Finding:
    return Finding(
        seen.code_equal and {*seen.code_states} <= {"sole", "shared"},
        "every byte as in the file, every page the page cache's",
        f"bytes {'equal' if seen.code_equal else 'differ'}; every page: {in_words(seen.code_states)}",
    )


@claim("through-the-slot", "A PLT stub reads its target from a GOT slot")
def _through(seen: CalledThroughSlot) -> Finding:
    named = "none" if seen.named_by_code is None else f"{seen.named_by_code:#x}"
    return Finding(seen.named_by_code == seen.slot, f"the stub reads slot {seen.slot:#x}", named)


@claim("slot-holds-address", "The slot holds the function's address")
def _holds(seen: CalledThroughSlot) -> Finding:
    good = seen.bound == seen.function and seen.result == 43
    expected = f"bias + {seen.function:#x} in the slot, and ask(2) is 43"
    return Finding(good, expected, f"bias + {seen.bound:#x}, {seen.result}")


@claim("bound-when-called", "With lazy binding the first call fills it in")
def _when_called(seen: CalledThroughSlot) -> Finding:
    start, end = seen.plt
    expected = "first an address inside the library's PLT, then the function's"
    observed = f"bias + {seen.unbound:#x}, then bias + {seen.bound:#x}"
    if seen.unbound == seen.function:
        return Finding(None, expected, observed, "on this machine miniloader binds every slot at once")
    return Finding(start <= seen.unbound < end and seen.bound == seen.function, expected, observed)


@claim("only-written-copied", "Only pages with relocations or bss are copied", "flags")
def _only(seen: CalledThroughSlot) -> Finding:
    return Finding(
        seen.copied == seen.written,
        f"pages {', '.join(map(hex, seen.written))}: those with relocations or bss",
        f"pages {', '.join(map(hex, seen.copied)) or 'none'}",
    )


_SNIPPET = '''\
import ctypes

libc = ctypes.CDLL(None)
toupper = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(("toupper", libc))
tolower = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(("tolower", libc))

# A slot of a global offset table: a word that holds an address.
slot = ctypes.c_void_p(ctypes.cast(toupper, ctypes.c_void_p).value)


def stub(character):
    """Like a PLT stub: jumps to whatever address the slot holds."""
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(slot.value)(character)


print(chr(stub(ord("a"))))
'''


def _check(names: dict[str, Any]) -> Answer:
    if names["stub"].__code__.co_names[:1] != ("ctypes",) or "slot" not in names["stub"].__code__.co_names:
        return Answer(False, "stub, the code, is to stay as it is; only data may change")
    answer = chr(names["stub"](ord("Q")))
    if answer == "q":
        return Answer(True, "the same code calls another function: only its slot has changed")
    return Answer(False, f"stub(ord('Q')) should give 'q', it gives {answer!r}")


CHAPTER: Final[Chapter[CalledThroughSlot]] = Chapter(
    id="relocation",
    number=9,
    title="Relocation, the GOT and the PLT",
    claim="The loader writes addresses into data, so that code need not change and can be shared.",
    surprise="Code calls through a table: one data page is copied, and every page of code stays shared.",
    claims=(_code, _through, _holds, _when_called, _only),
    question=Quiz(
        "A library calls a function whose address is not known before it is loaded. What is changed?",
        (
            Choice(
                "Each call instruction", "Then each page of code would be a copy of one's own: chapter 11."
            ),
            Choice("One word in a table", "The calls go to a stub, the stub through the word, its GOT slot."),
            Choice("Nothing", "Addresses are random; somebody has to write them down."),
        ),
        1,
    ),
    explanation=(
        "Position-independent code refers to its own library by distance: right wherever it lies. For "
        "what lies elsewhere it reads an address from the global offset table, words of data at a fixed "
        "distance. Relocation is filling in such words.",
        "For functions there is a stub each, the procedure linkage table: one jump through one slot. With "
        "lazy binding the slot first leads to the loader, which looks the function up at the first call.",
        "So all that differs between processes is gathered on few pages of data, and the code is one copy.",
    ),
    sources=("System V psABI, AMD64, 5.2, Dynamic Linking", "ld.so(8), LD_BIND_NOW", "elf(5), Rela"),
    exercise=Exercise(
        "The stub calls toupper. Without touching the stub, make it call tolower.",
        _SNIPPET,
        _SNIPPET.replace(
            "\n\nprint(chr", "\n\nslot.value = ctypes.cast(tolower, ctypes.c_void_p).value\nprint(chr"
        ),
        _check,
        hints=(
            "stub jumps to slot.value. Who can change that?",
            "slot.value = ctypes.cast(tolower, ctypes.c_void_p).value",
        ),
    ),
    source_of={
        "code-unchanged": (
            "System V psABI, AMD64, 5.2, Global Offset Table: position-independence and shareability of "
            "the text"
        ),
        "through-the-slot": (
            "System V psABI, AMD64, 5.2, Procedure Linkage Table: it uses addresses in the private global"
            " offset table"
        ),
        "slot-holds-address": (
            "System V psABI, AMD64, 5.2, Procedure Linkage Table: the dynamic linker stores the real "
            "address in the entry"
        ),
        "bound-when-called": (
            "System V psABI, AMD64, 5.2, Procedure Linkage Table: lazily, until the first execution of an"
            " entry; ld.so(8), LD_BIND_NOW"
        ),
        "only-written-copied": (
            "System V psABI, AMD64, 5.2, Global Offset Table: absolute addresses in private data; "
            "mmap(2), MAP_PRIVATE"
        ),
    },
    run=_run,
    later=(
        Quiz(
            "A library of 8 pages is loaded. Which of its pages does the loader copy?",
            (
                Choice("All", "It writes only where there is an address to fill in, or bss to zero."),
                Choice(
                    "Those with addresses, and the end of the data",
                    "Words of data are filled in. Code is not touched.",
                ),
                Choice("Its code", "The code goes through words of data, so that it can stay as it is."),
            ),
            1,
            step="relocated",
        ),
        Quiz(
            "With lazy binding, where does a slot lead before the first call?",
            (
                Choice("To address 0", "Then the first call would crash."),
                Choice(
                    "Back into the stub, and to the loader",
                    "Which looks the function up, and writes its address into the slot.",
                ),
                Choice("To the function", "That is what the first call is for."),
            ),
            1,
            step="called",
        ),
    ),
)
