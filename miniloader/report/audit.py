"""An audit for people: the answer first, the largest cost at the top; and as CSV."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

from miniloader.errors import printable
from miniloader.report.erosion import erosion_view
from miniloader.report.numbers import count, size
from miniloader.report.text import Line, Part, Piece, Table, heading, listed, more

if TYPE_CHECKING:
    from miniloader.lab.audit.diff import PageChange
    from miniloader.lab.audit.mappings import AuditedMapping
    from miniloader.lab.audit.page_words import PageView
    from miniloader.lab.audit.result import (
        Audit,
        AuditedLibrary,
        AuditedProcess,
        PrivatePage,
        Unreadable,
    )

__all__ = [
    "changes_view",
    "library_rows",
    "lines",
    "mapping_rows",
    "page_view",
    "records",
    "said_of",
    "sentence",
    "summary",
    "write_csv",
]

_MOST_SYMBOLS = 4
_MOST_SENTENCES = 8
_MEANING = {
    "frames": "page frame numbers: equal numbers are the same memory",
    "flags": "page flags: copies are certain, PSS and who shares with whom stay hidden",
}


def lines(audit: Audit, *, pages: bool = False) -> Iterator[Part]:
    """An audit; ``pages`` also lists each private page and each process of the libraries."""
    if audit.processes or not audit.unreadable:
        yield from summary(audit)
    paths = {library.path for library in audit.libraries}
    shown = [row for row in audit.mappings if not pages or (row.name in paths and row.kind != "file")]
    if shown:
        yield ()
        yield mapping_rows(shown)
    if audit.libraries:
        yield ()
        yield library_rows(audit)
    said = [text for library in audit.libraries if (text := sentence(library))]
    if audit.explained and said:
        yield ()
        yield from said if pages else said[:_MOST_SENTENCES]
        if len(said) > _MOST_SENTENCES and not pages:
            yield ((f"… {more(len(said) - _MOST_SENTENCES)}; --library NAME tells of one", "dim"),)
    if pages:
        for library in audit.libraries:
            yield from _library(library)
    elif audit.explained:
        yield from erosion_view(audit)
    if audit.processes:
        yield ()
        yield _processes(audit.processes)
    if audit.unreadable:
        if audit.processes:
            yield ()
        yield from _unreadable(audit.unreadable)


def summary(audit: Audit) -> Iterator[Line]:
    """The answer in a few lines."""
    page = audit.page_size
    if audit.processes:
        pss = "unknown" if audit.pss is None else size(audit.pss)
        same = len(audit.processes) - len(audit.counted)
        yield (
            (count(len(audit.processes), "process", "processes"), "bold"),
            *((f" with {count(len(audit.counted), 'address space')}",) if same else ()),
            f": {pss} in proportion (PSS), of it {size(audit.uss)} their own (USS); RSS {size(audit.rss)}",
        )
    own = _by_kind(audit.mappings, "own")
    inherited = sum(_by_kind(audit.mappings, "inherited").values())
    if own:
        by_fork = f"; copies that relatives still share: {size(inherited)}" if inherited else ""
        yield (f"  own: {', '.join(f'{size(number)} {kind}' for kind, number in own.items())}{by_fork}",)
    present = sum(library.present for library in audit.libraries)
    frames = sum(library.frames for library in audit.libraries)
    swapped = sum(library.swapped for library in audit.libraries)
    copies = sum(library.private - library.common for library in audit.libraries)
    exact = "" if audit.level == "frames" else "at most "
    besides = f"; {size(swapped * page)} of copies besides are swapped out" if swapped else ""
    apart = f"where separate copies would take {size(present * page)}"
    yield (
        f"  {count(len(audit.libraries), 'file')}: {exact}{size(frames * page)}, {apart}; "
        f"own copies: {size(copies * page)}{besides}",
    )
    yield ((f"  evidence: {audit.level} ({_MEANING.get(audit.level, '')})", "dim"),)


def _by_kind(mappings: Iterable[AuditedMapping], column: str) -> dict[str, int]:
    """The bytes in a column of all mappings and processes by kind, the most first; no kind that has none."""
    sums: dict[str, int] = {}
    for mapping in mappings:
        number = sum(getattr(process, column) for process in mapping.processes)
        sums[mapping.kind] = sums.get(mapping.kind, 0) + number
    return {kind: number for kind, number in sorted(sums.items(), key=lambda item: -item[1]) if number}


def mapping_rows(mappings: Sequence[AuditedMapping]) -> Table:
    """A row for each kind and name of memory, in bytes over all processes; those of files in one."""
    files = [mapping for mapping in mappings if mapping.kind == "file"]
    rows = [(str(mapping.kind), printable(mapping.name), [mapping]) for mapping in mappings]
    rows = [row for row in rows if row[0] != "file"]
    if files:
        rows.append(("file", f"{count(len(files), 'file')}, below", files))
    shown = []
    for kind, name, together in rows:
        processes = [process for mapping in together for process in mapping.processes]
        sums = {column: sum(getattr(process, column) for process in processes) for column in _BYTES}
        pss = [process.pss for process in processes]
        if any(sums.values()):
            shown.append((sums, [
                kind, name, f"{len({process.pid for process in processes}):,}",
                *(size(sums[column]) for column in _BYTES[:4]),
                "?" if None in pss else size(sum(filter(None, pss))),
                ", ".join(f"{size(sums[column])} {column}" for column in _BYTES[4:] if sums[column]),
            ]))  # fmt: skip
    shown.sort(key=lambda row: (-row[0]["own"], -row[0]["resident"]))
    cells = [row for _, row in shown[:_MOST_MAPPINGS]]
    if len(shown) > _MOST_MAPPINGS:
        own, resident = (
            sum(sums[column] for sums, _ in shown[_MOST_MAPPINGS:]) for column in ("own", "resident")
        )
        cells.append(["…", more(len(shown) - _MOST_MAPPINGS), "", size(resident), size(own), "", "", "", ""])
    return Table(("kind", "name", ">in", ">resident", ">own", ">by fork", ">shared", ">takes", "also"), cells)


def library_rows(audit: Audit, before: Audit | None = None) -> Table:
    """A row for each library, in pages over all processes; ``before`` adds what has changed since."""
    swapped = ("swapped",) if any(library.swapped for library in audit.libraries) else ()
    names = ("mapped", "present", "shared", "by fork", "own", "bss", *swapped)
    columns = ("library", ">in", *(f">{name}" for name in names), ">takes", ">apart")
    libraries_before = before.libraries if before is not None else ()
    old = {library.build_id or library.path: library for library in libraries_before}
    rows = []
    for library in audit.libraries:
        several = f" ({library.files} separate files)" if library.files > 1 else ""
        cells: list[Piece] = [
            (printable(library.name) + several, "yellow") if several else printable(library.name),
            f"{len({process.pid for process in library.processes}):,}",
            *(f"{sum(getattr(process, field) for process in library.processes):,}" for field in _COUNTED[:3]),
            f"{library.common:,}",
            f"{library.private - library.common:,}",
            *(
                f"{sum(getattr(process, field) for process in library.processes):,}"
                for field in ("bss", *swapped)
            ),
            size(library.frames * audit.page_size if library.takes is None else library.takes),
            size(library.present * audit.page_size),
        ]
        if before is not None:
            counterpart = old.get(library.build_id or library.path)
            change = library.own - (counterpart.own if counterpart is not None else 0)
            cells.append((f"{change:+,}" if change else "·", "red" if change > 0 else "green"))
        rows.append(cells)
    return Table((*columns, ">since start") if before is not None else columns, rows)


_MOST_MAPPINGS = 12
_BYTES = ("resident", "own", "inherited", "shared", "huge", "zero", "swapped")
_COUNTED = ("mapped", "present", "shared", "private", "bss")


# ------------------------------------------------------------------------------------------- sentences
def sentence(library: AuditedLibrary) -> Line:
    """``libcrypto.so.3: 101 own pages in each process: 97 only relocated (…), 4 written …``.

    Copies that relatives still share cost nothing yet, so they are counted and not explained.
    """
    if not library.private_pages and not library.swapped_pages:
        return ()
    by_kind: dict[str, dict[int, int]] = {}
    symbols: dict[str, int] = {}
    for page in library.private_pages:
        kind, alone = _kind(page), (Counter(page.pids) - Counter(page.common)).elements()
        for pid in alone:
            of_kind = by_kind.setdefault(kind, {})
            of_kind[pid] = of_kind.get(pid, 0) + 1
            for name in page.written if kind == "written" else ():
                symbols[name] = symbols.get(name, 0) + 1
    pids = {process.pid for process in library.processes}
    own, common = dict.fromkeys(pids, 0), dict.fromkeys(pids, 0)
    for process in library.processes:
        by_relatives = process.inherited + (process.merged or 0)
        own[process.pid] += process.private - by_relatives
        common[process.pid] += by_relatives
    in_each = " in each process" if len(pids) > 1 else ""
    pages = f": {_span(own.values(), 'own page')}{in_each}"
    parts = []
    for kind, words in _KINDS.items():
        if kind in by_kind:
            numbers = [by_kind[kind].get(pid, 0) for pid in pids]
            if kind == "relocated" and any(process.beforehand for process in library.processes):
                words = "relocated in each process, with addresses in other libraries"
            parts.append(f"{_span(numbers)} {words}")
            if kind == "written" and symbols:
                parts[-1] += f", {_named(sorted(symbols, key=lambda name: (-symbols[name], name)))}"
    if any(common.values()):
        parts.append(f"{_span(common.values())} besides, copied, are still shared with relatives or by KSM")
    beforehand = [process.beforehand for process in library.processes]
    if any(beforehand):
        parts.append(f"{_span(beforehand)} besides, relocated beforehand, are shared")
    swapped = [process.swapped for process in library.processes]
    if any(swapped):
        parts.append(f"{_span(swapped)} besides are swapped out, and not read, as that would bring them in")
    return ((printable(library.name), "bold"), f"{pages}: " + printable("; ".join(parts)))


_KINDS = {
    "relocated": "only relocated (sharable with prepared pages or fork)",
    "written": "written by the program",
    "bss": "with the start of bss, and not written otherwise",
    "loader": "with the loader's bookkeeping only",
    "identical": "copied, yet as in the file",
    "unknown": "unknown",
}


def _kind(page: PrivatePage) -> str:
    causes = set(page.causes)
    if "unknown" in causes:
        return "unknown"
    if causes & {"write", "overwritten"}:
        return "written"
    if "bss" in causes:
        return "bss"
    if page.only_relocated:
        return "relocated"
    return "loader" if "loader" in causes else "identical"


def _span(numbers: Iterable[int], noun: str = "") -> str:
    """``97``, or ``95 to 97`` where processes differ.

    >>> _span([97, 97], "private page"), _span([95, 97])
    ('97 private pages', '95 to 97')
    """
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[-1]
    text = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{text} {noun}{'' if high == 1 else 's'}" if noun else text


def _named(names: Sequence[str]) -> str:
    return f"symbol{'s' if len(names) > 1 else ''} {listed(names, _MOST_SYMBOLS)}"


# --------------------------------------------------------------------------------------------- tables
def _processes(processes: Sequence[AuditedProcess]) -> Table:
    columns = ("process", "name", ">RSS", ">PSS", ">USS", ">anonymous", ">of it shared", "also")
    rows = []
    for process in sorted(processes, key=lambda process: (-process.uss, process.pid)):
        also = [
            f"{number:,} {name}"
            for number, name in (
                (process.swapped, "swapped"),
                (process.huge, "in huge pages"),
                (process.ksm or 0, "merged (KSM)"),
                (process.zero, "zero"),
            )
            if number
        ]
        if process.memory_of is not None:
            also.insert(0, f"the memory of {process.memory_of}, counted there")
        rows.append(
            (
                str(process.pid),
                printable(process.name),
                size(process.rss),
                "?" if process.pss is None else size(process.pss),
                size(process.uss),
                f"{process.anonymous:,}",
                f"{process.anonymous_shared:,}",
                ", ".join(also),
            )
        )
    return Table(columns, rows)


def _library(library: AuditedLibrary) -> Iterator[Part]:
    yield ()
    yield heading(printable(library.path), f"build-id {library.build_id or 'none'}")
    merged = ["merged"] if any(process.merged != 0 for process in library.processes) else []
    numbers = (*_COUNTED[:4], "inherited", *merged, "bss", "swapped")
    yield Table(
        ("process", "base", *(f">{name}" for name in numbers)),
        [
            (str(process.pid), f"{process.base:#x}", *(_number(getattr(process, name)) for name in numbers))
            for process in library.processes
        ],
    )
    pages = (*library.private_pages, *library.bss_pages, *library.swapped_pages)
    if not pages:
        return
    yield ()
    yield Table(
        (">vaddr", "section", ">in", "causes", "relocations", "written, or else on it"),
        [
            (
                f"{page.vaddr:#x}",
                printable(page.section),
                f"{len(page.pids):,}{_family(page)}",
                printable(", ".join(page.causes) + (f": {page.reason}" if page.reason else "")),
                ", ".join(f"{n:,} {name.removeprefix('R_X86_64_')}" for name, n in page.kinds.items()),
                printable(listed(page.written or page.symbols, _MOST_SYMBOLS)),
            )
            for page in pages
        ],
    )


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _family(page: PrivatePage) -> str:
    """Where relatives still have one copy between them: in how many copies the page exists."""
    return f" ({count(len(page.groups), 'copy', 'copies')})" if page.groups else ""


def _unreadable(unreadable: Sequence[Unreadable]) -> Iterator[Line]:
    yield heading("not audited")
    for process in unreadable:
        yield (f"  {said_of(process)}",)


def said_of(process: Unreadable) -> str:
    """Which process could not be audited, why, and what would be needed."""
    return printable(f"{process.pid}: {process.reason}" + (f"; {process.needed}" if process.needed else ""))


# ------------------------------------------------------------------------------------------- one page
def page_view(view: PageView) -> Iterator[Part]:
    """One page, word by word."""
    title = printable(f"{view.path} at {view.vaddr:#x} in process {view.pid}")
    yield heading(title, printable(f"{view.section}, {view.state}" if view.section else view.state))
    if view.causes:
        reason = f" ({view.reason})" if view.reason else ""
        yield (printable(f"  causes: {', '.join(view.causes)}{reason}"),)
    if view.state in ("swapped", "unknown"):
        return
    if view.state != "private":
        yield (f"  {_OF_STATE[view.state]}",)
        return
    yield Table(
        (">vaddr", "cause", ">file", ">old", ">new", "symbol", "relocation"),
        [
            (
                f"{word.vaddr:#x}",
                word.cause or "as in the file",
                f"{word.file:#x}",
                f"{word.old:#x}",
                f"{word.new:#x}",
                printable(word.symbol),
                word.kind.removeprefix("R_X86_64_"),
            )
            for word in view.words
        ],
    )


_OF_STATE = {
    "shared": "no copy: every byte is the file's own",
    "anonymous": "anonymous memory at this place of the file, private: bss, or what the program put there",
    "absent": "not in memory",
}


# ------------------------------------------------------------------------------------------ differences
def changes_view(changes: Sequence[PageChange], page_size: int) -> Iterator[Part]:
    """What differs between two audits."""
    if not changes:
        yield ("no page went private, was rewritten, or returned",)
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


# ------------------------------------------------------------------------------------------------- CSV
def write_csv(audit: Audit, file: IO[str], what: str = "libraries") -> None:
    """A row for each process, or for each mapping or library in each process: numbers as they are in JSON."""
    import csv

    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(records(audit, what))


def records(audit: Audit, what: str) -> Iterator[Sequence[object]]:
    """The names of the columns, then a row for each of ``what``: processes, mappings or libraries."""
    return _CSV[what](audit)


def _process_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("pid", "name", *_OF_PROCESS)
    for process in audit.processes:
        yield (process.pid, printable(process.name), *_values(process, _OF_PROCESS))


def _mapping_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("kind", "name", "pid", *_OF_MAPPING)
    for mapping in audit.mappings:
        for process in mapping.processes:
            yield (mapping.kind, printable(mapping.name), process.pid, *_values(process, _OF_MAPPING))


def _library_records(audit: Audit) -> Iterator[Sequence[object]]:
    yield ("path", "build_id", "pid", *_OF_LIBRARY)
    for library in audit.libraries:
        for process in library.processes:
            values = _values(process, _OF_LIBRARY)
            yield (printable(library.path), library.build_id or "", process.pid, *values)


def _values(value: object, fields: Sequence[str]) -> list[object]:
    return [getattr(value, field) for field in fields]


_OF_PROCESS = (
    *("parent", "started", "rss", "pss", "uss", "anonymous", "anonymous_shared"),
    *("ksm", "zero", "huge", "swapped", "memory_of"),
)
_OF_MAPPING = ("resident", "own", "inherited", "shared", "pss", "zero", "huge", "swapped")
_OF_LIBRARY = ("base", *_COUNTED, "inherited", "swapped", "merged", "pss")
_CSV = {"processes": _process_records, "mappings": _mapping_records, "libraries": _library_records}
