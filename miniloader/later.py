"""Modules that are imported when something of them is first used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from miniloader.forking import importing

__all__ = ["Later", "leaving_out"]


class Later:
    """Stands for the module ``name``; what is asked of it is asked of the module, and kept."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.__spec__ = None  # "import name" asks for it, to see whether the module is still being imported

    def __getattr__(self, name: str) -> object:
        with importing:  # the import system's lock would stay locked in a child that is forked meanwhile
            if vars(sys)["modules"].get(self.__name__) is self:  # what is left out is needed now
                del sys.modules[self.__name__]
            value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


@contextmanager
def leaving_out(*names: str) -> Iterator[None]:
    """What is imported in this context has a stand-in for each of ``names``, if that is not imported yet.

    For modules that import what they use in an emergency: :mod:`pdb` and :mod:`inspect` take as long as
    Python's start.

    >>> with leaving_out("antigravity"):
    ...     import antigravity
    >>> type(antigravity).__name__, "antigravity" in sys.modules
    ('Later', False)
    """
    new = {name: Later(name) for name in names if name not in sys.modules}
    sys.modules.update(new)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, stand_in in new.items():
            if vars(sys)["modules"].get(name) is stand_in:
                del sys.modules[name]
