"""Child processes that load one library, say where everything is, and hold still to be looked at.

They are forks, not fresh interpreters, because a fork costs a fraction and finds the same process each time.
Whoever calls has to see to it that the calling process has not loaded what they shall load.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import LoadPlan
from miniloader.errors import LoadError, MiniloaderError, WorkerError
from miniloader.kernel import syscalls
from miniloader.loader import Event, host, load
from miniloader.loader.host import HostLibrary
from miniloader.loader.loaded import Loaded
from miniloader.loader.memory import Memory

__all__ = ["Held", "RemoteMemory", "load_and_hold", "open_and_hold"]

Report = dict[str, Any]
Tell = Callable[[Report], None]  # sends a report, and holds still


class Held:
    """A child process, with our ends of its pipes.  A context manager that kills it."""

    def __init__(self, pid: int, reports: int, hold: int, seconds: float) -> None:
        self.pid = pid
        self._reports = reports
        self._hold = hold
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._read = b""

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(wait=False)

    def report(self) -> Report:
        """Its next report; :class:`WorkerError` when it ends, or takes too long, before that."""
        while b"\n" not in self._read:
            left = self._until - time.monotonic()
            if left <= 0 or not select.select([self._reports], [], [], left)[0]:
                self.end(wait=False)
                raise WorkerError(f"took more than {self._seconds:g} s")
            data = os.read(self._reports, 1 << 16)
            if not data:
                raise WorkerError(self.end())
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return dict(json.loads(line))

    def go_on(self) -> None:
        """Let it go on to its next report."""
        os.write(self._hold, b".")

    def end(self, *, wait: bool = True) -> str:
        """Kill it, with whatever it started; how it had ended.

        With ``wait`` it has a moment to be gone, as a pipe breaks before a process is.
        """
        if self.pid == 0:
            return "is gone"
        os.close(self._hold)
        os.close(self._reports)
        by_itself = wait and self._wait(0.05)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)  # it had no time to begin a session
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        if not by_itself:
            return "was killed"
        code = os.waitstatus_to_exitcode(status)
        return f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _wait(self, seconds: float) -> bool:
        """Whether it is gone by itself within ``seconds``."""
        until = time.monotonic() + seconds
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True


def open_and_hold(path: str, seconds: float = 60) -> Held:
    """A child that opens ``path`` with dlopen(3), ``RTLD_NOW``.  It reports once."""
    return _start(lambda tell: _open(path, tell), seconds)


def load_and_hold(path: str, seconds: float = 60) -> Held:
    """A child that loads ``path`` with miniloader, allowing what dlopen allows.

    It reports, and holds still, twice: when everything is relocated (its ``start`` only), and when the
    constructors have run.
    """
    return _start(lambda tell: _load(path, tell), seconds)


def _open(path: str, tell: Tell) -> None:
    try:
        handle = host.open_host(path, load=True)
    except LoadError as error:
        tell({"error": str(error)})
        return
    assert handle is not None
    tell({"bias": host.load_address(handle), "libraries": _host_libraries()})


def _load(path: str, tell: Tell) -> None:
    start: int | None = None
    held = False

    def on_event(event: Event) -> None:
        nonlocal start, held
        if event.stage == "reserve" and start is None:  # the library itself is mapped first
            start = event.data["address"]
        elif event.stage == "initialise" and not held:
            held = True
            tell({"start": start})

    try:
        library = load(
            path, on_event=on_event, text_relocations=True, executable_stack=True, writable_code=True
        )
    except MiniloaderError as error:
        tell({"error": str(error)})
        return
    except Exception as error:  # noqa: BLE001 - a fault of the loader's is what this is here to find
        tell({"error": f"a fault of miniloader's own, {type(error).__name__}: {error}"})
        return
    if not held:
        tell({"start": start})
    ours = [other for other in library.libraries if not isinstance(other, HostLibrary)]
    tell(
        {
            "bias": library.base,
            "libraries": _host_libraries() + [_described(other) for other in ours],
            "stubs": [(stub.address, function) for other in ours for function, stub in other.stubs.items()],
        }
    )


def _host_libraries() -> list[Report]:
    """What ld.so has loaded: path, bias, first and last address, TLS module, offset of this thread's block."""
    return [
        {
            "path": os.path.realpath(library.path or "/proc/self/exe"),
            "bias": library.bias,
            "start": library.bias + min(start for start, _ in library.ranges),
            "end": library.bias + max(end for _, end in library.ranges),
            "tls_module": library.tls_module,
            "tls_offset": _block(library.tls_module) if library.tls_module else None,
        }
        for library in host.libraries()
    ]


def _block(module: int) -> int:
    """Where this thread's block is, from its thread pointer; glibc makes it when it is first asked for."""
    get_address = ctypes.CDLL(None).__tls_get_addr
    get_address.restype = ctypes.c_size_t
    address: int = get_address((ctypes.c_size_t * 2)(module, 0))
    return address - host.thread_pointer()


def _described(library: Loaded) -> Report:
    block = library.blocks.own
    return {
        "path": os.path.realpath(library.name),
        "bias": library.bias,
        "start": library.mapped.start,
        "end": library.mapped.end,
        "tls_module": block.module if block is not None else 0,
        "tls_offset": _block(block.module) if block is not None else None,
    }


def _start(body: Callable[[Tell], None], seconds: float) -> Held:
    reports, report = os.pipe()
    hold, holding = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reports)
        os.close(holding)

        def tell(what: Report) -> None:
            os.write(report, json.dumps(what).encode() + b"\n")
            os.read(hold, 1)

        _be_the_child(lambda: body(tell))
    os.close(report)
    os.close(hold)
    return Held(pid, reports, holding, seconds)


def _be_the_child(body: Callable[[], None]) -> NoReturn:
    """In a session of its own, silent, without a core file, and gone when the parent is."""
    try:
        os.setsid()
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        body()
    finally:
        os._exit(1)


class RemoteMemory(Memory):
    """The pages of a library in process ``pid``, to read."""

    def __init__(self, pid: int, name: str, plan: LoadPlan, bias: int) -> None:
        super().__init__(name, plan, bias)
        self._pid = pid

    def read_into(self, vaddr: int, data: NDArray[Any]) -> None:
        """Fill ``data`` (contiguous) from ``vaddr`` on; OSError when the process is gone."""
        flat = data.view(np.uint8)
        done = 0
        while done < len(flat):
            done += syscalls.process_vm_readv(
                self._pid, self.bias + vaddr + done, flat.ctypes.data + done, len(flat) - done
            )
