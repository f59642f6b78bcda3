"""What became of a family's memory over many looks: sums of each, for a curve; its length is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from miniloader.lab.audit.growth import Family, family_of
from miniloader.lab.audit.result import Audit
from miniloader.values import dataclass

__all__ = ["Moment", "Timeline"]


@dataclass(frozen=True)
class Moment:
    """One look: seconds since the epoch, bytes over all processes, who came and went since the last one.

    ``eroded`` is proven to have been in common with a relative, and is two copies now; None without frames.
    """

    when: float
    processes: int
    rss: int
    pss: int | None
    uss: int
    eroded: int | None
    family: Family

    @property
    def eventful(self) -> bool:
        """Whether somebody came, went, or executed another program."""
        return any(self.family)


class Timeline:
    """The moments of many looks, at most about ``most``: of more, every second one that nothing happened at
    is forgotten, but not the first nor the last.
    """

    def __init__(self, first: Audit, most: int = 1000) -> None:
        self._most = most
        self._moments = [_moment(first, first)]

    def __iter__(self) -> Iterator[Moment]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def add(self, audit: Audit, previous: Audit) -> None:
        """One more look."""
        self._moments.append(_moment(audit, previous))
        if len(self._moments) > self._most:
            last = len(self._moments) - 1
            self._moments = [
                moment
                for index, moment in enumerate(self._moments)
                if index % 2 == 0 or index == last or moment.eventful
            ]


def _moment(audit: Audit, previous: Audit) -> Moment:
    return Moment(
        when=audit.when,
        processes=len(audit.processes),
        rss=audit.rss,
        pss=audit.pss,
        uss=audit.uss,
        eroded=None if audit.erosion is None else sum(row.proven for row in audit.erosion),
        family=family_of(previous, audit),
    )
