"""Chapter 13: thread-local storage."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Generator
from typing import Any

from miniloader.elf import inspect
from miniloader.errors import EvidenceError
from miniloader.kernel.maps import read_maps
from miniloader.loader import load
from miniloader.values import dataclass
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Evidence,
    Exercise,
    Finding,
    PageBytes,
    Question,
    Row,
    Statement,
    Step,
    Table,
    Word,
)
from miniloader.walkthrough.recorded_calls import Made
from miniloader.walkthrough.workbench import Bench, shipped

__all__ = ["CHAPTER", "Seen"]

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
class Seen:
    """What was seen of PT_TLS and of each thread's own."""

    span: tuple[int, int]  # addresses of the library
    template: int  # address
    in_file: int
    in_memory: tuple[int, int]  # in the template, before and after the visits
    threads: tuple[Thread, ...]
    late: int  # the first value that a thread sees that was begun when the others had visited


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.copy(shipped("chapters"))
    image = inspect(path)
    tls = image.tls
    assert tls is not None, "it was built with one"
    in_file = int.from_bytes(image.read(tls.vaddr, _LONG, "PT_TLS"), "little")
    with load(path) as library:
        template = library.base + tls.vaddr
        span = (library.base + library.plan.start, library.base + library.plan.end)
        where = library.function("where_visits", ctypes.c_size_t, [])
        visit = library.function("visit", ctypes.c_long, [])
        bench.note('load("libchapters.so")', hex(library.base), access=True)
        before = _value(template)
        yield Step(
            "loaded",
            "A library with a variable that each thread has for itself: __thread long visits = 1000. "
            "PT_TLS says where its first value is, and how much room each thread needs.",
            bench.calls(),
            (
                f"PT_TLS: vaddr {tls.vaddr:#x}, {tls.filesz} bytes in the file, {tls.memsz} in memory. "
                f"There is {in_file} there.",
                f"There are as many variables as threads, and there is one template, at {template:#x}.",
            ),
        )

        first = _Visitor("first thread", where, visit, 1)
        second = _Visitor("second thread", where, visit, _VISITS)
        seen = _side_by_side([first, second])
        for visitor in (first, second):
            bench.record(visitor.made, visitor.name)
        after = _value(template)
        rows = tuple(
            (
                one.name,
                hex(one.address),
                str(one.values[0]),
                ", ".join(map(str, one.values[1:])),
                "not known" if one.file is None else one.file or "anonymous",
            )
            for one in seen
        )
        yield Step(
            "visited",
            f"Two threads call visit(), which is return ++visits: one of them once, one {_VISITS} times.",
            bench.calls(),
            (
                f"The same instructions, two addresses: {' and '.join(hex(one.address) for one in seen)}.",
                "Each began at the value of the template, and neither saw the other's visits.",
            ),
            evidence=(
                Evidence(
                    "Values",
                    "memory of this process",
                    (
                        Row("the template", str(before), str(after)),
                        *(Row(one.name, str(one.values[0]), str(one.at_the_end)) for one in seen),
                    ),
                ),
            ),
            tables=(
                Table(
                    "visits",
                    ("thread", "address", ">at first", ">after each visit", "memory"),
                    rows,
                ),
            ),
            bytes=(
                PageBytes(
                    "the template, and the second thread's variable",
                    tls.vaddr,
                    in_file.to_bytes(_LONG, "little"),
                    seen[1].at_the_end.to_bytes(_LONG, "little"),
                    (Word(0, _LONG, "visits"),),
                ),
            ),
        )

        third = _Visitor("third thread", where, visit, 1)
        late = _side_by_side([third])[0]
        bench.record(third.made, third.name)
        yield Step(
            "a thread more",
            "Now that the others have visited, one more thread begins.",
            bench.calls(),
            (f"It begins with {late.values[0]}: as the template says, not as others left it.",),
        )
        return Seen(span, template, in_file, (before, after), seen, late.values[0])


def _value(address: int) -> int:
    return int(ctypes.c_long.from_address(address).value)


