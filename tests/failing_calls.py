"""System calls that fail, and what a process has of the kernel before and after.

The seam: :func:`miniloader.kernel.syscalls.injected` for the calls that are declared there, the functions
of :mod:`os` for the others.  A call fails with an errno the ``at``-th time that it is made; where it moves
bytes it may also do half of its work (:data:`SHORT`).
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import gc
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

from miniloader.kernel import syscalls

SHORT: Final = 0
"""Instead of an errno: the call does half of what it was asked for."""

_E = errno
#: What the manual pages (section 2, ERRORS) list for each call.
ERRNOS: Final[dict[str, tuple[int, ...]]] = {
    "mmap": (_E.EACCES, _E.EAGAIN, _E.EBADF, _E.EEXIST, _E.EINVAL, _E.ENFILE, _E.ENODEV, _E.ENOMEM,
             _E.EOVERFLOW, _E.EPERM, _E.ETXTBSY),
    "mprotect": (_E.EACCES, _E.EINVAL, _E.ENOMEM),
    "madvise": (_E.EACCES, _E.EAGAIN, _E.EBADF, _E.EFAULT, _E.EINVAL, _E.EIO, _E.ENOMEM, _E.EPERM),
    "ioctl": (_E.EBADF, _E.EFAULT, _E.EINVAL, _E.ENOTTY, _E.EPERM, _E.ENOMEM, _E.ESRCH, _E.ENOENT, _E.E2BIG,
              _E.EINTR),
    "open": (_E.EACCES, _E.EBUSY, _E.EINTR, _E.EINVAL, _E.EIO, _E.EISDIR, _E.ELOOP, _E.EMFILE,
             _E.ENAMETOOLONG, _E.ENFILE, _E.ENODEV, _E.ENOENT, _E.ENOMEM, _E.ENOTDIR, _E.ENXIO, _E.EPERM,
             _E.ESRCH, _E.ETXTBSY),
    "read": (SHORT, _E.EAGAIN, _E.EBADF, _E.EFAULT, _E.EINTR, _E.EINVAL, _E.EIO, _E.EISDIR, _E.ENOMEM,
             _E.ESRCH),
    "pread": (SHORT, _E.EAGAIN, _E.EFAULT, _E.EINVAL, _E.EIO, _E.EISDIR, _E.ENOMEM, _E.EOVERFLOW, _E.ESRCH),
    "preadv": (SHORT, _E.EFAULT, _E.EINVAL, _E.EIO, _E.ENOMEM, _E.EPERM, _E.ESRCH),
    "fstat": (_E.EBADF, _E.EIO, _E.ENOMEM, _E.EOVERFLOW),
    "memfd_create": (_E.EINVAL, _E.EMFILE, _E.ENFILE, _E.ENOMEM, _E.EPERM),
    "write": (SHORT, _E.EDQUOT, _E.EFBIG, _E.EIO, _E.ENOSPC),
    "fsync": (_E.EDQUOT, _E.EIO, _E.ENOSPC),
    "dup": (_E.EBADF, _E.EMFILE),
}  # fmt: skip


def label(number: int) -> str:
    """``ENOMEM``, as tests and messages name it."""
    return errno.errorcode[number] if number else "SHORT"


class Failing:
    """A system call that fails, with ``number``, the ``at``-th time it is made; ``at=0``: never."""

    def __init__(self, name: str, number: int, at: int) -> None:
        self.name, self.number, self.at, self.calls = name, number, at, 0
        self.declared = name in syscalls._LIBC
        self.real: Callable[..., Any] = syscalls._LIBC[name] if self.declared else getattr(os, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            return self._short(arguments) if self.number == SHORT else self._fail(arguments)
        result = self.real(*arguments, **options)
        return int(result or 0) if self.declared else result

    def _fail(self, arguments: tuple[Any, ...]) -> int:
        if not self.declared:
            where = arguments[:1] if self.name == "open" else ()
            raise OSError(self.number, os.strerror(self.number), *where)
        ctypes.set_errno(self.number)
        return -1

    def _short(self, arguments: tuple[Any, ...]) -> Any:
        first, second, *rest = arguments
        if self.name == "preadv":
            return self.real(first, [second[0][: len(second[0]) // 2]], *rest)
        half = second[: len(second) // 2] if self.name == "write" else max(second // 2, 1)
        return self.real(first, half, *rest)


class _Raw(io.FileIO):
    """What :func:`open` opens while :class:`Failing` counts."""

    fault: Failing

    def readinto(self, buffer: Any) -> int:
        self._count("read")
        return int(super().readinto(buffer) or 0)

    def readall(self) -> bytes:
        self._count("read")
        return super().readall()

    def write(self, data: Any) -> int:
        self._count("write")
        return int(super().write(data) or 0)

    def _count(self, name: str) -> None:
        if self.fault.name == name:
            self.fault.calls += 1
            if self.fault.calls == self.fault.at and self.fault.number != SHORT:
                raise OSError(self.fault.number, os.strerror(self.fault.number))


def _opening(fault: Failing) -> Callable[..., Any]:
    """In place of the built-in ``open``, which makes its system calls where nobody can put another."""

    def opened(
        path: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
    ) -> Any:
        if fault.name == "open" and not isinstance(path, int):
            fault.calls += 1
            if fault.calls == fault.at:
                raise OSError(fault.number, os.strerror(fault.number), path)
        kind = type("_Counted", (_Raw,), {"fault": fault})
        raw = kind(path, mode.replace("b", "").replace("t", ""), closefd=closefd)
        if buffering == 0:
            return raw
        binary = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    return opened


@contextmanager
def failing(name: str, number: int, at: int) -> Iterator[Failing]:
    """Have the ``at``-th call of ``name`` in the block fail."""
    fault = Failing(name, number, at)
    with ExitStack() as stack:
        if fault.declared:
            stack.enter_context(syscalls.injected(name, fault))
        else:
            stack.enter_context(mock.patch.object(os, name, fault))
        if name in ("open", "read", "write"):
            for module in (builtins, io):
                stack.enter_context(mock.patch.object(module, "open", _opening(fault)))
        yield fault


@dataclass(frozen=True)
class Footprint:
    """What this process has of the kernel: mappings of files, descriptors, anonymous memory.

    ``code`` is how many anonymous mappings are executable; ``anonymous`` is bytes, not compared exactly, as
    Python maps some now and then.
    """

    files: tuple[str, ...]
    descriptors: tuple[str, ...]
    code: int
    anonymous: int = field(compare=False)

    @classmethod
    def now(cls) -> Footprint:
        lines = [
            line.split(None, 5) for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
        ]
        unnamed = [line for line in lines if len(line) == 5]
        ends = [[int(part, 16) for part in line[0].split("-")] for line in unnamed]
        return cls(
            tuple(" ".join(line) for line in lines if len(line) == 6 and not line[5].startswith("[")),
            tuple(sorted(os.listdir("/proc/self/fd"))),
            sum("x" in line[1] for line in unnamed),
            sum(high - low for low, high in ends),
        )

    def check(self) -> None:
        """Fail unless it is as it was."""
        now = Footprint.now()
        assert now == self
        assert now.anonymous - self.anonymous < 4 << 20  # a library's would be 8 MiB or more


def start_threads(count: int = 4) -> None:
    """Have so many threads at once, and wait until they are gone.

    glibc keeps the stack of each, 8 MiB, and malloc the arena, 64 MiB of addresses, for the next ones: so
    what an audit's threads use is there, however many of them the kernel has not quite ended yet.
    """
    together = threading.Barrier(count)

    def run() -> None:
        bytes(1 << 16)  # which malloc gives, not Python
        together.wait()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        while os.path.exists(f"/proc/self/task/{thread.native_id}"):
            time.sleep(0.001)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of circles: what is to be undone has to be undone at once."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
