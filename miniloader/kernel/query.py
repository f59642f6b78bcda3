"""``PROCMAP_QUERY`` (6.11): one mapping of a process, by address, with its file's build-id.

The build-id tells files apart where device and inode do not (overlayfs, bind mounts, btrfs).  Source:
``include/uapi/linux/fs.h``, ``struct procmap_query``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.files import open_regular
from miniloader.kernel import syscalls
from miniloader.kernel.maps import Vma, as_named
from miniloader.kernel.pagemap import FILE, PRESENT, PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.procfs import NO_MEMORY, open_process_file, process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["MappedVma", "query_vma"]


class _Query(ctypes.Structure):
    """``struct procmap_query``."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in (
            "size", "query_flags", "query_addr", "vma_start", "vma_end", "vma_flags",
            "vma_page_size", "vma_offset", "inode",
        )),
        *((name, ctypes.c_uint32) for name in ("dev_major", "dev_minor", "vma_name_size", "build_id_size")),
        *((name, ctypes.c_uint64) for name in ("vma_name_addr", "build_id_addr")),
    )  # fmt: skip


_READABLE, _WRITABLE, _EXECUTABLE, _SHARED = 1, 2, 4, 8
# _IOWR('f', 17, struct procmap_query)
_PROCMAP_QUERY: Final = 3 << 30 | ctypes.sizeof(_Query) << 16 | ord("f") << 8 | 17
_NAME_SIZE: Final = 4096  # PATH_MAX
_BUILD_ID_SIZE: Final = 20  # BUILD_ID_SIZE_MAX
_DELETED: Final = b" (deleted)"
_MOST_NOTES: Final = 1 << 16  # bytes
_MOST_HEADERS: Final = 256  # of segments: more the kernel does not look at (lib/buildid.c)
_PT_NOTE: Final = 4
#: By whether the file is one of 64 bits: e_phoff, e_phentsize, e_phnum; p_type, p_filesz.
_HEADERS: Final = (struct.Struct("=28xI10xHH"), struct.Struct("=32xQ14xHH"))
_NOTE: Final = (struct.Struct("=I12xI"), struct.Struct("=I28xQ"))


@dataclass(frozen=True)
class MappedVma:
    """A mapping, the size of its pages in bytes, and the build-id of its file (None: it has none)."""

    vma: Vma
    page_size: int
    build_id: bytes | None


def query_vma(pid: int | None, address: int) -> MappedVma | None:
    """The mapping of process ``pid`` (None: this one) that holds ``address``, or None.

    For the build-id the kernel reads all notes of the file, however long this says that they are, and nothing
    ends that.  It is asked for only where the mapping begins with the file's own header, which shows that
    they are short; else it is None.  Raises EvidenceError where the kernel does not have it or the process
    may not be read, ProcessGone.
    """
    fd = open_process_file(pid, "maps")
    try:
        found = _asked(fd, pid, address, with_build_id=False)
        if found is None or not found.vma.is_file or not _has_few_notes(pid, found.vma):
            return found
        return _asked(fd, pid, address, with_build_id=True)
    finally:
        os.close(fd)


def _asked(fd: int, pid: int | None, address: int, *, with_build_id: bool) -> MappedVma | None:
    """What the kernel answers, by the descriptor ``fd`` of the process's ``maps``."""
    name = ctypes.create_string_buffer(_NAME_SIZE)
    build_id = ctypes.create_string_buffer(_BUILD_ID_SIZE)
    query = _Query(
        size=ctypes.sizeof(_Query),
        query_addr=address,
        vma_name_size=len(name),
        vma_name_addr=ctypes.addressof(name),
        build_id_size=len(build_id) if with_build_id else 0,
        build_id_addr=ctypes.addressof(build_id) if with_build_id else 0,
    )
    try:
        syscalls.ioctl(fd, _PROCMAP_QUERY, ctypes.addressof(query))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise _refused(pid, error) from error
    path = name.value
    return MappedVma(
        vma=as_named(
            Vma(
                start=query.vma_start,
                end=query.vma_end,
                protection="".join(
                    letter if query.vma_flags & bit else "-"
                    for letter, bit in (("r", _READABLE), ("w", _WRITABLE), ("x", _EXECUTABLE))
                ),
                shared=bool(query.vma_flags & _SHARED),
                file_offset=query.vma_offset,
                device=(query.dev_major, query.dev_minor),
                inode=query.inode,
                path=os.fsdecode(path.removesuffix(_DELETED)),
                deleted=path.endswith(_DELETED),
            )
        ),
        page_size=query.vma_page_size,
        build_id=build_id.raw[: query.build_id_size] if query.build_id_size else None,
    )


def _head(pid: int | None, vma: Vma) -> bytes:
    """The first page of the file of ``vma``, which begins with it; empty where nobody knows what is in it.

    From the file itself, or else from the process's memory, where it has neither changed the page nor would
    have to bring it in.
    """
    for path in (process_file(pid, f"map_files/{vma.start:x}-{vma.end:x}"), vma.path):
        try:
            fd = open_regular(path)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            device = os.major(status.st_dev), os.minor(status.st_dev)
            if (device, status.st_ino) == (vma.device, vma.inode):
                return os.pread(fd, PAGE_SIZE, 0)
        except OSError:  # what is in memory may be read all the same
            continue
        finally:
            os.close(fd)
    with PageMap(pid) as pagemap, ProcessMemory(pid) as memory:
        (entry,) = pagemap.read(vma.start, vma.start + PAGE_SIZE).tolist()
        return memory.read(vma.start, PAGE_SIZE) if entry & int(PRESENT) and entry & int(FILE) else b""


def _has_few_notes(pid: int | None, vma: Vma) -> bool:
    """Whether the header of the file of ``vma``, which begins with it, tells of few notes; or is none."""
    page = _head(pid, vma) if not vma.file_offset else b""
    if page[:4] != b"\x7fELF":
        return bool(page)
    wide = page[4] == 2  # ELFCLASS64
    headers, size, count = _HEADERS[wide].unpack_from(page)
    sizes = 0
    for start in range(headers, headers + min(count, _MOST_HEADERS) * size, size or 1):
        if size < _NOTE[wide].size or start + size > len(page):
            return False
        kind, length = _NOTE[wide].unpack_from(page, start)
        sizes += length if kind == _PT_NOTE else 0
    return sizes <= _MOST_NOTES


def _refused(pid: int | None, error: OSError) -> EvidenceError:
    if error.errno == errno.ESRCH:
        return ProcessGone(pid, NO_MEMORY)
    if error.errno == errno.ENOTTY:
        return EvidenceError("PROCMAP_QUERY: this kernel does not have it", hint="it came with Linux 6.11")
    return EvidenceError(f"PROCMAP_QUERY: {error.strerror}")
