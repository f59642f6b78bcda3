"""What a person may have meant: names that look like one that is not there."""

from __future__ import annotations

from miniloader.forking import importing

TYPE_CHECKING = False  # typing is slow to import, and every error needs this module
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["did_you_mean", "in_versions", "near", "offered"]

_MOST = 3
_DIFFERENCE = 3  # characters
_LONGEST = 200  # characters: comparing takes time quadratic in them, and names come from files


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """A hint with up to three of ``names`` that look like ``name``, the nearest first; None for none.

    >>> did_you_mean("inspct", ["inspect", "load", "prove"])
    'did you mean inspect?'
    >>> did_you_mean("zzz", ["inspect"]) is None
    True
    """
    return offered(near(name, names))


def near(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of ``names`` that look like ``name``, the nearest first."""
    with importing:
        from difflib import get_close_matches

    if len(name) > _LONGEST:
        return []
    alike = sorted({candidate for candidate in names if abs(len(candidate) - len(name)) <= _DIFFERENCE})
    return get_close_matches(name, alike, _MOST)


def offered(names: list[str]) -> str | None:
    """The hint that offers ``names``; None for none.

    >>> offered(["libz.so.1"])
    'did you mean libz.so.1?'
    """
    *first, last = names[:_MOST] or [""]
    return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}?" if last else None


def in_versions(name: str, versions: list[str]) -> str | None:
    """The hint that tells in which ``versions`` there is a symbol ``name``; None for none.

    >>> in_versions("f", ["V1", "V2"])
    'it is f@V1 or f@V2'
    """
    return "it is " + " or ".join(f"{name}@{version}" for version in versions) if versions else None
