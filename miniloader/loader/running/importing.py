"""``importing()``: while it lasts, what this process opens with dlopen(3) is loaded by us.

The words through which the program and its libraries call dlopen(3) and its like lead to us meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Final

from miniloader.errors import MiniloaderError, UsageError, tell
from miniloader.loader import unload
from miniloader.loader.beside_glibc import host
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.events import OnEvent
from miniloader.loader.from_inside import answers, for_host, opening
from miniloader.loader.from_inside.caller import keep
from miniloader.loader.from_inside.for_host import Rules
from miniloader.loader.loading import can_answer
from miniloader.loader.policy import Policy
from miniloader.loader.running import slots
from miniloader.loader.running.bill import Bill, Meter
from miniloader.loader.surroundings import look_at_process
from miniloader.native import INSIDE, gate

__all__ = ["Imports", "importing"]


class Imports:
    """What :func:`importing` has loaded, and what it cost."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        #: The libraries that were there before and that loading itself needs: ld.so has loaded them.
        self.of_host = [library.path for library in host.libraries() if library.path]

    @property
    def bill(self) -> Bill:
        """What loading has cost until now."""
        return self._meter.bill()

    @property
    def fell_back(self) -> list[tuple[str, str]]:
        """What ld.so has loaded because we could not, and why not."""
        return self._meter.fell_back


_led: Final[dict[slots.LedWord, int]] = {}
_met: Final[set[HostLibrary]] = set()


@contextmanager
def importing(
    only: str | None = None,
    *,
    strict: bool = False,
    prepared: bool = False,
    on_event: OnEvent | None = None,
    warn: bool = True,
) -> Iterator[Imports]:
    """While it lasts, extension modules and all that dlopen(3) opens in this process are loaded by us.

    CPython initialises the modules itself.  ``only`` is a pattern as fnmatch has them, for paths or their
    last parts: what it does not fit is left to ld.so.  What cannot be loaded falls back to ld.so, with one
    line on standard error if it is to ``warn``; where it is ``strict``, that is an error.  ``prepared`` takes
    relocated pages from the cache; ``on_event`` hears of each step.

    >>> import miniloader
    >>> with miniloader.importing() as imports:
    ...     import _bisect
    >>> _bisect.bisect_right([1, 2, 3], 2)
    2
    """

    def takes(name: str) -> bool:
        return only is None or fnmatchcase(name, only) or fnmatchcase(os.path.basename(name), only)

    def fell_back(name: str, error: MiniloaderError) -> None:
        meter.fell_back.append((name, str(error)))
        if warn:
            tell(f"miniloader: {name}: loaded by ld.so instead: {error}")
        _lead_new()

    gate.require_loading()
    if not can_answer():
        raise UsageError("no page may become executable in this process: nothing can be led to miniloader")
    look_at_process()
    meter = Meter(on_event)
    rules = Rules(Policy(prepared=prepared), takes, strict, fell_back, meter)
    with unload.lock:
        imports = Imports(meter)
        for_host.in_force.append(rules)
        answers.watches.append(meter)
        _lead_new()
    try:
        yield imports
    finally:
        with unload.lock:
            for_host.in_force.remove(rules)
            answers.watches.remove(meter)
            if not for_host.in_force:
                _put_back()


def _lead_new() -> None:
    """Lead the words of those of ld.so's libraries that are new."""
    new = [library for library in host.libraries() if library not in _met]
    _met.update(new)
    led = slots.lead(new)
    for library in {slot.library for slot in led}:
        keep(library)
    _led.update(led)


def _put_back() -> None:
    """Put back what was led; but who has handles of ours goes on asking us about them."""
    if True in opening.handed_out:
        slots.put_back(_led, [b"dlopen", b"dlmopen"])
    else:
        slots.put_back(_led, INSIDE)
        _led.clear()
    _met.clear()
