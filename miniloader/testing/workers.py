"""The processes of a crew: started, led step by step, forked, looked at."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from miniloader.errors import EvidenceError, MiniloaderError, UsageError
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import take_descriptor
from miniloader.lab.erosion.writers import FirstWriters, FirstWrites, explain
from miniloader.lab.erosion.writers_by_faults import WritersByFaults
from miniloader.lab.workers.crew import Crew, Reply, Worker
from miniloader.loader.surroundings import find_path
from miniloader.testing.snapshots import MemorySnapshot, address_of, snapshot
from miniloader.values import dataclass

__all__ = ["By", "Workers", "start"]

By = Literal["miniloader", "dlopen"]
"""Who loads the library: this package, or the system's loader."""


@dataclass(frozen=True)
class _Member:
    """A process: which worker to ask, and the way down from there, by pid."""

    worker: Worker
    route: tuple[int, ...]

    @property
    def pid(self) -> int:
        return self.route[-1] if self.route else self.worker.pid


class Workers:
    """Some processes of a crew; what is asked of them, each of them does.

    ``workers[0]`` and ``workers[1:]`` are fewer of them, ``workers + children`` are more.  Workers of their
    own do a step at the same time, forks of one process one after the other.  Once a method has raised
    WorkerError, because a process has died, hangs or its function raised, the crew is no longer in step.
    """

    def __init__(
        self,
        crew: Crew,
        members: Sequence[_Member],
        library: str | None,
        on_level: Callable[[LevelName], None],
    ) -> None:
        self._crew, self._members, self._library, self._on_level = crew, tuple(members), library, on_level

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes' pids."""
        return tuple(member.pid for member in self._members)

    def __repr__(self) -> str:
        return f"<Workers {', '.join(map(str, self.pids))}>"

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Workers]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Workers:
        return self._with(self._members[index] if isinstance(index, slice) else [self._members[index]])

    def __add__(self, workers: Workers) -> Workers:
        if workers._crew is not self._crew:
            raise UsageError("these workers are of two crews, which cannot be led as one")
        return self._with([*self._members, *workers._members])

    def call(self, function: str, *arguments: Any) -> list[Any]:
        """Have each call a function; what it returned, in order.

        Of an imported module: its name there (``handle``, ``Shop.handle``) or ``other.module:name``, with
        arguments that JSON has.  Of the library: the whole call as at the command line,
        ``crc32(0, "hello", 5)->ulong`` (see :mod:`miniloader.loader.call`).
        """
        __tracebackhide__ = True
        replies = self._ask(f"call {function}", "call", {"function": function, "arguments": arguments})
        return [reply["value"] for reply in replies]

    def write(self, symbol: str, value: int | bytes, *, offset: int = 0, library: str | None = None) -> None:
        """Have each write to a symbol's memory, ``offset`` bytes past its start, by an ordinary store.

        A number is written as the processor stores it, in as many bytes as the symbol has, 8 at most.
        ``library`` is whose symbol it is: by default the one that the crew has loaded.
        """
        __tracebackhide__ = True
        name = library or self._library
        if name is None:
            raise UsageError(f"write {symbol}: of which library? this crew has imported a module")
        requests = []
        for pid in self.pids:
            address, size = address_of(pid, name, symbol)
            width = len(value) if isinstance(value, bytes) else min(size - offset, 8)
            if width < 1 or not 0 <= offset <= size - width:
                raise UsageError(f"write {symbol}: it has {size} bytes, none for {width} at {offset}")
            if not isinstance(value, bytes):
                value = (value % (1 << 8 * width)).to_bytes(width, sys.byteorder)
            requests.append({"address": address + offset, "data": [*value]})
        self._ask(f"write {symbol}", "poke", *requests)

    def fork(self, children: int = 1) -> Workers:
        """Have each fork this many children; these, as workers in their own right."""
        __tracebackhide__ = True
        replies = self._ask("fork", "fork", {"children": children})
        return self._with(
            [
                _Member(member.worker, (*member.route, pid))
                for member, reply in zip(self._members, replies, strict=True)
                for pid in reply["pids"]
            ]
        )

    def first_writes(self, function: str, *arguments: Any) -> list[FirstWrites]:
        """Have each call a function, one after the other; who was first to write to each page meanwhile.

        What is written to, a reference count, a collector's word or anything else, is told by what lies there
        in the process that has forked it, and the function by symbols.  Each writer is held up for a moment
        (userfaultfd(2), which takes ``CAP_SYS_PTRACE``): less than a millisecond a page.  Where the kernel
        does not allow that, first writes to pages that are shared with relatives are told all the same, by
        page faults (perf_event_open(2)); what is not seen then is in ``unseen`` of the answer.  Raises
        EvidenceError where neither is allowed.
        """
        __tracebackhide__ = True
        answers = []
        for worker in self:
            (pid,), (member,) = worker.pids, worker._members
            try:
                with worker._watcher(pid) as writers:
                    worker.call(function, *arguments)
            finally:
                worker._ask("first writes", "untrap", {})
            parents = (member.worker.pid, *member.route)[:-1]
            answers.append(explain(pid, writers.writes, parents[-1] if parents else None, writers.unseen))
        return answers

    def _watcher(self, pid: int) -> FirstWriters | WritersByFaults:
        """What sees who writes in this worker: the best that the kernel allows."""
        try:
            (reply,) = self._ask("first writes", "trap", {})
            return FirstWriters(pid, _taken(pid, reply["descriptor"]))
        except EvidenceError as refused:
            held_up = refused.message
        try:
            return WritersByFaults(pid)
        except EvidenceError as refused:
            raise EvidenceError(
                f"who writes first is unknown here: {held_up}; {refused.message}",
                hint="it takes CAP_SYS_PTRACE, or kernel.perf_event_paranoid 2 (by mprotect(2) system calls "
                "of the worker would fail: EFAULT)",
            ) from None

    def snapshot(
        self, step: str = "", *, library: str | None = None, level: LevelName | None = None
    ) -> MemorySnapshot:
        """Look at all of them; by default at the library that the crew has loaded, or else at every file.

        See :func:`miniloader.testing.snapshot`.  Raises WorkerError when one has died.
        """
        __tracebackhide__ = True
        self._crew.check(step or "snapshot")
        looked = snapshot(self.pids, step, library=library or self._library, level=level)
        self._crew.check(step or "snapshot")
        self._on_level(looked.level)
        return looked

    def _with(self, members: Sequence[_Member]) -> Workers:
        return Workers(self._crew, members, self._library, self._on_level)

    def _ask(self, step: str, command: str, *requests: Mapping[str, Any]) -> list[Reply]:
        """Have each carry out a command, by the same request or each by its own; the replies, in order."""
        __tracebackhide__ = True
        by_member = requests if len(requests) == len(self) else requests * len(self)
        replies: dict[int, Reply] = {}
        while waiting := [index for index in range(len(self)) if index not in replies]:
            indices = {self._members[index].worker.number: index for index in reversed(waiting)}.values()
            asked = [self._members[index] for index in indices]
            relayed = [
                {"route": member.route, "request": dict(by_member[index], command=command)}
                for index, member in zip(indices, asked, strict=True)
            ]
            workers = [member.worker for member in asked]
            try:
                answers = self._crew.ask_each("relay", relayed, step=step, workers=workers)
            except MiniloaderError as error:  # what the test did is of interest, not how we found out
                raise error.with_traceback(None) from None
            replies.update(zip(indices, answers, strict=True))
        return [replies[index] for index in range(len(self))]


