"""What the page about an audit shows: values for ``templates/audit.html``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from miniloader.lab.audit.library_pages import Sight
from miniloader.lab.audit.result import Audit, AuditedLibrary, PrivatePage
from miniloader.lab.audit.since_fork import parents_in
from miniloader.lab.audit.timeline import Moment
from miniloader.report.audit import sentence
from miniloader.report.audit_rows import mapping_rows
from miniloader.report.matrix_data import Film, Scene
from miniloader.report.memory_curve import curve_of
from miniloader.report.numbers import count
from miniloader.report.page_notes import bytes_of_pages, ranges
from miniloader.report.proof_page import groups_of
from miniloader.report.text import listed, plain
from miniloader.values import dataclass

__all__ = ["view_of"]

_MOST_LIBRARIES: Final = 60
_MOST_NAMES: Final = 6  # of the symbols on a page
_MOST_PIDS: Final = 8
_LOOKS: Final = ("the page tables as they were found", "what was written since has been copied since")

Range = tuple[int, int, str, str]


@dataclass(frozen=True)
class _Drawn:
    """A library that is drawn: what is said of it, and its pages."""

    library: AuditedLibrary
    said: str
    film: Film


def view_of(audit: Audit, sights: Sequence[Sight], moments: Iterable[Moment] = ()) -> dict[str, Any]:
    """Everything that the template asks for; ``moments`` are the looks of an audit over time."""
    drawn = tuple(_drawn(audit, sight) for sight in sights)
    first = sights[0] if sights else None
    pids = [process.pid for process in audit.processes[:_MOST_PIDS]]
    return {
        "audit": audit,
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(audit.when)),
        "present": sum(library.present for library in audit.libraries) * audit.page_size,
        "used": sum(library.frames for library in audit.libraries) * audit.page_size,
        "own": sum(library.private - library.common for library in audit.libraries) * audit.page_size,
        "memory": mapping_rows(audit.mappings, audit.libraries, where="above") if audit.mappings else None,
        "libraries": audit.libraries[:_MOST_LIBRARIES],
        "more": max(0, len(audit.libraries) - _MOST_LIBRARIES),
        "drawn": drawn,
        "curve": curve_of(moments),
        "jumps": first.study.jumps if first else (),
        "several": any(len(sight.snapshots) > 1 for sight in sights),
        "command": " ".join(["miniloader audit", *map(str, pids)]),
        "pids": pids,
    }


def _drawn(audit: Audit, sight: Sight) -> _Drawn:
    library, study = sight.library, sight.study
    names = {process.pid: process.name for process in audit.processes}
    rows = tuple(f"{names.get(process.pid, 'process')} {process.pid}" for process in sight.processes)
    several = len(sight.processes) < len(library.processes)
    all_of_them = count(len(library.processes), "process", "processes")
    those = f"{len(sight.processes):,} of {all_of_them}" if several else all_of_them
    film = Film(
        title=f"The pages of {library.name} in {those}",
        rows=rows,
        groups=groups_of(sight.plan),
        scenes=tuple(
            Scene(snapshot.step, _LOOKS[min(number, 1)], snapshot)
            for number, snapshot in enumerate(sight.snapshots)
        ),
        start=len(sight.snapshots) - 1,
        ranges=(*_causes(audit, sight), *_named(audit, sight)),
        pages=bytes_of_pages(study.landmarks, sight.plan, study.pages, None),
    )
    return _Drawn(library, plain(sentence(library, parents_in(audit.processes))), film)


def _named(audit: Audit, sight: Sight) -> Iterator[Range]:
    """Sections and symbols; what the file says of causes only where nobody asked the processes."""
    for marked in ranges(sight.image, sight.plan, None):
        if marked[2] != "cause" or not audit.explained:
            yield marked


def _causes(audit: Audit, sight: Sight) -> Iterator[Range]:
    """Why each copied page is no longer the file's, as far as the audit says."""
    library = sight.library
    several = len({process.pid for process in library.processes}) > 1
    for page in (*library.private_pages, *library.bss_pages, *library.swapped_pages):
        index = (page.vaddr - sight.plan.start) // audit.page_size
        where = f"in {count(len(page.pids), 'process', 'processes')}: " if several else ""
        yield index, index + 1, "cause", where + _cause(page)
        if page.written:
            yield index, index + 1, "written", listed(page.written, _MOST_NAMES)


def _cause(page: PrivatePage) -> str:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in page.kinds.items())
    told = ", ".join(page.causes) + (f" ({page.reason})" if page.reason else "")
    return f"{told} ({kinds})" if kinds else told
