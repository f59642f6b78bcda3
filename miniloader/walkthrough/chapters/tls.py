"""Chapter 13: thread-local storage."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator
from typing import Any, Final

from miniloader.elf import inspect
from miniloader.errors import EvidenceError
from miniloader.kernel.maps import read_maps
from miniloader.loader import load
from miniloader.values import NamedTuple, dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, claim, equal
from miniloader.walkthrough.step import BeforeAfter, ChangedWord, ChapterStep, Figures, PageBytes, Row
from miniloader.walkthrough.traced_calls import Calls
from miniloader.walkthrough.workbench import Workbench, shipped

__all__ = ["CHAPTER", "ThreadLocals"]

_LONG = 8
_FIRST = 1000  # what the template says
_VISITS = 3


@dataclass(frozen=True)
class Thread:
    """What one thread saw of its variable: where it is, its values in order, and where the code is."""

    name: str
    address: int
    values: tuple[int, ...]  # before, and after each visit
    at_the_end: int  # when the other threads have visited, too
    file: str | None  # that is mapped there; "" for anonymous memory, None: not known


@dataclass(frozen=True)
class ThreadLocals:
    """What was seen of PT_TLS and of each thread's own."""

    span: tuple[int, int]  # addresses of the library
    template: int  # address
    in_file: int
    in_memory: tuple[int, int]  # in the template, before and after the visits
    threads: tuple[Thread, ...]
    late: int  # the first value that a thread sees that was begun when the others had visited


class _Visits(NamedTuple):
    """Functions of the library: where the variable of the calling thread is, and one that counts it up."""

    address: Callable[[], int]
    visit: Callable[[], int]


def _run(bench: Workbench) -> Generator[ChapterStep, None, ThreadLocals]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    tls = image.tls
    assert tls is not None, "it was built with one"
    in_file = int.from_bytes(image.read(tls.vaddr, _LONG, "PT_TLS"), "little")
    with load(path) as library:
        template = library.base + tls.vaddr
        visits = _Visits(
            library.function("where_visits", ctypes.c_size_t, []),
            library.function("visit", ctypes.c_long, []),
        )
        bench.note('load("libchapters.so")', hex(library.base), access=True)
        before = _value(template)
        yield ChapterStep(
            "loaded",
            "A library with a variable that each thread has for itself: __thread long visits = 1000. "
            "PT_TLS says where its first value is, and how much room each thread needs.",
            bench.taken(),
            (
                f"PT_TLS: vaddr {tls.vaddr:#x}, {tls.filesz} bytes in the file, {tls.memsz} in memory. "
                f"There is {in_file} there.",
                f"There are as many variables as threads, and there is one template, at {template:#x}.",
            ),
        )
        threads = _side_by_side(bench, visits, {"first thread": 1, "second thread": _VISITS})
        after = _value(template)
        yield _visited(bench, threads, tls.vaddr, (before, after))
        late = _side_by_side(bench, visits, {"third thread": 1})[0]
        yield ChapterStep(
            "a thread more",
            "Now that the others have visited, one more thread begins.",
            bench.taken(),
            (f"It begins with {late.values[0]}: as the template says, not as others left it.",),
        )
        return ThreadLocals(
            span=(library.base + library.plan.start, library.base + library.plan.end),
            template=template,
            in_file=in_file,
            in_memory=(before, after),
            threads=threads,
            late=late.values[0],
        )


def _visited(
    bench: Workbench, threads: tuple[Thread, ...], vaddr: int, template: tuple[int, int]
) -> ChapterStep:
    """The step of two threads' visits; ``template`` are the values before and after."""
    rows = tuple(
        (
            thread.name,
            hex(thread.address),
            str(thread.values[0]),
            ", ".join(map(str, thread.values[1:])),
            "not known" if thread.file is None else thread.file or "anonymous",
        )
        for thread in threads
    )
    values = (
        Row("the template", *map(str, template)),
        *(Row(thread.name, str(thread.values[0]), str(thread.at_the_end)) for thread in threads),
    )
    octets = [value.to_bytes(_LONG, "little") for value in (template[0], threads[1].at_the_end)]
    title = "the template, and the second thread's variable"
    addresses = " and ".join(hex(thread.address) for thread in threads)
    columns = ("thread", "address", ">at first", ">after each visit", "memory")
    return ChapterStep(
        "visited",
        f"Two threads call visit(), which is return ++visits: one of them once, one {_VISITS} times.",
        bench.taken(),
        (
            f"The same instructions, two addresses: {addresses}.",
            "Each began at the value of the template, and neither saw the other's visits.",
        ),
        evidence=(BeforeAfter("Values", "memory of this process", values),),
        tables=(Figures("visits", columns, rows),),
        bytes=(PageBytes(title, vaddr, octets[0], octets[1], (ChangedWord(0, _LONG, "visits"),)),),
    )


