"""The tables of an audit: a row for each kind of memory, and for each library."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from miniloader.errors import printable
from miniloader.lab.audit.grouping import total
from miniloader.report.numbers import count, size
from miniloader.report.text import Piece, Table, more

if TYPE_CHECKING:
    from miniloader.lab.audit.grouping import MemoryGroup
    from miniloader.lab.audit.mappings import AuditedMapping
    from miniloader.lab.audit.result import Audit, AuditedLibrary

__all__ = ["COUNTED", "group_rows", "library_rows", "mapping_rows", "short_kind"]

#: The columns of a library in a process that are counted in pages.
COUNTED: Final = ("mapped", "present", "shared", "private", "bss")


def mapping_rows(
    mappings: Sequence[AuditedMapping], libraries: Sequence[AuditedLibrary] = (), *, where: str = "below"
) -> Table:
    """A row for each kind and name of memory, in bytes over all processes.

    Those of ``libraries``, which have a table ``where`` it says, are in one.  A file that is mapped shared
    only is no library, and may be the largest of all: it has a row.
    """
    names = {library.name for library in libraries}  # one that is there under several paths has one name
    rows: list[tuple[str, str, list[AuditedMapping]]] = []
    files: list[AuditedMapping] = []
    for mapping in mappings:
        if mapping.kind == "file" and os.path.basename(mapping.name) in names:
            files.append(mapping)
        else:
            rows.append((mapping.kind, printable(mapping.name), [mapping]))
    if files:
        rows.append(("file", f"{count(len(files), 'file')}, {where}", files))
    shown = []
    for kind, name, together in rows:
        processes = [process for mapping in together for process in mapping.processes]
        sums = {column: sum(map(attrgetter(column), processes)) for column in _BYTES}
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


def group_rows(groups: Sequence[MemoryGroup]) -> Table:
    """A row for each group, and the sum of all."""
    swapped = (">swapped",) if any(group.swapped for group in groups) else ()
    unnamed = "(memory of no library)" if groups[0].by == "library" else "(not known)"

    def sizes(of: Sequence[MemoryGroup]) -> list[str]:
        sums = [total(group.pss for group in of)]
        sums += [sum(getattr(group, column) for group in of) for column in ("uss", "rss", "swapped")]
        return ["?" if number is None else size(number) for number in sums[: 3 + len(swapped)]]

    rows: list[list[Piece]] = [
        [_short(group.name) or (unnamed, "dim"), f"{len(group.pids):,}", *sizes([group])] for group in groups
    ]
    everybody = {pid for group in groups for pid in group.pids}
    rows.append([(text, "bold") for text in ("all", f"{len(everybody):,}", *sizes(groups))])
    return Table((groups[0].by, ">in", ">PSS", ">USS", ">RSS", *swapped), rows)


def short_kind(name: str) -> str:
    """The name of a relocation kind without its processor's.

    >>> short_kind("R_X86_64_RELATIVE"), short_kind("R_AARCH64_GLOB_DAT"), short_kind("RELR")
    ('RELATIVE', 'GLOB_DAT', 'RELR')
    """
    return re.sub(r"^R_(X86_64|[A-Z0-9]+)_", "", name)


def _short(name: str) -> str:
    """A name as far as there is room: a command line ends after one of its arguments."""
    name = printable(name)
    if len(name) <= _MOST_LETTERS or " " not in name[:_MOST_LETTERS]:
        return name
    return f"{name[: name.rindex(' ', 0, _MOST_LETTERS)]} …"


def library_rows(audit: Audit, before: Audit | None = None) -> Table:
    """A row for each library, in pages over all processes.

    With ``before`` what has changed since, not how much is mapped, and what separate copies would take:
    a live table has few lines, and a row that is too long is several.
    """
    swapped = ("swapped",) if any(library.swapped for library in audit.libraries) else ()
    mapped, apart = (("mapped",), (">apart",)) if before is None else ((), (">since start",))
    names = (*mapped, "present", "shared", "by fork", "own", "bss", *swapped)
    old = {library.build_id or library.path: library.own for library in (before or audit).libraries}
    rows = []
    for library in audit.libraries:
        several = f" ({library.files} separate files)" if library.files > 1 else ""
        cells: list[Piece] = [
            (printable(library.name) + several, "yellow") if several else printable(library.name),
            f"{len({process.pid for process in library.processes}):,}",
            *(_over_all(library, field) for field in (*mapped, "present", "shared")),
            f"{library.common:,}",
            f"{library.private - library.common:,}",
            *(_over_all(library, field) for field in ("bss", *swapped)),
            size(library.frames * audit.page_size if library.takes is None else library.takes),
        ]
        if before is None:
            cells.append(size(library.present * audit.page_size))
        else:
            change = library.own - old.get(library.build_id or library.path, 0)
            cells.append((f"{change:+,}" if change else "·", "red" if change > 0 else "green"))
        rows.append(cells)
    return Table(("library", ">in", *(f">{name}" for name in names), ">takes", *apart), rows)


def _over_all(library: AuditedLibrary, field: str) -> str:
    return f"{sum(map(attrgetter(field), library.processes)):,}"


_MOST_MAPPINGS = 12
_MOST_LETTERS = 100  # of a command line, in a table
_BYTES = ("resident", "own", "inherited", "shared", "huge", "hugetlb", "zero", "swapped")
