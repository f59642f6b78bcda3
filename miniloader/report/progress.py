"""Progress, for a person who waits: one line on standard error that comes after a second and goes again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from miniloader.forking import importing

if TYPE_CHECKING:
    import threading

__all__ = ["progress"]

_PATIENCE: Final = 1.0  # seconds


@contextmanager
def progress(*, forks: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that says what is being done now.

    It is shown only on a terminal, and only when the block takes more than a second.  Where the block
    ``forks`` no thread waits for that second: it is what is said next that is shown.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with importing:
        import threading  # which nobody needs elsewhere

    line = _Line(threading.Lock())
    timer = None if forks else threading.Timer(_PATIENCE, line.show)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield line.say
    finally:
        if timer is not None:
            timer.cancel()
        line.clear()


class _Line:
    """The line; written to by two threads."""

    def __init__(self, lock: threading.Lock) -> None:
        self._due, self._lock = time.monotonic() + _PATIENCE, lock
        self._text = ""
        self._shown = False
        self._over = False

    def say(self, text: str) -> None:
        with self._lock:
            self._text = text
            self._shown = self._shown or time.monotonic() >= self._due
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
                _put("")

    def _write(self) -> None:
        with importing:
            import shutil  # which few need

        width = shutil.get_terminal_size().columns - 1
        _put(self._text[:width])


def _put(text: str) -> None:
    """Have the text in the terminal's line, in the place of what is there."""
    with suppress(OSError):  # the terminal is gone
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
