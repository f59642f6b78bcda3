"""What an audit found: frozen values, to JSON and back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, Literal, Self

from miniloader.errors import MiniloaderError, UsageError
from miniloader.files import read_text, write_whole
from miniloader.forking import cached_property, importing
from miniloader.json_schema import (
    BOOL,
    COUNT,
    HEX,
    INT,
    NUMBER,
    TEXT,
    array,
    by_name,
    keys,
    misfit,
    nullable,
    record,
)  # fmt: skip
from miniloader.kernel.features import LEVEL_SCHEMA, LevelName
from miniloader.lab.audit.mappings import MAPPING_SCHEMA, AuditedMapping, MappingProcess
from miniloader.lab.erosion.result import EROSION_SCHEMA, Erosion
from miniloader.showing import REPORT, Showing, dataframe
from miniloader.values import dataclass

__all__ = [
    "AUDIT_KEYS",
    "Audit",
    "AuditedLibrary",
    "AuditedProcess",
    "LibraryProcess",
    "PrivatePage",
    "Unreadable",
]

_FORMAT = "miniloader audit 1"
_LAST: Final = 253_402_300_799  # the last second of the year 9999


@dataclass(frozen=True)
class AuditedProcess:
    """What one process costs; ``rss``, ``pss``, ``uss`` in bytes, the rest in pages.

    ``pss`` is None where the kernel does not tell it, ``ksm`` (merged pages) where it tells neither which
    they are nor how many (5.19).  ``anonymous`` pages include copies of file pages; of them
    ``anonymous_shared`` are mapped more than once (a family of forks, or KSM).  ``zero`` is how often the
    page of zeros is mapped, which costs nothing.  ``huge`` pages are mapped by huge entries.  ``started`` is
    in clock ticks since boot: with the pid it names a process for good.  ``memory_of`` is the process that
    has the same address space (vfork(2), CLONE_VM) and is counted for both, None where nobody else has.
    ``user`` is a name (else a number), ``command`` the command line, ``cgroup`` the path of the most telling
    control group; "" where the kernel did not tell it, and in audits that older versions saved.
    ``arenas_free`` is what glibc's malloc holds free for single threads, in bytes of this process alone; None
    where nobody looked, or it is too much to be looked at.  ``stack`` is the address where the program's
    stack began: another one when it has executed a program; 0 in audits that older versions saved.
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
    memory_of: int | None = None
    user: str = ""
    command: str = ""
    cgroup: str = ""
    arenas_free: int | None = None
    stack: int = 0

    def executed_since(self, before: AuditedProcess) -> bool:
        """Whether it has executed a program since it was seen ``before``: a name alone may be changed."""
        if self.stack and before.stack:
            return self.stack != before.stack
        return self.name != before.name


@dataclass(frozen=True)
class LibraryProcess:
    """One library in one process, in pages of the file's mappings; ``base`` is the load bias, an address.

    ``present`` = ``shared`` (the file's own pages, one frame for all who map them) + ``private`` (copies).
    Of the shared ones ``beforehand`` were relocated beforehand (prepared).  Of the private ones ``inherited``
    are still shared with a relative by fork, ``merged`` with anybody by KSM; where that is None the kernel
    does not tell the two apart, and ``inherited`` counts both.  ``bss`` are anonymous pages beyond the
    file's.  ``swapped`` are copies, too, yet not present.  ``pss`` is what the present pages take in
    proportion, in bytes; None where the kernel does not tell it.
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
    pss: int | None = None


@dataclass(frozen=True)
class PrivatePage:
    """A page that some processes have a copy of, for the same causes.

    ``symbols`` are those on the page that loader or program wrote; ``written`` those of them that were
    written after relocation.  ``kinds`` counts the relocations on the page, where one of the causes is
    ``relocation`` or ``overwritten`` (else it is empty).  ``reason`` says why the cause is unknown, or how a
    page was written that is not writable.  ``pids`` has a process once for
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
        """Whether nobody but the loader wrote there: prepared pages, or a fork, could share it.

        >>> fields = {"vaddr": 0x4000, "section": ".data.rel.ro", "symbols": (), "written": (), "kinds": {}}
        >>> PrivatePage(**fields, causes=("relocation",), pids=(7,), groups=(), reason="").only_relocated
        True
        """
        return "relocation" in self.causes and set(self.causes) <= {"relocation", "loader"}

    @property
    def alone(self) -> tuple[int, ...]:
        """The pids that have a copy of it that nobody else has, once for each such copy.

        >>> fields = {"vaddr": 0x4000, "section": ".data", "symbols": (), "written": (), "kinds": {}}
        >>> PrivatePage(**fields, causes=(), pids=(7, 7, 8), groups=(), reason="", common=(7,)).alone
        (7, 8)
        """
        if not self.common:
            return self.pids
        return tuple((Counter(self.pids) - Counter(self.common)).elements())


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

    @cached_property
    def present(self) -> int:
        """Present pages, each process counted for itself: what separate copies would cost."""
        return sum([process.present for process in self.processes])

    @cached_property
    def private(self) -> int:
        """Private pages over all processes."""
        return sum([process.private for process in self.processes])

    @cached_property
    def common(self) -> int:
        """Private pages that somebody else has as well, by fork or KSM, over all processes."""
        return sum([process.inherited + (process.merged or 0) for process in self.processes])

    @cached_property
    def takes(self) -> int | None:
        """What the present pages take in proportion (PSS), in bytes, over all; None where not known."""
        pss = [process.pss for process in self.processes]
        return None if None in pss else sum(filter(None, pss))

    @cached_property
    def own(self) -> int:
        """Pages that a process has for itself, over all: copies, swapped out or not, and bss."""
        return self.private - self.common + self.swapped + sum([process.bss for process in self.processes])

    @cached_property
    def swapped(self) -> int:
        """Private pages that are swapped out, over all processes."""
        return sum([process.swapped for process in self.processes])


