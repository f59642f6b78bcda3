"""Watches, from outside, who is first to write to each page that a program's forked processes have inherited.

The kernel notes each page fault of the program and of all that it forks
(:class:`miniloader.kernel.family_faults.FamilyLog`).  A page that was inherited is read-only for the kernel's
page tables, so the first fault there is the first write, whether or not that copies the page.  Nobody is held
up, which userfaultfd(2) does for each page and each new process; and the program's own system calls go on as
they do, which they would not by mprotect(2).

Before each fork the program leaves a copy of itself (:mod:`miniloader.lab.erosion.watched_program`), which
connects here and waits until the connection ends.  It has which pages were inherited, and what lay there.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.errors import MiniloaderError
from miniloader.forking import cached_property
from miniloader.kernel import syscalls
from miniloader.kernel.ended import exit_code
from miniloader.kernel.family_faults import FAULT_DTYPE, FamilyEvent, FamilyLog
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.survey import Memo
from miniloader.lab.erosion.forked_writes import FamilyWrites, ForkedWrites, HowEnded, by_cause_and_place
from miniloader.lab.erosion.mapped_anew import MappedAnew
from miniloader.lab.erosion.writers import FirstWrite, MappedCode, explain
from miniloader.lab.erosion.writers_by_faults import BY_KERNEL, present_pages
from miniloader.lab.workers.child import ForkedProcess, ending

__all__ = ["ForkWatch"]

_LATE: Final = 50_000_000  # nanoseconds that a record may come later than one of another processor
_LISTEN_EVERY: Final = 1000  # milliseconds, where nobody has come
_SOON: Final = 2  # milliseconds, while somebody is being forked
_CREDENTIALS: Final = struct.Struct("=3i")
_OFFSET: Final = np.uint64(PAGE_SIZE - 1)
_OLD: Final = 5_000_000_000  # nanoseconds
_LAST: Final = 0.5  # seconds


class _KeptProcess:
    """A copy of a process as it was before a fork, which lasts as long as its ``connection``."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._connection, self.trouble = pid, connection, ""

    @cached_property
    def pages(self) -> NDArray[np.uint64]:
        """Which pages whoever was forked then has inherited, ascending; none where there is ``trouble``."""
        try:
            return present_pages(self.pid, files=True)
        except (MiniloaderError, OSError) as error:
            self.trouble = str(error)
            return np.empty(0, np.uint64)

    @cached_property
    def vmas(self) -> list[Vma]:
        """What is mapped where; nothing where there is ``trouble``."""
        return [*read_maps(self.pid)] if len(self.pages) else []

    def end(self) -> None:
        """Let it end."""
        self._connection.close()


class _Forked:
    """A forked process, and the first writes to the pages that it has inherited."""

    def __init__(self, event: FamilyEvent, before: int | None, descriptor: int) -> None:
        self.pid, self.parent, self._since = event.pid, event.parent, event.time
        self.before = before  # whom the same thread has forked before: the copy, where it is one
        self.copy: _KeptProcess | None = None
        self.descriptor, self.status = descriptor, None
        self.end = "running"
        self.code = list[MappedCode]()
        self.result: ForkedWrites | None = None
        self._waiting = list[NDArray[np.void] | FamilyEvent]()  # what came before the copy was known

    end: HowEnded
    status: int | None

    def meet(self, copy: _KeptProcess) -> None:
        """Know what was inherited, and go through what has come."""
        self.copy = copy
        count = len(copy.pages)
        self._touched = np.zeros(count, np.bool_)
        self._writes = np.zeros((count, 2), np.uint64)  # address and instruction
        self._mapped = MappedAnew(copy.vmas)
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            self.hear(part)

    def hear(self, part: NDArray[np.void] | FamilyEvent) -> None:
        """Faults of it, by time, or something that was mapped or protected."""
        if self.copy is None:
            self._waiting.append(part)
        elif isinstance(part, FamilyEvent):
            first, last = np.searchsorted(self.copy.pages, np.array([part.start, part.end], np.uint64))
            if self._mapped.is_anew(part):
                self._touched[first:last] = True
            if "x" in part.protection and part.path.startswith("/"):
                self.code.append(MappedCode(part.start, part.end, part.file_offset, part.path))
        elif len(self.copy.pages):
            rows = np.searchsorted(self.copy.pages, part["address"] & ~_OFFSET)
            rows = np.minimum(rows, len(self.copy.pages) - 1)
            wanted = (self.copy.pages[rows] == part["address"] & ~_OFFSET) & ~self._touched[rows]
            rows, at = np.unique(rows[wanted], return_index=True)  # of several the first
            first = np.flatnonzero(wanted)[at]
            self._touched[rows] = True
            self._writes[rows, 0] = part["address"][first]
            self._writes[rows, 1] = part["instruction"][first]

    def told(self, memo: Memo) -> ForkedWrites:
        """What can be said of it: in a process of its own, as it takes long."""
        assert self.copy is not None
        if self.copy.trouble:
            return self.unknown(self.copy.trouble)
        rows = np.flatnonzero(self._writes[:, 0])
        writes = [FirstWrite(*pair) for pair in self._writes[rows].tolist()]
        replaced = int(self._touched.sum()) - len(rows)
        inherited = len(self.copy.pages)
        try:
            told = explain(self.copy.pid, writes, code=self.code, memo=memo)
        except (MiniloaderError, OSError) as error:
            return self.unknown(str(error))
        parts = by_cause_and_place(told)
        return ForkedWrites(self.pid, self.parent, "ended", None, inherited, replaced, parts)

    @property
    def is_old(self) -> bool:
        """Whether a copy of its parent would have connected by now."""
        return time.monotonic_ns() - self._since > _OLD

    def look_how_it_ended(self) -> None:
        """Ask how, where it has ended itself and that is not known yet."""
        if self.end == "ended" and self.descriptor >= 0:
            code = exit_code(self.pid, self.descriptor)
            if code is not None:
                self.end, self.status = ("exited", code) if code >= 0 else ("killed", -code)
        if self.end != "ended":
            _close(self.descriptor)
            self.descriptor = -1

    def unknown(self, why: str) -> ForkedWrites:
        """What is said of a process of which nobody knows more, and ``why``."""
        return ForkedWrites(self.pid, self.parent, "ended", None, 0, 0, (), why)


