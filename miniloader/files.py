"""Writing files whole: whoever reads a file finds all of it, or what was there before.  Reading only files.

The bytes go to another name in the same directory, to the disk, and only then take the file's name (rename(2)
is atomic).  A full disk, a limit or an interrupt on the way leaves nothing behind.  Audits, pages and the
cache of prepared libraries are written with :func:`write_whole`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

__all__ = [
    "UNFINISHED",
    "NotRegularError",
    "kind_of",
    "open_regular",
    "read_regular",
    "read_text",
    "walked_to",
    "working_directory",
    "write_whole",
]

UNFINISHED: Final = ".miniloader-"
"""What the names of files begin with that are not whole yet; their writers hold a lock on them (flock(2))."""
_PROC: Final = "/proc/"
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_READING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_PART: Final = 1 << 20  # bytes that are read at once
_MOST_LINKS: Final = 40  # MAXSYMLINKS
_KINDS: Final = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind_of(mode: int) -> str | None:
    """What a file with the ``st_mode`` is, where it is no regular file.

    >>> kind_of(os.stat("/dev/null").st_mode), kind_of(os.stat(__file__).st_mode)
    ('a character device', None)
    """
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


class NotRegularError(OSError):
    """What was to be read is no regular file but ``kind``, such as a pipe; ``device`` is which one it is."""

    def __init__(self, path: str, kind: str, device: int) -> None:
        super().__init__(errno.EINVAL, f"found {kind}, expected a regular file", path)
        self.kind = kind
        self.device = device


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of the regular file ``path``, to be read; NotRegularError, or another OSError.

    Nothing else is opened at all: a pipe would wait for a writer, and there are devices that do something (a
    watchdog, a tape), where whoever may put a link there could choose which.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(found)
        kind = kind_of(status.st_mode)
        if kind is not None:
            raise NotRegularError(os.fspath(path), kind, status.st_rdev)
        try:
            return os.open(f"/proc/self/fd/{found}", _READING)
        except FileNotFoundError:  # where /proc is not mounted
            return os.open(path, _READING)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(found)


def read_regular(path: str | os.PathLike[str], most: int) -> bytes | None:
    """The bytes of the regular file ``path``; None where there are more than ``most``.

    Raises as :func:`open_regular` does, and BlockingIOError where one of the kernel's files has nothing to
    give yet, as ``trace_pipe`` of /sys/kernel/tracing.
    """
    data = bytearray()
    for part in _parts_of(path, min(most + 1, _PART)):
        data += part
        if len(data) > most:
            return None
    return bytes(data)


def read_text(path: str | os.PathLike[str], *, errors: str = "strict") -> str:
    """The text of the regular file ``path``; ValueError where it is none, at the first byte that is zero.

    So a hole that takes no disk is not read whole.  Raises as :func:`read_regular` does.
    """
    parts = []
    for part in _parts_of(path, _PART):
        if b"\0" in part:
            raise ValueError("found a zero byte, expected text")
        parts.append(part)
    return b"".join(parts).decode(errors=errors)


def _parts_of(path: str | os.PathLike[str], length: int) -> Iterator[bytes]:
    descriptor = open_regular(path)
    try:
        while part := os.read(descriptor, length):
            yield part
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(descriptor)


def working_directory() -> str:
    """Where this process is; "" where that has been removed.

    >>> working_directory() == os.getcwd()
    True
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def write_whole(
    path: str | os.PathLike[str], parts: Iterable[Any], *, mode: int | None = None, dir_fd: int | None = None
) -> None:
    """Write ``parts`` (bytes, arrays) as the file ``path``, or as the file of that name in ``dir_fd``.

    The permissions are ``mode``; else those of the file that is replaced, or what the umask leaves; what
    another user's file has and the umask leaves.  Where a symbolic link leads is replaced, not the link, if
    :func:`walked_to` follows it.  What is no regular file (a pipe, ``/dev/stdout``) is written to as it is.
    Raises OSError about ``path``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_whole(f"{directory}/notes", [b"whole", b"\\n"])
    ...     print(os.listdir(directory), os.stat(f"{directory}/notes").st_size)
    ['notes'] 6
    """
    name = os.fspath(path)
    if dir_fd is not None:
        _replace(name, parts, mode, dir_fd)
        return
    try:
        _write(name, parts, mode)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error