@dataclass(frozen=True)
class Unreadable:
    """A process that could not be audited: why, and what would be needed ("" where nothing helps).

    ``gone``: there is no such process (any more), or it has no memory.
    """

    pid: int
    reason: str
    needed: str
    gone: bool = False


@dataclass(frozen=True)
class Audit(Showing):
    """What was found at ``when`` (seconds since the epoch), at evidence ``level``.

    ``explained``: whether causes were asked for.  Libraries and mappings come with the most pages of the
    processes' own first.  ``mappings`` are all memory, also where only some libraries were asked for; there
    are none in an audit that an older version saved.  ``erosion`` has a row for each process with an elder
    relative among them; None where it is not known: without frames, or in an older audit.
    """

    level: LevelName
    when: float
    page_size: int
    explained: bool
    processes: tuple[AuditedProcess, ...]
    libraries: tuple[AuditedLibrary, ...]
    unreadable: tuple[Unreadable, ...]
    mappings: tuple[AuditedMapping, ...] = ()
    erosion: tuple[Erosion, ...] | None = None

    def __repr__(self) -> str:
        unreadable = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        processes, files = len(self.processes), len(self.libraries)
        many = f"{processes} process{'es' * (processes != 1)}"
        counts = f"{many}, {files} file{'s' * (files != 1)}{unreadable}"
        return f"<Audit of {counts}, by {self.level}>"

    @property
    def counted(self) -> tuple[AuditedProcess, ...]:
        """The processes with an address space of their own: each memory once."""
        return tuple(process for process in self.processes if process.memory_of is None)

    @property
    def uss(self) -> int:
        """What each of the processes alone has mapped, in bytes: files' pages and shared memory as well."""
        return sum(process.uss for process in self.counted)

    @property
    def rss(self) -> int:
        """What is resident, in bytes, each process counted for itself."""
        return sum(process.rss for process in self.counted)

    @property
    def pss(self) -> int | None:
        """What the processes take in proportion, in bytes; None where the kernel does not tell it of all."""
        pss = [process.pss for process in self.counted]
        return None if None in pss else sum(filter(None, pss))

    def library(self, name: str) -> AuditedLibrary:
        """The library whose path is, or holds, ``name``; UsageError when there is none, or several."""
        found = [library for library in self.libraries if name == library.path]
        found = found or [library for library in self.libraries if name in library.path]
        if len(found) != 1:
            raise UsageError(f"library {name!r}: {len(found)} in this audit, expected one")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        """The object that ``audit --json`` prints."""
        return {"format": _FORMAT, **asdict(self)}

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page that ``miniloader audit --html`` writes; MiniloaderError when it cannot be written.

        The pages of libraries are drawn as they are now, and only of processes that are still there.
        """
        REPORT.write_audit(self, path)

    def to_dataframe(self, what: Literal["libraries", "mappings", "processes"] = "libraries") -> Any:
        """A row for each library (or mapping) in each process, or each process, as a pandas ``DataFrame``.

        The columns are those of ``miniloader audit --csv``.  MiniloaderError without pandas.
        """
        return dataframe(REPORT.audit_rows(self, what))

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The audit in such an object; UsageError when it is not one."""
        try:
            if value["format"] != _FORMAT:
                raise UsageError(f"no audit: found format {value['format']!r}, expected {_FORMAT!r}")
            wrong = misfit(value, record(AUDIT_KEYS))
            if wrong is not None:
                raise UsageError(f"no audit as --save or --json writes it: {wrong}")
            return cls(
                level=value["level"],
                when=value["when"],
                page_size=value["page_size"],
                explained=value["explained"],
                processes=tuple(AuditedProcess(**process) for process in value["processes"]),
                libraries=tuple(_library(library) for library in value["libraries"]),
                unreadable=tuple(Unreadable(**process) for process in value["unreadable"]),
                mappings=tuple(_mapping(mapping) for mapping in value.get("mappings", ())),
                erosion=_erosion(value.get("erosion")),
            )
        except KeyError as error:
            raise UsageError(f"no audit as --save or --json writes it: it lacks {error}") from error
        except (TypeError, AttributeError) as error:
            raise UsageError(f"no audit as --save or --json writes it: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the audit to a file: all of it, or nothing; MiniloaderError says why not."""
        with importing:
            import json

        text = json.dumps(self.to_json())  # ASCII, whatever the names
        try:
            write_whole(path, [text.encode()])
        except OSError as error:
            raise MiniloaderError(f"{os.fspath(path)}: cannot write the audit: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote; UsageError, or OSError."""
        with importing:
            import json

        try:
            return cls.from_json(json.loads(read_text(path)))
        except UsageError as error:
            raise UsageError(f"{os.fspath(path)}: {error.message}") from error
        except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8
            raise UsageError(
                f"{os.fspath(path)}: no audit: found what is no JSON, expected what "
                "`miniloader audit --save FILE` wrote"
            ) from error


def _erosion(value: Any) -> tuple[Erosion, ...] | None:
    return None if value is None else tuple(Erosion.from_json(row) for row in value)


def _mapping(value: Mapping[str, Any]) -> AuditedMapping:
    processes = tuple(MappingProcess(**process) for process in value["processes"])
    return AuditedMapping(value["kind"], value["name"], processes)


def _library(value: Mapping[str, Any]) -> AuditedLibrary:
    fields = dict(value)
    fields["processes"] = tuple(LibraryProcess(**process) for process in value["processes"])
    for name in ("private_pages", "bss_pages", "swapped_pages"):
        fields[name] = tuple(_page(page) for page in value.get(name, ()))  # older ones lack the last
    return AuditedLibrary(**fields)


def _page(value: Mapping[str, Any]) -> PrivatePage:
    fields = dict(value)
    for name in ("symbols", "written", "causes", "pids", "common"):
        fields[name] = tuple(value.get(name, ()) if name == "common" else value[name])  # older ones lack it
    fields["groups"] = tuple(tuple(group) for group in value["groups"])
    return PrivatePage(**fields)


_COPY: Final = record(
    {"vaddr": COUNT, "section": TEXT, "reason": TEXT, "kinds": by_name(COUNT)},
    keys(array(TEXT), "symbols written causes"),
    {"pids": array(COUNT), "groups": array(array(COUNT)), "common": array(COUNT)},
)
_LIBRARY: Final = record(
    {"path": TEXT, "build_id": nullable(HEX), "files": COUNT, "frames": COUNT},
    {"processes": array(record(
        keys(COUNT, "pid mapped present shared private inherited bss swapped beforehand"),
        {"base": COUNT, "merged": nullable(COUNT), "pss": nullable(COUNT)},
    ))},
    keys(array(_COPY), "private_pages bss_pages swapped_pages"),
)  # fmt: skip

AUDIT_KEYS: Final = {
    "format": TEXT, "level": LEVEL_SCHEMA, "when": NUMBER | {"minimum": 0, "maximum": _LAST},
    "page_size": INT | {"minimum": 1}, "explained": BOOL,
    "processes": array(record(
        keys(COUNT, "pid parent started rss uss anonymous anonymous_shared zero huge swapped stack"),
        keys(TEXT, "name user command cgroup"),
        dict.fromkeys(("pss", "ksm", "memory_of", "arenas_free"), nullable(COUNT)),
    )),
    "libraries": array(_LIBRARY),
    "unreadable": array(record({"pid": COUNT, "gone": BOOL}, keys(TEXT, "reason needed"))),
    "mappings": array(MAPPING_SCHEMA), "erosion": nullable(array(EROSION_SCHEMA)),
}  # fmt: skip
"""The keys of what :meth:`Audit.to_json` gives, each with its schema."""
