"""Where the bytes of an ELF file come from.

Everything is read by copy (pread(2)) after its extent has been compared with the file's size, so that
neither a number in the file nor a file cut short behind our back can cost memory or raise SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Any, Final, Protocol

from miniloader.errors import ElfError, LoadError
from miniloader.files import NotRegularError, kind_of, open_regular

__all__ = ["LARGE", "Bytes", "FileCalls", "Source", "large_room", "unreadable"]

Bytes = bytes | mmap.mmap
"""What is read: both can be indexed, sliced and searched, and given to :func:`numpy.frombuffer`."""

_HEAD: Final = 1 << 12
LARGE: Final = 1 << 21
"""From so many bytes on :func:`large_room` is worth its call."""
_HOLE: Final = 1 << 14
"""So many zeros in a row that take no disk lie in no table; those of 800 libraries have no page of them."""


class FileCalls(Protocol):
    """The system calls that a source makes, each as it is in :mod:`os`, which has them all."""

    def fstat(self, fd: int, /) -> os.stat_result:
        """fstat(2)."""

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        """pread(2)."""

    def preadv(self, fd: int, buffers: Any, offset: int, /) -> int:
        """preadv(2)."""

    def lseek(self, fd: int, offset: int, whence: int, /) -> int:
        """lseek(2)."""

    def close(self, fd: int, /) -> None:
        """close(2)."""


class Source:
    """An open, readable ELF image: ``size`` bytes from ``start`` on of descriptor ``fd``, by default all.

    The descriptor belongs to the source and is closed with it.  ``name`` is for messages, ``identity``
    is the file's device and inode.  ``calls`` is who makes the system calls: who has the descriptor.
    """

    #: Negative once it is closed or rests, and where another process makes the calls.
    fd: int = -1
    #: Where the file of a source that rests is found again.
    _path: str | None = None

    def __init__(
        self, fd: int, name: str, start: int = 0, size: int | None = None, *, calls: FileCalls = os
    ) -> None:
        """Adopt ``fd``; it is closed here when it is no regular file, or cannot be read."""
        self.calls = calls
        try:
            status = calls.fstat(fd)
            kind = kind_of(status.st_mode)
            # Most tables of most libraries are here: one read instead of fifty.
            head = calls.pread(fd, _HEAD, start) if kind is None and start >= 0 else b""
        except OSError as error:
            calls.close(fd)
            raise unreadable(name, "file", error) from None
        fault = None
        if kind is not None:
            fault = ("file", kind, "a regular file")
        elif start < 0 or start > status.st_size:
            fault = ("offset", f"{start}", f"at most the file's size, {status.st_size} bytes")
        elif status.st_size == start or size == 0:
            fault = ("file", "0 bytes", "an ELF file")
        elif size is not None and start + size > status.st_size:
            fault = ("size", f"{size} bytes", f"at most {status.st_size - start}, which the file has there")
        if fault is not None:
            calls.close(fd)
            raise ElfError(name, *fault)
        self.fd = fd
        self.name = name
        self.start = start
        self.size = status.st_size - start if size is None else size
        self.identity = _identity(status)
        self._head = head[: self.size]

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from other images: device, inode, and where in the file it begins."""
        return (*self.identity, self.start)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, fd={self.fd}, start={self.start}, size={self.size})"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Open the file ``path``; :class:`ElfError` when there is none or it is not a regular file."""
        name = os.fspath(path)
        try:
            fd = open_regular(name)
        except (OSError, ValueError) as error:
            raise unreadable(name, "file", error) from None
        return cls(fd, name)

    @classmethod
    def from_fd(cls, fd: int, *, name: str | None = None, start: int = 0, size: int | None = None) -> Source:
        """The file behind ``fd`` (duplicated; yours stays open), ``size`` bytes from ``start`` on.

        ``start`` must be a multiple of the page size for the image to be mapped.
        """
        try:
            copy = os.dup(fd)
        except OSError as error:
            raise LoadError(f"descriptor {fd}: {error.strerror}") from None
        return cls(copy, name or f"descriptor {fd}", start, size)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, name: str = "bytes in memory") -> Source:
        """``data`` as a file that has no name: a sealed memfd (memfd_create(2))."""
        fd = -1
        try:
            fd = os.memfd_create("miniloader", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            view = memoryview(data).cast("B")
            while view:
                view = view[os.write(fd, view) :]
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise LoadError(f"{name}: cannot keep it in memory: {error.strerror}") from None
        return cls(fd, name)

    def close(self) -> None:
        """Close the descriptor now; reading afterwards is an error, closing twice is not."""
        fd, self.fd, self._path = self.fd, -1, None
        if fd < 0:
            return
        # A program may have closed all that it did not know: then the number is nobody's, or another file's.
        try:
            is_own = _identity(self.calls.fstat(fd)) == self.identity
        except OSError:
            is_own = True
        if is_own:
            with contextlib.suppress(OSError):
                self.calls.close(fd)

    def rest(self) -> None:
        """Close the descriptor until something is read, if it is of a file that its name leads to.

        A program with hundreds of libraries may have as few descriptors open as it would have without us.
        """
        if self.fd < 0 or self.calls is not os:
            return
        with contextlib.suppress(OSError, ValueError):  # also where the working directory has been removed
            path = self.name if self.name.startswith("/") else os.path.abspath(self.name)
            if _identity(os.stat(path)) == self.identity:
                self.close()
                self._path = path

    def _opened(self) -> int:
        """The descriptor, of a source that may have rested; OSError where another file is there by now."""
        if self.fd < 0 and self._path is not None:
            fd = open_regular(self._path)
            if _identity(os.fstat(fd)) != self.identity:
                os.close(fd)
                raise OSError(errno.ESTALE, "it is another file by now", self._path)
            self.fd, self._path = fd, None
        return self.fd

    def __del__(self) -> None:
        """Close what nobody has closed; not by weakref.finalize, whose turn at exit a program can tell."""
        self.close()

    def read(self, offset: int, length: int, field: str) -> Bytes:
        """``length`` bytes from ``offset`` on; :class:`ElfError` naming ``field`` if the file has fewer."""
        end = offset + length
        if 0 <= offset <= end <= len(self._head):
            return self._head[offset:end]
        if offset < 0 or length < 0 or end > self.size:
            raise ElfError(
                self.name,
                field,
                f"bytes {offset:#x} to {end:#x}",
                f"inside the file of {self.size:#x} bytes",
            )
        at = self.start + offset
        if length >= LARGE:
            self.refuse_hole(offset, length, field)
        try:
            data = (
                self.calls.pread(self._opened(), length, at)
                if length < LARGE
                else self._read_large(at, length)
            )
        except OSError as error:
            raise unreadable(self.name, field, error) from None
        if len(data) < length:
            hint = "it was cut short meanwhile"
            raise ElfError(self.name, field, f"{len(data)} bytes", f"{length} bytes", hint=hint)
        return data

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges [start, end) of the ``length`` bytes from ``offset`` on that holes are between.

        A hole (lseek(2), SEEK_HOLE) reads as zeros and takes no disk: over one, or many with crumbs of data
        between them, any length can be claimed at no cost.  Holes of less than 16 KiB are overlooked, and
        all where ``length`` is less than :data:`LARGE`.  Nothing is read here.  Where the file system knows
        of no holes all is one range.  Beyond the end of the file there is nothing.
        """
        start, hole, end = offset, offset, min(offset + length, self.size)
        while length >= LARGE and hole < end:
            data = min(self._seek(hole, os.SEEK_DATA), end)
            if data - hole >= _HOLE:
                if start < hole:
                    yield start, hole
                start = data
            hole = self._seek(data, os.SEEK_HOLE) if data < end else end
        if start < end:
            yield start, end

    def _seek(self, offset: int, whence: int) -> int:
        """Where data or a hole is next; the descriptor stays where it is, as its duplicates share that."""
        position = self.calls.lseek(self._opened(), 0, os.SEEK_CUR)
        try:
            return self.calls.lseek(self.fd, self.start + offset, whence) - self.start
        except OSError as error:
            # Without data there is none up to the end; what cannot tell holds data everywhere.
            return offset if whence == os.SEEK_DATA and error.errno != errno.ENXIO else self.size
        finally:
            self.calls.lseek(self.fd, position, os.SEEK_SET)

    def refuse_hole(self, offset: int, length: int, field: str) -> None:
        """Raise :class:`ElfError` for the table ``field`` where a hole or the file's end lies in it.

        Who has one of less than :data:`LARGE` bytes need not ask.
        """
        if next(self.parts(offset, length), None) != (offset, offset + length):
            what = "a hole" if offset + length <= self.size else "the end"
            found = f"{length:#x} bytes over {what} of the file"
            raise ElfError(self.name, field, found, "bytes that the file holds")

    def _read_large(self, at: int, length: int) -> Bytes:
        """Into huge pages; fewer bytes at the end."""
        room, done, fd = large_room(length), 0, self._opened()
        with memoryview(room) as view:
            while done < length:  # preadv(2) gives at most 2 GiB at a time
                with view[done:] as rest:
                    count = self.calls.preadv(fd, [rest], at + done)
                if not count:
                    return room[:done]
                done += count
        return room


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def large_room(length: int) -> mmap.mmap:
    """Memory for millions of bytes, of huge pages: faulting small ones in takes longer than filling them."""
    room = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    return room


def unreadable(name: str, field: str, error: OSError | ValueError) -> ElfError:
    """What is said of a file that cannot be opened or read; a ValueError is a name with a NUL."""
    if isinstance(error, NotRegularError):
        return ElfError(name, field, error.kind, "a regular file")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return ElfError(name, field, str(reason), "a readable ELF file")
