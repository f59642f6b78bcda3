"""Where a file uses a symbol that is not to be had, and who else has it: for a person who has to mend it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Final

import numpy as np

from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.dynamic import DT_STRSZ, DT_STRTAB
from miniloader.errors import ElfError
from miniloader.lab.check.names import is_defined
from miniloader.lab.check.shared_object import SharedObject, Shelf
from miniloader.loader.search import Surroundings
from miniloader.loader.spans import error_for
from miniloader.machine.names_at import Landmarks
from miniloader.native import Stopped
from miniloader.values import dataclass

__all__ = ["Use", "defined_on_machine", "definers", "files_like", "similar", "uses"]

_LARGEST_CODE: Final = 1 << 26  # bytes of a section that are looked through
_MOST: Final = 4  # providers that are named
_MOST_FILES: Final = 4096
_LARGEST_STRINGS: Final = 1 << 26  # bytes


@dataclass(frozen=True)
class Use:
    """Where a symbol is used: a section, and the function there, or the variable that holds its address."""

    section: str | None
    function: str | None


def uses(item: SharedObject, symbols: Sequence[int]) -> dict[int, Use]:
    """Where ``item`` uses each of ``symbols`` first; none where the file cannot be read any more."""
    try:
        image = item.reopened()
        landmarks = Landmarks(image)
        slots = _slots(image, symbols)
        stubs = {stub.slot.vaddr: stub.vaddr for stub in landmarks.stubs()} if slots else {}
        return {symbol: _use(landmarks, vaddr, stubs.get(vaddr)) for symbol, vaddr in slots.items()}
    except ElfError:
        return {}


def _slots(image: ElfImage, symbols: Sequence[int]) -> dict[int, int]:
    """The first word that is relocated by each of ``symbols``."""
    slots: dict[int, int] = {}
    for table in image.relocations.tables:
        rows = table.behind_head
        for row in rows[np.isin(rows["symbol"], symbols)]:
            slots.setdefault(int(row["symbol"]), int(row["offset"]))
    return slots


def _use(landmarks: Landmarks, slot: int, stub: int | None) -> Use:
    image = landmarks.image
    vaddr = _refers(image, [slot] if stub is None else [stub, slot], landmarks)
    if vaddr is None:
        vaddr = slot
    section, symbol = image.section_at(vaddr), landmarks.symbol_at(vaddr)
    return Use(section.name if section else None, symbol.name if symbol else None)


def _refers(image: ElfImage, targets: Sequence[int], landmarks: Landmarks) -> int | None:
    """The first instruction that leads to one of ``targets`` by a distance from its end (x86-64)."""
    if image.header.machine != "X86_64":
        return None
    for section in image.sections:
        code = section.allocated and section.type == "SHT_PROGBITS" and landmarks.is_code(section.vaddr)
        if not code or section.name.startswith(".plt") or section.size > _LARGEST_CODE:
            continue
        octets = np.frombuffer(image.read(section.vaddr, section.size, section.name), np.uint8)
        for start in range(4):
            words = octets[start : start + (len(octets) - start) // 4 * 4].view("<i4").astype(np.int64)
            ends = section.vaddr + start + 4 + 4 * np.arange(len(words))
            hits = np.flatnonzero(np.isin(words + ends, targets))
            if len(hits):
                return int(ends[hits[0]]) - 4
    return None


# ----------------------------------------------------------------------------------------- who has it
def definers(name: str, scope: Sequence[SharedObject]) -> list[str]:
    """The objects of ``scope`` that define ``name``, of whatever version."""
    text = name.encode("utf-8", "surrogateescape")
    return [item.path for item in scope if _defines(item, text)]


def _defines(item: SharedObject, name: bytes) -> bool:
    try:
        return is_defined(item.names, name)
    except Stopped as stopped:
        raise error_for(item.path, stopped) from None


def defined_on_machine(name: str, surroundings: Surroundings, shelf: Shelf) -> list[str]:
    """Some libraries of the default directories that define ``name``."""
    providers: list[str] = []
    text = b"\0" + name.encode("utf-8", "surrogateescape") + b"\0"
    for path in shelf.once(("libraries", surroundings.machine), lambda: list(_libraries(surroundings))):
        try:
            names = shelf.once(("strings", path), partial(_strings, shelf, path))
            if text in names and _may_define(shelf, path, text[1:-1]) and definers(name, [shelf.take(path)]):
                providers.append(path)
        except ElfError:
            continue
        if len(providers) == _MOST:
            break
    return providers


def _may_define(shelf: Shelf, path: str, name: bytes) -> bool:
    """Whether the library defines ``name`` in some version; the whole of it is taken only then.

    Every library that gcc has linked refers to ``_ITM_registerTMCloneTable``, and next to none defines it.
    """
    try:
        source = Source.open(shelf.root.outside(path))
    except (OSError, ValueError):
        return False
    try:
        return bool(read_image(source).symbols.definitions(name))
    finally:
        source.close()


def _strings(shelf: Shelf, path: str) -> bytes:
    """The string table of a library; empty where it cannot be read."""
    try:
        source = Source.open(shelf.root.outside(path))
    except (ElfError, OSError, ValueError):
        return b""
    try:
        image = read_image(source)
        tags = image.dynamic.tags
        return bytes(image.read(tags[DT_STRTAB], min(tags[DT_STRSZ], _LARGEST_STRINGS), "DT_STRTAB"))
    except (ElfError, KeyError):
        return b""
    finally:
        source.close()


def _libraries(surroundings: Surroundings) -> Iterator[str]:
    """The libraries in the default directories, each once."""
    met, root = set[str](), surroundings.root
    for directory in surroundings.directories:
        for name in _names(surroundings, directory):
            if ".so" not in name:
                continue
            try:
                real = root.real(directory + name)
            except (OSError, ValueError):
                continue
            if real not in met:
                met.add(real)
                yield directory + name


def _names(surroundings: Surroundings, directory: str) -> list[str]:
    try:
        return sorted(os.listdir(surroundings.root.outside(directory)))[:_MOST_FILES]
    except (OSError, ValueError):
        return []


def files_like(name: str, surroundings: Surroundings, directories: Sequence[str] = ()) -> list[str]:
    """Libraries called ``name`` but for the number at the end, in the default and other ``directories``."""
    stem = _stem(os.path.basename(name))
    providers = list[str]()
    for directory in dict.fromkeys((*surroundings.directories, *directories)):
        providers += [directory + file for file in _names(surroundings, directory) if _stem(file) == stem]
    return providers[:_MOST]


def _stem(name: str) -> str:
    return re.sub(r"(\.so)(\.[\d.]+)?$", r"\1", name)


def similar(name: str, scope: Sequence[SharedObject]) -> str | None:
    """A symbol that some object of ``scope`` defines and whose name is nearly ``name``."""
    text = name.encode("utf-8", "surrogateescape")
    if not 4 <= len(text) <= 256:
        return None
    pattern = re.compile(
        rb"(?<=\0)%s[^\0]{%d,%d}(?=\0)" % (re.escape(text[:3]), max(len(text) - 6, 0), len(text))
    )
    names = {match[0].decode("utf-8", "replace") for item in scope for match in pattern.finditer(item.tables)}
    close = get_close_matches(name, sorted(names - {name})[:2000], n=3, cutoff=0.8)
    return next((candidate for candidate in close if definers(candidate, scope)), None)