class _Visitor:
    """A thread that looks for its variable and visits; it stays until all others have, too."""

    def __init__(self, name: str, where: Any, visit: Any, visits: int) -> None:
        self.name, self._where, self._visit, self._visits = name, where, visit, visits
        self.made: list[Made] = []
        self.seen: Thread | None = None
        self.error: Exception | None = None

    def run(self, all_have: threading.Barrier) -> None:
        """In the thread: where no other thread waits for ever when this one fails."""
        try:
            address = self._where()
            self.made.append(Made("where_visits()", hex(address), True))
            values = [_value(address)]
            for _ in range(self._visits):
                values.append(self._visit())
                self.made.append(Made("visit()", str(values[-1]), True))
            all_have.wait()
            self.seen = Thread(self.name, address, tuple(values), _value(address), _file_at(address))
            all_have.wait()  # or another thread might be given the same memory
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits for us
            self.error = error
            all_have.abort()


def _file_at(address: int) -> str | None:
    """The file that is mapped there, "" for none, None when the kernel does not tell."""
    try:
        found = read_maps(start=address, end=address + 1)
    except EvidenceError:
        return None
    return found[0].path if found and found[0].is_file else ""


def _side_by_side(visitors: list[_Visitor]) -> tuple[Thread, ...]:
    """Let them run at the same time; what each has seen."""
    barrier = threading.Barrier(len(visitors))
    threads = [threading.Thread(target=one.run, args=(barrier,)) for one in visitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in visitors:
        if one.error is not None and not isinstance(one.error, threading.BrokenBarrierError):
            raise one.error
    return tuple(one.seen for one in visitors if one.seen is not None)


# ---------------------------------------------------------------------------------------- claims
def _addresses(seen: Seen) -> Finding:
    addresses = {one.address for one in seen.threads}
    return Finding(
        len(addresses) == len(seen.threads) > 1,
        f"{len(seen.threads)} threads, {len(seen.threads)} addresses",
        ", ".join(hex(one.address) for one in seen.threads),
    )


def _begins(seen: Seen) -> Finding:
    begun = [one.values[0] for one in seen.threads]
    return Finding(
        seen.in_file == _FIRST and {*begun} == {seen.in_file},
        f"each begins with {_FIRST}, as in the file",
        f"{', '.join(map(str, begun))}; {seen.in_file} in the file",
    )


def _own(seen: Seen) -> Finding:
    good = all(
        one.values == tuple(range(_FIRST, _FIRST + len(one.values))) and one.at_the_end == one.values[-1]
        for one in seen.threads
    )
    wanted = ", ".join(str(_FIRST + len(one.values) - 1) for one in seen.threads)
    return Finding(good, f"{wanted} in the end", ", ".join(str(one.at_the_end) for one in seen.threads))


def _template(seen: Seen) -> Finding:
    return Finding(
        seen.in_memory == (_FIRST, _FIRST), f"{_FIRST} before and after", "{} and {}".format(*seen.in_memory)
    )


def _elsewhere(seen: Seen) -> Finding:
    start, end = seen.span
    expected = "in anonymous memory, outside the library"
    if any(one.file is None for one in seen.threads):
        return Finding(None, expected, "nothing", "/proc/self/maps does not tell")
    inside = [one.name for one in seen.threads if start <= one.address < end or one.file]
    return Finding(not inside, expected, f"inside a file: {', '.join(inside) or 'none'}")


def _late(seen: Seen) -> Finding:
    return Finding(seen.late == _FIRST, str(_FIRST), str(seen.late))


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


CHAPTER = Chapter(
    id="tls",
    number=13,
    title="Thread-local storage",
    claim="PT_TLS is a template, not storage: each thread gets a copy of it, at an address of its own.",
    surprise="One variable, one instruction, two threads: two addresses. It also works for a library that "
    "the system's loader has not loaded.",
    claims=(
        Statement("two-addresses", "Each thread has the variable at another address", _addresses),
        Statement("from-the-template", "Each begins with the value that the template has", _begins),
        Statement("own-values", "No thread sees another's visits", _own),
        Statement("template-stays", "Nobody writes to the template", _template),
        Statement("not-in-the-library", "The variables are not in the library's mappings", _elsewhere),
        Statement("late-thread", "A later thread begins with the template's value as well", _late),
    ),
    question=Question(
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
        "elf(5), PT_TLS",
    ),
    exercise=Exercise(
        "Three threads share one counter, which gets to 1003. Make it thread-local, with Visits as the "
        "template: each thread should come to 1001.",
        _SNIPPET,
        _SNIPPET.replace("class Visits:\n", "class Visits(threading.local):\n"),
        _check,
    ),
    run=_run,
)
