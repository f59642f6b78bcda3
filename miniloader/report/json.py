"""``--json``: one object on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, Protocol, cast

__all__ = ["Rows", "dump"]

#: How many items of a list are printed as people would indent them; of a longer one each is a line.
_INDENTED: Final = 1000


class _Numpy(Protocol):
    """A number or an array of numpy's, which is not imported for this."""

    def tolist(self) -> object: ...


def dump(value: object, *, line: bool = False) -> None:
    """Print ``value`` as JSON: keys in the order given, numpy's integers as numbers, its arrays as lists.

    On one ``line`` where several objects follow one another.

    Everything that is not ASCII is escaped, so that a hostile name can neither act on a terminal nor fail to
    be encoded; file names that are not UTF-8 become surrogates (PEP 383), which Python reads back.
    """
    if line:
        json.dump(value, sys.stdout, allow_nan=False, default=_plain)
    else:
        sys.stdout.writelines(_pieces(value, "\n"))
    print()


class Rows:
    """Items of a list that are made while they are printed: by ``make``, anew each time."""

    def __init__(self, make: Callable[[], Iterable[object]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[object]:
        return iter(self._make())


_one_line: Final = json.JSONEncoder(allow_nan=False, default=lambda value: _plain(value)).encode


def _pieces(value: object, newline: str) -> Iterator[str]:
    """``value`` as JSON, indented by two spaces a level; ``newline`` is a line's end and the indent there."""
    inner = newline + "  "
    if isinstance(value, dict) and value:
        start = "{"
        for key, item in value.items():
            yield f"{start}{inner}{_one_line(key)}: "
            yield from _pieces(item, inner)
            start = ","
        yield newline + "}"
    elif isinstance(value, Rows) or (isinstance(value, (list, tuple)) and len(value) > _INDENTED):
        start, rows = "[", iter(value)
        while part := list(islice(rows, _INDENTED)):
            yield start + inner + f",{inner}".join(map(_one_line, part))
            start = ","
        yield "[]" if start == "[" else newline + "]"
    else:
        text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
        yield text.replace("\n", newline)


def _plain(value: Any) -> object:
    if isinstance(value, Rows):
        return list(value)
    if not hasattr(value, "tolist"):
        raise TypeError(f"no JSON for {type(value).__name__}")
    return cast(_Numpy, value).tolist()
