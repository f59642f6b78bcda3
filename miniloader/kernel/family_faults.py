"""Page faults of a process and of all that it forks, as they happen, with the forks and ends between them.

The kernel has whoever is forked inherit the event, so a child's first fault is there, and nobody is held up.
Beside faults it notes forks, ends, new programs (execve), and what is mapped, each with its time: rings are
one for each processor, and only the times tell what came before what.
Source: perf_event_open(2), ``include/uapi/linux/perf_event.h``.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from miniloader.kernel.page_faults import (
    ADDRESS,
    IP,
    KERNEL,
    MODE,
    PAGE_FAULTS,
    RECORD,
    SAMPLE,
    SOFTWARE,
    TID,
    TIME,
    EventLog,
    processors,
)
from miniloader.values import NamedTuple

__all__ = ["FAULT_DTYPE", "FamilyEvent", "FamilyLog"]

_MAPPINGS, _COMMANDS, _TASKS, _DATA, _EVERYWHERE = 1 << 8, 1 << 9, 1 << 13, 1 << 17, 1 << 18
_WITH_PROTECTION, _EXECUTIONS, _BY_CLOCK = 1 << 23, 1 << 24, 1 << 25
_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQQQQIi")  # the fourth version of the structure
_LOST, _COMMAND, _EXIT, _FORK, _MAPPED = 2, 3, 4, 7, 10
_EXECUTED: Final = 1 << 13  # of misc
_TASK: Final = struct.Struct("=4I")  # process, its parent, thread, who started it
_MAPPING: Final = struct.Struct("=II3Q24xII")  # process, thread, address, length, offset; protection, flags
_NUMBER: Final = struct.Struct("=QQ")
_WHEN: Final = 8  # bytes from the end
_IN_ALL: Final = 256 << 20  # bytes of rings
_WAKE: Final = 1 << 16

FAULT_DTYPE: Final = np.dtype(
    [
        *(("kind", np.uint32), ("misc", np.uint16), ("length", np.uint16), ("instruction", np.uint64)),
        *(("pid", np.uint32), ("tid", np.uint32), ("time", np.uint64), ("address", np.uint64)),
    ]
)
"""A fault of ``pid``; ``instruction`` is 0 where the kernel touched the address; ``time`` in nanoseconds."""


class FamilyEvent(NamedTuple):
    """What happened to process ``pid`` at ``time`` (nanoseconds of the monotonic clock).

    ``fork``: thread ``by`` of process ``parent`` has started it.  ``exit``: its first thread has ended.
    ``exec``: it is another program now.  ``map``: [``start``, ``end``) is mapped anew, from ``file_offset``
    of the file ``path`` where it is one's, or has another ``protection``, which reads like ``r-x``.
    """

    kind: Literal["fork", "exit", "exec", "map"]
    time: int
    pid: int
    parent: int = 0
    by: int = 0
    start: int = 0
    end: int = 0
    file_offset: int = 0
    path: str = ""
    protection: str = ""


def _sizes() -> tuple[int, ...]:
    most = _IN_ALL // max(len(processors()), 1)
    return (*(size for size in (1 << 24, 1 << 22, 1 << 20, 1 << 19) if size <= most), 1 << 18)


class FamilyLog(EventLog):
    """What happens to process ``pid`` and to those that it starts, from now on.

    ``lost`` is how many records there was no room for.
    """

    _sample = FAULT_DTYPE.itemsize

    def __init__(self, pid: int) -> None:
        self._sizes, self.lost = _sizes(), 0
        super().__init__(pid)

    def _attributes(self, flags: int) -> bytes:
        flags |= _MAPPINGS | _COMMANDS | _TASKS | _DATA | _EVERYWHERE
        flags |= _WITH_PROTECTION | _EXECUTIONS | _BY_CLOCK
        kinds, length = IP | TID | TIME | ADDRESS, _ATTRIBUTES.size
        begin = (SOFTWARE, length, PAGE_FAULTS, 1, kinds, 0, flags, _WAKE, 0, 0)
        return _ATTRIBUTES.pack(*begin, 0, 0, 0, 0, time.CLOCK_MONOTONIC)

    def read(self) -> tuple[NDArray[np.void], list[FamilyEvent]]:
        """The faults (:data:`FAULT_DTYPE`) and other events since the last time; in no order."""
        faults, events = [np.empty(0, FAULT_DTYPE)], list[FamilyEvent]()
        for _, ring in self._rings:
            records = ring.take()
            for part in _parts(records):
                if isinstance(part, bytes):
                    events += self._event_of(part)
                else:
                    faults.append(part)
        told = np.concatenate(faults)
        told["instruction"][told["misc"] & MODE == KERNEL] = 0
        return told, events

    def _event_of(self, record: bytes) -> Iterator[FamilyEvent]:
        kind, misc, _ = RECORD.unpack_from(record)
        body = record[RECORD.size :]
        when = int.from_bytes(record[-_WHEN:], "little")
        if kind == _LOST:
            self.lost += _NUMBER.unpack_from(body)[1]
        elif kind in (_FORK, _EXIT):
            pid, parent, thread, by = _TASK.unpack_from(body)
            if kind == _FORK and pid != parent:
                yield FamilyEvent("fork", when, pid, parent, by)
            elif kind == _EXIT and thread == pid:
                yield FamilyEvent("exit", when, pid)
        elif kind == _COMMAND and misc & _EXECUTED:
            yield FamilyEvent("exec", when, int.from_bytes(body[:4], "little"))
        elif kind == _MAPPED:
            pid, _, start, length, offset, bits, _ = _MAPPING.unpack_from(body)
            path = body[_MAPPING.size :].partition(b"\0")[0].decode(errors="surrogateescape")
            protection = "".join(sign if bits >> bit & 1 else "-" for bit, sign in enumerate("rwx"))
            yield FamilyEvent("map", when, pid, 0, 0, start, start + length, offset, path, protection)


def _parts(records: bytes) -> Iterator[NDArray[np.void] | bytes]:
    """Runs of faults, as arrays, and every other record by itself."""
    at, length = 0, FAULT_DTYPE.itemsize
    while at < len(records):
        kind, _, size = RECORD.unpack_from(records, at)
        if kind != SAMPLE or size != length:
            yield records[at : at + size]
            at += size
            continue
        number = min((len(records) - at) // length, 1 << 12)
        run = np.frombuffer(records, FAULT_DTYPE, number, at)
        ends = np.flatnonzero((run["kind"] != SAMPLE) | (run["length"] != length))
        number = int(ends[0]) if len(ends) else number
        yield run[:number]
        at += number * length
