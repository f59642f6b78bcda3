"""What eroded, as frozen values, to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.json_schema import COUNT, TEXT, array, keys, nullable, record
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["EROSION_SCHEMA", "ErodedObjects", "ErodedPages", "Erosion", "Spans", "pages_in", "spans_of"]

Spans = tuple[tuple[int, int], ...]
"""Addresses [start, end) of pages, ascending."""


@dataclass(frozen=True)
class ErodedObjects:
    """The objects of one type that begin on eroded pages: on how many of these pages, and how many."""

    type: str
    pages: int
    count: int


@dataclass(frozen=True)
class ErodedPages:
    """Where the pages are: one frame for both still (``together``), and two frames now.

    ``proven`` and ``possible`` are all that are two frames now; ``same`` are those of them that were read and
    hold the same bytes.
    """

    together: Spans = ()
    proven: Spans = ()
    possible: Spans = ()
    same: Spans = ()


@dataclass(frozen=True)
class Erosion:
    """What a process has no longer in common with its nearest living ``relative`` (a pid), in bytes.

    Both have a page at one address, in different frames now.  ``proven``: it was one frame; ``possible``:
    perhaps, for two that built the same thing after the fork look alike.  ``same``: of both, the pages whose
    bytes are all equal; None where nobody read them.  ``changed``: what changed while it was read, or could
    not be read; nothing is said of its bytes.  ``huge``: the part of ``same`` in huge pages of the process of
    which no page is one frame with the relative's, as a collapse leaves them; None where nobody knows.
    ``touched``: the part of ``same`` that counts or the collector may have touched: outside of such huge
    pages, where objects begin; None where no CPython is known.  ``spared``: what ``gc.freeze()`` may have
    spared, the part of ``same`` where objects begin and of the collector's cause, where a copy that several
    processes have apart from this relative counts in one of their rows only; None where nobody read the
    bytes.  ``causes`` sums up by cause, ``objects`` are the objects on
    these pages, where ``runtime`` (such as ``cpython-3.12``, None: none that is known) tells them.
    """

    pid: int
    relative: int
    proven: int
    possible: int
    same: int | None = None
    changed: int = 0
    huge: int | None = None
    spared: int | None = None
    touched: int | None = None
    causes: Mapping[str, int] = field(default_factory=dict)
    objects: tuple[ErodedObjects, ...] = ()
    runtime: str | None = None
    pages: ErodedPages = field(default_factory=ErodedPages)

    @property
    def apart(self) -> int:
        """All bytes that are two copies now, proven or not.

        >>> Erosion(4712, 4700, proven=8192, possible=4096).apart
        12288
        """
        return self.proven + self.possible

    @property
    def proven_same(self) -> int:
        """The part of ``same`` that is proven, in bytes.

        >>> pages = ErodedPages(proven=((0, 8192),), same=((4096, 16384),))
        >>> Erosion(4712, 4700, proven=8192, possible=8192, same=12288, pages=pages).proven_same
        4096
        """
        spans, total = iter(self.pages.same), 0
        start, end = next(spans, (0, 0))
        for first, last in self.pages.proven:
            while end and start < last:
                total += max(min(end, last) - max(start, first), 0)
                if end > last:
                    break
                start, end = next(spans, (0, 0))
        return total

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Erosion:
        """The row in such an object as :func:`dataclasses.asdict` makes; raises TypeError or KeyError."""
        fields = dict(value)
        fields["objects"] = tuple(ErodedObjects(**kind) for kind in value.get("objects", ()))
        fields["pages"] = ErodedPages(**{
            name: tuple((int(start), int(end)) for start, end in spans)
            for name, spans in value.get("pages", {}).items()
        })  # fmt: skip
        return cls(**fields)


def spans_of(addresses: NDArray[np.uint64]) -> Spans:
    """The pages at these ascending addresses.

    >>> spans_of(np.array([0, PAGE_SIZE, 5 * PAGE_SIZE], np.uint64)) == (
    ...     (0, 2 * PAGE_SIZE), (5 * PAGE_SIZE, 6 * PAGE_SIZE))
    True
    """
    if not len(addresses):
        return ()
    edges = np.flatnonzero(np.diff(addresses) != PAGE_SIZE)
    starts, ends = addresses[[0, *(edges + 1)]], addresses[[*edges, -1]] + np.uint64(PAGE_SIZE)
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


def pages_in(spans: Spans, page_size: int = PAGE_SIZE) -> NDArray[np.uint64]:
    """The address of each page of ``spans``, ascending.

    >>> pages_in(((0, 8192), (16384, 20480)), 4096).tolist()
    [0, 4096, 16384]
    """
    parts = [np.arange(start, end, page_size, dtype=np.uint64) for start, end in spans]
    return np.concatenate([np.empty(0, np.uint64), *parts])


_SPANS: Final = array(array(COUNT))
EROSION_SCHEMA: Final = record(
    keys(COUNT, "pid relative proven possible changed"),
    {
        "same": nullable(COUNT),
        "huge": nullable(COUNT),
        "spared": nullable(COUNT),
        "touched": nullable(COUNT),
        "causes": {"type": "object", "additionalProperties": COUNT},
        "objects": array(record({"type": TEXT}, keys(COUNT, "pages count"))),
        "runtime": nullable(TEXT),
        "pages": record(keys(_SPANS, "together proven possible same")),
    },
)
"""An :class:`Erosion` in ``--json``."""
