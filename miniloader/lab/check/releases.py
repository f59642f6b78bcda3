"""Which release brought a symbol version, and which versions a release or a manylinux policy has.

Sources: glibc's version names are its releases; GCC's manual of libstdc++, "ABI Policy and Guidelines"; the
policies of PyPA's auditwheel (PEP 600).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from miniloader.errors import UsageError
from miniloader.values import dataclass

__all__ = ["LIMITS", "Limit", "limit_of", "number_of", "release_of"]

_GCC_OF_GLIBCXX: Final = (
    "3.4.0 3.4.1 3.4.2 3.4.3 4.0.0 4.0.1 4.0.2 4.0.3 4.1.1 4.2.0 4.3.0 4.4.0 4.4.1 4.4.2 4.5.0 4.6.0 4.6.1"
    " 4.7.0 4.8.0 4.8.3 4.9.0 5.1 6.1 7.1 7.2 8.1 9.1 9.2 9.3 11.1 12.1 13.1 13.2 14.1 15.1"
).split()
"""The GCC release that brought GLIBCXX_3.4.N."""
_GCC_OF_CXXABI: Final = (
    "3.4.0 4.0.0 4.3.0 4.4.0 4.5.0 4.6.0 4.7.0 4.8.0 4.9.0 5.1 6.1 7.1 10.1 11.1 13.1 14.1 15.1"
).split()
"""The GCC release that brought CXXABI_1.3.N."""

#: Versions that are called otherwise than by a release: the first glibc that has them.
_MARKERS: Final = {
    "GLIBC_ABI_DT_RELR": (2, 36),
    "GLIBC_ABI_GNU_TLS": (2, 42),
    "GLIBC_ABI_GNU2_TLS": (2, 42),
    "GLIBC_ABI_DT_X86_64_PLT": (2, 42),
}
_NUMBERED: Final = re.compile(r"([A-Z]+)_(\d+(?:\.\d+)*)$")

Number = tuple[int, ...]


def number_of(version: str) -> tuple[str, Number | None]:
    """The family of a version, and its number; None where it has none.

    >>> number_of("GLIBC_2.34"), number_of("GLIBC_ABI_DT_RELR"), number_of("GLIBC_PRIVATE")
    (('GLIBC', (2, 34)), ('GLIBC', (2, 36)), ('GLIBC', None))
    """
    if version in _MARKERS:
        return "GLIBC", _MARKERS[version]
    match = _NUMBERED.match(version)
    if match is None:
        return version.partition("_")[0], None
    return match[1], tuple(int(part) for part in match[2].split("."))


def release_of(version: str) -> str | None:
    """What brought a version: a release of glibc or GCC; None where that is not known.

    >>> release_of("GLIBC_2.38"), release_of("GLIBCXX_3.4.32"), release_of("CXXABI_1.3.15")
    ('glibc 2.38', 'GCC 13.2', 'GCC 14.1')
    """
    family, number = number_of(version)
    if number is None:
        return None
    if family in ("GLIBC", "GCC"):
        return f"{'glibc' if family == 'GLIBC' else 'GCC'} {'.'.join(map(str, number))}"
    releases, start = (_GCC_OF_GLIBCXX, (3, 4)) if family == "GLIBCXX" else (_GCC_OF_CXXABI, (1, 3))
    last = number[2] if len(number) > 2 else 0
    known = (
        family in ("GLIBCXX", "CXXABI") and number[:2] == start and len(number) <= 3 and last < len(releases)
    )
    return f"GCC {releases[last]}" if known else None


@dataclass(frozen=True)
class Limit:
    """The newest version of each family that there is on the oldest system aimed at.

    Where a ``policy`` is meant, versions without a number (``GLIBC_PRIVATE``) are not allowed but for those
    ``named``; a family that is not in ``newest`` has no limit, one with None has no version.
    """

    name: str
    newest: Mapping[str, Number | None]
    policy: bool = False
    named: frozenset[str] = frozenset()

    def allows(self, version: str) -> bool:
        """Whether it has this version."""
        family, number = number_of(version)
        if family not in self.newest or version in self.named:
            return True
        newest = self.newest[family]
        if number is None:
            return not self.policy
        return newest is not None and number <= newest


def _parse(text: str) -> Number | None:
    return None if text == "-" else tuple(int(part) for part in text.split("."))


# auditwheel's policies for x86-64: glibc, and the newest GLIBCXX_, CXXABI_, GCC_, ZLIB_, LIBATOMIC_.
_POLICIES: Final = """
2.5   3.4.8  1.3.1  4.2.0  -        -
2.12  3.4.13 1.3.3  4.3.0  1.2.2.4  -
2.17  3.4.19 1.3.7  4.8.0  1.2.5.2  -
2.24  3.4.22 1.3.10 4.8.0  1.2.5.2  1.2
2.26  3.4.22 1.3.10 4.8.0  1.2.5.2  1.2
2.27  3.4.24 1.3.11 7.0.0  1.2.9    1.2
2.28  3.4.24 1.3.11 7.0.0  1.2.9    1.2
2.31  3.4.28 1.3.12 7.0.0  1.2.9    1.2
2.34  3.4.29 1.3.13 7.0.0  1.2.9    1.2
2.35  3.4.30 1.3.13 12.0.0 1.2.9    1.2
2.36  3.4.30 1.3.13 12.0.0 1.2.9    1.2
2.37  3.4.30 1.3.13 12.0.0 1.2.12   1.2
2.38  3.4.30 1.3.13 12.0.0 1.2.12   1.2
2.39  3.4.33 1.3.15 14.0.0 1.2.12   1.2
2.40  3.4.33 1.3.15 14.0.0 1.2.12   1.2
2.41  3.4.33 1.3.15 14.0.0 1.2.12   1.2
"""
_ALIASES: Final = {
    "manylinux1": "manylinux_2_5",
    "manylinux2010": "manylinux_2_12",
    "manylinux2014": "manylinux_2_17",
}
_FAMILIES: Final = ("GLIBC", "GLIBCXX", "CXXABI", "GCC", "ZLIB", "LIBATOMIC")


def _policy(row: str) -> Limit:
    numbers = dict(zip(_FAMILIES, map(_parse, row.split()), strict=True))
    glibc = numbers["GLIBC"] or ()
    named = {"CXXABI_TM_1"} if glibc >= (2, 17) else set()
    named |= {"CXXABI_FLOAT128"} if glibc >= (2, 24) else set()
    return Limit("manylinux_" + "_".join(map(str, glibc)), numbers, True, frozenset(named))


LIMITS: Final = {limit.name: limit for limit in map(_policy, _POLICIES.split("\n")[1:-1])}
"""The policies by name."""


def limit_of(*, libc: str | None = None, policy: str | None = None) -> Limit | None:
    """The limit that ``--libc 2.28`` or ``--policy manylinux_2_28`` means.

    :class:`UsageError` where there is no such release or policy.  A platform tag such as
    ``manylinux_2_28_x86_64`` means its policy.

    >>> limit_of(libc="2.28").allows("GLIBC_2.34"), limit_of(policy="manylinux2014").allows("GLIBC_2.17")
    (False, True)
    """
    if policy is not None:
        name = re.sub(r"^(manylinux\d*(?:_\d+_\d+)?)_[a-z]\w*$", r"\1", policy)
        limit = LIMITS.get(_ALIASES.get(name, name))
        if limit is None:
            hint = f"one of {', '.join([*_ALIASES, *LIMITS])}"
            raise UsageError(f"{policy!r}: no policy of that name", hint=hint)
        if libc is None:
            return limit
    if libc is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", libc):
        raise UsageError(f"{libc!r} is no release of glibc, such as 2.28")
    number = tuple(int(part) for part in libc.split("."))
    newest = {**(limit.newest if policy is not None and limit else {}), "GLIBC": number}
    return Limit(f"glibc {libc}", newest)
