"""What grew between two audits, for people: all memory first, then what it is and who has it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from miniloader.errors import printable
from miniloader.forking import importing
from miniloader.report.erosion import eroded_rows
from miniloader.report.numbers import count, size
from miniloader.report.text import Cell, Line, Part, Table, listed, more

if TYPE_CHECKING:
    from miniloader.lab.audit.diff import PageChange
    from miniloader.lab.audit.growth import (
        AmountChange,
        Family,
        Growth,
        LibraryGrowth,
        MappingGrowth,
        ProcessGrowth,
    )
    from miniloader.lab.audit.result import Audit, AuditedProcess

__all__ = ["changes_view", "growth_view", "live_view", "said_of_family", "tick"]

_MOST_ROWS: Final = 12
_MOST_PROCESSES: Final = 6
_MOST_SYMBOLS: Final = 4


def growth_view(growth: Growth) -> Iterator[Part]:
    """What grew; only rows in which something differs."""
    figures = [("USS", growth.uss), ("PSS", growth.pss), ("RSS", growth.rss)]
    if growth.swapped.before or growth.swapped.after:
        figures.append(("swapped out", growth.swapped))
    yield ((", ".join(f"{name} {_moved(figure)}" for name, figure in figures), "bold"),)
    yield (f"  {_said_of_processes(growth)}",)
    kinds = _by_kind(growth.mappings)
    if kinds:
        yield (f"  own memory by kind: {', '.join(f'{kind} {_signed(number)}' for kind, number in kinds)}",)
    elif not growth.mappings:
        yield ("  memory that is no file's is not compared: an older version saved one of the audits",)
    yield from _table(("kind", "name"), _not_of_libraries(growth))
    yield from _table(
        ("library",), [((printable(row.path.rpartition("/")[2]),), row) for row in growth.libraries]
    )
    changed = [
        process
        for process in growth.processes
        if process.state != "stayed" or any(figure.change for figure in _figures(process))
    ]
    if changed:
        swapped = (">swapped out",) if any(process.swapped.change for process in changed) else ()
        yield ()
        yield Table(
            ("process", "name", "", ">USS", ">PSS", ">RSS", *swapped),
            [
                (
                    str(process.pid),
                    printable(process.name),
                    "" if process.state == "stayed" else process.state,
                    *map(_moved, _figures(process)[: 3 + len(swapped)]),
                )
                for process in changed
            ],
        )
    yield from eroded_rows(growth.erosion)
    yield ()


def _figures(process: ProcessGrowth) -> tuple[AmountChange, ...]:
    return process.uss, process.pss, process.rss, process.swapped


def _not_of_libraries(growth: Growth) -> list[tuple[tuple[str, str], MappingGrowth]]:
    """The rows of memory that is no library's: files that are mapped shared only are among them."""
    names = {os.path.basename(library.path) for library in growth.libraries}
    return [
        ((row.kind, printable(row.name)), row)
        for row in growth.mappings
        if row.kind != "file" or os.path.basename(row.name) not in names
    ]


def tick(audit: Audit, first: Audit, previous: Audit | None = None) -> Line:
    """One look of many on a line: processes, memory, growth since the ``first`` look and the ``previous``."""
    with importing:
        from miniloader.lab.audit.growth import family_of, growth
        from miniloader.lab.erosion.since import newly_proven

    previous = previous or first
    since_start, since_last = growth(first, audit), growth(previous, audit)
    clock = time.strftime("%H:%M:%S", time.localtime(audit.when))
    pss = "?" if audit.pss is None else size(audit.pss)
    sizes = f"USS {size(audit.uss)}, PSS {pss}, RSS {size(audit.rss)}"
    if since_start.swapped.before or since_start.swapped.after:
        sizes += f", swapped out {_moved(since_start.swapped)}"
    changed = [*said_of_family(family_of(previous, audit))]
    own = _own_change(since_start)
    if own:
        changed.append(
            f"own {_signed(own)} since the start, {_signed(_own_change(since_last))} since the last look"
        )
    eroded, lately = newly_proven(first, audit), newly_proven(previous, audit)
    if eroded:
        changed.append(f"no longer shared {size(eroded)}, {size(lately)} of it since the last look")
    by_kind = [
        f"{kind} {_signed(number)}" for kind, number in _by_kind(since_start.mappings) if kind != "file"
    ]
    libraries = [
        f"{library.path.rpartition('/')[2]} {_signed(library.own.change)}"
        for library in since_start.libraries
        if library.own.change
    ]
    changed += [*by_kind, *libraries[:_MOST_PROCESSES]]
    if len(libraries) > _MOST_PROCESSES:
        changed.append(f"{more(len(libraries) - _MOST_PROCESSES)} files")
    number = count(len(audit.processes), "process", "processes")
    return (printable(f"{clock}  {number}: {sizes}; {', '.join(changed) or 'as at the start'}"),)


