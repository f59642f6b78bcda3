"""Chapter 12: RELRO: relocated, then frozen."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from typing import Any

import numpy as np

from miniloader.elf import LoadPlan, inspect
from miniloader.errors import WorkerError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import Event, Library, load
from miniloader.loader.relocation_groups import sort_relocations
from miniloader.values import dataclass
from miniloader.walkthrough.exercises import address_of
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    Part,
    Question,
    Row,
    Statement,
    Step,
    Table,
)
from miniloader.walkthrough.recorded_calls import Calls
from miniloader.walkthrough.workbench import Bench, View, rows_of, shipped

__all__ = ["CHAPTER", "Seen"]

_WORD = 8
_USERS = 16


@dataclass(frozen=True)
class Seen:
    """What was seen of the pages of PT_GNU_RELRO, and of the data behind them."""

    pages: int  # of RELRO
    relocating: str  # protection of the first, while words are filled in
    frozen: tuple[str, ...]  # protection of each, loaded
    data: str  # protection of the page behind them, loaded
    states: tuple[str, ...]  # loaded
    written: tuple[int, ...]  # numbers of those that relocating writes
    store: str  # the signal that a store into RELRO ends in
    store_data: tuple[bool, str]  # whether a store behind it is read back, and its signal
    bases: tuple[int, int]  # load biases of two copies
    differences: tuple[int, ...]  # of their relocated words: values, those that occur
    others_equal: bool  # all other words of RELRO


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.copy(shipped("demo"))
    image = inspect(path)
    plan = image.plan(PAGE_SIZE)
    relro = plan.relro
    pages = (relro.end - relro.start) // PAGE_SIZE
    located = sort_relocations(image).dynamic["offset"].tolist()
    targets = sorted([*image.relocations.targets().tolist(), *located])
    words = tuple(vaddr for vaddr in targets if relro.start <= vaddr < relro.end)
    parts = (Part(0, "RELRO"), Part(relro.end - relro.start, "data"))
    meanwhile: list[str] = []
    mapped: list[View] = []
    biases: list[int] = []

    def look(title: str) -> View:
        row = [("this process", os.getpid(), biases[0] + relro.start)]
        return bench.look(row, pages + 1, title, parts)[0]

    def note(event: Event) -> None:
        bench.note(f"{event.stage}: {event.text}", access=True)
        if event.stage == "reserve":
            biases.append(event.data["address"] - plan.start)
        if event.stage == "bind":  # mapped, and not yet relocated
            mapped.append(look("mapped"))
        if event.stage == "relocate":
            meanwhile.append(_protection(biases[0] + relro.start))

    with load(path, on_event=note) as library:
        start = library.base + relro.start
        frozen = tuple(_protection(start + page * PAGE_SIZE) for page in range(pages))
        data = _protection(library.base + relro.end)
        view = look("frozen")
        yield Step(
            "frozen",
            f"A library is loaded. {pages} pages of its data, PT_GNU_RELRO, hold addresses that never change "
            "again: the loader fills them in, and then takes the right to write away.",
            bench.calls(),
            (
                f"While it relocates they are {meanwhile[0] if meanwhile else '?'}, afterwards "
                f"{', '.join(dict.fromkeys(frozen))}; the data behind them stays {data}.",
                "All but the last step of this is copy-on-write as ever: what was written is a copy.",
            ),
            evidence=(
                Evidence(
                    "Protection",
                    "/proc/self/maps",
                    (
                        Row("RELRO", meanwhile[0] if meanwhile else "?", frozen[0] if frozen else "?"),
                        Row("data behind it", meanwhile[0] if meanwhile else "?", data),
                    ),
                ),
                Evidence("Pages", "/proc/self/pagemap", rows_of(mapped[0], view, range(pages + 1))),
            ),
            grid=view.grid,
        )

        signal = yield from _store(bench, library.base + words[0])
        stored = yield from _store_behind(bench, library, plan)
        bases, differences, others_equal = yield from _twice(bench, library, words)

    return Seen(
        pages,
        meanwhile[0] if meanwhile else "",
        frozen,
        data,
        view.states[:pages],
        tuple(sorted({(vaddr - relro.start) // PAGE_SIZE for vaddr in words})),
        signal,
        stored,
        bases,
        differences,
        others_equal,
    )


def _protection(address: int) -> str:
    """What maps says of the page at ``address``."""
    found = read_maps(start=address, end=address + 1)
    return found[0].protection if found else "not mapped"


def _store(bench: Bench, address: int) -> Generator[Step, None, str]:
    def attack(calls: Calls) -> Generator[Any, None, None]:
        yield calls.load(address, _WORD, "table[0]")
        calls.store(address, bytes(_WORD))

    child = bench.child("a child", attack)
    _, made = child.next()
    bench.record(made, "child")
    signal = bench.fatal(child, f"store at {address:#x}")
    yield Step(
        "a store into RELRO",
        "A child, which has inherited the library, overwrites the first of these addresses, as an attacker "
        "would who wants the next call to go elsewhere.",
        bench.calls(),
        (
            f"{signal or 'Nothing'}: the processor faults; the kernel finds a mapping there (r--) that does "
            "not allow stores, and sends SIGSEGV. No copy is made, and the parent goes on.",
        ),
    )
    return signal


def _store_behind(bench: Bench, library: Library, plan: LoadPlan) -> Generator[Step, None, tuple[bool, str]]:
    address = library.base + plan.relro.end

    def write(calls: Calls) -> Generator[Any, None, None]:
        calls.store(address, b"allowed!", "data[0]")
        yield calls.load(address, _WORD, "data[0]")

    child = bench.child("a child", write)
    try:
        read, made = child.next()
        bench.record(made, "child")
        stored = (read == b"allowed!", "")
    except WorkerError:
        stored = (False, child.died())
    child.end()
    yield Step(
        "a store behind it",
        "Another child stores one page further on, into ordinary data of the same segment.",
        bench.calls(),
        ("It works: the freeze ends with the page." if stored[0] else f"{stored[1] or 'It is lost'}.",),
    )
    return stored


def _twice(
    bench: Bench, library: Library, words: tuple[int, ...]
) -> Generator[Step, None, tuple[tuple[int, int], tuple[int, ...], bool]]:
    relro = library.plan.relro
    again = bench.file("another.so", shipped("demo").read_bytes())
    with load(again) as other:
        bench.note('load("another.so")', hex(other.base), access=True)
        ours, theirs = (
            np.frombuffer(ctypes.string_at(one.base + relro.start, relro.end - relro.start), np.uint64)
            for one in (library, other)
        )
        bases = (library.base, other.base)
    relocated = np.zeros(len(ours), np.bool_)
    relocated[[(vaddr - relro.start) // _WORD for vaddr in words]] = True
    differences = tuple(sorted({int(one) for one in (theirs - ours)[relocated].view(np.int64)}))
    others_equal = bool((ours == theirs)[~relocated].all())
    size = len({vaddr // PAGE_SIZE for vaddr in words}) * PAGE_SIZE // 1024
    yield Step(
        "what sharing would save",
        "The same library is loaded a second time, from a copy of the file, to another address; then the "
        "two RELRO areas are compared word by word.",
        bench.calls(),
        (
            f"{len(words)} relocated words, those of the dynamic section among them, differ by "
            f"{', '.join(map(hex, differences))}; the distance of the two libraries is "
            f"{bases[1] - bases[0]:#x}. All other words are equal.",
            "So at one and the same address for all processes these pages would be equal, too: one process "
            "could relocate, and all of them map the result.",
        ),
        tables=(
            Table(
                "RELRO of this library",
                ("processes", ">as it is", ">shared"),
                tuple((str(users), f"{users * size} KiB", f"{size} KiB") for users in (1, 4, _USERS)),
            ),
        ),
    )
    return bases, differences, others_equal


# ---------------------------------------------------------------------------------------- claims
def _writable(seen: Seen) -> Finding:
    return Finding(seen.relocating == "rw-", "rw- while words are filled in", seen.relocating or "not seen")


def _frozen(seen: Seen) -> Finding:
    good = len(seen.frozen) == seen.pages > 0 and {*seen.frozen} == {"r--"} and seen.data == "rw-"
    return Finding(
        good,
        f"{seen.pages} pages r--, the data behind them rw-",
        f"{', '.join(dict.fromkeys(seen.frozen))}; behind them {seen.data}",
    )


def _copied(seen: Seen) -> Finding:
    copied = tuple(page for page, state in enumerate(seen.states) if state == "copied")
    return Finding(
        copied == seen.written and bool(copied),
        f"pages {', '.join(map(str, seen.written))} of RELRO, where words were relocated",
        f"pages {', '.join(map(str, copied)) or 'none'}",
    )


def _refused(seen: Seen) -> Finding:
    return Finding(seen.store == "SIGSEGV", "SIGSEGV", seen.store or "nothing happened")


def _allowed(seen: Seen) -> Finding:
    good, signal = seen.store_data
    return Finding(good, "the store is read back", signal or ("read back" if good else "something else"))


def _by_bias(seen: Seen) -> Finding:
    distance = seen.bases[1] - seen.bases[0]
    return Finding(
        bool(distance) and seen.differences == (distance,) and seen.others_equal,
        f"each relocated word differs by {distance:#x}, the distance of the two; no other word differs",
        f"{', '.join(map(hex, seen.differences))}; others {'equal' if seen.others_equal else 'differ'}",
    )


_SNIPPET = """\
import ctypes, mmap

PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)


def protect(page, protection):
    \"\"\"mprotect(2) one page.\"\"\"
    start = ctypes.c_void_p(address + page * PAGE)
    assert libc.mprotect(start, ctypes.c_size_t(PAGE), protection) == 0


memory[0:8] = address.to_bytes(8, "little")     # page 0: a table of addresses
memory[PAGE] = 1                                # page 1: a variable
"""


def _check(names: dict[str, Any]) -> Answer:
    memory = names["memory"]
    address = address_of(memory)
    table, variable = _protection(address), _protection(address + PAGE_SIZE)
    if memory[0:8] != address.to_bytes(8, "little"):
        return Answer(False, "the table should hold the address")
    if (table, variable) == ("r--", "rw-"):
        return Answer(True, "the table is filled in and frozen, the variable is not")
    return Answer(False, f"the table is {table}, the variable {variable}; r-- and rw- are asked for")


CHAPTER = Chapter(
    id="relro",
    number=12,
    title="RELRO: relocated, then frozen",
    claim="Addresses that the loader has filled in once can be made read-only; a store there is fatal.",
    surprise="Read-only, equal but for a constant in all processes, and yet each has a copy of its own.",
    claims=(
        Statement("writable-at-first", "While it is relocated it is writable", _writable),
        Statement("frozen", "Then it is read-only, and the data behind it is not", _frozen),
        Statement("still-copied", "Frozen or not, what was relocated is a copy", _copied, "flags"),
        Statement("store-refused", "A store there ends in SIGSEGV", _refused),
        Statement("data-writable", "A store right behind it is allowed", _allowed),
        Statement("differ-by-bias", "Two copies differ by the distance of the two libraries", _by_bias),
    ),
    question=Question(
        "A page of addresses was relocated, then made read-only. Is it shared with other processes that load "
        "the library?",
        (
            Choice("Yes: read-only pages are shared", "It was written before; the copy does not merge back."),
            Choice(
                "No: it was written, and is a copy",
                "mprotect changes what one may do with a page, not which frame it is.",
            ),
            Choice("Only as long as nobody reads it", "Reading changes nothing: the page is a copy already."),
        ),
        1,
    ),
    explanation=(
        "Tables of addresses are the favourite target of attackers: who changes one decides where the next "
        "call goes. The linker gathers those that are filled in only once at the beginning of the data, "
        "PT_GNU_RELRO; the loader calls mprotect when it has relocated them.",
        "The store of the child faults: there is a mapping, but its protection forbids stores (SEGV_ACCERR). "
        "Copy-on-write does not apply, since it is for pages that one may write.",
        "For memory RELRO changes nothing: relocating has copied the pages. Their content is that of the "
        "file plus the load bias; with one bias for all processes they could be relocated once, kept in a "
        "file and shared. That is what prelink did, and what miniloader prepare does.",
    ),
    sources=("ld(1), -z relro", "mprotect(2)", "sigaction(2), SEGV_ACCERR", "elf(5), PT_GNU_RELRO"),
    exercise=Exercise(
        "The snippet fills in a table of addresses on page 0, and has a variable on page 1. Freeze the table "
        "when it is filled in; the variable has to stay writable.",
        _SNIPPET,
        _SNIPPET + "protect(0, mmap.PROT_READ)\n",
        _check,
    ),
    run=_run,
)
