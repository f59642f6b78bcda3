"""Progress, for a person who waits: one line on standard error that comes after a second and goes again."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["progress"]

_PATIENCE: Final = 1.0  # seconds


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says what is being done now.

    It is shown only on a terminal, and only when the block takes more than a second.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    line = _Line()
    timer = threading.Timer(_PATIENCE, line.show)
    timer.daemon = True
    timer.start()
    try:
        yield line.say
    finally:
        timer.cancel()
        line.clear()


class _Line:
    """The line; written to by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = ""
        self._shown = False
        self._over = False

    def say(self, text: str) -> None:
        with self._lock:
            self._text = text
            if self._shown:
                self._write()

    def show(self) -> None:
        with self._lock:
            if not self._over:
                self._shown = True
                self._write()

    def clear(self) -> None:
        with self._lock:
            self._over = True
            if self._shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _write(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{self._text[:width]}")
        sys.stderr.flush()
