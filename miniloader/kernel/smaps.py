"""``/proc/PID/smaps``: how much of each mapping is in memory, in sums.

What they suggest and what they do not prove: ``Private_Clean`` follows the map count, so a lone
process's clean text is private; ``Private_Dirty`` is not copy-on-write; ``Anonymous`` of a private file
mapping is: it counts the present pages whose ``pagemap`` bit 61 is clear.  Source: proc_pid_smaps(5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from miniloader.errors import EvidenceError
from miniloader.kernel.maps import Vma, parse_vma
from miniloader.kernel.procfs import read_process_file
from miniloader.values import dataclass

__all__ = ["VmaTotals", "read_rollup", "read_smaps", "sum_sizes"]


@dataclass(frozen=True)
class VmaTotals:
    """The sums of one mapping.

    ``sizes`` are in bytes, by the kernel's name (``Rss``, ``Pss``, ``Anonymous``, …);
    ``flags`` the two-letter ``VmFlags``.
    """

    vma: Vma
    sizes: Mapping[str, int]
    flags: frozenset[str]


def _size(text: bytes) -> int:
    """``  12 kB`` in bytes; a number without unit as it is."""
    number, *unit = text.split()
    return int(number) * (1024 if unit else 1)


def _totals(header: bytes, lines: list[bytes]) -> VmaTotals:
    sizes: dict[str, int] = {}
    flags: frozenset[str] = frozenset()
    for line in lines:
        name, _, value = line.partition(b":")
        if name == b"VmFlags":
            flags = frozenset(value.decode("ascii").split())
        else:
            sizes[name.decode("ascii")] = _size(value)
    return VmaTotals(parse_vma(header), MappingProxyType(sizes), flags)


def _blocks(text: bytes) -> Iterable[tuple[bytes, list[bytes]]]:
    """Each header line with the ``Name: value`` lines below it; field names begin with a capital."""
    header, lines = b"", list[bytes]()
    for line in text.split(b"\n"):
        if line[:1].isupper():
            lines.append(line)
        elif line:
            if header:
                yield header, lines
            header, lines = line, []
    if header:
        yield header, lines


def _parsed(pid: int | None, name: str) -> tuple[VmaTotals, ...]:
    text = read_process_file(pid, name)
    try:
        return tuple(_totals(header, lines) for header, lines in _blocks(text))
    except ValueError as error:
        raise EvidenceError(f"/proc/{'self' if pid is None else pid}/{name}: {error}") from error


def read_smaps(pid: int | None = None) -> tuple[VmaTotals, ...]:
    """The sums of every mapping of process ``pid`` (None: this one), by address.

    Raises ProcessGone, or EvidenceError where it may not be read.
    """
    return _parsed(pid, "smaps")


def read_rollup(pid: int | None = None) -> Mapping[str, int]:
    """The sums over all mappings in bytes, added up by the kernel (``smaps_rollup``, 4.14).

    Raises ProcessGone, or EvidenceError where it may not be read.
    """
    return _parsed(pid, "smaps_rollup")[0].sizes


def sum_sizes(totals: Iterable[VmaTotals]) -> dict[str, int]:
    """The sizes of several mappings added up, by name, in bytes.

    >>> from miniloader.kernel.maps import parse_vma
    >>> vma = parse_vma(b"00400000-00402000 r-xp 00000000 08:02 173521 /usr/bin/dbus-daemon")
    >>> sum_sizes([VmaTotals(vma, {"Rss": 4096}, frozenset()), VmaTotals(vma, {"Rss": 8192}, frozenset())])
    {'Rss': 12288}
    """
    added: dict[str, int] = {}
    for mapping in totals:
        for name, size in mapping.sizes.items():
            added[name] = added.get(name, 0) + size
    return added
