"""``--json``: one object on standard output."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol, cast

__all__ = ["dump"]


class _Numpy(Protocol):
    """A number or an array of numpy's, which is not imported for this."""

    def tolist(self) -> object: ...


def dump(value: object, *, line: bool = False) -> None:
    """Print ``value`` as JSON: keys in the order given, numpy's integers as numbers, its arrays as lists.

    On one ``line`` where several objects follow one another.

    Everything that is not ASCII is escaped, so that a hostile name can neither act on a terminal nor fail to
    be encoded; file names that are not UTF-8 become surrogates (PEP 383), which Python reads back.
    """
    json.dump(value, sys.stdout, indent=None if line else 2, allow_nan=False, default=_plain)
    print()


def _plain(value: Any) -> object:
    if not hasattr(value, "tolist"):
        raise TypeError(f"no JSON for {type(value).__name__}")
    return cast(_Numpy, value).tolist()
