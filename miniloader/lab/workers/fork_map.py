"""Work on a list, done by several processes at once: this one, and helpers that it forks.

A helper knows all that this process knows, and leaves its answers in memory
(:mod:`miniloader.lab.workers.shared_value`).  The standard library's pools take longer to import than most
work here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeVar

from miniloader.lab.workers.child import ForkedProcess, uninterrupted
from miniloader.lab.workers.shared_value import SharedValue

__all__ = ["share_out"]

_SMALL: Final = 4  # pieces for each process that go to whoever has time
_LEAST: Final = 3  # items in one of them: to begin with one takes time, too
_TICKET: Final = 2  # bytes of a piece's number

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def share_out(
    work: Callable[[Sequence[_Item]], _Answer], items: Sequence[_Item], processes: int
) -> list[_Answer]:
    """What ``work`` answers for pieces of ``items``, in order, done by so many ``processes`` at once.

    Each process has a large piece.  The last third of a longer list is in small ones, for whoever is done
    first: nobody knows what an item will take.  Answers of helpers are pickled.  What a helper does not
    answer, since it cannot be started, fails or dies, is done here in the end, and raises here.  For a
    program without threads: one could hold a lock for ever that ``work`` needs in the helper (fork(2)).

    >>> share_out(list, range(7), 2)
    [[0, 1, 2], [3, 4, 5, 6]]
    """
    pieces = [items[start:end] for start, end in pairwise(_bounds(len(items), processes))]

    def answer(numbers: Iterable[int]) -> dict[int, _Answer]:
        return {number: work(pieces[number]) for number in numbers}

    answers, helpers = dict[int, _Answer](), list[_Helper]()
    with _handed_out(range(processes, len(pieces))) as taken:
        try:
            for number in range(1, processes):
                with uninterrupted():
                    helpers.append(_Helper(partial(answer, [number]), lambda: answer(taken())))
            answers |= answer([0]) | answer(taken())
            for helper in helpers:
                answers |= helper.answers()
        finally:
            for helper in helpers:
                helper.end()
    return [answers[number] if number in answers else work(piece) for number, piece in enumerate(pieces)]


def _bounds(count: int, processes: int) -> list[int]:
    """Where the pieces of so many items begin and end: one for each process, then the small ones."""
    small = max(_LEAST, count // (3 * _SMALL * processes))
    large = count if processes == 1 or count < 2 * small * processes else count - count // 3
    return [*(large * number // processes for number in range(processes)), *range(large, count, small), count]


@contextmanager
def _handed_out(numbers: Sequence[int]) -> Iterator[Callable[[], Iterable[int]]]:
    """What tells a process, as often as it is done, the next of ``numbers`` that no other has been told.

    They are in a pipe.  Where there is none, as too many files are open, nobody is told any.
    """
    ends = list[int]()
    try:
        with suppress(OSError), uninterrupted():
            ends += os.pipe() if numbers else ()
        if ends:
            with open(ends.pop(), "wb", buffering=0) as pipe:
                pipe.write(b"".join([number.to_bytes(_TICKET, sys.byteorder) for number in numbers]))
        yield lambda: (
            int.from_bytes(ticket, sys.byteorder)
            for end in ends
            for ticket in iter(partial(os.read, end, _TICKET), b"")
        )
    finally:
        for end in ends:
            os.close(end)


class _Helper:
    """A child that does some of the work, in steps.

    To be made while no interrupt is heard, and until somebody is bound to end it.  What one step comes to is
    pickled before the next begins: this process may be at work still.
    """

    def __init__(self, *steps: Callable[[], dict[int, Any]]) -> None:
        self._process: ForkedProcess | None = None
        with suppress(OSError):  # too many files, or too many processes
            self._answers = [SharedValue() for _ in steps]
            self._process = ForkedProcess(lambda: sum(map(_done, self._answers, steps)))

    def answers(self) -> dict[int, Any]:
        """What it has answered when it has ended; nothing where it has failed."""
        if self._process is None or self._process.wait() != 0:
            return {}
        return {number: answer for step in self._answers for number, answer in step.read().items()}

    def end(self) -> None:
        """Leave no process of it."""
        if self._process is not None:
            self._process.kill()


def _done(answers: SharedValue, step: Callable[[], dict[int, Any]]) -> int:
    return answers.leave(step())
