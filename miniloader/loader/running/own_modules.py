"""A program's own modules that are called as some of Python's: it imports its own, whatever we have imported.

Of what is in ``sys.modules`` when a program begins, Python itself would have imported a few; the others are
what miniloader needs.  Where the program's directory has a module of such a name, it is the program's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib._bootstrap import _find_spec  # type: ignore[attr-defined]
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Final

__all__ = ["as_before", "make_way"]

#: What the command itself imports first: by ``python -m``, by the script that pip makes for a command.
_FIRST: Final = ("runpy", "re", "miniloader")
#: These stay: the command's own, and what makes classes of values when they are first used.
_OURS: Final = {"__main__", "dataclasses", "miniloader"}
_set_aside: Final[dict[str, ModuleType]] = {}


def make_way() -> None:
    """Have the program find its own modules, in the first directory of ``sys.path``."""
    names = list(sys.modules)
    ours = names[min(names.index(name) for name in _FIRST if name in names) :]
    begin = sys.path[0] if sys.path else ""
    try:
        there = os.listdir(begin or ".")
    except NotADirectoryError:  # a zip file
        there = ours
    except OSError:
        return
    for name in {name.partition(".")[0] for name in there}.intersection(ours) - _OURS:
        if _is_elsewhere(sys.modules[name], _find_spec(name, None)):
            _set_aside.update((known, sys.modules.pop(known)) for known in ours if _is_of(known, name))


def _is_of(known: str, name: str) -> bool:
    return known == name or known.startswith(f"{name}.")


def _is_elsewhere(module: ModuleType, found: ModuleSpec | None) -> bool:
    """Whether what is ``found`` by the name of the ``module`` is another file."""
    known = getattr(module, "__spec__", None)
    if found is None or known is None or found.loader is None or not found.has_location:
        return False
    return os.path.realpath(found.origin or "") != os.path.realpath(known.origin or "")


@contextmanager
def as_before(path: list[str]) -> Iterator[None]:
    """What miniloader imports meanwhile comes from ``path``, and is none of the program's modules."""
    theirs, earlier = _only_theirs(path), sys.path
    sys.path = path
    for name in theirs:
        del sys.modules[name]
    sys.modules.update(_set_aside)
    try:
        yield
    finally:
        sys.path = earlier
        for name in _set_aside:
            sys.modules.pop(name, None)
        sys.modules.update(theirs)


def _only_theirs(path: list[str]) -> dict[str, ModuleType]:
    """The modules of the program, from its directory, in whose place another is found along the ``path``."""
    try:
        begin = os.path.join(os.path.abspath(sys.path[0] if sys.path else ""), "")
    except OSError:  # the working directory has been removed
        return {}
    of_program = {
        name: module
        for name, module in list(sys.modules.items())  # threads of the program may be importing still
        if name not in _OURS and str(getattr(module, "__file__", None)).startswith(begin)
    }
    hidden = [
        name
        for name, module in of_program.items()
        if "." not in name and _is_elsewhere(module, PathFinder.find_spec(name, path))
    ]
    return {name: module for name, module in of_program.items() if name.partition(".")[0] in hidden}
