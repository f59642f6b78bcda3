"""Who was first to write to the pages that forked processes have inherited: tables for people, and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record, words
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.workers.child import signal_name
from miniloader.report.numbers import count, size
from miniloader.report.text import Part, Table, heading, listed, more

if TYPE_CHECKING:
    from miniloader.lab.erosion.causes import ErosionCause
    from miniloader.lab.erosion.forked_writes import FamilyWrites, ForkedWrites
    from miniloader.lab.erosion.writers import CodePlace

__all__ = ["SCHEMA", "as_json", "lines"]

_MOST_PLACES: Final = 12
_MOST_PROCESSES: Final = 20
#: What was written to, as a cell and in a sentence.
_CAUSES: Final[dict[ErosionCause, tuple[str, str]]] = {
    "reference-count": ("count", "reference counts"),
    "collector": ("collector", "the collector's words"),
    "other-write": ("other data", "other data"),
}


def as_json(family: FamilyWrites) -> dict[str, Any]:
    """The object that ``run --writers FILE --json`` writes; what is counted are pages."""
    return {
        "page_size": PAGE_SIZE,
        "refused": family.refused,
        "unseen": family.unseen,
        "others": family.others,
        "processes": [
            {
                "pid": process.pid,
                "parent": process.parent,
                "end": process.end,
                "status": process.status,
                "unknown": process.unknown,
                "inherited": process.inherited,
                "replaced": process.replaced,
                "written": [
                    {
                        "cause": part.cause,
                        "function": part.place.function,
                        "library": part.place.path,
                        "pages": part.pages,
                        "spans": [[*span] for span in part.spans],
                    }
                    for part in process.written
                ],
            }
            for process in family.processes
        ],
    }


SCHEMA: Final = record(
    {"page_size": COUNT, "others": COUNT, "processes": array(record(
        keys(COUNT, "pid parent inherited replaced"),
        {"end": words("exited killed executed running ended"), "status": nullable(COUNT), "unknown": TEXT},
        {"written": array(record(
            {"cause": words("reference-count collector other-write"), "pages": COUNT},
            keys(TEXT, "function library"),
            {"spans": array(array(COUNT))},
        ))},
    ))},
    keys(TEXT, "refused unseen"),
)  # fmt: skip
"""What :func:`as_json` gives; ``spans`` are addresses [start, end)."""


def lines(family: FamilyWrites) -> Iterator[Part]:
    """How many pages, by what and by which function in all processes; then each process."""
    if family.refused:
        yield (("who writes first is unknown here", "bold"), f": {printable(family.refused)}")
        return
    told = [process for process in family.processes if not process.unknown]
    if not family.processes:
        inherits = "" if family.others else ": nobody inherited a page"
        yield (f"the program has forked no process by Python's own fork{inherits}",)
        yield from _others(family)
        return
    written, inherited = sum(p.pages() for p in told), sum(process.inherited for process in told)
    yield (
        (
            f"{count(len(told), 'forked process', 'forked processes')} wrote to {written:,} of"
            f" {count(inherited, 'page')} that they inherited",
            "bold",
        ),
        f": {size(written * PAGE_SIZE)} that they no longer need to share",
    )
    if written:
        yield from _by_place(told)
    yield ()
    yield from _by_process(family)
    yield from _others(family)
    if family.unseen:
        yield ((f"  not seen: {family.unseen}", "dim"),)


def _others(family: FamilyWrites) -> Iterator[Part]:
    if family.others:
        number = count(family.others, "more process", "more processes")
        yield ((f"  not told: {number}, forked by other code than Python's own (os.fork)", "dim"),)


def _by_place(told: list[ForkedWrites]) -> Iterator[Part]:
    pages = Counter[tuple["ErosionCause", "CodePlace"]]()
    for process in told:
        for part in process.written:
            pages[part.cause, part.place] += part.pages
    causes = Counter[str]()
    for (cause, _), number in pages.items():
        causes[_CAUSES[cause][1]] += number
    yield ("  first written: " + ", ".join(f"{name} {number:,}" for name, number in causes.most_common()),)
    yield ()
    rows = [
        (
            _CAUSES[cause][0],
            printable(place.function) or "no symbol",
            printable(place.path.rpartition("/")[2]),
            f"{number:,}",
            size(number * PAGE_SIZE),
        )
        for (cause, place), number in pages.most_common(_MOST_PLACES)
    ]
    if len(pages) > _MOST_PLACES:
        remaining = sum(pages.values()) - sum(number for _, number in pages.most_common(_MOST_PLACES))
        rows.append(
            (f"… {more(len(pages) - _MOST_PLACES)}", "", "", f"{remaining:,}", size(remaining * PAGE_SIZE))
        )
    yield Table(("written", "by function", "of", ">pages", ">memory"), rows)


def _by_process(family: FamilyWrites) -> Iterator[Part]:
    ordered = sorted(family.processes, key=lambda process: (-process.pages(), process.pid))
    rows = [
        (
            str(process.pid),
            str(process.parent),
            _ending(process),
            f"{process.inherited:,}" if not process.unknown else "?",
            *(f"{process.pages(cause):,}" if not process.unknown else "" for cause in (None, *_CAUSES)),
        )
        for process in ordered[:_MOST_PROCESSES]
    ]
    if len(ordered) > _MOST_PROCESSES:
        rows.append((f"… {more(len(ordered) - _MOST_PROCESSES)}", "", "", "", "", "", "", ""))
    yield heading("each process", "pages that it inherited, and those of them that it wrote to first")
    yield Table(
        ("process", "of", "its end", ">inherited", ">written", ">counts", ">collector", ">other"), rows
    )
    unknown = [process for process in ordered if process.unknown]
    for process in unknown[:3]:
        yield (f"  {process.pid}: {printable(process.unknown)}",)
    if len(unknown) > 3:
        yield (f"  unknown, too: {listed([str(process.pid) for process in unknown[3:]], 8)}",)


def _ending(process: ForkedWrites) -> str:
    if process.end == "exited":
        return f"status {process.status}"
    if process.end == "killed":
        return signal_name(-(process.status or 0))
    return {"executed": "executed a program", "running": "still ran"}.get(process.end, "ended")
