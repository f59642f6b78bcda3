"""Work on a list, done by several processes at once: this one, and helpers that it forks.

A helper knows all that this process knows, and leaves its answer in memory
(:mod:`miniloader.lab.workers.shared_value`).  The standard library's pools take longer to import than most
work here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from miniloader.lab.workers.child import ForkedProcess, uninterrupted
from miniloader.lab.workers.shared_value import SharedValue

__all__ = ["share_out"]

_MY_SHARE, _HELPERS_SHARE = 4, 3  # how large the parts are: a helper has to start, and write its answer, too

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def share_out(
    work: Callable[[Sequence[_Item]], _Answer], items: Sequence[_Item], parts: int
) -> list[_Answer]:
    """What ``work`` answers for each of so many ``parts`` of ``items``, in order, all done at once.

    Answers of helpers are pickled.  What a helper does not answer, since it cannot be started, fails or dies,
    is done here in the end, and raises here.  For a program without threads: one of them could hold a lock
    for ever that ``work`` needs in the helper (fork(2)).

    >>> share_out(list, range(7), 2)
    [[0, 1, 2, 3], [4, 5, 6]]
    """
    whole = _MY_SHARE + _HELPERS_SHARE * (parts - 1)
    bounds = [0] + [len(items) * (_MY_SHARE + _HELPERS_SHARE * part) // whole for part in range(parts)]
    first, *further = [items[start:end] for start, end in pairwise(bounds)]
    helpers = list[_Helper]()
    try:
        for part in further:
            with uninterrupted():
                helpers.append(_Helper(partial(work, part)))
        answers = [work(first)]
        for helper, part in zip(helpers, further, strict=True):
            answers.append(helper.answer() if helper.is_done() else work(part))
        return answers
    finally:
        for helper in helpers:
            helper.end()


class _Helper:
    """A child that does one part.

    To be made while no interrupt is heard, and until somebody is bound to end it.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._process: ForkedProcess | None = None
        with suppress(OSError):  # too many files, or too many processes
            self._answer = SharedValue()
            self._process = ForkedProcess(lambda: self._answer.leave(work()))

    def is_done(self) -> bool:
        """Wait for it; whether it has answered."""
        return self._process is not None and self._process.wait() == 0

    def answer(self) -> Any:
        """What it has answered."""
        return self._answer.read()

    def end(self) -> None:
        """Leave no process of it."""
        if self._process is not None:
            self._process.kill()
