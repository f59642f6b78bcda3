"""Modules that are imported when something of them is first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from miniloader.forking import importing

__all__ = ["Later", "leaving_out"]


class Later:
    """Stands for the module ``name``; what is asked of it is asked of the module, and kept."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.__spec__ = None  # "import name" asks for it, to see whether the module is still being imported

    def promise(self, *functions: str) -> None:
        """Have ``from name import`` get these ``functions``, which import the module when one is called."""
        self.__path__: list[str] = []  # which "from name import" asks for
        for function in functions:
            setattr(self, function, self._promised(function))

    def _promised(self, function: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            with importing:
                called: Callable[..., object] = getattr(import_module(self.__name__), function)
            return called(*arguments, **named)

        return call

    def __getattr__(self, name: str) -> object:
        with importing:  # the import system's lock would stay locked in a child that is forked meanwhile
            if vars(sys)["modules"].get(self.__name__) is self:  # what is left out is needed now
                del sys.modules[self.__name__]
            value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


@contextmanager
def leaving_out(*names: str, **functions: tuple[str, ...]) -> Iterator[None]:
    """What is imported in this context has a stand-in for each of ``names``, if that is not imported yet.

    For modules that import what they use in an emergency: :mod:`pdb` and :mod:`inspect` take as long as
    Python's start.  ``functions`` are what is imported from a module, given by its name, and called later.

    >>> with leaving_out("antigravity"):
    ...     import antigravity
    >>> type(antigravity).__name__, "antigravity" in sys.modules
    ('Later', False)
    """
    new = {name: Later(name) for name in (*names, *functions) if name not in sys.modules}
    for name in functions.keys() & new.keys():
        new[name].promise(*functions[name])
    sys.modules.update(new)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, stand_in in new.items():
            if vars(sys)["modules"].get(name) is stand_in:
                del sys.modules[name]
