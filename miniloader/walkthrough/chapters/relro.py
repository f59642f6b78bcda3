"""Chapter 12: RELRO: relocated, then frozen."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from typing import Any, Final

import numpy as np

from miniloader.elf import ElfImage, LoadPlan, inspect
from miniloader.errors import WorkerError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import Event, Library, Loading, load
from miniloader.loader.relocation_groups import sort_relocations
from miniloader.values import NamedTuple, dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.mapping_views import MappingView, address_of, before_and_after
from miniloader.walkthrough.step import BeforeAfter, ChapterStep, Figures, Part, Row
from miniloader.walkthrough.traced_calls import Calls
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "RelroPages"]

_WORD = 8
_USERS = (1, 4, 16)


@dataclass(frozen=True)
class RelroPages:
    """What was seen of the pages of PT_GNU_RELRO, and of the data behind them."""

    pages: int  # of RELRO
    relocating: str  # protection of the first, mapped, before any word is filled in
    frozen: tuple[str, ...]  # protection of each, loaded
    data: str  # protection of the page behind them, loaded
    states: tuple[str, ...]  # loaded
    written: tuple[int, ...]  # numbers of those that relocating writes
    store: str  # the signal that a store into RELRO ends in
    store_data: tuple[bool, str]  # whether a store behind it is read back, and its signal
    bases: tuple[int, int]  # load biases of two copies
    differences: tuple[int, ...]  # of their relocated words: values, those that occur
    others_equal: bool  # all other words of RELRO


class _Comparison(NamedTuple):
    """Two copies of RELRO: load biases, differences of relocated words, and whether all others are equal."""

    bases: tuple[int, int]
    differences: tuple[int, ...]
    others_equal: bool


def _run(bench: Workbench) -> Generator[ChapterStep, None, RelroPages]:
    path = bench.copy(shipped("demo"))
    image = inspect(path)
    plan = image.plan(PAGE_SIZE)
    pages = (plan.relro.end - plan.relro.start) // PAGE_SIZE
    words = _relocated_words(image, plan)

    def note(event: Event) -> None:
        bench.note(f"{event.stage}: {event.text}", access=True)

    with Loading(path, on_event=note) as steps:
        bias = steps.map()[0].bias
        mapped = _look(bench, bias, plan, "mapped")
        relocating = _protection(bias + plan.relro.start)
        steps.link()
        steps.initialise()
    with steps.library as library:
        start = library.base + plan.relro.start
        frozen = tuple(_protection(start + page * PAGE_SIZE) for page in range(pages))
        data = _protection(library.base + plan.relro.end)
        view = _look(bench, library.base, plan, "frozen")
        yield _frozen_step(bench, relocating, frozen, data, mapped, view)
        signal = yield from _store(bench, library.base + words[0])
        stored = yield from _store_behind(bench, library.base + plan.relro.end)
        comparison = yield from _twice(bench, library, words)

    return RelroPages(
        pages=pages,
        relocating=relocating,
        frozen=frozen,
        data=data,
        states=view.states[:pages],
        written=tuple(sorted({(vaddr - plan.relro.start) // PAGE_SIZE for vaddr in words})),
        store=signal,
        store_data=stored,
        bases=comparison.bases,
        differences=comparison.differences,
        others_equal=comparison.others_equal,
    )


def _relocated_words(image: ElfImage, plan: LoadPlan) -> tuple[int, ...]:
    """The vaddrs of the words of RELRO that relocating writes, the dynamic section's among them."""
    located = sort_relocations(image).dynamic["offset"].tolist()
    targets = sorted([*image.relocations.targets().tolist(), *located])
    return tuple(vaddr for vaddr in targets if plan.relro.start <= vaddr < plan.relro.end)


