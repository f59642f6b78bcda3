"""How does a file become running code?  Mapping, symbol scope, relocation, constructors; nothing is ld.so's.

Its names are imported when first used: who only searches, or asks ld.so what it has, needs no loader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from miniloader.forking import importing

if TYPE_CHECKING:
    from miniloader.loader.events import Event as Event
    from miniloader.loader.library import Library as Library
    from miniloader.loader.loading import Loading as Loading
    from miniloader.loader.loading import load as load
    from miniloader.loader.surroundings import inspect as inspect

__all__ = ["Event", "Library", "Loading", "inspect", "load"]

_HOMES: Final = {
    "Event": "events",
    "Library": "library",
    "Loading": "loading",
    "inspect": "surroundings",
    "load": "loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing:
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
