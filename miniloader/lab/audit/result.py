"""What an audit found: frozen values, to JSON and back, and what differs between two of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Self, get_args

from miniloader.errors import MiniloaderError, UsageError
from miniloader.files import write_whole
from miniloader.kernel.features import LevelName
from miniloader.values import dataclass

__all__ = [
    "Audit",
    "AuditedLibrary",
    "AuditedProcess",
    "LibraryProcess",
    "PageChange",
    "PrivatePage",
    "Unreadable",
    "diff",
]

_FORMAT = "miniloader audit 1"


@dataclass(frozen=True)
class AuditedProcess:
    """What one process costs; ``rss``, ``pss``, ``uss`` in bytes, the rest in pages.

    ``pss`` is None where frames are hidden, ``ksm`` (merged pages) where the kernel tells neither which they
    are nor how many (5.19).  ``anonymous`` pages include copies of file pages;
    of them ``anonymous_shared`` are mapped more than once (a family of forks, or KSM).  ``zero`` is how
    often the page of zeros is mapped, which costs nothing.  ``huge`` pages are mapped by huge entries.
    ``started`` is in clock ticks since boot: with the pid it names a process for good.
    """

    pid: int
    name: str
    parent: int
    started: int
    rss: int
    pss: int | None
    uss: int
    anonymous: int
    anonymous_shared: int
    ksm: int | None
    zero: int
    huge: int
    swapped: int


@dataclass(frozen=True)
class LibraryProcess:
    """One library in one process, in pages of the file's mappings; ``base`` is the load bias.

    ``present`` = ``shared`` (the file's own pages, one frame for all who map them) + ``private`` (copies).
    Of the shared ones ``beforehand`` were relocated beforehand (prepared).  Of the private ones
    ``inherited`` are still shared with a relative by fork, ``merged`` with anybody by KSM; where that is None
    the kernel does not tell the two apart, and ``inherited`` counts both.  ``bss`` are anonymous pages beyond
    the file's.  ``swapped`` are copies, too, yet not present.
    """

    pid: int
    base: int
    mapped: int
    present: int
    shared: int
    private: int
    inherited: int
    bss: int
    swapped: int
    beforehand: int = 0
    merged: int | None = 0


@dataclass(frozen=True)
class PrivatePage:
    """A page that some processes have a copy of, for the same causes.

    ``symbols`` are those on the page that loader or program wrote; ``written`` those of them that were
    written after relocation.  ``kinds`` counts the relocations on the page.  ``pids`` has a process once for
    each time it has the file mapped.  ``groups`` are the pids that still have one frame between them, after
    fork; () where every process has its own, or frames are hidden.  ``common`` are the pids whose copy
    somebody has as well, whether audited or not.
    """

    vaddr: int
    section: str
    symbols: tuple[str, ...]
    written: tuple[str, ...]
    causes: tuple[str, ...]
    kinds: Mapping[str, int]
    pids: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    reason: str
    common: tuple[int, ...] = ()

    @property
    def only_relocated(self) -> bool:
        """Whether nobody but the loader wrote there: prepared pages, or a fork, could share it."""
        return "relocation" in self.causes and set(self.causes) <= {"relocation", "loader"}


@dataclass(frozen=True)
class AuditedLibrary:
    """One file in all processes.

    ``files`` is how many separate files in the page cache it is (containers, a replaced file): they share
    nothing with each other.  ``frames`` is how many pages of memory all its present pages really take; at
    level ``flags`` at most so many.  ``swapped_pages`` are private pages that are not present.
    """

    path: str
    build_id: str | None
    files: int
    frames: int
    processes: tuple[LibraryProcess, ...]
    private_pages: tuple[PrivatePage, ...]
    bss_pages: tuple[PrivatePage, ...]
    swapped_pages: tuple[PrivatePage, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without directories."""
        return os.path.basename(self.path)

    @property
    def present(self) -> int:
        """Present pages, each process counted for itself: what separate copies would cost."""
        return sum(one.present for one in self.processes)

    @property
    def private(self) -> int:
        """Private pages over all processes."""
        return sum(one.private for one in self.processes)

    @property
    def common(self) -> int:
        """Private pages that somebody else has as well, by fork or KSM, over all processes."""
        return sum(one.inherited + (one.merged or 0) for one in self.processes)

    @property
    def own(self) -> int:
        """Pages that a process has for itself, over all: copies, swapped out or not, and bss."""
        return self.private - self.common + self.swapped + sum(one.bss for one in self.processes)

    @property
    def swapped(self) -> int:
        """Private pages that are swapped out, over all processes."""
        return sum(one.swapped for one in self.processes)


@dataclass(frozen=True)
class Unreadable:
    """A process that could not be audited: why, and what would be needed ("" where nothing helps)."""

    pid: int
    reason: str
    needed: str


@dataclass(frozen=True)
class Audit:
    """What was found at ``when`` (seconds since the epoch), at evidence ``level``.

    ``explained``: whether causes were asked for.  Libraries come with the most private pages first.
    """

    level: LevelName
    when: float
    page_size: int
    explained: bool
    processes: tuple[AuditedProcess, ...]
    libraries: tuple[AuditedLibrary, ...]
    unreadable: tuple[Unreadable, ...]

    def library(self, name: str) -> AuditedLibrary:
        """The library whose path is, or holds, ``name``; UsageError when there is none, or several."""
        found = [one for one in self.libraries if name == one.path]
        found = found or [one for one in self.libraries if name in one.path]
        if len(found) != 1:
            raise UsageError(f"library {name!r}: {len(found)} in this audit, expected one")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        """The object that ``audit --json`` prints."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The audit in such an object; UsageError when it is not one."""
        try:
            if value["format"] != _FORMAT or value["level"] not in get_args(LevelName):
                raise UsageError(f"no audit: found format {value['format']!r}, expected {_FORMAT!r}")
            return cls(
                level=value["level"],
                when=value["when"],
                page_size=value["page_size"],
                explained=value["explained"],
                processes=tuple(AuditedProcess(**one) for one in value["processes"]),
                libraries=tuple(_library(one) for one in value["libraries"]),
                unreadable=tuple(Unreadable(**one) for one in value["unreadable"]),
            )
        except KeyError as error:
            raise UsageError(f"no audit as --save or --json writes it: it lacks {error}") from error
        except (TypeError, AttributeError) as error:
            raise UsageError(f"no audit as --save or --json writes it: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file: all of it, or nothing; MiniloaderError says why not."""
        import json

        text = json.dumps(self.to_json())  # ASCII, whatever the names
        try:
            write_whole(path, [text.encode()])
        except OSError as error:
            raise MiniloaderError(f"{os.fspath(path)}: cannot write the audit: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote; UsageError, or OSError."""
        import json

        with open(path, encoding="utf-8") as file:
            try:
                return cls.from_json(json.load(file))
            except UsageError as error:
                raise UsageError(f"{os.fspath(path)}: {error.message}") from error
            except ValueError as error:  # neither JSON nor UTF-8
                raise UsageError(f"{os.fspath(path)}: no audit as --save writes it: {error}") from error


def _library(value: Mapping[str, Any]) -> AuditedLibrary:
    fields = dict(value)
    fields["processes"] = tuple(LibraryProcess(**one) for one in value["processes"])
    for name in ("private_pages", "bss_pages", "swapped_pages"):
        fields[name] = tuple(_page(one) for one in value.get(name, ()))  # older ones lack the last
    return AuditedLibrary(**fields)


def _page(value: Mapping[str, Any]) -> PrivatePage:
    fields = dict(value)
    if not isinstance(fields["vaddr"], int):
        raise TypeError(f"found vaddr {fields['vaddr']!r}, expected a number")
    for name in ("symbols", "written", "causes", "pids", "common"):
        fields[name] = tuple(value.get(name, ()) if name == "common" else value[name])  # older ones lack it
    fields["groups"] = tuple(tuple(group) for group in value["groups"])
    return PrivatePage(**fields)


# ----------------------------------------------------------------------------------------- differences
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


class _Row(NamedTuple):
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
    common = {(one.pid, one.started) for one in before.processes}
    common &= {(one.pid, one.started) for one in after.processes}
    pids = frozenset(pid for pid, _ in common) if common else None
    changes: list[PageChange] = []
    old = {_key(one): one for one in before.libraries}
    new = {_key(one): one for one in after.libraries}
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
    before, after = _rows(old, pids), _rows(new, pids)
    # A process that has not had the library before has not eroded: it has just loaded it.
    had, has = _having(old, pids), _having(new, pids)
    sections = {page.vaddr: page.section for one in (old, new) if one for page in _every_private(one)}
    found: dict[tuple[int, str, tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for place in sorted({*before, *after}):
        vaddr, pid = place
        if pid not in had or pid not in has:
            continue
        was, now = before.get(place), after.get(place)
        if now is None:
            change, row = "returned", was or _Row()
        elif was is None or (now.alone and not was.alone):
            change, row = "private", now
        else:
            change, row = "rewritten", _Row(now.causes - was.causes, now.written - was.written)
            if "unknown" in was.causes | now.causes or not (row.causes or row.written):
                continue
        causes, symbols = row.causes, row.written
        found.setdefault((vaddr, change, tuple(sorted(causes)), tuple(sorted(symbols))), []).append(pid)
    for (vaddr, change, causes_of, symbols_of), who in found.items():
        named = () if pids is None else tuple(who)
        yield PageChange(
            shown.path, shown.build_id, vaddr, sections[vaddr], change, causes_of, symbols_of, len(who), named
        )


def _having(library: AuditedLibrary | None, pids: frozenset[int] | None) -> frozenset[int]:
    """The processes that have it; 0 stands for any where they cannot be compared."""
    if library is None:
        return frozenset()
    return frozenset({0}) if pids is None else frozenset(one.pid for one in library.processes) & pids


def _rows(library: AuditedLibrary | None, pids: frozenset[int] | None) -> dict[tuple[int, int], _Row]:
    """What each process has, by vaddr and pid; where they cannot be compared, what any has."""
    rows: dict[tuple[int, int], _Row] = {}
    for page in _every_private(library) if library is not None else ():
        for pid in page.pids:
            place = page.vaddr, 0 if pids is None else pid
            if pids is None or pid in pids:
                known, alone = rows.get(place, _Row()), pid not in page.common
                causes, written = known.causes.union(page.causes), known.written.union(page.written)
                rows[place] = _Row(causes, written, known.alone or alone)
    return rows


def _every_private(library: AuditedLibrary) -> Iterable[PrivatePage]:
    return (*library.private_pages, *library.bss_pages, *library.swapped_pages)