def _taken(pid: int, descriptor: int) -> int:
    """A descriptor of a worker's, for this process."""
    try:
        return take_descriptor(pid, descriptor)
    except OSError as error:
        raise EvidenceError(f"process {pid}: its userfaultfd is not to be had: {error.strerror}") from error


class _DisbandingCrew(Crew):
    """A crew that has its workers end and reap their children before it ends them."""

    _in_step = True

    def ask_each(self, *arguments: Any, **options: Any) -> list[Reply]:
        """As any crew, and remember whether all have answered."""
        in_step, self._in_step = self._in_step, False
        replies = super().ask_each(*arguments, **options)
        self._in_step = in_step
        return replies

    def close(self) -> None:
        """End all of them; a second call does nothing."""
        if self._in_step and self.workers:
            with suppress(MiniloaderError):  # whoever has died or hangs is dealt with below
                self.ask("disband")
        super().close()


def start(
    processes: int,
    *,
    library: str | os.PathLike[str] | None,
    module: str | None,
    by: By,
    timeout: float,
    keep: Callable[[Crew], Crew],
    on_level: Callable[[LevelName], None],
) -> Workers:
    """Start a crew, which ``keep`` is told of before anything can go wrong; see ``crew`` in
    :mod:`miniloader.testing`.
    """
    __tracebackhide__ = True
    if (library is None) == (module is None):
        raise UsageError("a crew loads a library or imports a module: give one of library= and module=")
    if by not in ("miniloader", "dlopen"):
        raise UsageError(f"by={by!r}: expected 'miniloader' or 'dlopen'")
    path = None if library is None else os.path.realpath(find_path(library))
    crew = keep(_DisbandingCrew(processes, timeout=timeout, program="miniloader.lab.workers.scripted"))
    workers = Workers(crew, [_Member(worker, ()) for worker in crew.workers], path, on_level)
    if path is not None:
        workers._ask(f"load {path}", "load" if by == "miniloader" else "dlopen", {"path": path})
    else:
        workers._ask(f"import {module}", "import", {"module": module})
    return workers