def _value(address: int) -> int:
    return int(ctypes.c_long.from_address(address).value)


def _side_by_side(bench: Workbench, visits: _Visits, counts: dict[str, int]) -> tuple[Thread, ...]:
    """Let threads visit so many times each, at the same time; what each has seen."""
    barrier = threading.Barrier(len(counts))
    visitors = [_Visitor(name, visits, count, barrier) for name, count in counts.items()]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for visitor in visitors:
        if visitor.error is not None and not isinstance(visitor.error, threading.BrokenBarrierError):
            raise visitor.error
        bench.add(visitor.calls.taken(), visitor.name)
    return tuple(visitor.seen for visitor in visitors if visitor.seen is not None)


class _Visitor(threading.Thread):
    """A thread that looks for its variable and visits; it stays until all others have, too."""

    def __init__(self, name: str, visits: _Visits, count: int, all_have: threading.Barrier) -> None:
        super().__init__(name=name)
        self._visits, self._count, self._all_have = visits, count, all_have
        self.calls = Calls()
        self.seen: Thread | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """In the thread: where no other thread waits for ever when this one fails."""
        try:
            address = self._visits.address()
            self.calls.note("where_visits()", hex(address), access=True)
            values = [_value(address)]
            for _ in range(self._count):
                values.append(self._visits.visit())
                self.calls.note("visit()", str(values[-1]), access=True)
            self._all_have.wait()
            self.seen = Thread(self.name, address, tuple(values), _value(address), _file_at(address))
            self._all_have.wait()  # or another thread might be given the same memory
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits for us
            self.error = error
            self._all_have.abort()


def _file_at(address: int) -> str | None:
    """The file that is mapped there, "" for none, None when the kernel does not tell."""
    try:
        vmas = read_maps(start=address, end=address + 1)
    except EvidenceError:
        return None
    return vmas[0].path if vmas and vmas[0].is_file else ""


# ---------------------------------------------------------------------------------------- claims
@claim("two-addresses", "Each thread has the variable at another address")
def _addresses(seen: ThreadLocals) -> Finding:
    addresses = [thread.address for thread in seen.threads]
    return Finding(
        len(set(addresses)) == len(addresses) > 1,
        f"{len(addresses)} threads, {len(addresses)} addresses",
        ", ".join(map(hex, addresses)),
    )


@claim("from-the-template", "Each begins with the value that the template has")
def _begins(seen: ThreadLocals) -> Finding:
    first = [thread.values[0] for thread in seen.threads]
    return Finding(
        seen.in_file == _FIRST and {*first} == {seen.in_file},
        f"each begins with {_FIRST}, as in the file",
        f"{', '.join(map(str, first))}; {seen.in_file} in the file",
    )


@claim("own-values", "No thread sees another's visits")
def _own(seen: ThreadLocals) -> Finding:
    counted = all(
        thread.values == tuple(range(_FIRST, _FIRST + len(thread.values)))
        and thread.at_the_end == thread.values[-1]
        for thread in seen.threads
    )
    wanted = ", ".join(str(_FIRST + len(thread.values) - 1) for thread in seen.threads)
    observed = ", ".join(str(thread.at_the_end) for thread in seen.threads)
    return Finding(counted, f"{wanted} in the end", observed)


@equal("template-stays", "Nobody writes to the template", (_FIRST, _FIRST), "{} before, {} after")
def _template(seen: ThreadLocals) -> tuple[int, int]:
    return seen.in_memory


@claim("not-in-the-library", "The variables are not in the library's mappings")
def _elsewhere(seen: ThreadLocals) -> Finding:
    start, end = seen.span
    expected = "in anonymous memory, outside the library"
    if any(thread.file is None for thread in seen.threads):
        return Finding(None, expected, "nothing", "/proc/self/maps does not tell")
    inside = [thread.name for thread in seen.threads if start <= thread.address < end or thread.file]
    return Finding(not inside, expected, f"inside a file: {', '.join(inside) or 'none'}")


@equal("late-thread", "A later thread begins with the template's value as well", _FIRST)
def _late(seen: ThreadLocals) -> int:
    return seen.late


