"""What miniloader would like the kernel to tell it, and the levels of evidence that gives: two tables.

Light on purpose (no numpy), so that the command line can print them in its help;
:mod:`miniloader.kernel.probe` finds out which of them work.
"""

from __future__ import annotations

from typing import Final, Literal

from miniloader.json_schema import words
from miniloader.values import NamedTuple

__all__ = ["FEATURES", "LEVELS", "LEVEL_SCHEMA", "EvidenceLevel", "Feature", "LevelName"]

LevelName = Literal["frames", "flags", "totals", "none"]
"""How much the kernel tells here; see :data:`LEVELS`."""

LEVEL_SCHEMA: Final = words("frames flags totals none")
"""What a level may be in ``--json``."""


class Feature(NamedTuple):
    """One thing to ask of the kernel: its name, what it tells, and how to get it where it is missing."""

    name: str
    what: str
    get: str


_ROOT: Final = "run as root, or with CAP_SYS_ADMIN of the initial user namespace"

_UNFILTERED: Final = "no seccomp filter that refuses it, as containers have"

_PERF: Final = f"CONFIG_PERF_EVENTS; kernel.perf_event_paranoid at most 2, or CAP_PERFMON; {_UNFILTERED}"

_WRITES: Final = f"Linux 6.7 with CONFIG_USERFAULTFD; {_UNFILTERED}"

FEATURES: Final = (
    Feature("smaps", "sums for each mapping: Rss, Pss, Anonymous", "mount /proc; CONFIG_PROC_PAGE_MONITOR"),
    Feature("pagemap", "each page: present, file or copied, exclusive", "mount /proc, do not mask its files"),
    Feature("frames", "each page's frame number: equal means the same memory", _ROOT),
    Feature("kpagecount", "how often a frame is mapped, over all processes", "run as root"),
    Feature("kpageflags", "what a frame is: anonymous, merged, part of a large folio", "run as root"),
    Feature("pagemap-scan", "runs of pages of one kind; the page of zeros", "Linux 6.7"),
    Feature("procmap-query", "the mapping at an address, with its file's build-id", "Linux 6.11"),
    Feature("page-faults", "who touches a page first, where userfaultfd cannot tell", _PERF),
    Feature("userfaultfd", "which pages were written since we looked", _WRITES),
)  # fmt: skip
"""Every feature, the ones that decide the level of evidence first."""


class EvidenceLevel(NamedTuple):
    """A level of evidence: the feature it rests on, what it shows, and how to reach it."""

    name: LevelName
    feature: str | None
    shows: str
    get: str


LEVELS: Final = (
    EvidenceLevel(
        "frames",
        "frames",
        "proves which pages are one frame",
        f"{_ROOT} (sudo; docker run --cap-add SYS_ADMIN)",
    ),
    EvidenceLevel(
        "flags",
        "pagemap",
        "proves which pages were copied, and which are the page cache's own",
        "let /proc/PID/pagemap be read: mount /proc, do not mask it; be the process's owner",
    ),
    EvidenceLevel("totals", "smaps", "sums that suggest, and prove nothing", "mount /proc"),
    EvidenceLevel("none", None, "nothing", ""),
)  # fmt: skip
"""Best first; each stands on one feature."""
