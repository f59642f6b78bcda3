"""Names of C++ and Rust as people write them: LLVM's demanglers, by pycxxfilt, bounded.

What LLVM's demangler writes is made as binutils' ``c++filt`` writes it: clones, transaction clones, Rust's
older names (which are C++'s with escapes).  Closing brackets stay together, ``>>``, as in C++ since 2011.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from miniloader.forking import importing

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["base_name", "demangled", "demangled_all", "plain_name"]

_MANGLED: Final = ("_Z", "_R", "__Z", "___Z")
_LONGEST: Final = 1 << 14  # bytes of a mangled name
_ANONYMOUS: Final = "(anonymous namespace)"
_LARGEST: Final = 1 << 24  # characters that a name may become
_A_CHARACTER: Final = (
    16  # characters that one of a mangled name may stand for, such as Ss for std::string, half
)
#: What stands for an earlier part of the name: S_, S0_, T_, T0_ in C++, B0_ in Rust.
_REFERENCE: Final = re.compile(r"[ST]([0-9A-Z]*)_|B([0-9A-Za-z]*)_")
_CLONE: Final = re.compile(r" \((\.[^()]+)\)$")
_CLONES: Final = re.compile(r"\.[^.0-9][^.]*(?:\.[0-9]+)*")
_LEGACY: Final = re.compile(r"_ZN.*17h[0-9a-f]{16}E", re.DOTALL)
_OF_OPERATORS: Final = "<>-=()[] "
_ESCAPES: Final = {
    "SP": "@", "BP": "*", "RF": "&", "LT": "<", "GT": ">", "LP": "(", "RP": ")", "C": ",",
}  # fmt: skip
_LENGTH: Final = re.compile(r"[0-9]{1,7}")  # of an identifier
_ESCAPE: Final = re.compile(r"\$(?:(SP|BP|RF|LT|GT|LP|RP|C)|u([0-9a-f]{1,6}))\$|\.\.")


@lru_cache(maxsize=1)
def _engine() -> Any:
    """LLVM's demanglers; None in an installation without them, where names stay as they are."""
    try:
        with importing:
            import pycxxfilt
    except ImportError:
        return None
    return pycxxfilt


def demangled(name: str) -> str | None:
    """``name`` as people write it; ``None`` where it is not mangled, or is malformed or hostile.

    >>> demangled("_ZNSt6vectorIiSaIiEE9push_backEOi"), demangled("crc32")
    ('std::vector<int, std::allocator<int>>::push_back(int&&)', None)
    """
    engine = _engine() if name.startswith(_MANGLED) else None
    if engine is None or len(name) > _LONGEST or _may_become(name) > _LARGEST:
        return None
    if "17h" in name and _LEGACY.match(name):
        legacy = _legacy(name)
        if legacy is not None:
            return legacy
    if name.startswith("_ZGT") and name[4:5] in ("t", "n"):
        original = demangled("_Z" + name[5:])
        return original and f"transaction clone for {original}"
    try:
        text: str = (engine.rust_demangle if name.startswith("_R") else engine.itanium_demangle)(name)
    except ValueError:
        return None
    if " (." in text:
        clone = _CLONE.search(text)
        if clone is not None:
            clones = "".join(f" [clone {part}]" for part in _CLONES.findall(clone[1]))
            text = text[: clone.start()] + clones
    return text


def demangled_all(names: Iterable[str]) -> list[str | None]:
    """Each of ``names`` as :func:`demangled` gives it."""
    return [demangled(name) if name[:1] == "_" else None for name in names]


def _may_become(name: str) -> int:
    """At most how many characters the name stands for, about.

    Each part of a name may stand for all that is before it, so that a hundred bytes can stand for gigabytes.
    What a reference stands for was complete before any reference to it, or to what is numbered later, was
    made: it is no longer than all that was there then.
    """
    if len(name) * _A_CHARACTER << name.count("_") <= _LARGEST:
        return 0
    length, at = 0, 0
    complete: dict[str, list[tuple[int, int]]] = {"S": [], "T": [], "B": []}  # number, length: both ascending
    for match in _REFERENCE.finditer(name):
        length += (match.start() - at) * _A_CHARACTER
        at = match.start()
        kind = match[0][0]
        number = _number(match[1] or match[2] or "", 62 if kind == "B" else 36)
        earlier = complete[kind]
        if kind == "B":  # a place in the name, which numbers nothing
            size = next((size for place, size in earlier if place == number), None)
        else:
            size = next((size for highest, size in earlier if highest >= number), None)
        if size is None:
            size = length
            earlier.append((number, length))
        length += size
        if length > _LARGEST:
            break
    return length + (len(name) - at) * _A_CHARACTER


def _number(digits: str, base: int) -> int:
    """The number of a reference: none is 0, 0 is 1; Rust has small letters before capitals."""
    value = 0
    for digit in digits if len(digits) < 8 else "":
        order = (
            int(digit, 36) if base == 36 or digit.islower() or digit.isdigit() else ord(digit) - ord("A") + 36
        )
        value = value * base + order
    return value + 1 if digits else 0


def _legacy(name: str) -> str | None:
    """A name of Rust's older mangling without its hash: identifiers of C++ with escapes in them."""
    parts, at = [], 3
    while digits := _LENGTH.match(name, at):
        at = digits.end() + int(digits[0])
        parts.append(name[digits.end() : at])
    if len(parts) < 2 or name[at : at + 1] != "E" or not re.fullmatch("h[0-9a-f]{16}", parts[-1]):
        return None
    return "::".join(_ESCAPE.sub(_plain, part[1:] if part.startswith("_$") else part) for part in parts[:-1])


def _plain(escape: re.Match[str]) -> str:
    if escape[1]:
        return _ESCAPES[escape[1]]
    if escape[2]:
        code = int(escape[2], 16)
        return chr(code) if code < 0x110000 and chr(code).isprintable() else escape[0]
    return "::"


def plain_name(text: str) -> str:
    """A demangled name without parameters, clones and return type.

    >>> plain_name("void shop::Cart::add<int>(int) const"), plain_name("shop::operator<(int, long)")
    ('shop::Cart::add<int>', 'shop::operator<')
    """
    depth, start, operator = 0, 0, False
    for at, sign in enumerate(text):
        if not operator or text[at - 1] not in _OF_OPERATORS:  # it goes on through these
            operator = text.endswith("operator", 0, at)
        if operator and sign in "<>-=()[]":
            if sign == "(" and depth == 0 and not text.startswith("()", at):
                return text[start:at]
            continue
        if sign == "(" and depth == 0 and not text.startswith(_ANONYMOUS, at):
            return text[start:at]
        if sign in "<([{":
            depth += 1
        elif sign in ">)]}" and text[at - 1] != "-":
            depth = max(depth - 1, 0)
        elif sign == " " and depth == 0 and not operator:
            if text.startswith("[clone", at + 1):
                return text[start:at]
            start = at + 1
    return text[start:]


def base_name(text: str) -> str:
    """A demangled name as :func:`plain_name` gives it, also without the template arguments at its end.

    >>> base_name("void shop::Cart::add<int>(int) const"), base_name("<T as core::fmt::Debug>::fmt")
    ('shop::Cart::add', '<T as core::fmt::Debug>::fmt')
    """
    name = plain_name(text)
    if not name.endswith(">") or name.rstrip("<>-=").endswith("operator"):
        return name
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ">") - (name[at] == "<")
        if depth == 0:
            return name[:at].removesuffix("::") or name
    return name
