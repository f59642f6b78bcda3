"""A process that loads the root of a tree twice, each time in a fork of its own: with dlopen(3), and with us.

It reads lines ``DIRECTORY<tab>PATH`` and answers each with a line of JSON: for ld.so and for miniloader
whether it was loaded, what the constructors wrote (see :mod:`tests.oracle.rule_trees`), and what was said.
It starts once for many trees.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

import miniloader
from miniloader.errors import MiniloaderError
from tests.oracle.rule_trees import LOG

_SECONDS: Final = 20


def main() -> None:
    """Answer until there is no more line."""
    miniloader.load("libz.so.1").close()
    gc.freeze()
    for line in sys.stdin:
        directory, path = line.rstrip("\n").split("\t")
        os.chdir(directory)
        answers = [_in_child(load, path) for load in (_with_dlopen, miniloader.load)]
        os.chdir("/")
        print(json.dumps(answers), flush=True)


def _with_dlopen(path: str) -> object:
    return ctypes.CDLL(path, os.RTLD_NOW)


def _in_child(load: Callable[[str], object], path: str) -> tuple[str, str, str]:
    log, said = os.memfd_create("log"), os.memfd_create("said")
    child = os.fork()
    if child == 0:
        os.dup2(log, LOG)
        signal.alarm(_SECONDS)
        try:
            kept = load(path)
            os.write(said, b"loaded")
            del kept
        except (OSError, MiniloaderError) as error:
            os.write(said, str(error).encode("utf-8", "backslashreplace"))
            os._exit(1)
        except BaseException as error:  # noqa: BLE001 - a fault of ours is an answer as well
            os.write(said, repr(error).encode("utf-8", "backslashreplace"))
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: "loaded", 1: "refused"}.get(code, f"died, {code}")
    return outcome, _read(log), _read(said)


def _read(fd: int) -> str:
    text = os.pread(fd, 1 << 16, 0).decode("ascii", "replace")
    os.close(fd)
    return text


if __name__ == "__main__":
    main()
