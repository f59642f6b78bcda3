"""Make one thing of many, without those of them that keep it from being made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["sparing"]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def sparing(
    items: Sequence[_Item], make: Callable[[Sequence[_Item]], _Made]
) -> tuple[_Made, list[tuple[_Item, Exception]]]:
    """What ``make`` makes of ``items``, and those that were left out, as it raises with them: with what.

    It is called once where nothing is wrong, else for halves of the items, and halves of these.  Raises what
    it raises for nothing at all.

    >>> sparing(["a", "b", "c"], lambda names: [{"a": 1, "c": 3}[name] for name in names])
    ([1, 3], [('b', KeyError('b'))])
    """
    try:
        return make(items), []
    except Exception:  # what it is, the halves tell, with the item that it comes of
        if not items:
            raise
    kept, left_out = list[_Item](), list[tuple[_Item, Exception]]()
    made = make(kept)
    waiting = [items[len(items) // 2 :], items[: len(items) // 2]]
    while waiting:
        part = waiting.pop()
        try:
            made = make([*kept, *part])
            kept += part
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told with the item that it comes of
            if len(part) == 1:
                left_out.append((part[0], error))
            else:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
    return made, left_out
