"""Why pages are two copies, as far as their bytes tell: what differs is a count, a collector's word, or data.

Pages that hold the same bytes do not say who wrote there, for a count that went up has come down again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from miniloader.lab.erosion.objects import Objects

__all__ = ["CAUSES", "ErosionCause", "causes_of"]

ErosionCause = Literal["reference-count", "collector", "other-write", "unknown"]
CAUSES: Final[tuple[ErosionCause, ...]] = ("reference-count", "collector", "other-write", "unknown")
_COLLECTOR: Final = 2  # words in front of an object


def causes_of(
    differs: NDArray[np.bool_], objects: Objects | None
) -> Mapping[ErosionCause, NDArray[np.bool_]]:
    """Which of these pages are of each cause.  ``differs``: which words do, a row a page.

    ``objects`` are those on the pages; without them any difference is a write.  A page with several causes
    is of the gravest: other writes, then the collector, then counts.
    """
    data, heads = differs, np.zeros(len(differs), np.bool_)
    changed = np.asarray(differs.any(axis=1))
    if objects is not None:
        data = differs.copy()
        data[objects.page, objects.word] = False
        with_head = objects.before >= _COLLECTOR
        for distance in (1, 2):
            chosen = with_head & (objects.word >= distance)
            place = objects.page[chosen], objects.word[chosen] - distance
            heads[place[0][data[place]]] = True
            data[place] = False
    written = np.asarray(data.any(axis=1))
    collected = changed & heads & ~written
    return {
        "reference-count": changed & ~written & ~collected,
        "collector": collected,
        "other-write": written,
        "unknown": ~changed,
    }
