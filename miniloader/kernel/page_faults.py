"""Page faults of a process as they happen, by perf_event_open(2): at which address, by which instruction.

The kernel notes them in rings in memory, one for each processor, and holds up nobody.  Whoever may not
trace the kernel (``kernel.perf_event_paranoid``) sees those of programs alone: a page that the kernel writes
to in a system call is not among them.
Source: perf_event_open(2), ``include/uapi/linux/perf_event.h``.
"""

from __future__ import annotations

import errno
import os
import struct
from mmap import mmap
from threading import Lock
from typing import Final, Self

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import NamedTuple

__all__ = [
    "ADDRESS",
    "IP",
    "KERNEL",
    "MODE",
    "PAGE_FAULTS",
    "RECORD",
    "SAMPLE",
    "SOFTWARE",
    "TID",
    "TIME",
    "EventLog",
    "EventRing",
    "FaultLog",
    "PageFault",
    "processors",
]

SOFTWARE, PAGE_FAULTS = 1, 2
IP, TID, TIME, ADDRESS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_INHERIT, _NOT_KERNEL, _NOT_HYPERVISOR, _BY_BYTES = 1 << 1, 1 << 5, 1 << 6, 1 << 14
_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQ")  # the first version of the structure
_SET_OUTPUT: Final = 0x2405
_HEAD, _TAIL = 128, 129  # data_head, data_tail: which words of struct perf_event_mmap_page
RECORD: Final = struct.Struct("=IHH")
"""struct perf_event_header: type, misc, size."""
_NOTED: Final = struct.Struct("=QQQ")  # of a sample: instruction, process and thread, address
SAMPLE: Final = 9
MODE, KERNEL = 7, 1  # of misc


class PageFault(NamedTuple):
    """The address that was touched, and that of the instruction: 0 where the kernel did, in a call."""

    address: int
    instruction: int


class EventLog:
    """Rings of what happens to the threads of ``pid``, and to whom they start, from now on; for a subclass.

    ``sees_kernel``: whether what happens in system calls is among it.  Raises EvidenceError where the kernel
    or its settings do not allow it.
    """

    _sizes: tuple[int, ...] = (1 << 18,)
    """Bytes of a ring, as many as are allowed: any user may lock a little over 512 KiB for each processor."""
    _sample = 32
    """Bytes of a record of a fault."""

    def __init__(self, pid: int) -> None:
        self._descriptors, self._rings = list[int](), list[tuple[int, EventRing]]()
        self.sees_kernel = True
        try:
            for thread in sorted(int(name) for name in os.listdir(process_file(pid, "task"))):
                self._open(thread)
        except OSError as error:
            self.close()
            raise EvidenceError(f"process {pid}: its page faults: {error.strerror}") from error

    def _open(self, thread: int) -> None:
        events = [self._event(thread, cpu) for cpu in processors()]
        self._descriptors += events
        if self._rings:
            for event, (descriptor, _) in zip(events, self._rings, strict=True):
                syscalls.ioctl(event, _SET_OUTPUT, descriptor)
            return
        for size in self._sizes:
            try:
                for event in events:
                    ring = EventRing(mmap(event, PAGE_SIZE + size), self._sample)
                    self._rings.append((event, ring))
                return
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOMEM) or size == self._sizes[-1]:
                    raise
                self._unmap()

    def _attributes(self, flags: int) -> bytes:
        """The ``struct perf_event_attr``, with these flags and what else there is."""
        raise NotImplementedError

    def _event(self, thread: int, cpu: int) -> int:
        """The event of a thread on a processor; of programs alone, where the kernel may not be traced."""
        flags = _INHERIT | _NOT_HYPERVISOR | _BY_BYTES | (0 if self.sees_kernel else _NOT_KERNEL)
        try:
            return syscalls.open_events(self._attributes(flags), thread, cpu)
        except OSError as error:
            if not self.sees_kernel or error.errno not in (errno.EACCES, errno.EPERM):
                raise
        self.sees_kernel = False
        return self._event(thread, cpu)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Note nothing any more."""
        self._unmap()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _unmap(self) -> None:
        while self._rings:
            self._rings.pop()[1].close()

    @property
    def has_lost(self) -> bool:
        """Whether a ring was full when it was read: then there was no room for some, as nobody had read."""
        return any(ring.was_full for _, ring in self._rings)

    def descriptors(self) -> list[int]:
        """For poll(2): one is readable where much of its ring is full."""
        return [descriptor for descriptor, _ in self._rings]


class FaultLog(EventLog):
    """The page faults of the threads of ``pid``, and of those that they start, from now on."""

    def _attributes(self, flags: int) -> bytes:
        kinds, wake = IP | TID | ADDRESS, self._sizes[0] // 2
        return _ATTRIBUTES.pack(SOFTWARE, _ATTRIBUTES.size, PAGE_FAULTS, 1, kinds, 0, flags, wake, 0, 0)

    def read(self) -> list[PageFault]:
        """What has been noted since the last time; in order, but for processors."""
        return [fault for _, ring in self._rings for fault in ring.read()]


class EventRing:
    """What the kernel notes in ``memory``: a ``struct perf_event_mmap_page``, and records after its page.

    ``was_full``: whether there has been no room for another record at a time when it was read.
    """

    def __init__(self, memory: mmap, sample: int = 32) -> None:
        self._memory, self._least, self._turn, self.was_full = memory, sample, Lock(), False
        self._turn.acquire()

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def take(self) -> bytes:
        """The records that have been noted since the last time; makes room for others."""
        with memoryview(self._memory) as octets, octets.cast("Q") as words:
            head, tail, size = words[_HEAD], words[_TAIL], len(octets) - PAGE_SIZE
            self._in_order()
            at = PAGE_SIZE + tail % size
            records = octets[at : at + head - tail].tobytes()
            records += octets[PAGE_SIZE : PAGE_SIZE + head - tail - len(records)]  # what was over the end
            self._in_order()
            words[_TAIL] = head  # the word at once: struct.pack_into makes it 0 first, which the kernel sees
            self._in_order()
            # The kernel's own word of it (PERF_RECORD_LOST) comes with the next record, which may never be.
            self.was_full |= words[_HEAD] - tail >= size - self._least
        return records

    def read(self) -> list[PageFault]:
        """The faults that have been noted since the last time; makes room for others."""
        records, at, faults = self.take(), 0, list[PageFault]()
        while at < len(records):
            kind, misc, length = RECORD.unpack_from(records, at)
            if kind == SAMPLE:
                instruction, _, address = _NOTED.unpack_from(records, at + RECORD.size)
                faults.append(PageFault(address, 0 if misc & MODE == KERNEL else instruction))
            at += length
        return faults

    def _in_order(self) -> None:
        """A memory barrier, which not every processor does without: a release, and an acquire after it."""
        self._turn.release()
        self._turn.acquire()


def processors() -> list[int]:
    """The numbers of the processors that are there."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        spans = [part.split("-") for part in file.read().strip().split(",")]
    return [cpu for first, *last in spans for cpu in range(int(first), int((last or [first])[0]) + 1)]
