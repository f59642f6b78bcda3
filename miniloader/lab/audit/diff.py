"""What differs between two audits: the pages that went private, were rewritten, or returned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from miniloader.errors import UsageError
from miniloader.json_schema import COUNT, HEX, TEXT, array, keys, nullable, record, words
from miniloader.lab.audit.result import Audit, AuditedLibrary, PrivatePage
from miniloader.values import NamedTuple, dataclass

__all__ = ["CHANGE_SCHEMA", "PageChange", "diff"]


@dataclass(frozen=True)
class PageChange:
    """A page that is not what it was in the audit before.

    ``change``: ``private`` (it was not), ``rewritten`` (private before, with other causes or symbols) or
    ``returned`` (private no more).  ``causes`` and ``symbols`` are what is new; of a returned page, what was.
    A copy that relatives still have in common after a fork goes private when it becomes a process's own.
    Anonymous pages of bss count as well.  A page that is swapped out is still private; what was written to it
    meanwhile cannot be told.
    ``processes`` is in how many more processes; ``pids`` are those, where the same processes were audited.
    """

    path: str
    build_id: str | None
    vaddr: int
    section: str
    change: str
    causes: tuple[str, ...]
    symbols: tuple[str, ...]
    processes: int
    pids: tuple[int, ...]


CHANGE_SCHEMA: Final = record(
    {"path": TEXT, "build_id": nullable(HEX), "vaddr": COUNT, "section": TEXT, "processes": COUNT},
    {"change": words("private rewritten returned"), "pids": array(COUNT)},
    keys(array(TEXT), "causes symbols"),
)
"""A :class:`PageChange` in ``--json``."""


class _Copy(NamedTuple):
    """A private page of a process: why, what was written, and whether nobody else has that copy."""

    causes: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    alone: bool = False


def diff(before: Audit, after: Audit) -> tuple[PageChange, ...]:
    """The pages that went private, were rewritten, or returned, between two audits; by library and vaddr.

    Processes in both audits (the same pid and start) are compared one by one.  Where none is, as after a
    restart, only what any process has is compared.
    """
    if before.page_size != after.page_size:
        found = f"pages of {before.page_size} and of {after.page_size} bytes"
        raise UsageError(f"audits of different machines cannot be compared: found {found}")
    common = {(process.pid, process.started) for process in before.processes}
    common &= {(process.pid, process.started) for process in after.processes}
    pids = frozenset(pid for pid, _ in common) if common else None
    changes: list[PageChange] = []
    old = {_key(library): library for library in before.libraries}
    new = {_key(library): library for library in after.libraries}
    for key in [*new, *(key for key in old if key not in new)]:
        changes += _changes(old.get(key), new.get(key), pids)
    return tuple(changes)


def _key(library: AuditedLibrary) -> str:
    return library.build_id or library.path


def _changes(
    old: AuditedLibrary | None, new: AuditedLibrary | None, pids: frozenset[int] | None
) -> Iterable[PageChange]:
    shown = new or old
    if shown is None:
        return
    before, after = _copies(old, pids), _copies(new, pids)
    # A process that has not had the library before has not eroded: it has just loaded it.
    had, has = _having(old, pids), _having(new, pids)
    pages = [page for library in (old, new) if library for page in _every_private(library)]
    sections = {page.vaddr: page.section for page in pages}
    found: dict[tuple[int, str, tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for place in sorted({*before, *after}):
        vaddr, pid = place
        if pid not in had or pid not in has:
            continue
        previous, present = before.get(place), after.get(place)
        if present is None:
            change, (causes, symbols, _) = "returned", previous or _Copy()
        elif previous is None or (present.alone and not previous.alone):
            change, (causes, symbols, _) = "private", present
        else:
            change = "rewritten"
            causes, symbols = present.causes - previous.causes, present.written - previous.written
            if "unknown" in previous.causes | present.causes or not (causes or symbols):
                continue
        found.setdefault((vaddr, change, tuple(sorted(causes)), tuple(sorted(symbols))), []).append(pid)
    for (vaddr, change, names, written), processes in found.items():
        yield PageChange(
            path=shown.path,
            build_id=shown.build_id,
            vaddr=vaddr,
            section=sections[vaddr],
            change=change,
            causes=names,
            symbols=written,
            processes=len(processes),
            pids=() if pids is None else tuple(processes),
        )


def _having(library: AuditedLibrary | None, pids: frozenset[int] | None) -> frozenset[int]:
    """The processes that have ``library``; 0 stands for any where they cannot be compared."""
    if library is None:
        return frozenset()
    return frozenset({0}) if pids is None else frozenset(process.pid for process in library.processes) & pids


def _copies(library: AuditedLibrary | None, pids: frozenset[int] | None) -> dict[tuple[int, int], _Copy]:
    """The copies of each process, by vaddr and pid; where processes cannot be compared, what any has."""
    copies: dict[tuple[int, int], _Copy] = {}
    for page in _every_private(library) if library is not None else ():
        for pid in page.pids:
            place = page.vaddr, 0 if pids is None else pid
            if pids is None or pid in pids:
                copy, alone = copies.get(place, _Copy()), pid not in page.common
                causes, written = copy.causes.union(page.causes), copy.written.union(page.written)
                copies[place] = _Copy(causes, written, copy.alone or alone)
    return copies


def _every_private(library: AuditedLibrary) -> Iterable[PrivatePage]:
    return (*library.private_pages, *library.bss_pages, *library.swapped_pages)
