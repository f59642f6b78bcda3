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
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any, Final

__all__ = ["UNFINISHED", "kind_of", "open_regular", "write_whole"]

UNFINISHED: Final = ".miniloader-"
"""What the names of files begin with that are not whole yet; their writers hold a lock on them (flock(2))."""
_STREAMS: Final = ("/dev/", "/proc/")
_MOST_LINKS: Final = 40  # MAXSYMLINKS
_KINDS: Final = {
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


def open_regular(path: str | os.PathLike[str], *, errors: str = "strict") -> IO[str]:
    """The text file ``path`` to be read; OSError, at once, where it is a pipe, a device or a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not wait for a writer
    kind = kind_of(os.fstat(fd).st_mode)
    if kind is not None:
        os.close(fd)
        raise OSError(errno.EINVAL, f"found {kind}, expected a regular file", os.fspath(path))
    return open(fd, encoding="utf-8", errors=errors)


def write_whole(
    path: str | os.PathLike[str], parts: Iterable[Any], *, mode: int | None = None, dir_fd: int | None = None
) -> None:
    """Write ``parts`` (bytes, arrays) as the file ``path``, relative to ``dir_fd`` if that is given.

    The permissions are ``mode``; else those of the file that is replaced, or what the umask leaves.  Where a
    symbolic link leads is replaced, not the link; one that another user has put into a directory which
    everybody writes to, such as /tmp, is refused (proc_sys_fs(5), protected_symlinks).  What is no regular
    file (a pipe, ``/dev/stdout``) is written to as it is.  Raises OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_whole(f"{directory}/notes", [b"whole", b"\\n"])
    ...     print(os.listdir(directory), os.stat(f"{directory}/notes").st_size)
    ['notes'] 6
    """
    name = os.fspath(path)
    if dir_fd is None:
        name = _target(name)
        if _is_stream(name):
            more = 0 if name.startswith(_STREAMS) else os.O_NOFOLLOW
            with open(name, "wb", opener=lambda path, flags: os.open(path, flags | more)) as file:
                file.writelines(parts)
            return
    mode = _mode_of(name, dir_fd) if mode is None else mode
    new = os.path.join(os.path.dirname(name), f"{UNFINISHED}{os.urandom(8).hex()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        with open(fd, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.writelines(parts)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(new, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(new, dir_fd=dir_fd)
        raise


def _target(name: str) -> str:
    """The path that ``name`` leads to, through symbolic links that may be followed; OSError for others."""
    for _ in range(_MOST_LINKS):
        if name.startswith(_STREAMS):
            return name
        directory = os.path.realpath(os.path.dirname(name))
        name = os.path.join(directory, os.path.basename(name))
        try:
            found = os.lstat(name)
        except FileNotFoundError:
            return name
        if not stat.S_ISLNK(found.st_mode):
            return name
        around = os.stat(directory)
        everybodys = around.st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH
        if everybodys and found.st_uid not in (os.geteuid(), around.st_uid):
            raise PermissionError(errno.EACCES, "it is another user's link, where everybody may write", name)
        name = os.path.join(directory, os.readlink(name))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)


def _is_stream(path: str) -> bool:
    """Whether there is something that cannot be replaced; standard output is not, even if it is a file."""
    try:
        return path.startswith(_STREAMS) or not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _mode_of(name: str, dir_fd: int | None) -> int:
    """The permissions of the file that is there; of a new one those that open(2) would give it."""
    try:
        return stat.S_IMODE(os.stat(name, dir_fd=dir_fd).st_mode)
    except FileNotFoundError:
        return 0o666 & ~_umask()


def _umask() -> int:
    """The mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
