"""Calling a program as CPython's main does: nothing is beneath it, and what it does not catch is shown."""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

from miniloader.native import FRAME_RECORD, address_of

__all__ = ["call_outermost", "show_outermost"]

_HEAD: Final = 3 * struct.calcsize("P")  # of a frame that Python sees: its kind, count, and who called
_STATE: Final = 256  # bytes of a PyThreadState: what is looked for is at its beginning
_FUNCTIONS: Final = ("PyObject_CallOneArg", "Py_IncRef", "PyErr_Restore", "PyErr_PrintEx")


def call_outermost(function: Callable[[Any], object], argument: object, between: int = 0) -> None:
    """Call ``function`` as if nobody had: it sees no frame but its own, and may go as deep as there is.

    It makes ``between`` calls that CPython counts before the one that is to be the first.
    """
    kind = ctypes.PYFUNCTYPE(
        *(ctypes.py_object, ctypes.c_uint64, ctypes.c_uint64, ctypes.py_object, ctypes.py_object),
        ctypes.c_int,
    )
    kind(address_of("call_outermost"))(_known().buffer_info()[0], _state(), function, argument, between)


def show_outermost(error: BaseException) -> None:
    """Show an ``error`` that nobody has caught, in Python's words; ``sys.excepthook`` is whatever it is."""
    kind = ctypes.PYFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, *[ctypes.py_object] * 3)
    show = kind(address_of("show_outermost"))
    show(_known().buffer_info()[0], _state(), type(error), error, error.__traceback__)


def _state() -> int:
    function = ctypes.PYFUNCTYPE(ctypes.c_uint64)(("PyThreadState_Get", ctypes.pythonapi))
    return int(function())


@lru_cache(maxsize=1)
def _known() -> array[int]:
    """What program.c has to know of this CPython: what cannot be found is left as it is."""
    state = _state()
    own = ctypes.c_uint64.from_address(id(sys._getframe()) + _HEAD).value
    words = array("Q", (ctypes.c_char * _STATE).from_address(state).raw)  # by no function of Python's
    numbers = array("i", words.tobytes())
    record, frame = 0, 0
    if own in words:
        frame = words.index(own) * words.itemsize
    elif FRAME_RECORD:
        within = 8 if sys.version_info < (3, 12) else 0
        place = words[FRAME_RECORD // words.itemsize]
        if place and ctypes.c_uint64.from_address(place + within).value == own:
            record, frame = FRAME_RECORD, within
    limit, near = sys.getrecursionlimit(), 100
    depths = [
        place * numbers.itemsize
        for place, (left, most) in enumerate(pairwise(numbers))
        if most == limit and limit - near < left < limit
    ]
    depth = depths[0] if len(depths) == 1 else 0
    functions = (ctypes.cast(ctypes.pythonapi[name], ctypes.c_void_p).value for name in _FUNCTIONS)
    return array("Q", [record, frame, depth, *(function or 0 for function in functions)])
