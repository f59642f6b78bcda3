r"""``/proc/PID/maps``: which ranges of a process's memory are mapped, and from what.

Names come from the kernel as bytes.  It escapes only the newline, as ``\012`` (``seq_file_path``), so a
name that holds those four characters itself reads the same; and it appends `` (deleted)`` to the name
of a file that has been unlinked, so a file that is called so reads as deleted.  Both are the kernel's
ambiguity; :func:`as_named` settles them where the file is there to be asked.
Source: proc_pid_maps(5), ``fs/proc/task_mmu.c``.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Final

from miniloader.errors import EvidenceError
from miniloader.kernel.procfs import read_process_file
from miniloader.values import NamedTuple

__all__ = ["Vma", "as_named", "mappings_of", "parse_vma", "read_maps", "within"]

_DELETED = b" (deleted)"
_NEWLINE = rb"\012"
_REST = rb"[rwx-]{3}[sp] [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ [0-9]{1,20}(?:\s[^\n]*)?"


class Vma(NamedTuple):
    """One virtual memory area: a line of ``maps``.

    ``start`` and ``end`` are addresses (the end is exclusive), ``file_offset`` is in bytes;
    ``protection`` reads like ``r-x``; ``shared`` is MAP_SHARED, otherwise the area is private;
    ``device`` is (major, minor).  ``path`` is "" for anonymous memory, ``[heap]`` and the like for the
    kernel's own names, else the file's name (undecodable bytes as surrogates, as ``os.fsdecode`` does),
    without the `` (deleted)`` that ``deleted`` stands for.
    """

    start: int
    end: int
    protection: str
    shared: bool
    file_offset: int
    device: tuple[int, int]
    inode: int
    path: str
    deleted: bool

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.start

    @property
    def is_file(self) -> bool:
        """Whether a file is behind it (anonymous memory and the kernel's own areas have inode 0)."""
        return self.inode != 0

    def __contains__(self, address: int) -> bool:  # type: ignore[override]  # it is a range, not what it is of
        return self.start <= address < self.end


def parse_vma(line: bytes) -> Vma:
    """One line of ``maps`` (or one header of ``smaps``), without its newline.

    Raises EvidenceError for a line that is not one.
    """
    return _parsed([line])[0]


def _parsed(lines: Sequence[bytes]) -> list[Vma]:
    """What each of some lines says; one call for all, as there are a hundred in a small process."""
    vmas = list[Vma]()
    for line in lines:
        span, _, rest = line.partition(b" ")
        start, _, end = span.partition(b"-")
        try:
            vmas.append(_as_vma((int(start, 16), int(end, 16), *_rest(rest))))
        except ValueError:
            raise _no_line(line) from None
    return vmas


_as_vma: Final[Callable[[Iterable[object]], Vma]] = partial(tuple.__new__, Vma)  # Vma._make counts them, too


@lru_cache(maxsize=1)
def _behind() -> re.Pattern[bytes]:
    return re.compile(_REST)  # when it is needed: it takes as long as importing this module


@lru_cache(maxsize=4096)
def _rest(text: bytes) -> tuple[str, bool, int, tuple[int, int], int, str, bool]:
    """What a line says behind the addresses: of the same few files in processes of one program."""
    if not _behind().fullmatch(text):
        raise ValueError(text)
    access, offset, device, inode, *rest = text.split(None, 4)
    major, minor = (int(part, 16) for part in device.split(b":"))
    name = rest[0] if rest else b""
    path = os.fsdecode(name.removesuffix(_DELETED).replace(_NEWLINE, b"\n"))
    protection, shared = access[:3].decode(), access[3:] == b"s"
    return protection, shared, int(offset, 16), (major, minor), int(inode), path, name.endswith(_DELETED)


def read_maps(pid: int | None = None, *, start: int = 0, end: int = 1 << 64) -> tuple[Vma, ...]:
    """The mappings of process ``pid`` (None: this one) that overlap [``start``, ``end``), by address.

    The kernel gives a consistent answer for each few kilobytes of text, not for the whole of it: a
    process that maps meanwhile may be seen half before and half after.  Raises ProcessGone, or
    EvidenceError where it may not be read.
    """
    text = read_process_file(pid, "maps")
    lines = text.removesuffix(b"\n").split(b"\n")
    if start > 0 or end < 1 << 64:
        vmas = [vma for vma in _parsed(_near(lines, start, end)) if vma.start < end and start < vma.end]
    else:
        vmas = _parsed(lines)
    if _DELETED in text or _NEWLINE in text:
        vmas = [as_named(vma) if vma.deleted or "\n" in vma.path else vma for vma in vmas]
    return tuple(vmas)


def _near(lines: Sequence[bytes], start: int, end: int) -> Sequence[bytes]:
    """The ``lines``, which ascend, of what overlaps [``start``, ``end``), and maybe one before."""
    first = bisect_right(lines, start, key=_start) - 1
    return lines[max(first, 0) : bisect_left(lines, end, key=_start)]


def _start(line: bytes) -> int:
    """Where the mapping begins that is in a line."""
    try:
        return int(line.partition(b"-")[0], 16)
    except ValueError:
        raise _no_line(line) from None


def _no_line(line: bytes) -> EvidenceError:
    return EvidenceError(f"/proc/PID/maps: found {line!r}, expected a mapping")


def as_named(vma: Vma) -> Vma:
    """``vma`` with the name that its file really has, where the kernel's could be read in two ways."""
    if vma.deleted and _is_named(vma, vma.path + os.fsdecode(_DELETED)):
        return vma._replace(path=vma.path + os.fsdecode(_DELETED), deleted=False)
    if "\n" in vma.path and _is_named(vma, vma.path.replace("\n", r"\012")):
        return vma._replace(path=vma.path.replace("\n", r"\012"))
    return vma


def _is_named(vma: Vma, path: str) -> bool:
    """Whether the file called ``path`` is the one that is mapped."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) == (*vma.device, vma.inode)


def mappings_of(vmas: Iterable[Vma], path: str | os.PathLike[str]) -> tuple[Vma, ...]:
    """The mappings among ``vmas`` that the kernel names ``path``, in the order given; ``path`` is absolute.

    >>> [vma.path for vma in mappings_of(read_maps(), "[stack]")]
    ['[stack]']
    """
    name = os.fspath(path)
    return tuple(vma for vma in vmas if vma.path == name)


def within(vmas: Iterable[Vma], start: int, end: int) -> tuple[Vma, ...]:
    """The parts of ``vmas`` between the addresses ``start`` and ``end``.

    The kernel joins neighbours that are alike (the anonymous end of one library and the next one's memory),
    so an area may begin before a library or go on after it.
    """
    return tuple(
        vma._replace(
            start=max(vma.start, start),
            end=min(vma.end, end),
            file_offset=vma.file_offset + max(start - vma.start, 0) if vma.is_file else 0,
        )
        for vma in vmas
        if vma.start < end and start < vma.end
    )
