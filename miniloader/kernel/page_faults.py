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
from typing import Final, NamedTuple, Self

from miniloader.errors import EvidenceError
from miniloader.kernel import syscalls
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE

__all__ = ["FaultLog", "PageFault"]

_SOFTWARE, _PAGE_FAULTS = 1, 2
_IP, _TID, _ADDRESS = 1 << 0, 1 << 1, 1 << 3
_INHERIT, _NOT_KERNEL, _NOT_HYPERVISOR, _BY_BYTES = 1 << 1, 1 << 5, 1 << 6, 1 << 14
_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQ")  # the first version of the structure
_SET_OUTPUT: Final = 0x2405
_RING: Final = 1 << 18  # bytes: what any user may lock for each processor is a little over 512 KiB
_HEAD, _TAIL = 1024, 1032  # data_head, data_tail of struct perf_event_mmap_page
_RECORD: Final = struct.Struct("=IHH")  # struct perf_event_header: type, misc, size
_LOST, _SAMPLE = 2, 9
_MODE, _KERNEL = 7, 1  # of misc


class PageFault(NamedTuple):
    """The address that was touched, and that of the instruction: 0 where the kernel did, in a call."""

    address: int
    instruction: int


class FaultLog:
    """The page faults of the threads of ``pid``, and of those that they start, from now on.

    ``sees_kernel``: whether those of system calls are among them.  ``lost``: how many there was no room for,
    since nobody had read.  Raises EvidenceError where the kernel or its settings do not allow it.
    """

    def __init__(self, pid: int) -> None:
        self.lost, self._descriptors, self._rings = 0, list[int](), list[tuple[int, mmap]]()
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
                self._rings.append((descriptor, mmap(descriptor, PAGE_SIZE + max(_RING, PAGE_SIZE))))
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

    def descriptors(self) -> list[int]:
        """For poll(2): one is readable where half of its ring is full."""
        return [descriptor for descriptor, _ in self._rings]

    def read(self) -> list[PageFault]:
        """What has been noted since the last time; in order, but for processors."""
        return [fault for _, ring in self._rings for fault in self._read(ring)]

    def _read(self, ring: mmap) -> Iterator[PageFault]:
        (head,), (tail,) = struct.unpack_from("Q", ring, _HEAD), struct.unpack_from("Q", ring, _TAIL)
        size = len(ring) - PAGE_SIZE
        while tail < head:
            at = tail % size
            kind, misc, length = _RECORD.unpack_from(ring, PAGE_SIZE + at)
            record = ring[PAGE_SIZE + at : PAGE_SIZE + at + length]
            record += ring[PAGE_SIZE : PAGE_SIZE + length - len(record)]  # what was over the end
            if kind == _SAMPLE:
                instruction, _, address = struct.unpack_from("=QQQ", record, _RECORD.size)
                yield PageFault(address, 0 if misc & _MODE == _KERNEL else instruction)
            elif kind == _LOST:
                self.lost += struct.unpack_from("=Q", record, _RECORD.size + 8)[0]
            tail += length
        struct.pack_into("Q", ring, _TAIL, tail)


def _processors() -> list[int]:
    """The numbers of the processors that are there."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        spans = [part.split("-") for part in file.read().strip().split(",")]
    return [cpu for first, *last in spans for cpu in range(int(first), int((last or [first])[0]) + 1)]