def _write(path: str, parts: Iterable[Any], mode: int | None) -> None:
    """Write ``parts`` where ``path`` leads."""
    place, last = walked_to(path)
    try:
        if last.startswith(_PROC):  # standard output, which may be a file, is not replaced
            with open(last, "wb") as file:
                file.writelines(parts)
        elif (status := _status(last, place)) is None or stat.S_ISREG(status.st_mode):
            _replace(last, parts, mode, place)
        else:
            _write_stream(last, parts, place)
    finally:
        os.close(place)


def _replace(name: str, parts: Iterable[Any], mode: int | None, place: int) -> None:
    """Put a new file in the place of ``name`` in the directory ``place``, whatever that is by then."""
    mode = _mode_of(name, place) if mode is None else mode
    new = f"{UNFINISHED}{os.urandom(8).hex()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place)
    try:
        with open(fd, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.writelines(parts)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(new, name, src_dir_fd=place, dst_dir_fd=place)
    except BaseException:
        with suppress(OSError):
            os.unlink(new, dir_fd=place)
        raise


def _write_stream(name: str, parts: Iterable[Any], place: int) -> None:
    """Write to the pipe or device ``name``; a file that has come in its place meanwhile stays as it is."""
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=place)
    with open(fd, "wb") as file:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EAGAIN, "a regular file has come in its place")
        file.writelines(parts)


def walked_to(path: str) -> tuple[int, str]:
    """A descriptor of the directory that ``path`` leads to, to be closed, and the name in it; OSError.

    Each step is taken from the directory before it, so that nothing put behind it leads it astray.  Links of
    ours and of root are followed.  Another user's is not in a directory that everybody writes to, such as
    /tmp, whatever fs.protected_symlinks is (proc_sys_fs(5)), nor where it leads into a directory that is not
    that user's: there we would write, and that user may not.  In ``/proc`` the name is a path from the root
    on: what looks like a link there (``/dev/stdout`` leads to one) is none.
    """
    links, owners, names, at_root = 0, set[int](), _names(path), path.startswith("/")
    place = os.open("/" if at_root else ".", _DIRECTORY)
    try:
        while not (at_root and names[-1] == "proc"):
            name = names.pop()
            status = _status(name, place)
            if status is not None and stat.S_ISLNK(status.st_mode):
                _refuse_planted(status, os.fstat(place))
                owners.add(status.st_uid)
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = os.readlink(name, dir_fd=place)
                names += _names(target)
                at_root = target.startswith("/")
                place = _entered("/", place) if at_root else place
            elif names:
                place, at_root = _entered(name, place), False
            else:
                if status is not None:
                    _refuse_planted(status, os.fstat(place))
                names, at_root = [name], False
                break
        if owners <= {*_trusted(), os.fstat(place).st_uid}:
            return place, "/" * at_root + "/".join(reversed(names))
        raise PermissionError(
            errno.EACCES, "a link of another user leads into a directory that is not that user's"
        )
    except BaseException:
        os.close(place)
        raise


def _names(path: str) -> list[str]:
    """The names in a path, the last one first; a dot is the last of one that ends in a slash."""
    whole = path if path[-1:] not in ("", "/") else f"{path}."
    return [name for name in reversed(whole.split("/")) if name]


def _entered(name: str, place: int) -> int:
    """A descriptor of the directory ``name`` in ``place``, which is closed."""
    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
    os.close(place)
    return fd


def _status(name: str, place: int) -> os.stat_result | None:
    """The status of what has the name, be it a link; None where nothing has it."""
    try:
        return os.lstat(name, dir_fd=place)
    except FileNotFoundError:
        return None


def _trusted() -> set[int]:
    """The users whose links lead where they may: this one and root, which may have another number here."""
    return {os.geteuid(), os.stat("/").st_uid}


def _refuse_planted(status: os.stat_result, around: os.stat_result) -> None:
    """PermissionError for another user's link, pipe or device in a directory that everybody writes to."""
    kind = kind_of(status.st_mode)
    everybodys = around.st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH
    if kind and everybodys and status.st_uid not in {*_trusted(), around.st_uid}:
        raise PermissionError(errno.EACCES, f"found {kind} of another user, where everybody may write")


def _mode_of(name: str, place: int) -> int:
    """The permissions of a file to be written, where ``name`` may be one already; see :func:`write_whole`."""
    status, new = _status(name, place), 0o666 & ~_umask()
    if status is None or not stat.S_ISREG(status.st_mode):
        return new
    return status.st_mode & (0o777 if status.st_uid == os.geteuid() else new)


def _umask() -> int:
    """The mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
