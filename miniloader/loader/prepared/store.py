"""Where prepared libraries are kept: files that nobody but their user can read, write or plant.

``$XDG_CACHE_HOME/miniloader/prepared`` (or below ``~/.cache``) with mode 0700, files with mode 0400.  What is
found there is used only if the directory and the file are this user's own and closed to everybody else.  A
file is written under another name, synced and renamed, so that there are only whole ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

from miniloader.errors import EvidenceError, LoadError
from miniloader.files import UNFINISHED, walked_to, write_whole
from miniloader.forking import importing
from miniloader.kernel.procfs import read_proc_file

__all__ = ["SUFFIX", "boot_id", "clear", "directory", "names", "open_file", "secret", "sweep", "write_file"]

SUFFIX: Final = ".prepared"
_SECRET: Final = "secret"
_LONGEST: Final = 1 << 10  # bytes of the secret: a boot, a line's end, 32 bytes
_OTHERS: Final = 0o077
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


def directory() -> str:
    """The path of the directory, which may not exist; :class:`LoadError` for a user without a home.

    What is empty or not an absolute path counts as not set, as the XDG Base Directory Specification has it.
    """
    parent = os.environ.get("XDG_CACHE_HOME", "")
    if not parent.startswith("/"):
        parent = f"{_home()}/.cache"
    return os.path.join(parent, "miniloader", "prepared")


def _home() -> str:
    """The user's home directory: $HOME, or what the list of users has."""
    home = os.environ.get("HOME", "")
    if not home.startswith("/"):
        with importing:
            import pwd
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = ""
    if not home.startswith("/"):
        raise LoadError("no directory for the cache: this user has no home", hint="set XDG_CACHE_HOME")
    return home.rstrip("/")


@lru_cache(maxsize=1)
def boot_id() -> str:
    """What tells this run of the kernel from all others (random(4)); EvidenceError where it is not told."""
    try:
        return read_proc_file(_BOOT_ID).decode().strip()
    except EvidenceError as error:
        hint = "prepared pages hold until the machine boots again; mount /proc without subset=pid"
        raise EvidenceError(error.message, hint=hint) from error


def names() -> list[str]:
    """The files of prepared libraries, whatever they hold; :class:`LoadError` if it is not ours alone."""
    try:
        with _opened(create=False) as place:
            return sorted(name for name in os.listdir(place) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LoadError(f"{directory()}: {error.strerror}") from None


def open_file(name: str) -> tuple[int, os.stat_result]:
    """A descriptor of the file ``name``, and its status.

    Raises :class:`LoadError` when it, or the directory, is not ours alone, and FileNotFoundError.
    """
    with _opened(create=False) as place:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    status = os.fstat(fd)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & (_OTHERS | 0o200)
    ):
        os.close(fd)
        raise LoadError(
            f"{os.path.join(directory(), name)}: found {_ownership(status)}, "
            f"expected a file of user {os.geteuid()} with mode 0400"
        )
    return fd, status


def write_file(name: str, parts: Iterable[Any]) -> None:
    """Write ``parts`` (bytes, arrays) as the file ``name``: all or nothing; :class:`LoadError`."""
    try:
        with _opened(create=True) as place:
            write_whole(name, parts, mode=0o400, dir_fd=place)
            os.fsync(place)
    except OSError as error:
        raise LoadError(
            f"{os.path.join(directory(), name)}: cannot be written: {error.strerror}",
            hint="choose another directory with XDG_CACHE_HOME",
        ) from None


def clear() -> None:
    """Remove every file, and the secret; processes that have one mapped keep its pages."""
    with contextlib.suppress(FileNotFoundError), _opened(create=False) as place:
        for name in os.listdir(place):
            _remove(name, place)


def sweep() -> None:
    """Remove what a process that was killed while it wrote has left; one that still writes keeps its file."""
    with contextlib.suppress(OSError), _opened(create=False) as place:
        for name in os.listdir(place):
            if name.startswith(UNFINISHED) and _is_left(name, place):
                _remove(name, place)


def _is_left(name: str, place: int) -> bool:
    """Whether nobody writes the file any more: who does holds a lock on it (flock(2))."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _remove(name: str, place: int) -> None:
    """Remove a file of whatever kind, or a directory with all that is in it; links are not followed."""
    try:
        os.unlink(name, dir_fd=place)
    except IsADirectoryError:
        with importing:
            import shutil

        shutil.rmtree(name, dir_fd=place)


def secret(boot: str) -> bytes:
    """32 random bytes, the same for this user until the machine boots again."""
    try:
        fd, _ = open_file(_SECRET)
    except FileNotFoundError:
        kept = b""
    else:
        with open(fd, "rb") as file:
            kept = file.read(_LONGEST)
    written_at, _, key = kept.partition(b"\n")
    if written_at == boot.encode() and len(key) == 32:
        return key
    key = os.urandom(32)
    write_file(_SECRET, [boot.encode(), b"\n", key])
    return key


@contextmanager
def _opened(*, create: bool) -> Iterator[int]:
    """A descriptor of the directory, which is ours alone."""
    path = directory()
    if create:
        _make(os.path.dirname(path))
    try:
        parent, name = walked_to(path)
    except PermissionError as error:
        hint = "choose another directory with XDG_CACHE_HOME"
        raise LoadError(f"{path}: {error.strerror}", hint=hint) from None
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
            raise LoadError(
                f"{path}: found {_ownership(status)}, expected one of user {os.geteuid()} with mode 0700",
                hint="remove it, or choose another with XDG_CACHE_HOME",
            )
        yield fd
    finally:
        os.close(fd)


def _make(path: str) -> None:
    """Make a directory and those that it is in, however many: os.makedirs calls itself for each."""
    for part in re.finditer(r"/+[^/]+", path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path[: part.end()])


def _ownership(status: os.stat_result) -> str:
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a file"
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        kind = "something else"
    return f"{kind} of user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
