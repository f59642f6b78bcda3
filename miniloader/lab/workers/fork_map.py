"""Work on a list, done by several processes at once: this one, and helpers that it forks.

A helper knows all that this process knows, and leaves its answer in memory: arrays are used where it has put
them (pickle protocol 5, PEP 574).  The standard library's pools take longer to import than most work here.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from miniloader.lab.workers.child import die_with, kill, uninterrupted

__all__ = ["share_out"]

_MY_SHARE, _HELPERS_SHARE = 8, 7  # how large the parts are: a helper has to write its answer, too
_ALIGNED = 16  # bytes; where an array may begin

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def share_out(
    work: Callable[[Sequence[_Item]], _Answer], items: Sequence[_Item], parts: int
) -> list[_Answer]:
    """What ``work`` answers for each of so many ``parts`` of ``items``, in order, all done at once.

    Answers of helpers are pickled.  What a helper does not answer, since it cannot be started, fails or dies,
    is done here in the end, and raises here.  For a program without threads: one of them could hold a lock
    for ever that ``work`` needs in the helper (fork(2)).
    """
    whole = _MY_SHARE + _HELPERS_SHARE * (parts - 1)
    bounds = [0] + [len(items) * (_MY_SHARE + _HELPERS_SHARE * part) // whole for part in range(parts)]
    mine, *others = [items[start:end] for start, end in pairwise(bounds)]
    helpers = list[_Helper]()
    try:
        for part in others:
            with uninterrupted():
                helpers.append(_Helper(partial(work, part)))
        answers = [work(mine)]
        for helper, part in zip(helpers, others, strict=True):
            answers.append(helper.answer() if helper.is_done() else work(part))
        return answers
    finally:
        for helper in helpers:
            helper.end()


class _Helper:
    """A child that does one part.

    To be made while no interrupt is heard: in the child one would unwind the stack as in the parent, before
    there is anything to stop it.  There it is never heard; who does hear it ends the helper.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._answer, self._pid = -1, 0
        parent = os.getpid()
        with suppress(OSError):  # too many files, or too many processes
            self._answer = os.memfd_create("answer")
            self._pid = os.fork() or self._help(work, parent)

    def _help(self, work: Callable[[], object], parent: int) -> NoReturn:
        status = 1
        try:
            die_with(parent)
            _write(work(), self._answer)
            status = 0
        finally:
            os._exit(status)

    def is_done(self) -> bool:
        """Wait for it; whether it has answered."""
        if not self._pid:
            return False
        status = 1
        with suppress(ChildProcessError):  # the program ignores SIGCHLD: nobody knows how it has ended
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)  # interrupted here, it is still ours
            with uninterrupted():
                _, status = os.waitpid(self._pid, 0)
                self._pid = 0
        return status == 0

    def answer(self) -> Any:
        """What it has answered."""
        return _read(self._answer)

    def end(self) -> None:
        """Leave nothing of it."""
        if self._pid:
            kill(self._pid)
        if self._answer >= 0:
            os.close(self._answer)


def _write(value: object, fd: int) -> None:
    """The value pickled, with the sizes of its arrays, and then these."""
    buffers = list[pickle.PickleBuffer]()
    said = pickle.dumps(value, 5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    with open(fd, "wb", closefd=False) as file:
        pickle.dump((said, [array.nbytes for array in arrays]), file)
        for array in arrays:
            file.write(bytes(-file.tell() % _ALIGNED))
            file.write(array)


def _read(fd: int) -> Any:
    """What was written, its arrays where they are, not to be written to."""
    memory = mmap.mmap(fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    said, sizes = pickle.load(memory)
    arrays, end, whole = list[memoryview](), memory.tell(), memoryview(memory)
    for size in sizes:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + size
        arrays.append(whole[start:end])
    return pickle.loads(said, buffers=arrays)
