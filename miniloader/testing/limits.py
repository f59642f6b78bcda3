"""``@pytest.mark.limit_private("2 MiB")``: how much private memory a test may leave in its own process.

What the process alone has mapped, its USS, is summed from ``/proc/self/smaps`` before the test's fixtures are
set up, and when it has run, before they are torn down.  Summing leaves next to nothing behind: the text is
read line by line, and what its names mean is asked only for a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import UsageError
from miniloader.forking import importing
from miniloader.values import NamedTuple

if TYPE_CHECKING:
    import pytest

    from miniloader.report.text import Part

__all__ = ["OwnByPath", "excess", "limit_of", "number_of_bytes", "own_by_path"]

_UNITS: Final = {"": 0, "B": 0, "BYTES": 0, "K": 10, "M": 20, "G": 30}
_MOST_ROWS: Final = 12
_WIDTH: Final = 100  # columns of a message


class _OfPath(NamedTuple):
    """What mappings of one path have of their own, in bytes, and how maps shows one of them."""

    own: int
    shown: bytes


OwnByPath = Mapping[bytes, _OfPath]
"""The private memory of this process, by what its mappings are called; no name for most of it."""


def number_of_bytes(given: int | str) -> int:
    """The number of bytes in a text like ``2 MiB``; UsageError for anything else.

    ``MB`` counts as MiB does, as it does for pytest-memray and for the kernel.

    >>> number_of_bytes("1.5 KiB"), number_of_bytes("24 MB"), number_of_bytes(7)
    (1536, 25165824, 7)
    """
    if isinstance(given, int):
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(bytes|B|([KMG])i?B|)\s*", given, re.IGNORECASE)
    if found is None:
        raise UsageError(f"{given!r}: no number of bytes, such as 4096 or '2 MiB'")
    return int(float(found[1]) * (1 << _UNITS[(found[3] or "").upper()]))


def limit_of(item: pytest.Item) -> int:
    """The bytes that the closest marker ``limit_private`` of a test allows.

    Raises UsageError for a marker without a limit, or one that is no number of bytes.
    """
    marker = item.get_closest_marker("limit_private")
    assert marker is not None
    values = [*marker.args, *marker.kwargs.values()]
    if len(values) != 1 or not isinstance(values[0], (int, str)) or marker.kwargs.keys() - {"limit"}:
        raise UsageError("limit_private: expected one limit, such as @pytest.mark.limit_private('2 MiB')")
    return number_of_bytes(values[0])


def own_by_path() -> OwnByPath:
    """What this process alone has mapped now: Private_Clean and Private_Dirty of smaps.

    Raises EvidenceError where that may not be read.
    """
    with importing:
        from miniloader.kernel.procfs import open_process_file

    memory: dict[bytes, _OfPath] = {}
    shown, own = b"", 0
    with open(open_process_file(None, "smaps"), "rb") as lines:
        for line in lines:
            if line.startswith((b"Private_Clean:", b"Private_Dirty:")):
                own += int(line.split()[1]) * 1024
            elif not line[:1].isupper():
                _add(memory, shown, own)
                shown, own = line, 0
        _add(memory, shown, own)
    return memory


def _add(memory: dict[bytes, _OfPath], shown: bytes, own: int) -> None:
    path = shown.rstrip(b"\n").split(None, 5)[5:]
    if own:
        key = path[0] if path else b""
        memory[key] = _OfPath(own + (memory[key].own if key in memory else 0), shown)


def excess(before: OwnByPath, after: OwnByPath, limit: int) -> str:
    """What to say when there is more than ``limit`` bytes more private memory; "" when there is not.

    >>> excess({}, {b"": _OfPath(8192, b"0-2000 rw-p 0 00:00 0")}, 8192)
    ''
    """
    with importing:
        from miniloader.report.numbers import size

    first, last = (sum(row.own for row in memory.values()) for memory in (before, after))
    if last - first <= limit:
        return ""
    with importing:
        from miniloader.report.text import laid_out, plain

    said = f"private memory (USS) grew by {size(last - first)}, from {size(first)} to {size(last)}"
    table = map(plain, laid_out([*_grown(before, after)], _WIDTH))
    return "\n".join((f"{said}; at most {size(limit)} allowed", "", *table))


def _grown(before: OwnByPath, after: OwnByPath) -> Iterator[Part]:
    """A table of what is more or less, by kind and name of mapping, what grew most first."""
    with importing:
        from miniloader.errors import printable
        from miniloader.kernel.maps import parse_vma
        from miniloader.lab.audit.mappings import MappingName, name_of
        from miniloader.report.numbers import size
        from miniloader.report.text import Table, more

    sums: dict[MappingName, list[int]] = {}
    for number, memory in enumerate((before, after)):
        for row in memory.values():
            sums.setdefault(name_of(parse_vma(row.shown.rstrip(b"\n"))), [0, 0])[number] += row.own
    changed = [(name, first, last) for name, (first, last) in sums.items() if first != last]
    changed.sort(key=lambda row: row[1] - row[2])
    cells: list[Any] = [
        (name.kind, printable(name.name), size(first), size(last), _signed(last - first))
        for name, first, last in changed[:_MOST_ROWS]
    ]
    if len(changed) > _MOST_ROWS:
        cells.append((f"… {more(len(changed) - _MOST_ROWS)}",))
    yield Table(("kind", "name", ">before", ">after", ">more"), cells)


def _signed(number: int) -> str:
    with importing:
        from miniloader.report.numbers import size

    return f"{'+' if number >= 0 else '-'}{size(abs(number))}"
