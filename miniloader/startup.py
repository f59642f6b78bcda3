"""What a process of our own, a command or a worker, does before it imports anything large."""

from __future__ import annotations

import gc
import os
import sys

from miniloader.arrays import NDArray
from miniloader.forking import importing
from miniloader.later import Later, leaving_out

__all__ = ["import_argparse", "import_numpy", "open_what_is_closed", "travel_light"]

#: What numpy imports for functions that nobody calls here, and which of them it takes from there.
_UNCALLED = {
    "numpy.linalg": ("eigvals", "inv", "lstsq", "matrix_power"),
    "numpy.lib._npyio_impl": (
        *("DataSource", "NpzFile", "fromregex", "genfromtxt", "load", "loadtxt"),
        *("packbits", "save", "savetxt", "savez", "savez_compressed", "unpackbits"),
    ),
}
#: By which numpy checks two hundred functions of its own against each other.
_SIGNATURES = "numpy._utils._inspect"
_DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")


def travel_light() -> None:
    """Leave out of start-up what nobody uses here: a fifth of it."""
    gc.set_threshold(1_000_000)  # imports make many objects and no garbage to look for
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # importing numpy starts threads, for nothing here
    for name in _DOCSTRINGS:  # and gives functions written in C their docstrings, but under `python -OO`
        sys.modules.setdefault(name, type(sys)(name))


def open_what_is_closed() -> None:
    """Have the null device where the process that started this one has closed a standard stream.

    Else the next file that is opened takes its number: what a library prints would be written into a report,
    and what a child is to read from, or to write to, would come in the place of a file that is in use.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process


def import_argparse() -> None:
    """Import argparse without what looks for translations of its words, of which Python has none."""
    with importing:
        left_out = leaving_out("gettext")
        with left_out:
            _stand_in("gettext", gettext=str, ngettext=lambda one, more, number: one if number == 1 else more)
            import argparse  # noqa: F401 - for all who import it later


def import_numpy() -> None:
    """Import numpy without what it takes to describe itself to :func:`help` and to type checkers: a third.

    For a process that runs nobody else's Python: numpy's functions have no ``__signature__`` in it, and
    ``NDArray`` is but a name there.
    """
    with importing:
        import miniloader.values  # noqa: F401 - and so dataclasses without inspect, too

        left_out = ("ast", "inspect", "pickle", "platform", "textwrap", "numpy._typing", _SIGNATURES)
        with leaving_out(*left_out, **_UNCALLED):
            _stand_in("inspect", cleandoc=str, signature=lambda _: None)
            for name, functions in _UNCALLED.items():
                _stand_in(name, __all__=functions)
            _stand_in("numpy._typing", NDArray=NDArray)
            _stand_in(_SIGNATURES, getargspec=lambda _: (None, None, None, None))
            import numpy  # noqa: F401 - for all who import it later
    sys.modules.setdefault("numpy.typing", Later("numpy.typing"))  # type: ignore[arg-type]
    _stand_in("numpy.typing", NDArray=NDArray)


def _stand_in(name: str, **has: object) -> None:
    """Have what stands in for a module have that; nothing, where it is the module itself that is there."""
    module: object = sys.modules[name]
    if isinstance(module, Later):
        vars(module).update(has, __path__=[])  # as Later.promise has it