_SNIPPET = """\
import threading


class Visits:
    count = 1000                       # the template


visits, results = Visits(), {}


def visit(name):
    visits.count += 1
    results[name] = visits.count


for name in ("first", "second", "third"):
    thread = threading.Thread(target=visit, args=(name,))
    thread.start()
    thread.join()
print(results)
"""


def _check(names: dict[str, Any]) -> Answer:
    if names["Visits"].count != _FIRST:
        return Answer(False, "the template should stay 1000")
    results = names["results"]
    if [*results] != ["first", "second", "third"]:
        return Answer(False, "each of the three threads should visit")
    if {*results.values()} != {_FIRST + 1}:
        return Answer(False, f"each thread should come to 1001, they came to {[*results.values()]}")
    if not isinstance(names["visits"], threading.local):
        return Answer(False, "the right numbers, yet there is one variable for all threads")
    return Answer(True, "each thread began with the template, and had a variable of its own")


CHAPTER: Final[Chapter[ThreadLocals]] = Chapter(
    id="tls",
    number=13,
    title="Thread-local storage",
    claim="PT_TLS is a template, not storage: each thread gets a copy of it, at an address of its own.",
    surprise="One variable, one instruction, two threads: two addresses. It also works for a library that "
    "the system's loader has not loaded.",
    claims=(_addresses, _begins, _own, _template, _elsewhere, _late),
    question=Quiz(
        "A library has __thread long visits = 1000. One thread has counted to 1003. A new thread reads it. "
        "What does it see?",
        (
            Choice("1003", "That is the first thread's; the new one has a variable of its own."),
            Choice("1000", "Each thread's block is made from the template, which nobody writes to."),
            Choice("0", "Only what is .tbss begins with zeros; this variable has a first value."),
        ),
        1,
    ),
    explanation=(
        "PT_TLS describes a block: the first bytes come from the file, the rest are zeros. No code ever uses "
        "the variable there. For each thread memory is allocated, and the template copied to it.",
        "Code finds its thread's block through the thread pointer, a register: either at a fixed distance "
        "from it, or by asking __tls_get_addr for (module, offset), two words in the GOT that the loader "
        "fills in.",
        "Module numbers belong to the C library. Miniloader gets one by having it open a tiny library that "
        "it makes up, whose PT_TLS is a copy of this one's: so all threads, also later ones, are served.",
    ),
    sources=(
        "Drepper, ELF Handling For Thread-Local Storage",
        "System V psABI, AMD64, Thread-Local Storage",
        "System V gABI, Program Header, PT_TLS",
    ),
    exercise=Exercise(
        "Three threads share one counter, which gets to 1003. Make it thread-local, with Visits as the "
        "template: each thread should come to 1001.",
        _SNIPPET,
        _SNIPPET.replace("class Visits:\n", "class Visits(threading.local):\n"),
        _check,
        hints=(
            "One object for all threads, or one for each?",
            "class Visits(threading.local): then each thread begins with the template's count.",
        ),
    ),
    source_of={
        "two-addresses": "Drepper, ELF Handling For Thread-Local Storage, Run-Time Handling",
        "from-the-template": (
            "System V gABI, Program Header, PT_TLS: the template; Drepper, ELF Handling For Thread-Local "
            "Storage, the initialization image"
        ),
        "own-values": "Drepper, ELF Handling For Thread-Local Storage, Run-Time Handling",
        "template-stays": (
            "System V gABI, Program Header, PT_TLS: the template; Drepper, ELF Handling For Thread-Local "
            "Storage, the initialization image"
        ),
        "not-in-the-library": (
            "Drepper, ELF Handling For Thread-Local Storage, Run-Time Handling: a block for each thread"
        ),
        "late-thread": "Drepper, ELF Handling For Thread-Local Storage, Run-Time Handling",
    },
    run=_run,
    later=(
        Quiz(
            "Two threads call one function that returns ++visits. How many variables are there?",
            (
                Choice("One", "Then the second thread would go on counting where the first has left off."),
                Choice("Two", "Each thread has a block of its own, made from the template."),
                Choice("Three: the template counts", "The template is only copied from. No code uses it."),
            ),
            1,
            step="visited",
        ),
        Quiz(
            "Another thread begins now, when the others have counted. What does it begin with?",
            (
                Choice("1000", "Its block is made from the template, and nobody has written there."),
                Choice("1003", "That is another thread's variable."),
                Choice("0", "The template says 1000."),
            ),
            0,
            step="a thread more",
        ),
    ),
)
