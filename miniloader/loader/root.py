"""A root directory, and the files inside of it: this machine's, a container image, a sysroot."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from miniloader.files import open_regular

__all__ = ["Root"]

_MOST_LINKS: Final = 40  # MAXSYMLINKS of the kernel's include/linux/namei.h


class Root:
    """The files below a directory, by their paths inside of it.

    Symbolic links are followed as a process would whose root it is (chroot(2)): none leads out of it, and
    ``..`` of the root is the root.  Whether a directory is there is asked once.

    >>> Root("/").outside("/etc/../etc/passwd")
    '/etc/../etc/passwd'
    """

    def __init__(self, directory: str | os.PathLike[str] = "/") -> None:
        #: The root as seen from here.
        self.directory = os.path.realpath(directory)
        self._directories: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"Root({self.directory!r})"

    @property
    def is_ours(self) -> bool:
        """Whether it is the root of this process."""
        return self.directory == "/"

    def outside(self, path: str) -> str:
        """The path from here; links are followed, the last one as well, where the root is another.

        :class:`OSError` where a part of it is not there (or there are too many links), as open(2) has it.
        """
        return path if self.is_ours else self.directory + self.real(path)

    def inside(self, path: str) -> str:
        """The path inside of the root of the file that ``path`` is from here, links and all.

        ``path`` itself where it does not lie below the root.

        >>> Root("/usr").inside("/usr/lib/x.so"), Root("/usr").inside("/lib/x.so")
        ('/lib/x.so', '/lib/x.so')
        """
        parent, _, name = os.path.abspath(path).rpartition("/")
        parent = os.path.realpath(parent)
        if self.is_ours or not f"{parent}/".startswith(f"{self.directory}/"):
            return path
        return f"{parent.removeprefix(self.directory)}/{name}"

    def real(self, path: str) -> str:
        """The absolute path inside of the root, without links and ``..``; errors as in :meth:`outside`."""
        if self.is_ours:
            return os.path.realpath(path)
        parts: list[str] = []
        coming, links = path.split("/")[::-1], 0
        while coming:
            part = coming.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del parts[-1:]
                continue
            parts.append(part)
            try:
                target = os.readlink("/".join([self.directory, *parts]))
            except OSError as error:
                if error.errno == errno.EINVAL:  # it is no link
                    continue
                raise
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            parts = [] if target.startswith("/") else parts[:-1]
            coming += target.split("/")[::-1]
        return "/" + "/".join(parts)

    def open(self, path: str) -> int:
        """A descriptor of the file, to be read; :class:`OSError` where there is none, or no regular one."""
        return open_regular(self.outside(path))

    def has_directory(self, path: str) -> bool:
        """Whether ``path`` is a directory ("": the current one).

        Of absolute paths that is found out once, as ld.so does; where a relative one leads may change.
        """
        known = self._directories.get(path)
        if known is None:
            try:
                known = stat.S_ISDIR(os.stat(self.outside(path or ".")).st_mode)
            except (OSError, ValueError):
                known = False
            if path.startswith("/"):
                self._directories[path] = known
        return known

    def identity(self, path: str) -> tuple[int, int]:
        """Device and inode of the file; :class:`OSError` where there is none."""
        status = os.stat(self.outside(path))
        return status.st_dev, status.st_ino
