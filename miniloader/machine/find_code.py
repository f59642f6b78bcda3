"""From what a user calls a piece of code (``name``, ``name@VERSION``, ``name@plt``, ``0xVADDR:LENGTH``) to
where it is."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from miniloader.elf.demangling import base_name, demangled_all, plain_name
from miniloader.elf.symbols import SHN_UNDEF, STT_FUNC, STT_GNU_IFUNC, STT_TLS
from miniloader.errors import SymbolError
from miniloader.machine.names_at import CodeSymbol, Landmarks
from miniloader.suggestions import did_you_mean, in_versions
from miniloader.values import dataclass

__all__ = ["CodeRange", "locate"]

_ADDRESS: Final = re.compile(r"0[xX]([0-9a-fA-F]+)(?::(?:0[xX]([0-9a-fA-F]+)|([0-9]{1,20})))?")
_MOST_UNSIZED: Final = 1 << 12
_MOST_LISTED: Final = 20  # functions of one name


@dataclass(frozen=True)
class CodeRange:
    """``size`` bytes of code at ``vaddr``.

    ``whole``: ``name`` begins at ``vaddr``, so places inside are ``name+…``.  ``ifunc``: it is an IFUNC's
    resolver, not the function itself.
    """

    name: str
    vaddr: int
    size: int
    thumb: bool = False
    whole: bool = True
    ifunc: bool = False

    @property
    def end(self) -> int:
        """The vaddr after its last byte."""
        return self.vaddr + self.size


def locate(landmarks: Landmarks, text: str) -> CodeRange:
    """The code that ``text`` names.

    Where the file does not say how long it is, it ends at the next symbol, with its section or its segment,
    or after 4 KiB.  Raises :class:`SymbolError` when there is no such code.
    """
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        start, hexadecimal, decimal = address.groups()
        length = int(hexadecimal, 16) if hexadecimal else int(decimal) if decimal else None
        return _at_address(landmarks, int(start, 16), length)
    return _stub(landmarks, text) if text.endswith("@plt") else _symbol(landmarks, text)


def _at_address(landmarks: Landmarks, vaddr: int, length: int | None) -> CodeRange:
    arm = landmarks.image.header.machine == "ARM"
    thumb, vaddr = (bool(vaddr & 1), vaddr & ~1) if arm else (False, vaddr)
    target = landmarks.at(vaddr)
    if target is None or not landmarks.is_code(vaddr):
        place = "outside the image" if target is None else f"{target.name}, which is not code"
        raise SymbolError(f"{landmarks.image.path}: {vaddr:#x} is {place}")
    symbol, stub = landmarks.symbol_at(vaddr), landmarks.stub_at(vaddr)
    if stub is not None:
        end, start = stub.end, stub.vaddr
    elif symbol is not None:
        end, start, thumb = symbol.vaddr + max(symbol.size, 1), symbol.vaddr, thumb or symbol.thumb
    else:
        end, start = vaddr, -1
    size = length if length is not None else end - vaddr if end - vaddr > 1 else _unsized(landmarks, vaddr)
    return CodeRange(
        target.name, vaddr, min(size, landmarks.end_of_code(vaddr) - vaddr), thumb, start == vaddr
    )


def _unsized(landmarks: Landmarks, vaddr: int) -> int:
    following = landmarks.next_symbol(vaddr)
    ends = [landmarks.end_of_code(vaddr), vaddr + _MOST_UNSIZED, *([following] if following else [])]
    return min(ends) - vaddr


def _stub(landmarks: Landmarks, text: str) -> CodeRange:
    names = []
    for stub in landmarks.stubs():
        name = f"{landmarks.meaning(stub.slot)}@plt"
        if name == text:
            return CodeRange(name, stub.vaddr, stub.end - stub.vaddr)
        names.append(name)
    raise SymbolError(f"{landmarks.image.path}: no PLT stub {text}", hint=did_you_mean(text, names))


def _symbol(landmarks: Landmarks, text: str) -> CodeRange:
    path = landmarks.image.path
    name, _, version = text.rpartition("@")  # a name may contain the sign itself
    symbol = landmarks.symbol(text)
    if symbol is None and name:
        symbol = landmarks.symbol(name.removesuffix("@"), version)
    if symbol is None:
        symbol = _demangled(landmarks, text)
    if symbol is None:
        plain = text.partition("@")[0] or text
        raise SymbolError(f"{path}: no symbol {text}", hint=_instead(landmarks, plain))
    if symbol.type == STT_TLS:
        raise SymbolError(f"{path}: {text} is thread-local data, not code")
    if not landmarks.is_code(symbol.vaddr):
        target = landmarks.at(symbol.vaddr)
        where = "outside the image" if target is None else f"data at vaddr {symbol.vaddr:#x}"
        raise SymbolError(f"{path}: {text} is {where}, not code")
    return _whole(landmarks, symbol)


def _demangled(landmarks: Landmarks, text: str) -> CodeSymbol | None:
    """The function of C++ or Rust that people call ``text``, with its parameters or without.

    Raises :class:`SymbolError` where that may be one of several, which it lists.
    """
    candidates: dict[int, tuple[str, str]] = {}  # by vaddr: as people write it, and as it is in the file
    for table in landmarks.tables:
        kinds = np.isin(table.type, (STT_FUNC, STT_GNU_IFUNC)) & (table.rows["shndx"] != SHN_UNDEF)
        indices = np.flatnonzero(kinds & (table.rows["name"] != 0))
        names = [name.decode("utf-8", "backslashreplace") for name in table.names(indices)]
        vaddrs = table.rows["value"][indices].tolist()
        for vaddr, name, plain in zip(vaddrs, names, demangled_all(names), strict=True):
            if plain is not None and text in plain and text in (plain, plain_name(plain), base_name(plain)):
                candidates.setdefault(vaddr, (plain, name))
    if not candidates:
        return None
    exact = [name for plain, name in candidates.values() if plain == text]
    if len(candidates) > 1 and len(exact) != 1:
        listed = [f"{plain} ({name})" for plain, name in sorted(candidates.values())]
        hint = "ask for one of: " + "; ".join(listed[:_MOST_LISTED])
        if len(listed) > _MOST_LISTED:
            hint += f"; and {len(listed) - _MOST_LISTED} more"
        path = landmarks.image.path
        raise SymbolError(f"{path}: {text} is the name of {len(listed)} functions", hint=hint)
    return landmarks.symbol(exact[0] if exact else next(iter(candidates.values()))[1])


def _whole(landmarks: Landmarks, symbol: CodeSymbol) -> CodeRange:
    size = symbol.size or _unsized(landmarks, symbol.vaddr)
    return CodeRange(symbol.name, symbol.vaddr, size, symbol.thumb, ifunc=symbol.type == STT_GNU_IFUNC)


def _instead(landmarks: Landmarks, name: str) -> str | None:
    """What to ask for instead of ``name``."""
    table = landmarks.image.symbols
    wanted = name.encode("utf-8", "surrogateescape")
    indices = np.flatnonzero(table.rows["name"] != 0).tolist()
    same = [index for index in indices if table.name_bytes(index) == wanted]
    if hint := in_versions(name, table.versions_of(wanted)):
        return hint
    if any(table.undefined[index] for index in same):
        return f"it is needed from another library; {name}@plt is the stub that leads there, if there is one"
    static = landmarks.tables[1]
    names = [table.name(index) for index in indices if table.defined[index]]
    names += [static.name(index) for index in np.flatnonzero(static.rows["size"]).tolist()]
    return did_you_mean(name, names)
