"""Child processes that load one library, say where everything is, and hold still to be looked at."""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan
from miniloader.errors import MiniloaderError, WorkerError
from miniloader.lab.workers.child import ForkedProcess, crash_quietly, ending
from miniloader.lab.workers.shared_value import SharedValue
from miniloader.loader import Loading
from miniloader.loader.beside_glibc import dynamic_linker, host
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.thread_local import address_of
from miniloader.loader.loaded import Loaded
from miniloader.loader.memory import Memory
from miniloader.loader.prepare import prepare
from miniloader.loader.prepared import store
from tests.oracle import dlopen_child

__all__ = ["HeldProcess", "RemoteMemory", "load_and_hold", "open_and_hold"]

Report = dict[str, Any]


class HeldProcess:
    """A child process, with our ends of its pipes.  A context manager that kills it."""

    def __init__(self, process: ForkedProcess, reports: int, hold: int, seconds: float) -> None:
        self.pid = process.pid
        self._process = process
        self._reports = reports
        self._hold = hold
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._read = b""

    def __enter__(self) -> HeldProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def report(self) -> Report:
        """Its next report; :class:`WorkerError` when it ends, or takes too long, before that."""
        while b"\n" not in self._read:
            seconds = self._until - time.monotonic()
            if seconds <= 0 or not select.select([self._reports], [], [], seconds)[0]:
                self._end()
                raise WorkerError(f"took more than {self._seconds:g} s")
            data = os.read(self._reports, 1 << 16)
            if not data:
                self._wait(0.05)  # a pipe breaks before its process is gone
                self._end()
                raise WorkerError(ending(self._process.wait()))
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return dict(json.loads(line))

    def go_on(self) -> None:
        """Let it go on to its next report."""
        os.write(self._hold, b".")

    def _end(self) -> None:
        """Kill it, with whatever it started, and close the pipes; a second call does nothing."""
        self._process.kill()
        for descriptor in (self._hold, self._reports):
            if descriptor >= 0:
                os.close(descriptor)
        self._hold = self._reports = -1

    def _wait(self, seconds: float) -> None:
        """Wait until it is gone by itself, ``seconds`` at most."""
        until = time.monotonic() + seconds
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > until:
                return
            time.sleep(0.001)


def open_and_hold(path: str, seconds: float = 60) -> HeldProcess:
    """A fresh interpreter that opens ``path`` with dlopen(3), ``RTLD_NOW``.  It reports once.

    It opens the libraries of this process first, so that it finds what a child of :func:`load_and_hold`
    finds; none of them if ``path`` is one, so that ``path`` itself is always opened anew.
    """
    present = [library.path for library in host.libraries() if library.path]
    if os.path.realpath(path) in map(os.path.realpath, present):
        present = []

    def body(report: int, hold: int) -> None:
        os.set_inheritable(report, True)
        os.set_inheritable(hold, True)
        script = os.path.abspath(dlopen_child.__file__)
        command = [sys.executable, "-I", "-S", script, str(report), str(hold), path, *present]
        # What the interpreter itself brought may be asked for, and is to be bound at once as well.
        os.execve(sys.executable, command, os.environ | {"LD_BIND_NOW": "1"})

    return _start(body, seconds)


def load_and_hold(path: str, seconds: float = 60, *, prepared_in: str | None = None) -> HeldProcess:
    """A forked child that loads ``path`` with miniloader, allowing what dlopen allows.

    It reports, and holds still, twice: when everything is relocated (its ``start`` only), and when the
    constructors have run.  It is a fork, not a fresh interpreter, because that costs a fraction; whoever
    calls has to see to it that the calling process itself has loaded nothing.  With ``prepared_in``, a
    directory for a cache of its own, ``path`` is prepared first; the last report says as ``plain`` why that
    was of no use.
    """
    return _start(lambda report, hold: _load(path, report, hold, prepared_in), seconds)


def _load(path: str, report: int, hold: int, prepared_in: str | None) -> None:
    plain = None
    if prepared_in is not None:
        os.environ["XDG_CACHE_HOME"] = prepared_in
        plain = _prepare(path)

    def tell(what: Report) -> None:
        os.write(report, json.dumps(what).encode() + b"\n")
        os.read(hold, 1)

    try:
        with Loading(
            path,
            text_relocations=True,
            executable_stack=True,
            writable_code=True,
            prepared=prepared_in is not None,
        ) as steps:
            steps._graph.keeps_bindings = False  # so that what is ordinary is linked as load() does
            steps.map()
            steps.link()
            if prepared_in is not None:
                store.clear()  # what is mapped stays
            tell({"start": steps.mapped[0].mapped.start})
            steps.initialise()
    except MiniloaderError as error:
        tell({"error": str(error)})
        return
    except Exception as error:  # noqa: BLE001 - a fault of the loader's is what this is here to find
        tell({"error": f"a fault of miniloader's own, {type(error).__name__}: {error}"})
        return
    library = steps.library
    plain = plain or steps.mapped[0].not_prepared
    ours = [other for other in library.libraries if not isinstance(other, HostLibrary)]
    stubs = [(here, function) for other in ours for function, here in other.stand_ins.items()]
    used = dlopen_child.libraries() + [_described(other) for other in ours]
    tell({"bias": library.base, "libraries": used, "stubs": stubs, "plain": plain})


def _prepare(path: str) -> str | None:
    """Prepare ``path`` in a child, as no process can that has it already; why it could not be done."""
    why = SharedValue()

    def attempt() -> int:
        try:
            prepare(path)
        except MiniloaderError as error:
            why.leave(str(error))
        return 0

    with ForkedProcess(attempt) as child:
        child.wait()
    reason: str | None = why.read()
    return reason


def _described(library: Loaded) -> Report:
    block = library.blocks.own
    return {
        "path": os.path.realpath(library.name),
        "bias": library.bias,
        "start": library.mapped.start,
        "end": library.mapped.end,
        "tls_module": block.module if block is not None else 0,
        "tls_offset": address_of(block, 0) - dynamic_linker.thread_pointer() if block is not None else None,
    }


def _start(body: Callable[[int, int], None], seconds: float) -> HeldProcess:
    """A child that does ``body``, silent and without a core file."""
    reports, report = os.pipe()
    hold, holding = os.pipe()

    def run() -> int:
        os.close(reports)
        os.close(holding)
        crash_quietly()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        body(report, hold)
        return 1

    process = ForkedProcess(run, leader=True)
    os.close(report)
    os.close(hold)
    return HeldProcess(process, reports, holding, seconds)


class RemoteMemory(Memory):
    """The pages of a library in process ``pid``, to read."""

    def __init__(self, pid: int, name: str, plan: LoadPlan, bias: int) -> None:
        super().__init__(name, plan, bias)
        self._pid = pid

    def read_into(self, vaddr: int, data: NDArray[Any]) -> None:
        """Fill ``data`` (contiguous) from ``vaddr`` on; OSError when the process is gone."""
        flat = data.view(np.uint8).reshape(-1).data
        done = 0
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            memory.seek(self.bias + vaddr)
            while done < len(flat):
                count = memory.readinto(flat[done:])
                if not count:
                    raise ProcessLookupError(errno.ESRCH, "its memory is gone")
                done += count