def _look(bench: Workbench, bias: int, plan: LoadPlan, title: str) -> MappingView:
    """The pages of RELRO, and the one behind them."""
    length = plan.relro.end - plan.relro.start
    rows = [("this process", os.getpid(), bias + plan.relro.start)]
    return bench.look(rows, length // PAGE_SIZE + 1, title, (Part(0, "RELRO"), Part(length, "data")))[0]


def _protection(address: int) -> str:
    """What maps says of the page at ``address``."""
    vmas = read_maps(start=address, end=address + 1)
    return vmas[0].protection if vmas else "not mapped"


def _frozen_step(
    bench: Workbench,
    relocating: str,
    frozen: tuple[str, ...],
    data: str,
    mapped: MappingView,
    view: MappingView,
) -> ChapterStep:
    rows = (Row("RELRO", relocating, frozen[0] if frozen else "?"), Row("data behind it", relocating, data))
    return ChapterStep(
        "frozen",
        f"A library is loaded. {len(frozen)} pages of its data, PT_GNU_RELRO, hold addresses that never "
        "change again: the loader fills them in, and then takes the right to write away.",
        bench.taken(),
        (
            f"Mapped, and to be relocated, they are {relocating}, afterwards "
            f"{', '.join(dict.fromkeys(frozen))}; the data behind them stays {data}.",
            "All but the last step of this is copy-on-write as ever: what was written is a copy.",
        ),
        evidence=(
            BeforeAfter("Protection", "/proc/self/maps", rows),
            before_and_after("Pages", mapped, view, range(len(frozen) + 1)),
        ),
        grid=view.grid,
    )


def _store(bench: Workbench, address: int) -> Generator[ChapterStep, None, str]:
    def attack(calls: Calls) -> Generator[Any, None, None]:
        yield calls.load(address, _WORD, "table[0]")
        calls.store(address, bytes(_WORD))

    child = bench.child("child", attack)
    bench.resume(child)
    signal = bench.fatal(child, f"store at {address:#x}")
    yield ChapterStep(
        "a store into RELRO",
        "A child, which has inherited the library, overwrites the first of these addresses, as an attacker "
        "would who wants the next call to go elsewhere.",
        bench.taken(),
        (
            f"{signal or 'Nothing'}: the processor faults; the kernel finds a mapping there (r--) that does "
            "not allow stores, and sends SIGSEGV. No copy is made, and the parent goes on.",
        ),
    )
    return signal


def _store_behind(bench: Workbench, address: int) -> Generator[ChapterStep, None, tuple[bool, str]]:
    def write(calls: Calls) -> Generator[Any, None, None]:
        calls.store(address, b"allowed!", "data[0]")
        yield calls.load(address, _WORD, "data[0]")

    child = bench.child("child", write)
    try:
        stored = (bench.resume(child) == b"allowed!", "")
    except WorkerError:
        stored = (False, child.died())
    child.end()
    yield ChapterStep(
        "a store behind it",
        "Another child stores one page further on, into ordinary data of the same segment.",
        bench.taken(),
        ("It works: the freeze ends with the page." if stored[0] else f"{stored[1] or 'It is lost'}.",),
    )
    return stored


def _twice(
    bench: Workbench, library: Library, words: tuple[int, ...]
) -> Generator[ChapterStep, None, _Comparison]:
    relro = library.plan.relro
    with load(bench.file("another.so", shipped("demo").read_bytes())) as copy:
        bench.note('load("another.so")', hex(copy.base), access=True)
        bases = (library.base, copy.base)
        first, second = (
            np.frombuffer(ctypes.string_at(base + relro.start, relro.end - relro.start), np.uint64)
            for base in bases
        )
    relocated = np.zeros(len(first), np.bool_)
    relocated[[(vaddr - relro.start) // _WORD for vaddr in words]] = True
    differences = tuple(sorted(set((second - first)[relocated].view(np.int64).tolist())))
    size = len({vaddr // PAGE_SIZE for vaddr in words}) * PAGE_SIZE // 1024
    rows = tuple((str(users), f"{users * size} KiB", f"{size} KiB") for users in _USERS)
    yield ChapterStep(
        "what sharing would save",
        "The same library is loaded a second time, from a copy of the file, to another address; then the "
        "two RELRO areas are compared word by word.",
        bench.taken(),
        (
            f"{len(words)} relocated words, those of the dynamic section among them, differ by "
            f"{', '.join(map(hex, differences))}; the distance of the two libraries is "
            f"{bases[1] - bases[0]:#x}. All other words are equal.",
            "So at one and the same address for all processes these pages would be equal, too: one process "
            "could relocate, and all of them map the result.",
        ),
        tables=(Figures("RELRO of this library", ("processes", ">as it is", ">shared"), rows),),
    )
    return _Comparison(bases, differences, others_equal=bool((first == second)[~relocated].all()))


# ---------------------------------------------------------------------------------------- claims
@equal(
    "writable-at-first", "While it is relocated it is writable", "rw-", "{} when words are to be filled in"
)
def _writable(seen: RelroPages) -> str:
    return seen.relocating


@claim("frozen", "Then it is read-only, and the data behind it is not")
def _frozen(seen: RelroPages) -> Finding:
    return Finding(
        len(seen.frozen) == seen.pages > 0 and {*seen.frozen} == {"r--"} and seen.data == "rw-",
        f"{seen.pages} pages r--, the data behind them rw-",
        f"{', '.join(dict.fromkeys(seen.frozen))}; behind them {seen.data}",
    )


@claim("still-copied", "Frozen or not, what was relocated is a copy", "flags")
def _copied(seen: RelroPages) -> Finding:
    copied = tuple(page for page, state in enumerate(seen.states) if state == "copied")
    return Finding(
        copied == seen.written and bool(copied),
        f"pages {', '.join(map(str, seen.written))} of RELRO, where words were relocated",
        f"pages {', '.join(map(str, copied)) or 'none'}",
    )


@equal("store-refused", "A store there ends in SIGSEGV", "SIGSEGV")
def _refused(seen: RelroPages) -> str:
    return seen.store or "nothing happened"


@claim("data-writable", "A store right behind it is allowed")
def _allowed(seen: RelroPages) -> Finding:
    good, signal = seen.store_data
    return Finding(good, "the store is read back", signal or ("read back" if good else "something else"))


@claim("differ-by-bias", "Two copies differ by the distance of the two libraries")
def _by_bias(seen: RelroPages) -> Finding:
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


CHAPTER: Final[Chapter[RelroPages]] = Chapter(
    id="relro",
    number=12,
    title="RELRO: relocated, then frozen",
    claim="Addresses that the loader has filled in once can be made read-only; a store there is fatal.",
    surprise="Read-only, equal but for a constant in all processes, and yet each has a copy of its own.",
    claims=(_writable, _frozen, _copied, _refused, _allowed, _by_bias),
    question=Quiz(
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
    sources=(
        "ld(1), -z relro",
        "mprotect(2)",
        "sigaction(2), SEGV_ACCERR",
        "Linux Standard Base, Core, PT_GNU_RELRO",
    ),
    exercise=Exercise(
        "The snippet fills in a table of addresses on page 0, and has a variable on page 1. Freeze the table "
        "when it is filled in; the variable has to stay writable.",
        _SNIPPET,
        _SNIPPET + "protect(0, mmap.PROT_READ)\n",
        _check,
        hints=(
            "protect() is there: when must it be called, for which page?",
            "protect(0, mmap.PROT_READ), after the table has been filled in.",
        ),
    ),
    source_of={
        "writable-at-first": (
            "ld(1), -z relro: read-only after relocation; Linux Standard Base, Core, PT_GNU_RELRO: may be"
            " made read-only after relocations"
        ),
        "frozen": "ld(1), -z relro: read-only after relocation; mprotect(2): whole pages",
        "still-copied": "mmap(2), MAP_PRIVATE; mprotect(2): it changes protections, and no page",
        "store-refused": "mprotect(2), SIGSEGV; sigaction(2), SEGV_ACCERR",
        "data-writable": "mprotect(2): it changes pages of the range, and no others",
        "differ-by-bias": "System V psABI, AMD64, 4.4, R_X86_64_RELATIVE: B + A",
    },
    run=_run,
    later=(
        Quiz(
            "A child stores into the table that was frozen. What happens?",
            (
                Choice("The page is copied", "Copy-on-write is for pages that one may write."),
                Choice("SIGSEGV", "The mapping forbids stores, and the kernel says so."),
                Choice("Nothing: it is ignored", "The processor cannot leave a store out."),
            ),
            1,
            step="a store into",
        ),
        Quiz(
            "The same library at two addresses: how do its relocated words differ?",
            (
                Choice("At random", "Each is an address in the library: vaddr plus load bias."),
                Choice("All by one number", "The distance of the two libraries."),
                Choice("They do not", "They are addresses, and those differ."),
            ),
            1,
            step="what sharing",
        ),
    ),
)
