"""An audit for people: the answer first, the largest cost at the top."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from miniloader.errors import printable
from miniloader.lab.audit.since_fork import had_at_fork, parents_in
from miniloader.lab.erosion.advice import can_be_prepared
from miniloader.report.audit_rows import COUNTED, group_rows, library_rows, mapping_rows, short_kind
from miniloader.report.erosion import advice_view, erosion_view
from miniloader.report.numbers import count, size
from miniloader.report.text import Line, Part, Table, heading, listed, more

if TYPE_CHECKING:
    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.mappings import AuditedMapping
    from miniloader.lab.audit.result import (
        Audit,
        AuditedLibrary,
        AuditedProcess,
        PrivatePage,
        Unreadable,
    )

__all__ = [
    "lines",
    "said_of",
    "sentence",
    "summary",
]

_MOST_SYMBOLS = 4
_MOST_SENTENCES = 8
_MOST_PIDS = 6
_MEANING = {
    "frames": "page frame numbers: equal numbers are the same memory",
    "flags": "page flags: copies are certain, who shares with whom stays hidden",
}


def lines(audit: Audit, *, pages: bool = False, groups: Sequence[MemoryGroup] = ()) -> Iterator[Part]:
    """An audit; ``pages`` also lists each private page and each process of the libraries.

    ``groups`` come first, where some were asked for.
    """
    if audit.processes or not audit.unreadable:
        yield from summary(audit)
    if groups:
        yield ()
        yield group_rows(groups)
    paths = {library.path for library in audit.libraries}
    shown = [row for row in audit.mappings if not pages or (row.name in paths and row.kind != "file")]
    if shown:
        yield ()
        yield mapping_rows(shown, audit.libraries)
    if audit.libraries:
        yield ()
        yield library_rows(audit)
    parents = parents_in(audit.processes)
    said = [text for library in audit.libraries if (text := sentence(library, parents))]
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
        yield from advice_view(audit)
    if audit.processes:
        yield ()
        yield _processes(audit.processes, audit.page_size)
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
        shared = f"; copies that relatives still share: {size(inherited)}, counted in each of them"
        by_fork = shared if inherited else ""
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
        number = sum(map(attrgetter(column), mapping.processes))
        sums[mapping.kind] = sums.get(mapping.kind, 0) + number
    return {kind: number for kind, number in sorted(sums.items(), key=lambda item: -item[1]) if number}


# ------------------------------------------------------------------------------------------- sentences
def sentence(library: AuditedLibrary, parents: Mapping[int, int]) -> Line:
    """``libcrypto.so.3: 101 own pages in each process: 97 only relocated (…), 4 written …``.

    Copies that relatives still share cost nothing yet, so they are counted and not explained.  ``parents``
    are those of processes that were forked.
    """
    if not library.private_pages and not library.swapped_pages:
        return ()
    by_kind, symbols = _own_pages(library, had_at_fork(library, parents))
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
            elif kind == "relocated" and not can_be_prepared(library.name):
                words = "only relocated (sharable by fork)"
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


def _own_pages(
    library: AuditedLibrary, forked: Mapping[int, int]
) -> tuple[Mapping[str, Mapping[int, int]], Mapping[str, int]]:
    """How many pages of each kind each process has for itself; and on how many of those that the program has
    written to each symbol is.  ``forked``: who had the library at the fork, with the parents.
    """
    by_kind: dict[str, Counter[int]] = defaultdict(Counter)
    symbols = Counter[str]()
    for page in library.private_pages:
        kind = _kind(page)
        relocated = page.pids if forked and kind == "relocated" else ()
        for pid in page.alone:
            by_kind["again" if forked.get(pid) in relocated else kind][pid] += 1
        if kind == "written":
            symbols.update(page.written * len(page.alone))
    return by_kind, symbols


_KINDS = {
    "relocated": "only relocated (sharable with prepared pages or fork)",
    "again": "only relocated, yet copied again since the fork",
    "written": "written by the program",
    "patched": "written though not writable",
    "bss": "with the start of bss, and not written otherwise",
    "loader": "with the loader's bookkeeping only",
    "identical": "copied, yet as in the file",
    "unknown": "unknown",
}


def _kind(page: PrivatePage) -> str:
    causes = set(page.causes)
    if "unknown" in causes:
        return "unknown"
    if "write" in causes and page.reason:
        return "patched"
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
    begin = "" if low == high else f"{low:,} to "
    return begin + (count(high, noun) if noun else f"{high:,}")


def _named(names: Sequence[str]) -> str:
    return f"symbol{'s' if len(names) > 1 else ''} {listed(names, _MOST_SYMBOLS)}"


# --------------------------------------------------------------------------------------------- tables
def _processes(processes: Sequence[AuditedProcess], page_size: int) -> Table:
    columns = ("process", "name", ">RSS", ">PSS", ">USS", ">anonymous", ">of it shared", "also")
    rows = []
    for process in sorted(processes, key=lambda process: (-process.uss, process.pid)):
        also = [
            f"{size(number * page_size)} {name}"
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
                size(process.anonymous * page_size),
                size(process.anonymous_shared * page_size),
                ", ".join(also),
            )
        )
    return Table(columns, rows)


def _library(library: AuditedLibrary) -> Iterator[Part]:
    yield ()
    yield heading(printable(library.path), f"build-id {library.build_id or 'none'}")
    merged = ["merged"] if any(process.merged != 0 for process in library.processes) else []
    numbers = (*COUNTED[:4], "inherited", *merged, "bss", "swapped")
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
                ", ".join(f"{n:,} {short_kind(name)}" for name, n in page.kinds.items()),
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
    """Who could not be audited: those of whom the same is said together."""
    yield heading("not audited")
    alike: dict[str, list[Unreadable]] = {}
    for process in unreadable:
        alike.setdefault(_said(process).replace(str(process.pid), "PID"), []).append(process)
    for text, processes in alike.items():
        if len(processes) == 1:
            yield (f"  {said_of(processes[0])}",)
        else:
            pids = listed([str(process.pid) for process in processes], _MOST_PIDS)
            yield (printable(f"  {count(len(processes), 'process', 'processes')} ({pids}): {text}"),)


def said_of(process: Unreadable) -> str:
    """Which process could not be audited, why, and what would be needed."""
    return printable(f"{process.pid}: {_said(process)}")


def _said(process: Unreadable) -> str:
    return process.reason + (f"; {process.needed}" if process.needed else "")
