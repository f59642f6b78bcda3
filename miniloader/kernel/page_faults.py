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
from collections.abc import Iterator
from mmap import mmap
from threading import Lock
from typing import Final, Self

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import NamedTuple

__all__ = ["FaultLog", "PageFault"]

_SOFTWARE, _PAGE_FAULTS = 1, 2
_IP, _TID, _ADDRESS = 1 << 0, 1 << 1, 1 << 3
_INHERIT, _NOT_KERNEL, _NOT_HYPERVISOR, _BY_BYTES = 1 << 1, 1 << 5, 1 << 6, 1 << 14
_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQ")  # the first version of the structure
_SET_OUTPUT: Final = 0x2405
_RING: Final = 1 << 18  # bytes: what any user may lock for each processor is a little over 512 KiB
_HEAD, _TAIL = 128, 129  # data_head, data_tail: which words of struct perf_event_mmap_page
_RECORD: Final = struct.Struct("=IHH")  # struct perf_event_header: type, misc, size
_NOTED: Final = struct.Struct("=QQQ")  # of a sample: instruction, process and thread, address
_SAMPLE: Final = 9
_MODE, _KERNEL = 7, 1  # of misc


class PageFault(NamedTuple):
    """The address that was touched, and that of the instruction: 0 where the kernel did, in a call."""

    address: int
    instruction: int


class FaultLog:
    """The page faults of the threads of ``pid``, and of those that they start, from now on.

    ``sees_kernel``: whether those of system calls are among them.  Raises EvidenceError where the kernel or
    its settings do not allow it.
    """

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
        first = not self._rings
        for place, cpu in enumerate(_processors()):
            descriptor = self._event(thread, cpu)
            self._descriptors.append(descriptor)
            if first:
                self._rings.append((descriptor, EventRing(mmap(descriptor, PAGE_SIZE + _RING))))
            else:
                syscalls.ioctl(descriptor, _SET_OUTPUT, self._rings[place][0])

    def _event(self, thread: int, cpu: int) -> int:
        """The event of a thread on a processor; of programs alone, where the kernel may not be traced."""
        flags = _INHERIT | _NOT_HYPERVISOR | _BY_BYTES | (0 if self.sees_kernel else _NOT_KERNEL)
        kinds = _IP | _TID | _ADDRESS
        attributes = _ATTRIBUTES.pack(
            _SOFTWARE, _ATTRIBUTES.size, _PAGE_FAULTS, 1, kinds, 0, flags, _RING // 2, 0, 0
        )
        try:
            return syscalls.open_events(attributes, thread, cpu)
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
        while self._rings:
            self._rings.pop()[1].close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    @property
    def has_lost(self) -> bool:
        """Whether a ring was full when it was read: then there was no room for some, as nobody had read."""
        return any(ring.was_full for _, ring in self._rings)

    def descriptors(self) -> list[int]:
        """For poll(2): one is readable where half of its ring is full."""
        return [descriptor for descriptor, _ in self._rings]

    def read(self) -> list[PageFault]:
        """What has been noted since the last time; in order, but for processors."""
        return [fault for _, ring in self._rings for fault in ring.read()]


class EventRing:
    """What the kernel notes in ``memory``: a ``struct perf_event_mmap_page``, and records after its page.

    ``was_full``: whether there has been no room for another record at a time when it was read.
    """

    def __init__(self, memory: mmap) -> None:
        self._memory, self._turn, self.was_full = memory, Lock(), False
        self._turn.acquire()

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def read(self) -> list[PageFault]:
        """The faults that have been noted since the last time; makes room for others."""
        with memoryview(self._memory) as octets, octets.cast("Q") as words:
            head, tail = words[_HEAD], words[_TAIL]
            self._in_order()
            faults = list(self._faults(tail, head))
            self._in_order()
            words[_TAIL] = head  # the word at once: struct.pack_into makes it 0 first, which the kernel sees
            self._in_order()
            # The kernel's own word of it (PERF_RECORD_LOST) comes with the next record, which may never be.
            full = len(octets) - PAGE_SIZE - _RECORD.size - _NOTED.size
            self.was_full |= words[_HEAD] - tail >= full
        return faults

    def _in_order(self) -> None:
        """A memory barrier, which not every processor does without: a release, and an acquire after it."""
        self._turn.release()
        self._turn.acquire()

    def _faults(self, tail: int, head: int) -> Iterator[PageFault]:
        size = len(self._memory) - PAGE_SIZE
        while tail < head:
            at = PAGE_SIZE + tail % size
            kind, misc, length = _RECORD.unpack_from(self._memory, at)
            record = self._memory[at : at + length]
            record += self._memory[PAGE_SIZE : PAGE_SIZE + length - len(record)]  # what was over the end
            if kind == _SAMPLE:
                instruction, _, address = _NOTED.unpack_from(record, _RECORD.size)
                yield PageFault(address, 0 if misc & _MODE == _KERNEL else instruction)
            tail += length


def _processors() -> list[int]:
    """The numbers of the processors that are there."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        spans = [part.split("-") for part in file.read().strip().split(",")]
    return [cpu for first, *last in spans for cpu in range(int(first), int((last or [first])[0]) + 1)]
