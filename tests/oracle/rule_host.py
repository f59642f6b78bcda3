"""A process that makes calls of dlopen(3) and dlclose(3) twice, each in a fork of its own: ld.so's, and ours.

It reads lines of JSON, ``[DIRECTORY, CALLS]`` (see :class:`tests.oracle.rule_trees.Call`), and answers each
with a line of JSON: for ld.so and for miniloader how the first call ended, what was written meanwhile (see
:mod:`tests.oracle.rule_library`), and what was said.  Between what constructors and destructors write stands
what each call gave: ``+`` and whose the symbols are by its handle, ``!`` for a refusal, ``-`` for a close.
At the end the process exits, so that all destructors run.  It starts once for many trees.
"""

from __future__ import annotations

import _ctypes
import atexit
import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import miniloader
from miniloader.errors import MiniloaderError
from tests.oracle.rule_library import LOG

_SECONDS: Final = 120
_SYMBOLS: Final = "stuv"
_NONE: Final = "---"
Calls = Sequence[tuple[str | None, int, int]]


def main() -> None:
    """Answer until there is no more line."""
    miniloader.load("libz.so.1").close()
    with miniloader.importing(strict=True):
        pass
    gc.freeze()
    for line in sys.stdin:
        directory, calls = json.loads(line)
        os.chdir(directory)
        answers = [_in_child(way, calls) for way in (nullcontext, _way_of_ours(calls))]
        os.chdir("/")
        print(json.dumps(answers), flush=True)


def _way_of_ours(calls: Calls) -> Callable[[], Any]:
    """A library that is opened and closed: by load(); what else is called comes to us as from any program."""
    is_plain = len(calls) == 2 and calls[0][1] == os.RTLD_NOW and calls[1][0] is None
    return _Loader if is_plain else lambda: miniloader.importing(strict=True)


class _Loader(nullcontext[Any]):
    """miniloader's own interface."""

    def __enter__(self) -> _Loader:
        return self

    def dlopen(self, name: str, _: int) -> Any:
        return miniloader.load(name)

    def dlsym(self, library: Any, name: str) -> int:
        return int(library.address(name))

    def dlclose(self, library: Any) -> None:
        library.close()


def _make(calls: Calls, interface: Any, said: int) -> bool:
    """Make the calls, noting what each gives; whether the first one has opened something."""
    handles: dict[int, Any] = {}
    for number, (name, flags, opened) in enumerate(calls):
        if name is None:
            if opened in handles:
                os.write(LOG, b"-")
                interface.dlclose(handles.pop(opened))
            continue
        try:
            handles[number] = interface.dlopen(name, flags)
        except (OSError, MiniloaderError) as error:
            os.write(LOG, b"!")
            os.write(said, str(error).encode("utf-8", "backslashreplace") + b"\n")
            if number == 0:
                return False
            continue
        found = [_symbol(interface, handles[number], f"symbol_{symbol}") for symbol in _SYMBOLS]
        os.write(LOG, ("+" + "".join(found)).encode())
    return True


def _symbol(interface: Any, handle: Any, name: str) -> str:
    try:
        return ctypes.string_at(interface.dlsym(handle, name), 3).decode("ascii", "replace")
    except (OSError, MiniloaderError):
        return _NONE


def _in_child(way: Callable[[], Any], calls: Calls) -> tuple[str, str, str]:
    log, said = os.memfd_create("log"), os.memfd_create("said")
    child = os.fork()
    if child == 0:
        os.dup2(log, LOG)
        signal.alarm(_SECONDS)
        try:
            with way() as made:
                is_open = _make(calls, made if isinstance(made, _Loader) else _ctypes, said)
            os.write(LOG, b".")
            atexit._run_exitfuncs()
            ctypes.CDLL(None).exit(0 if is_open else 1)
        except BaseException as error:  # noqa: BLE001 - a fault of ours is an answer as well
            os.write(said, repr(error).encode("utf-8", "backslashreplace"))
        os._exit(2)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: "loaded", 1: "refused"}.get(code, f"died, {code}")
    return outcome, _read(log), _read(said)


def _read(fd: int) -> str:
    text = os.pread(fd, 1 << 16, 0).decode("utf-8", "replace")
    os.close(fd)
    return text


if __name__ == "__main__":
    main()
