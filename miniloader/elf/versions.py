"""Symbol versions: ``DT_VERNEED`` and ``DT_VERDEF``.  Source: the LSB, "Symbol Versioning"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from miniloader.elf.dynamic import (
    DT_VERDEF,
    DT_VERDEFNUM,
    DT_VERNEED,
    DT_VERNEEDNUM,
    Reader,
    string_at,
)
from miniloader.errors import ElfError

__all__ = ["VERSION_HIDDEN", "VER_NDX_GLOBAL", "VER_NDX_LOCAL", "Version", "read_versions"]

VERSION_HIDDEN: Final = 0x8000
VER_NDX_LOCAL: Final = 0
VER_NDX_GLOBAL: Final = 1
_VER_FLG_BASE: Final = 1
_VER_FLG_WEAK: Final = 2
_MOST: Final = 0x8000  # a version index has 15 bits


@dataclass(frozen=True, slots=True)
class Version:
    """A symbol version; ``file`` is the library it is needed from, ``None`` when defined here."""

    name: str
    file: str | None
    base: bool = False
    weak: bool = False


def read_versions(
    read: Reader, tags: Mapping[int, int], strings: bytes, *, order: str, name: str | None
) -> dict[int, Version]:
    """Every version the image needs or defines, by the index ``DT_VERSYM`` uses (without its hidden bit)."""
    needed = dict(_needed(read, tags, strings, order, name)) if DT_VERNEED in tags else {}
    defined = dict(_defined(read, tags, strings, order, name)) if DT_VERDEF in tags else {}
    return needed | defined


def _records(
    read: Reader, vaddr: int, count: int, dtype: np.dtype[Any], what: str, name: str | None
) -> Iterator[tuple[int, Any]]:
    """The ``count`` records linked by their field ``next`` from ``vaddr`` on; each step goes forward."""
    if count > _MOST:
        raise ElfError(name, what, f"{count} records", f"at most {_MOST}")
    for _ in range(count):
        record = np.frombuffer(read(vaddr, dtype.itemsize, what), dtype)[0]
        yield vaddr, record
        step = int(record["next"])
        if step == 0:
            return
        if step < dtype.itemsize:
            raise ElfError(name, what, f"a step of {step} bytes", f"0 or at least {dtype.itemsize}")
        vaddr += step


def _text(strings: bytes, offset: int) -> str:
    return string_at(strings, offset).decode("utf-8", "backslashreplace")


def _needed(
    read: Reader, tags: Mapping[int, int], strings: bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    u2, u4 = f"{order}u2", f"{order}u4"
    need = np.dtype([("version", u2), ("count", u2), ("file", u4), ("aux", u4), ("next", u4)])
    aux = np.dtype([("hash", u4), ("flags", u2), ("other", u2), ("name", u4), ("next", u4)])
    total = 0
    for at, row in _records(read, tags[DT_VERNEED], tags.get(DT_VERNEEDNUM, 0), need, "DT_VERNEED", name):
        file = _text(strings, int(row["file"]))
        total += int(row["count"])
        if total > _MOST:
            raise ElfError(name, "DT_VERNEED", f"{total} versions", f"at most {_MOST}")
        for _, entry in _records(read, at + int(row["aux"]), int(row["count"]), aux, "DT_VERNEED", name):
            version = Version(
                _text(strings, int(entry["name"])), file, weak=bool(entry["flags"] & _VER_FLG_WEAK)
            )
            yield int(entry["other"]) & ~VERSION_HIDDEN, version


def _defined(
    read: Reader, tags: Mapping[int, int], strings: bytes, order: str, name: str | None
) -> Iterator[tuple[int, Version]]:
    u2, u4 = f"{order}u2", f"{order}u4"
    fields = [
        ("version", u2),
        ("flags", u2),
        ("index", u2),
        ("count", u2),
        ("hash", u4),
        ("aux", u4),
        ("next", u4),
    ]
    aux = np.dtype([("name", u4), ("next", u4)])
    for at, row in _records(
        read, tags[DT_VERDEF], tags.get(DT_VERDEFNUM, 0), np.dtype(fields), "DT_VERDEF", name
    ):
        entry = np.frombuffer(read(at + int(row["aux"]), aux.itemsize, "DT_VERDEF"), aux)[0]
        version = Version(_text(strings, int(entry["name"])), None, base=bool(row["flags"] & _VER_FLG_BASE))
        yield int(row["index"]) & ~VERSION_HIDDEN, version
