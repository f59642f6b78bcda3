"""What a forked child tells its parent: a value, pickled, in memory that both have."""

from __future__ import annotations

import mmap
import os
import pickle
from pickle import PickleBuffer  # now: pickle goes on without it where there is no memory for its C part
from typing import Any, Final

__all__ = ["SharedValue"]

_ROOM: Final = 1 << 16  # bytes; more is taken when a value needs it
_ALIGNED: Final = 16  # bytes; where an array may begin


class SharedValue:
    """A value that a forked child leaves in place of the one before, and its parent reads.

    To be made before the fork.  Being memory it is there however the child has ended, whatever became of its
    descriptors, and arrays are used where they were put (pickle protocol 5, PEP 574).

    >>> from miniloader.lab.workers.child import ForkedProcess
    >>> answer = SharedValue()
    >>> with ForkedProcess(lambda: answer.leave([1, 2])) as process:
    ...     process.wait()
    0
    >>> answer.read()
    [1, 2]
    """

    def __init__(self) -> None:
        """Take the memory; OSError where too many files are open."""
        descriptor = os.memfd_create("shared value", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, _ROOM)
            self._memory = mmap.mmap(descriptor, _ROOM)
        finally:
            os.close(descriptor)

    def leave(self, value: object) -> int:
        """Leave a value that can be pickled; 0, as an exit status."""
        buffers = list[PickleBuffer]()
        pickled = pickle.dumps(value, 5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        parts: list[bytes | memoryview] = [
            pickle.dumps((pickled, [array.nbytes for array in arrays])),
            *arrays,
        ]
        end = 0
        for part in parts:
            start = -(-end // _ALIGNED) * _ALIGNED
            end = start + len(part)
            if end > len(self._memory):
                self._memory.resize(max(end, sum(map(len, parts)) + _ALIGNED * len(parts)))
            self._memory[start:end] = part
        return 0

    def read(self) -> Any:
        """The value that was left, None when none was; its arrays are good until the next is left."""
        if self._memory.size() > len(self._memory):  # the child has taken more
            self._memory.resize(self._memory.size())
        self._memory.seek(0)
        if self._memory.read_byte() == 0:
            return None
        self._memory.seek(0)
        pickled, sizes = pickle.load(self._memory)
        arrays, end, whole = list[memoryview](), self._memory.tell(), memoryview(self._memory).toreadonly()
        for size in sizes:
            start = -(-end // _ALIGNED) * _ALIGNED
            end = start + size
            arrays.append(whole[start:end])
        return pickle.loads(pickled, buffers=arrays)