class ForkWatch:
    """Watches whom process ``pid`` forks; copies of it, and in the end it itself, connect to ``name``.

    Raises EvidenceError where the kernel or its settings do not allow it.
    """

    def __init__(self, pid: int, name: str) -> None:
        self._log = FamilyLog(pid)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(b"\0" + name.encode())
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._pid, self._program = pid, syscalls.open_process(pid)
        self._held: tuple[list[NDArray[np.void]], list[FamilyEvent]] = ([np.empty(0, FAULT_DTYPE)], [])
        self._copies: dict[int, _KeptProcess] = {}
        self._latest: dict[int, int] = {}  # whom each thread has forked last
        self._living: dict[int, _Forked] = {}
        self._forked = list[_Forked]()
        self._descriptors: dict[int, int] = {}
        self._queue, self._jobs = list[_Forked](), dict[int, _Job]()
        self._others = 0  # of whom there is no copy, and who executed nothing
        self._ending: socket.socket | None = None

    def watch(self) -> FamilyWrites:
        """What was seen until the program ended, or has said that it is at its end.

        Whoever has said so waits until this process has ended.
        """
        poll = select.poll()
        for descriptor in (self._program, self._listener.fileno(), *self._log.descriptors()):
            poll.register(descriptor, select.POLLIN)
        soon = 0.0
        while True:
            moment = time.monotonic()
            ready = {descriptor for descriptor, _ in poll.poll(_SOON if moment < soon else _LISTEN_EVERY)}
            if self._listener.fileno() in ready and self._accept():
                soon = time.monotonic() + 0.2
            self._read()
            self._work(1)
            if self._held[1] or self._jobs or any(map(len, self._held[0])):
                soon = max(soon, time.monotonic() + 0.01)
            if self._ending is not None or self._program in ready:
                return self._finish()

    def _accept(self) -> bool:
        """Meet who connects: whether it was a copy."""
        met = False
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                pid = self._peer(connection)
                if pid == self._pid:
                    self._ending = connection
                elif pid:
                    self._copies[pid] = _KeptProcess(pid, connection)
                    met = True
                self._note()  # at once: whoever is forked now may not be there for long
        if met:
            self._introduce()
        return met

    def _peer(self, connection: socket.socket) -> int:
        """Who has connected; 0 where it is somebody else's process."""
        octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(octets)
        if user == os.getuid() or not os.getuid():
            return int(pid)
        connection.close()
        return 0

    def _introduce(self) -> None:
        """Tell those of their copies who have waited for them; and copies are not forked processes."""
        for forked in [forked for forked in self._forked if forked.pid in self._copies]:
            self._forked.remove(forked)
            self._living.pop(forked.pid, None)
            _close(forked.descriptor)
        for forked in self._forked:
            if forked.copy is None and forked.before in self._copies:
                forked.meet(self._copies[forked.before])

    # ------------------------------------------------------------------------------------ what happens
    def _note(self) -> None:
        """Take what has been noted, and a descriptor of each new process."""
        faults, events = self._log.read()
        for event in events:
            if event.kind == "fork":
                with suppress(OSError):  # has ended, and been reaped
                    self._descriptors[event.pid] = syscalls.open_process(event.pid)
        self._held[0].append(faults)
        self._held[1].extend(events)

    def _read(self, *, to_the_end: bool = False) -> None:
        """Go through what has been noted, but for what others may be late with."""
        until = np.iinfo(np.int64).max if to_the_end else time.monotonic_ns() - _LATE
        self._note()
        held, waiting = self._held
        faults = np.concatenate(held)
        late = faults["time"] >= until
        self._held = [faults[late]], [event for event in waiting if event.time >= until]
        faults = faults[~late]
        faults = faults[np.argsort(faults["time"], kind="stable")]
        by_pid = {int(pid): faults[faults["pid"] == pid] for pid in np.unique(faults["pid"])}
        for event in sorted((event for event in waiting if event.time < until), key=lambda event: event.time):
            if event.pid in by_pid:
                part = by_pid[event.pid]
                place = int(np.searchsorted(part["time"], np.uint64(event.time)))
                self._hear(event.pid, part[:place])
                by_pid[event.pid] = part[place:]
            self._happen(event)
        for pid, part in by_pid.items():
            self._hear(pid, part)

    def _hear(self, pid: int, faults: NDArray[np.void]) -> None:
        if len(faults) and pid in self._living:
            self._living[pid].hear(faults)

    def _happen(self, event: FamilyEvent) -> None:
        if event.kind == "fork":
            before = self._latest.get(event.by)
            self._latest[event.by] = event.pid
            descriptor = self._descriptors.pop(event.pid, -1)
            if event.pid in self._copies:
                _close(descriptor)
                return
            forked = _Forked(event, before, descriptor)
            self._forked.append(forked)
            self._living[event.pid] = forked
            if before in self._copies:
                forked.meet(self._copies[before])
        elif event.pid in self._living and event.kind == "map":
            self._living[event.pid].hear(event)
        elif event.pid in self._living:
            forked = self._living.pop(event.pid)
            forked.end = "executed" if event.kind == "exec" else "ended"
            self._queue.append(forked)

    # ------------------------------------------------------------------------------- what becomes of it
    def _work(self, most: int) -> None:
        """Have explained what those have written to that have ended, so many at once; and what has been."""
        for reading, job in [*self._jobs.items()]:
            if job.has_told():
                del self._jobs[reading]
                for forked in job.forked:
                    forked.result = forked.result or forked.unknown(f"what would explain it {job.ending}")
                    self._release(forked)
        for forked in [forked for forked in self._queue if forked.copy is None and forked.is_old]:
            self._queue.remove(forked)
            self._forked.remove(forked)
            self._others += forked.end != "executed"
            _close(forked.descriptor)
        ready = [forked for forked in self._queue if forked.copy is not None]
        share = -(-len(ready) // most)
        while ready and len(self._jobs) < most:
            job = _Job(ready[:share])
            self._jobs[job.fileno()] = job
            del ready[:share]
        self._queue = [forked for forked in self._queue if forked.copy is None or forked in ready]

    def _release(self, forked: _Forked) -> None:
        """Let its copy end; how it has ended itself may be known by now."""
        assert forked.copy is not None
        self._copies.pop(forked.copy.pid).end()
        forked.look_how_it_ended()

    def _finish(self) -> FamilyWrites:
        self._accept()
        self._read(to_the_end=True)
        patience = time.monotonic() + _LAST
        while self._awaits_copies() and time.monotonic() < patience:
            time.sleep(0.01)
            self._accept()
        self._queue += self._living.values()
        self._living.clear()
        while self._jobs or any(forked.copy is not None for forked in self._queue):
            self._work(len(os.sched_getaffinity(0)))
            select.select([*self._jobs], [], [], 0.1)
        told = list[ForkedWrites]()
        for forked in self._forked:
            if forked.result is not None:
                forked.look_how_it_ended()
                told.append(replace(forked.result, end=forked.end, status=forked.status))
            elif forked.copy is None:
                self._others += forked.end != "executed"
        unseen = [] if self._log.sees_kernel else [BY_KERNEL]
        if self._log.lost or self._log.has_lost:
            unseen.append(f"{self._log.lost or 'some':,} page faults that came too fast to be read")
        return FamilyWrites(tuple(told), " and ".join(unseen), others=self._others)

    def _awaits_copies(self) -> bool:
        return any(forked.copy is None and forked.before in self._living for forked in self._forked)


class _Job:
    """A process that explains what ``forked`` ones have written to: what they have in common is read once."""

    def __init__(self, forked: Sequence[_Forked]) -> None:
        self.forked = forked
        self._reading, writing = os.pipe()
        self._octets = bytearray()
        self.ending = ""
        try:
            os.set_blocking(self._reading, False)
            self._process = ForkedProcess(lambda: _tell(forked, writing))
        finally:
            os.close(writing)

    def fileno(self) -> int:
        """For select(2): what it tells."""
        return self._reading

    def has_told(self) -> bool:
        """Whether it has told everything."""
        with suppress(BlockingIOError):
            while part := os.read(self._reading, 1 << 16):
                self._octets += part
            os.close(self._reading)
            self.ending = ending(self._process.wait())
            told = io.BytesIO(self._octets)
            with suppress(EOFError, pickle.UnpicklingError):
                for forked in self.forked:
                    forked.result = pickle.load(told)
            return True
        return False


def _tell(several: Sequence[_Forked], writing: int) -> int:
    memo = Memo()
    with open(writing, "wb") as pipe:
        for forked in several:
            pickle.dump(forked.told(memo), pipe)
    return 0


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
