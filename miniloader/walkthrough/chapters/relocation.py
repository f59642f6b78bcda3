"""Chapter 8: relocation, the GOT and the PLT."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from typing import Any

from miniloader.elf import inspect
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import Event, load
from miniloader.machine.disassembly import disassemble
from miniloader.machine.find_code import Span, locate
from miniloader.machine.names_at import Landmarks, Stub
from miniloader.values import dataclass
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    Line,
    Listing,
    PageBytes,
    Part,
    Question,
    Statement,
    Step,
    Word,
)
from miniloader.walkthrough.workbench import Bench, rows_of, shipped

__all__ = ["CHAPTER", "Seen"]

_WORD = 8


@dataclass(frozen=True)
class Seen:
    """What was seen of one stub, its slot and the pages; addresses are less the load bias."""

    stub: tuple[int, int]  # vaddrs: its first, the one after its last byte
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


def _value(address: int) -> int:
    return int(ctypes.c_uint64.from_address(address).value)


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    landmarks = Landmarks(image)
    stub = next(one for one in landmarks.stubs() if one.slot.symbol == "answer")
    slot = stub.slot.vaddr

    def note(event: Event) -> None:
        if event.stage not in ("parse", "search"):
            bench.note(f"{event.stage}: {event.text}", access=True)

    with load(path, bind="lazy", on_event=note) as library:
        plan, bias = library.plan, library.base
        pages = plan.length // PAGE_SIZE
        row = [("this process", os.getpid(), bias + plan.start)]
        parts = [Part(one.start - plan.start, one.protection) for one in plan.mappings]
        got_page = slot // PAGE_SIZE * PAGE_SIZE
        for one in plan.mappings:
            if one.kind == "file":
                for vaddr in range(one.start, one.end, PAGE_SIZE):
                    ctypes.string_at(bias + vaddr, 1)
        loaded = bench.look(row, pages, "loaded", parts)[0]
        unbound = _value(bias + slot) - bias
        in_file = int.from_bytes(image.read(slot, _WORD), "little")
        before = bytes(image.read(got_page, min(64, _in_page(image, got_page)), "GOT"))
        during = ctypes.string_at(bias + got_page, len(before))
        copied = tuple(plan.start + page * PAGE_SIZE for page in loaded.pages("copied", "copied-shared"))
        yield Step(
            "relocated",
            "A library is loaded by miniloader. Its code was linked for vaddr 0, and is somewhere else now; "
            "the loader writes the addresses that depend on that into data pages.",
            bench.calls(),
            (
                f"Copied by that: {len(copied)} of {pages} pages ({', '.join(map(hex, copied))}). "
                "No page of code is among them.",
            ),
            grid=loaded.grid,
            bytes=(
                PageBytes(
                    "the GOT: in the file, and loaded",
                    got_page,
                    before,
                    during,
                    _words(image, got_page, before),
                ),
            ),
        )

        ask = library.function("ask", ctypes.c_long, [ctypes.c_long])
        result = ask(2)
        bench.note("ask(2)", str(result), access=True)
        bound = _value(bias + slot) - bias
        after = bench.look(row, pages, "called", parts)[0]
        function = library.address("answer") - bias
        code = [one for one in plan.mappings if "x" in one.protection]
        code_pages = [
            (vaddr - plan.start) // PAGE_SIZE
            for one in code
            for vaddr in range(one.start, one.end, PAGE_SIZE)
        ]
        equal = _code_equal(image, bias)
        listing = _listing(landmarks, stub, bias, unbound, bound)
        slot_line = next((line.slot for line in listing.lines if line.slot == slot), None)
        yield Step(
            "called",
            "ask(2) calls answer through the PLT. The stub jumps to whatever its slot in the GOT holds.",
            bench.calls(),
            (
                f"Before the first call the slot held {unbound:#x}"
                + (", inside the stub: a way to the loader" if stub.vaddr <= unbound < stub.end else "")
                + f"; after it {bound:#x}, which is answer. (All less the load bias.)",
                f"The code in memory is {'byte for byte' if equal else 'not'} that of the file.",
            ),
            evidence=(
                Evidence(
                    "The slot",
                    "memory of this process",
                    (*_slot_rows(slot, unbound, bound),),
                ),
                Evidence(
                    "Pages of code and GOT",
                    "/proc/self/pagemap",
                    rows_of(loaded, after, (code_pages[0], (got_page - plan.start) // PAGE_SIZE)),
                ),
            ),
            grid=after.grid,
            listing=listing,
        )
        return Seen(
            (stub.vaddr, stub.end),
            slot,
            slot_line,
            in_file,
            unbound,
            bound,
            function,
            result,
            equal,
            tuple(after.states[page] for page in code_pages),
            copied,
            _written(image),
        )


def _in_page(image: Any, vaddr: int) -> int:
    """How many bytes of the file are in the page at ``vaddr``."""
    load_ = next(one for one in image.loads if one.vaddr < vaddr + PAGE_SIZE and vaddr < one.file_end)
    return int(min(load_.file_end, vaddr + PAGE_SIZE) - vaddr)


def _words(image: Any, page: int, data: bytes) -> tuple[Word, ...]:
    """The relocated words among the first bytes of a page, named by what fills them."""
    landmarks = Landmarks(image)
    found = []
    for vaddr in sorted({int(target) for target in image.relocations.targets()}):
        if page <= vaddr and vaddr + _WORD <= page + len(data):
            slot = landmarks.slot_at(vaddr)
            found.append(Word(vaddr - page, _WORD, landmarks.meaning(slot) if slot else "relocated"))
    return tuple(found)


def _code_equal(image: Any, bias: int) -> bool:
    return all(
        ctypes.string_at(bias + one.vaddr, one.filesz) == bytes(image.read(one.vaddr, one.filesz, "code"))
        for one in image.loads
        if "x" in one.flags
    )


def _written(image: Any) -> tuple[int, ...]:
    """The pages that relocating and zeroing write."""
    plan = image.plan(PAGE_SIZE)
    vaddrs = [int(one) for one in image.relocations.targets()] + [span.start for span in plan.zeroed]
    return tuple(sorted({vaddr // PAGE_SIZE * PAGE_SIZE for vaddr in vaddrs}))


def _slot_rows(slot: int, unbound: int, bound: int) -> tuple[Any, ...]:
    from miniloader.walkthrough.model import Row

    return (Row(f"GOT slot {slot:#x}", f"bias + {unbound:#x}", f"bias + {bound:#x}"),)


def _listing(landmarks: Landmarks, stub: Stub, bias: int, unbound: int, bound: int) -> Listing:
    """The caller and the stub, with the slot that the stub goes through."""
    lines = []
    spans = [
        locate(landmarks, "ask"),
        Span("answer@plt", stub.vaddr, stub.end - stub.vaddr),
    ]
    for span in spans:
        code = ctypes.string_at(bias + span.vaddr, span.size)
        for one in disassemble(landmarks, span, code):
            refers = one.target.vaddr if one.target is not None else None
            name = f"   # {one.target.name}" if one.target is not None and one.target.name else ""
            reads = refers if refers == stub.slot.vaddr else None
            lines.append(Line(one.vaddr, one.bytes, f"{one.mnemonic} {one.operands}{name}".strip(), reads))
    slots = ((stub.slot.vaddr, stub.slot.symbol or "", f"bias + {unbound:#x}", f"bias + {bound:#x}"),)
    return Listing("ask, and the PLT stub that it calls", tuple(lines), slots)


# ---------------------------------------------------------------------------------------- claims
def _code(seen: Seen) -> Finding:
    return Finding(
        seen.code_equal and {*seen.code_states} <= {"sole", "shared"},
        "every byte as in the file, every page the page cache's",
        f"bytes {'equal' if seen.code_equal else 'differ'}; {', '.join(sorted(set(seen.code_states)))}",
    )


def _holds(seen: Seen) -> Finding:
    return Finding(
        seen.bound == seen.function and seen.result == 43,
        f"bias + {seen.function:#x} in the slot, and ask(2) is 43",
        f"bias + {seen.bound:#x}, {seen.result}",
    )


def _through(seen: Seen) -> Finding:
    named = "none" if seen.named_by_code is None else f"{seen.named_by_code:#x}"
    return Finding(seen.named_by_code == seen.slot, f"the stub reads slot {seen.slot:#x}", named)


def _when_called(seen: Seen) -> Finding:
    start, end = seen.stub
    expected = "first an address inside the library's PLT, then the function's"
    observed = f"bias + {seen.unbound:#x}, then bias + {seen.bound:#x}"
    if seen.unbound == seen.function:
        return Finding(None, expected, observed, "on this machine miniloader binds every slot at once")
    inside = start <= seen.unbound < end
    return Finding(inside and seen.bound == seen.function, expected, observed)


def _only(seen: Seen) -> Finding:
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


CHAPTER = Chapter(
    id="relocation",
    number=8,
    title="Relocation, the GOT and the PLT",
    claim="The loader writes addresses into data, so that code need not change and can be shared.",
    surprise="Code calls through a table: one data page is copied, and every page of code stays shared.",
    claims=(
        Statement("code-unchanged", "Code in memory is the file's, page for page", _code, "flags"),
        Statement("through-the-slot", "A PLT stub reads its target from a GOT slot", _through),
        Statement("slot-holds-address", "The slot holds the function's address", _holds),
        Statement("bound-when-called", "With lazy binding the first call fills it in", _when_called),
        Statement("only-written-copied", "Only pages with relocations or bss are copied", _only, "flags"),
    ),
    question=Question(
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
    ),
    run=_run,
)
