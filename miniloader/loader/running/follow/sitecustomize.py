"""What a new interpreter imports first under ``miniloader run --follow``: it loads as its parent does.

This directory is the first of ``PYTHONPATH``; the program's own sitecustomize, if there is one, comes after.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _follow() -> None:
    """Load as ``MINILOADER_RUN`` says."""
    told = json.loads(os.environ["MINILOADER_RUN"])
    if told["package"] not in sys.path:
        sys.path.append(told["package"])
    import miniloader

    _kept.append(miniloader.importing(told["only"], strict=told["strict"], prepared=told["prepared"]))
    _kept[0].__enter__()


def _go_on() -> None:
    """Import the program's own."""
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_kept: list[contextlib.AbstractContextManager[object]] = []  # as long as the interpreter lives
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _here]
if "MINILOADER_RUN" in os.environ:
    _follow()
_go_on()
