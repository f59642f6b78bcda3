"""The files behind the mappings of processes: found again, opened once, and told apart."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, TypeVar

from miniloader.elf import Source
from miniloader.elf.image import read_image
from miniloader.errors import ElfError, EvidenceError, MiniloaderError
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.mounts import ServedMounts, mount_of
from miniloader.kernel.open_files import most_open_files
from miniloader.kernel.procfs import process_file
from miniloader.kernel.query import query_vma
from miniloader.lab.audit.prepared_pages import PreparedPages
from miniloader.lab.audit.served_files import UNANSWERED, ServedFile
from miniloader.lab.workers.patient import Blocked, PatientProcess
from miniloader.values import NamedTuple

__all__ = ["Identity", "MappedFile", "MappedFiles", "facts_of", "identity_of"]

_TOP: Final = 1 << 63  # above is the kernel's half
_MAGIC: Final = b"\x7fELF"
_RAISE_LIMIT: Final = "raise the limit (ulimit -n)"
_KERNEL: Final = -1  # its name leads to the mapped file itself

_Answer = TypeVar("_Answer")


class Identity(NamedTuple):
    """What ``maps`` says a file is.  Two of these may be one file (overlayfs), a path may be several."""

    device: tuple[int, int]
    inode: int
    path: str
    deleted: bool


def identity_of(vma: Vma) -> Identity:
    """The identity of the file behind ``vma``."""
    return Identity(vma.device, vma.inode, vma.path, vma.deleted)


class MappedFile:
    """A file that is mapped somewhere: by process ``pid`` at ``vma``, where it was met first.

    ``build_id`` is the kernel's (in hexadecimal, None: none, or not known).  ``facts`` is None where the file
    itself cannot be read, for the reason ``trouble``.  Pickled is only where it was met, and its build-id.
    """

    def __init__(self, number: int, pid: int, vma: Vma, build_id: str | None = None) -> None:
        self.number, self.pid, self.vma = number, pid, vma
        self.identity = identity_of(vma)
        self.build_id = build_id
        self.facts: FileFacts | None = None
        self.trouble = ""

    def __reduce__(self) -> tuple[type[MappedFile], tuple[int, int, Vma, str | None]]:
        return MappedFile, (self.number, self.pid, self.vma, self.build_id)


class MappedFiles:
    """All the files of an audit: each is looked for once, however many processes have it mapped."""

    def __init__(self) -> None:
        self._files: dict[Identity, MappedFile] = {}
        self._openable: dict[int, int] = {}  # how many files more may be opened that a process has
        self._served: dict[int | None, ServedMounts] = {}
        self._reader = PatientProcess()
        self._names = NameNumbers()
        self.prepared = PreparedPages()

    def __iter__(self) -> Iterator[MappedFile]:
        return iter(self._files.values())

    def of(self, pid: int, vma: Vma) -> MappedFile:
        """The file behind a mapping of process ``pid``."""
        identity = identity_of(vma)
        file = self._files.get(identity)
        if file is None:
            file = self._files[identity] = MappedFile(len(self._files), pid, vma)
            self._look(file, pid, vma)
        elif file.facts is None:  # another process may offer a way to it
            self._open(file, pid, vma)
        return file

    def mappings_of(self, pid: int) -> tuple[tuple[Vma, ...], frozenset[int]]:
        """All mappings of process ``pid``, and which of them have pages relocated beforehand."""
        vmas = read_maps(pid)
        return self.prepared.in_place(pid, vmas[:-1] if vmas and vmas[-1].start >= _TOP else vmas)

    def same(self, file: MappedFile) -> MappedFile:
        """The file that a helper has met, as this process knows it."""
        counterpart = self._files.get(file.identity)
        if counterpart is None or (counterpart.facts is None and counterpart is not file):
            counterpart = self.of(file.pid, file.vma)
            counterpart.build_id = counterpart.build_id or file.build_id
        return counterpart

    def _look(self, file: MappedFile, pid: int, vma: Vma) -> None:
        """Open it; only of what cannot be opened is the kernel asked for the build-id: it reads, too."""
        self._open(file, pid, vma)
        if file.facts is not None or file.trouble == UNANSWERED:
            return
        with suppress(Blocked):
            file.build_id = self._ask(pid, vma, _kernels_build_id, pid, vma)
        if file.build_id is not None:
            self._open(file, pid, vma)

    def _ask(self, pid: int, vma: Vma, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        """What ``function`` returns, which has to do with the file of a mapping; Blocked by who serves it."""
        return self._reader.call(function, *arguments) if self._is_served(pid, vma) else function(*arguments)

    def _open(self, file: MappedFile, pid: int, vma: Vma) -> None:
        """Open the very file that is mapped, not one that has taken its name since."""
        if file.trouble == UNANSWERED:
            return
        if not self._may_open(pid):
            file.trouble = f"more files are mapped than may be open here; {_RAISE_LIMIT}"
            return
        file.trouble = UNANSWERED  # as it stays where this call never comes back
        by_kernel = process_file(pid, f"map_files/{vma.start:x}-{vma.end:x}")
        in_root = process_file(pid, "root") + vma.path
        is_served = self._is_served(pid, vma)
        for path, viewer in ((vma.path, None), (by_kernel, _KERNEL), (in_root, pid)):
            served = ServedFile(self._reader, path) if is_served else None
            try:
                source = Source.open(path) if served is None else served.source()
                facts = facts_of(source, self._names)
                is_mapped = viewer == _KERNEL or _is(source, facts, file, viewer)
            except (MiniloaderError, OSError):
                is_mapped = False
            if served is not None and served.silent:
                return
            if is_mapped:
                file.facts, file.trouble = facts, ""
                self._openable[pid] -= 1
                if file.build_id is None and facts.image is not None:
                    file.build_id = facts.image.build_id
                return
        with suppress(Blocked):
            file.trouble = self._ask(pid, vma, _trouble, file.identity, vma.path, in_root)

    def _is_served(self, pid: int, vma: Vma) -> bool:
        """Whether a server is asked for the file, whose answer may never come."""
        for viewer in (None, pid):
            if viewer not in self._served:
                self._served[viewer] = ServedMounts(viewer)
        return any(self._served[viewer].have(vma.path, vma.device) for viewer in (None, pid))

    def _may_open(self, pid: int) -> bool:
        """Whether a process has not had its share: half of what was left when its first file was met.

        However many files it has mapped, those of the others can be opened.
        """
        if pid not in self._openable:
            self._openable[pid] = (most_open_files() - len(os.listdir("/proc/self/fd"))) // 2
        return self._openable[pid] > 0


def _trouble(mapped: Identity, *paths: str) -> str:
    """Why the file that is mapped cannot be read under any of these names of it."""
    for path in paths if not mapped.deleted else ():
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_ino == mapped.inode and not os.access(path, os.R_OK):
            mode, owner = stat.S_IMODE(status.st_mode), status.st_uid
            return f"this user may not read the file (mode {mode:04o}, owner {owner})"
    try:
        os.stat(mapped.path)
    except PermissionError:
        return f"this user may not search the directories of the file {mapped.path}"
    except OSError:
        state = "deleted or replaced" if mapped.deleted else "not to be found"
    else:
        state = "deleted or replaced"
    return f"the file is {state}, and only CAP_SYS_ADMIN may read it through /proc/PID/map_files"


def _kernels_build_id(pid: int, vma: Vma) -> str | None:
    """The build-id that the kernel tells of the file of a mapping, in hexadecimal."""
    try:
        answer = query_vma(pid, vma.start)
    except EvidenceError:  # PROCMAP_QUERY is from 6.11 on
        return None
    if answer is None or not answer.build_id or identity_of(answer.vma) != identity_of(vma):
        return None
    return answer.build_id.hex()


def facts_of(source: Source, names: NameNumbers) -> FileFacts:
    """What the file says: no image where it cannot be read."""
    image = None
    with suppress(ElfError):
        if bytes(source.read(0, min(4, source.size), "magic")) == _MAGIC:
            image = read_image(source)
    return FileFacts(source, image, names)


def _is(source: Source, facts: FileFacts, file: MappedFile, pid: int | None) -> bool:
    """Whether the file that ``pid`` calls so is the mapped one.

    By device and inode; where maps tells another device (overlayfs, btrfs) by the kernel's build-id, and
    before 6.11 by the inode below.
    """
    number, inode = source.identity
    device, mapped = (os.major(number), os.minor(number)), file.identity
    if (device, inode) == (mapped.device, mapped.inode):
        return not mapped.deleted or source.calls.fstat(source.fd).st_nlink > 0
    if mapped.deleted:
        return False
    if file.build_id is not None:
        return facts.image is not None and facts.image.build_id == file.build_id
    return inode == mapped.inode and _is_below(mapped, device, pid)


def _is_below(mapped: Identity, device: tuple[int, int], pid: int | None) -> bool:
    """Whether maps tells the device below the one that stat(2) tells, and the inode is that of both.

    An overlay gives its own device, and the inode of the file below where all its layers are on one file
    system (Documentation/filesystems/overlayfs.rst, "Inode properties"); btrfs has a device a subvolume.
    """
    try:
        mount = mount_of(pid, mapped.path)
    except EvidenceError:
        return False
    if mount is None:
        return False
    return (mount.kind == "overlay" and mount.device == device) or (
        mount.kind == "btrfs" and mount.device == mapped.device
    )