def live_view(audit: Audit, first: Audit, previous: Audit) -> Iterator[Part]:
    """What stands in a terminal while a family is followed: the look, processes, memory, libraries."""
    with importing:
        from miniloader.lab.audit.growth import growth
        from miniloader.report.audit_rows import library_rows

    since_start = growth(first, audit)
    yield tick(audit, first, previous)
    yield ()
    ordered = sorted(audit.processes, key=lambda process: (-process.uss, process.pid))
    change = {process.pid: process.uss.change for process in since_start.processes if process.uss.change}
    rows: list[Sequence[Cell]] = [
        (
            str(process.pid),
            printable(process.name),
            *("?" if number is None else size(number) for number in (process.rss, process.pss, process.uss)),
            _signed(change[process.pid]) if process.pid in change else "·",
        )
        for process in ordered[:_MOST_PROCESSES]
    ]
    if len(ordered) > _MOST_PROCESSES:
        rows.append((f"… {more(len(ordered) - _MOST_PROCESSES)}",))
    yield Table(("process", "name", ">RSS", ">PSS", ">USS", ">since start"), rows)
    yield from _table(("kind", "name"), _not_of_libraries(since_start))
    yield ()
    yield library_rows(audit, first)


def _own_change(growth: Growth) -> int:
    """How much more own memory there is: pages of files that are mapped once by chance are left out."""
    copies = sum(library.own.change for library in growth.libraries)
    return copies + sum(mapping.own.change for mapping in growth.mappings if mapping.kind != "file")


def said_of_family(family: Family) -> Iterator[str]:
    """Who was forked, came, ended, or executed another program: a few words for each."""
    for word, processes in (("forked", family.forked), ("came", family.came), ("ended", family.ended)):
        if processes:
            yield f"{word} {listed([str(process.pid) for process in processes], _MOST_PROCESSES)}"
    yield from _said_of_replaced(family.replaced)


def _said_of_replaced(replaced: Iterable[tuple[AuditedProcess, AuditedProcess]]) -> Iterator[str]:
    for before, after in replaced:
        was = f"was {before.name}" if before.name != after.name else "once more"
        yield f"{after.pid} executed {after.name} ({was})"


def _said_of_processes(growth: Growth) -> str:
    said = []
    for state in ("stayed", "came", "went"):
        pids = [str(process.pid) for process in growth.processes if process.state == state]
        if pids:
            names = "" if state == "stayed" else f" ({listed(pids, _MOST_PROCESSES)})"
            said.append(f"{count(len(pids), 'process', 'processes')} {state}{names}")
    said += _said_of_replaced(growth.executed)
    return ", ".join(said) or "no process"


def _by_kind(mappings: Iterable[MappingGrowth]) -> list[tuple[str, int]]:
    """How much more own memory of each kind there is, the most first; no kind that is as it was."""
    sums: dict[str, int] = {}
    for mapping in mappings:
        sums[mapping.kind] = sums.get(mapping.kind, 0) + mapping.own.change
    return sorted(((kind, number) for kind, number in sums.items() if number), key=lambda item: -abs(item[1]))


def _table(
    columns: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], MappingGrowth | LibraryGrowth]]
) -> Iterator[Part]:
    """The rows in which something is more or less, own memory first."""
    changed = [row for row in rows if row[1].own.change or row[1].inherited.change or row[1].shared.change]
    if not changed:
        return
    yield ()
    cells: list[Sequence[Cell]] = [
        (*names, *(_moved(figure) for figure in (row.own, row.inherited, row.shared)))
        for names, row in changed[:_MOST_ROWS]
    ]
    if len(changed) > _MOST_ROWS:
        cells.append((f"… {more(len(changed) - _MOST_ROWS)}",))
    yield Table((*columns, ">own", ">by fork", ">shared"), cells)


def _moved(figure: AmountChange) -> str:
    """``74.1 MiB → 269 MiB (+195 MiB)``, or how large it still is."""
    before, after = ("–" if number is None else size(number) for number in (figure.before, figure.after))
    return f"{before} → {after} ({_signed(figure.change)})" if figure.change else after


def _signed(number: int) -> str:
    return f"{'+' if number >= 0 else '-'}{size(abs(number))}"


def changes_view(changes: Sequence[PageChange], growth: Growth, page_size: int) -> Iterator[Part]:
    """What differs between two audits in pages of files: of processes that are in both, if there are any."""
    if not changes:
        states = {process.state for process in growth.processes}
        besides = ", of processes that stayed" if {"stayed"} < states else ""
        yield (f"no page went private, was rewritten, or returned{besides}",)
        return
    number = {kind: sum(page.processes for page in changes if page.change == kind) for kind in _CHANGES}
    said = [f"{count(number[kind], 'page')} {words}" for kind, words in _CHANGES.items() if number[kind]]
    grown = (number["private"] - number["returned"]) * page_size
    yield ("; ".join(said), "bold"), f": {'+' if grown >= 0 else '-'}{size(abs(grown))} of private memory"
    yield ()
    kinds = list(_CHANGES)
    ordered = sorted(changes, key=lambda page: (kinds.index(page.change), -page.processes, page.vaddr))
    yield Table(
        ("library", ">vaddr", "section", "change", ">in", "causes", "symbols"),
        [
            (
                printable(os.path.basename(page.path)),
                f"{page.vaddr:#x}",
                printable(page.section),
                page.change,
                f"{page.processes:,}",
                ", ".join(page.causes),
                printable(listed(page.symbols, _MOST_SYMBOLS)),
            )
            for page in ordered
        ],
    )


_CHANGES = {"private": "went private", "rewritten": "written again", "returned": "returned to the file"}
